"""BatchNorm(momentum=None): captured in one graph, packed as with a number, and PyTorch's running statistics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import SmallNet, small_batch, step_gradients
from torch import nn
from torch._dynamo.utils import counters

import fqt_compile
from fqt_compile.capturable import CumulativeBatchNorm2d
from fqt_compile.errors import ConfigError, FQTWarning


def assert_same_statistics(got: SmallNet, wanted: SmallNet) -> None:
    for name in ("norm1", "norm2"):
        torch.testing.assert_close(getattr(got, name).state_dict(), getattr(wanted, name).state_dict())


def test_cumulative_average_in_one_graph():
    """The same layers are packed as with a number, with the same gradients, and the statistics are PyTorch's."""
    number = SmallNet(norm=True)
    model = copy.deepcopy(number)
    model.norm1.momentum = model.norm2.momentum = None
    plain = copy.deepcopy(model)
    assert fqt_compile.capturable(model) is model
    compiled, with_number = (
        torch.compile(m, backend="fqt1bit", options={"lowering": "eager"}) for m in (model, number)
    )
    copied = fqt_compile.eager(plain)
    counters.clear()
    for seed in range(2):
        x, y = small_batch()
        step = step_gradients(compiled, x, y, seed)
        torch.testing.assert_close(step, step_gradients(with_number, x, y, seed), rtol=0, atol=0)
        if seed == 0:
            with pytest.warns(FQTWarning, match=r"breaks the graph at BatchNorm2d\(momentum=None\).*capturable"):
                other = step_gradients(copied, x, y, seed)
        else:
            other = step_gradients(copied, x, y, seed)
        assert other[0] == pytest.approx(step[0], rel=1e-6)
    assert not counters["graph_break"]
    assert [site.decision for site in copied._fqt_plan].count("packed") == 3
    assert type(copied.norm1) is nn.BatchNorm2d
    assert_same_statistics(compiled, copied)
    assert counters["stats"]["unique_graphs"] == 3  # the two compiled models and eager FQT's capture
    fqt_compile.recalibrate(compiled, [x])
    fqt_compile.recalibrate(with_number, [x])
    assert_same_statistics(compiled, with_number)
    assert counters["stats"]["unique_graphs"] == 3


def test_capturable_changes_nothing_else():
    layers = [nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4), nn.SyncBatchNorm(4, momentum=None)]
    model = fqt_compile.capturable(nn.Sequential(*layers))
    assert [type(layer) for layer in model] == [CumulativeBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm]
    fresh = pickle.dumps(copy.deepcopy(model))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer, plain = pickle.loads(fresh)[0].to(dtype), nn.BatchNorm2d(4, momentum=None, dtype=dtype)
        for scale in (1, 2, 3):
            x = (torch.randn(8, 4, 3, 3) * scale + scale).to(dtype)
            assert torch.equal(layer(x), plain(x))
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_capturable_in_eval_mode_needs_no_warning():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=None), nn.Conv2d(8, 8, 1)).eval()
    with pytest.warns(FQTWarning, match="no convolution or linear layer") as caught:
        fqt_compile.explain(model, torch.randn(2, 3, 4, 4))
    assert not any("momentum" in str(warning.message) for warning in caught)


def test_bad_model():
    with pytest.raises(ConfigError, match="model: got int"):
        fqt_compile.capturable(3)
