"""Row compaction: the backward below the cut on the kept rows only, and no number changed."""

from __future__ import annotations

import re

import pytest
import torch
from support import sample
from support.graphs import BATCH, captured, captured_once, images, operations, refusals
from support.nets import PreActivation, SmallNet, small_batch
from support.steps import assert_same_step
from torch import nn

from fqt_compile.models import small_vgg


def test_below_the_cut_no_float_tensor_has_the_whole_batch():
    graph = captured_once("vgg")
    lines = graph.stages["layout"].splitlines()
    below = lines[next(i for i, line in enumerate(lines) if "fqt.keep_rows" in line) :]
    whole = [line for line in below if re.match(rf"\w+: (float32|int32|int16|bool)\[{BATCH}, \d+, \d+, \d+\]", line)]
    assert whole == []
    after = operations(graph.stages["layout"])
    assert after["fqt.scatter_rows"] == after["fqt.prune_rows"] == after["aten.scatter_add"] == 0
    assert after["fqt.max_pool_gradient"] == 2
    assert graph.compacted > 10
    assert refusals(graph, "compact") == []


def test_forward_values_are_computed_again_from_bits_and_masks_of_junctions_are_bits():
    graph = captured_once("skips")
    after = operations(graph.stages["compact"])
    assert after["fqt.output_product"] == 3 + 2  # two BatchNorms read their input again
    assert after["aten.convolution"] == 2 + 1  # the stem again, for its ReLU
    assert after["fqt.pack_bool"] == 1  # the ReLU behind the last addition; the others have a short history


class Mixing(nn.Module):
    """Between two packed layers an operator that mixes the rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.third(x + torch.flip(x, [0]))))


def test_an_operator_that_mixes_rows_keeps_full_rows_and_is_named():
    graph = captured(Mixing(), torch.randn(BATCH, 64))
    (reason,) = refusals(graph, "compact")
    assert "rev" in reason  # what flip became
    assert operations(graph.stages["compact"])["fqt.scatter_rows"] == 1
    torch.manual_seed(1)
    assert_same_step(Mixing(), torch.randn(BATCH, 64), torch.arange(BATCH))


NETS = {"pre-activation": PreActivation, "vgg": lambda: small_vgg(10), "skips": lambda: SmallNet(norm=True)}


@pytest.mark.parametrize("net", NETS)
def test_compaction_and_fusion_equal_eager_fqt(net):
    torch.manual_seed(3)
    x, y = small_batch(BATCH, 8)
    assert_same_step(NETS[net](), x, y, tolerance=2e-3, inductor=sample.one_in(4, f"inductor {net}"))


WHOLE = [{"keep": 1}, {"scope": "layer"}, {"prune": "bernoulli"}]


@pytest.mark.rotates(4)
@pytest.mark.parametrize(("net", "options"), [(net, o) for net in NETS for o in sample.some(net, WHOLE)], ids=str)
def test_fusion_without_compaction_equals_eager_fqt(net, options):
    torch.manual_seed(3)
    x, y = small_batch(BATCH, 8)
    assert_same_step(NETS[net](), x, y, tolerance=2e-3, **options)


def test_bernoulli_is_not_compacted():
    graph = captured(SmallNet(), images(8), prune="bernoulli")
    assert graph.compacted == 0
    assert refusals(graph, "compact") == ["prune='bernoulli' keeps a random number of rows"]
    assert operations(graph.stages["layout"])["fqt.prune_rows"] == 1
