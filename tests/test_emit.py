"""Adding nodes: what is known of equal operands is what would be computed for them."""

from __future__ import annotations

import collections

import pytest
import torch
import torchvision
from support.graphs import captured
from support.nets import SmallNet
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fqt_compile.models import small_vgg
from fqt_compile.passes import emit
from fqt_compile.passes.graph import Replacements, value

NETS = {
    "vgg": (lambda: small_vgg(10), (4, 3, 16, 16)),
    "skips": (lambda: SmallNet(norm=True), (4, 3, 8, 8)),
    "vit": (
        lambda: torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        ),
        (4, 3, 16, 16),
    ),
}


def described(fake: torch.Tensor) -> tuple[object, ...]:
    return tuple(fake.shape), fake.stride(), fake.storage_offset(), fake.dtype, fake.device


def storage(fake: torch.Tensor) -> int:
    return fake.untyped_storage()._cdata


def test_views_of_one_shape_at_two_places_of_a_memory():
    """Chunks of one projection: what is known of the first holds for the second but for the place."""
    with FakeTensorMode() as mode:
        x = torch.randn(4, 2, 6)
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    output = graph.output(node)
    at = emit.Emitter(graph, "test", emit.Known(mode)).at(output, "step")
    aten = torch.ops.aten
    for start in (0, 2, 4, 2):
        chunk = at.call("chunk", aten.slice.Tensor, node, 2, start, start + 2)
        turned = value(at.call("turned", aten.permute.default, chunk, [1, 0, 2]))
        assert (value(chunk).storage_offset(), turned.storage_offset()) == (start, start)
        assert storage(turned) == storage(x)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("net", NETS)
def test_known_results_are_what_would_be_computed(net, monkeypatch):
    again, seen, used = emit.Insertion._again, collections.Counter(), set()

    def compared(self, node, result):
        made = again(self, node, result)
        for mine, computed in zip(tree_leaves(made), tree_leaves(self._computed(node)), strict=True):
            assert described(mine) == described(computed), node.format_node()
            is_view = storage(computed) == storage(value(node.all_input_nodes[0])) if node.all_input_nodes else False
            seen["views" if is_view else "others"] += 1
            if is_view:
                assert storage(mine) == storage(computed), node.format_node()
            else:
                assert storage(mine) not in used, node.format_node()
                used.add(storage(mine))
        kept.append(made)  # an address is not given to another
        return made

    kept: list[object] = []
    monkeypatch.setattr(emit.Insertion, "_again", compared)
    build, shape = NETS[net]
    captured(build(), torch.randn(shape))
    assert seen["others"] > 50
    assert seen["views"] > 5


def test_the_output_reads_what_is_new_and_what_that_was_replaced_by():
    graph = fx.Graph()
    x = graph.placeholder("x")
    old, new, newer = (graph.call_function(torch.relu, (x,)) for _ in range(3))
    user = graph.call_function(torch.neg, (old,))
    output = graph.output((old, [user, x]))
    replacements = Replacements(graph)
    replacements.replace(old, new)
    assert user.args == (new,)
    replacements.replace(new, newer)
    assert (user.args, output.args) == ((newer,), ((old, [user, x]),))
    replacements.finish()
    assert output.args == ((newer, [user, x]),)
    assert not old.users
    assert not new.users
