"""The definition: algebra against plain float layers, unbiasedness and variance with standard errors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from fqt_compile.kernels import noise, packing, reference, selection


def keys(n: int) -> tuple[int, int]:
    return noise.stream_keys(n, 3)


def assert_mean(draws: torch.Tensor, expected: torch.Tensor, variance: torch.Tensor, errors: float = 6.0) -> None:
    """The mean over axis 0 is ``expected`` within ``errors`` standard errors, from the known variance of one draw.

    Nearly certain outcomes are not normal: one event more or less than expected is always allowed for.
    """
    count = draws.shape[0]
    tolerance = errors * (variance.double() / count).sqrt() + 6 / count * draws.double().abs().amax(0) * (variance > 0)
    error = (draws.double().mean(0) - expected.double()).abs()
    assert bool((error <= tolerance + 1e-5 * (1 + expected.abs())).all()), (error / tolerance).max()


def test_lane_sum_is_a_sum_in_lane_order():
    x = torch.randn(3, 200)
    assert torch.allclose(reference.lane_sum(x), x.sum(1), atol=1e-4)
    big = torch.zeros(1, 128)
    big[0, 0], big[0, 64], big[0, 1] = 1e8, -1e8, 1.0  # lanes 0 and 0, then lane 1: nothing is lost
    assert reference.lane_sum(big).item() == 1.0
    assert reference.lane_sum(torch.zeros(2, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("code", ["sign", "threshold"])
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (1, 1)), ((2, 1), (0, 3)), ((3, 2), (2, 0))])
def test_products_are_the_convolution_and_its_gradients(code, stride, padding):
    x = torch.randn(3, 5, 7, 6)
    w = torch.randn(4, 5, 3, 2)
    t = reference.activation_threshold(x, "sample") if code == "threshold" else None
    values = reference.code_values(reference.activation_bits(x, t), code).requires_grad_()
    sign = reference.code_values(reference.weight_bits(w), "sign").requires_grad_()
    y = F.conv2d(values, sign, stride=stride, padding=padding)
    assert torch.equal(reference.output_product(values, sign, stride, padding).float(), y)
    codes = torch.randint(0, 16, y.shape)
    gx, gw = torch.autograd.grad(y, (values, sign), codes.float())
    acc, weight_sum = reference.grad_input_product(codes, sign.detach(), x.shape[2:], stride, padding)
    assert torch.equal(acc.float(), gx)
    ones = F.conv2d(values, sign, stride=stride, padding=padding)
    (gx_ones,) = torch.autograd.grad(ones, values, torch.ones_like(ones))
    assert torch.equal(weight_sum.float(), gx_ones[:1])
    acc, code_sum = reference.grad_weight_product(codes, values.detach(), w.shape[2:], stride, padding)
    assert torch.equal(acc.float(), gw)
    ones = F.conv2d(values, sign, stride=stride, padding=padding)
    (gw_ones,) = torch.autograd.grad(ones, sign, torch.ones_like(ones))
    assert torch.equal(code_sum.float(), gw_ones[:1])


def test_dequantized_gradients_equal_float_gradients_of_the_dequantized_codes():
    """s acc + z sum is the float product with q s + z: the algebra of docs/math.md 6, borders included."""
    g, w = torch.randn(4, 6, 5, 5), torch.randn(6, 3, 3, 3)
    sign = reference.code_values(reference.weight_bits(w), "sign")
    rows = torch.tensor([0, 2], dtype=torch.int32)
    codes, s, z = reference.quantize_rows(g, None, rows, None, keys(1), 4)
    acc, weight_sum = reference.grad_input_product(codes, sign, (5, 5), (1, 1), (1, 1))
    mask = torch.ones(4, 3, 5, 5, dtype=torch.bool)
    grad = reference.dequantize_grad_input(acc, weight_sum, s, z, rows, mask)
    dequantized = torch.zeros_like(g)
    dequantized[[0, 2]] = codes * s.view(-1, 1, 1, 1) + z.view(-1, 1, 1, 1)
    expected = torch.nn.grad.conv2d_input(grad.shape, sign, dequantized, padding=1)
    assert torch.allclose(grad, expected, atol=1e-4)
    assert bool((grad[[1, 3]] == 0).all())


def dequantized(v, bits, grid, number=1):
    """Codes, values and groups of the rows of v."""
    codes, groups, _ = reference.quantize_groups(
        v, torch.arange(v.numel()).view(v.shape), keys(number), bits, None, grid
    )
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 1 << bits
    return codes, (codes - groups.level[:, None]) * groups.scale[:, None] + groups.center[:, None], groups


@pytest.mark.rotates(2)
@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_quantizer_is_unbiased_and_bounded(bits, grid):
    """Rows of both signs, lopsided ones (a small end would be clamped to a level of 0), and of one sign."""
    v = torch.randn(5, 24)
    v = torch.stack([v[0], 100 * v[1], torch.where(v[2] > 0, v[2], 0.01 * v[2]), v[3].abs() + 2, -v[4].abs()])
    draws = [dequantized(v, bits, grid, n) for n in range(800)]
    stacked, groups = torch.stack([values for _, values, _ in draws]), draws[0][2]
    step = groups.scale[:, None].double()
    position = ((v - groups.center[:, None]) / step).double()
    fraction = position - position.floor()
    assert_mean(stacked / step, v / step, fraction * (1 - fraction) + 1e-9)
    variance = stacked.double().var(0) / step**2
    assert float(variance.max()) < 0.25 * (1 + 6 * math.sqrt(2 / 800))  # stochastic rounding: at most step^2 / 4


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_exact_zero_is_exact(bits):
    """Whatever the noise, in groups of both signs and of one: no error where the gradient is 0."""
    v = torch.randn(6, 500)
    v = torch.cat([v, v.abs(), -v.abs()])
    v[:, ::3] = 0
    for n in range(4):
        assert bool((dequantized(v, bits, True, n)[1][:, ::3] == 0).all())
    codes, s, z = reference.quantize_rows(v, None, torch.arange(18, dtype=torch.int32), torch.rand(18), keys(1), bits)
    assert bool((codes * s[:, None] + z[:, None])[:, ::3].eq(0).all())


def test_quantizer_edge_cases():
    constant = dequantized(torch.full((1, 5), 3.0), 4, True)
    assert constant[0].tolist() == [[15] * 5]  # 0 is a code, too
    assert constant[1].tolist() == [[pytest.approx(3.0)] * 5]
    assert dequantized(torch.full((1, 5), 3.0), 4, False)[1].tolist() == [[3.0] * 5]
    one = torch.zeros(1, 9)
    one[0, 4] = -2.0
    assert torch.allclose(dequantized(one, 4, True)[1], one)
    assert bool((dequantized(one, 1, True)[1] == one).all())  # one sign: one bit has room for zero
    both = dequantized(torch.tensor([[-1.0, 0.0, 3.0]]), 1, True)
    assert both[1][0, 0] == -1.0
    assert both[1][0, 2] == 3.0
    zero = dequantized(torch.tensor([[-0.0, 0.0]]), 4, True)
    assert [math.copysign(1, x) for x in zero[1][0].tolist()] == [1.0, 1.0]
    for bad in (math.nan, math.inf, -math.inf):
        codes, values, groups = dequantized(torch.tensor([[1.0, bad, 0.0]]), 4, True)
        assert codes.tolist() == [[0, 0, 0]]
        assert math.isnan(groups.scale.item())
        assert not torch.isfinite(values).any()
    tiny = dequantized(torch.tensor([[1e-42, 0.0, -1e-43]]), 4, True)
    assert tiny[1].tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("chosen", [None, [0, 2]])
def test_sums_of_channels_are_exact_and_unbiased(chosen):
    """sum (s q + z') = sum v / p of every channel in every draw, and E (s q + z') = v / p element by element."""
    g = torch.randn(6, 3, 5, 4)
    g[g.abs() < 0.3] = 0
    g *= torch.tensor([1.0, 30.0, 0.1]).view(1, 3, 1, 1)
    rows, row_scale = torch.tensor([1, 3, 4, -1], dtype=torch.int32), torch.tensor([1.0, 2.5, 1.5, 0.0])
    channels = None if chosen is None else torch.tensor([*chosen, -1], dtype=torch.int32)
    factor = None if chosen is None else torch.tensor([2.0, 3.0, 0.0])
    wanted = g[[1, 3, 4]] * row_scale[:3].view(-1, 1, 1, 1)
    if chosen is not None:
        wanted = wanted[:, chosen] * factor[:2].view(1, -1, 1, 1)
    draws, scales = [], None
    for n in range(600):
        codes, s, z = reference.quantize_channels(g, rows, row_scale, channels, factor, keys(n), 4)
        width = wanted.shape[1]
        values = codes[:3, :width] * s[:width].view(1, -1, 1, 1) + z[:width].view(1, -1, 1, 1)
        total, exact = values.double().sum((0, 2, 3)), wanted.double().sum((0, 2, 3))
        assert torch.allclose(total, exact, rtol=0, atol=1e-5 * float(wanted.abs().sum())), n
        draws.append(values)
        scales = s[:width].view(1, -1, 1, 1)
    assert_mean(torch.stack(draws) / scales, wanted / scales, torch.full_like(wanted, 0.26))


def test_batch_norm_gradient_with_all_rows_is_the_exact_one():
    for shape in ((6, 5), (6, 5, 4), (6, 5, 4, 3)):
        x, g = (torch.randn(shape, dtype=torch.float64).float() for _ in range(2))
        weight, bias = torch.rand(5) + 0.5, torch.randn(5)
        _, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-3)
        args = (g, x, weight, None, None, mean, invstd, True, 1e-3, [True, True, True])
        exact = torch.ops.aten.native_batch_norm_backward(*args)
        ours = reference.batch_norm_gradient(g, x, weight, mean, invstd, 1e-3)
        for a, b in zip(ours, exact, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batch_norm_gradient_is_orthogonal_on_the_kept_rows():
    """To 1 and to the input, per channel: what the exact gradient is on all rows. Unused rows change nothing."""
    x, g = torch.randn(4, 5, 3, 3) * 3 + 1, torch.randn(4, 5, 3, 3)
    mean, invstd = torch.randn(5) * 0.1, torch.rand(5) + 0.5
    grad, grad_weight, grad_bias = reference.batch_norm_gradient(g, x, None, mean, invstd, 0.0)
    assert float(grad.sum((0, 2, 3)).abs().max()) < 1e-4
    assert float((grad * x).sum((0, 2, 3)).abs().max()) < 1e-3
    assert torch.allclose(grad_bias, g.sum((0, 2, 3)), atol=1e-5)
    xhat = (x - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
    assert torch.allclose(grad_weight, (g * xhat).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    used = torch.tensor([True, True, False, True, True, False])
    padded = [torch.zeros(6, 5, 3, 3).index_copy(0, used.nonzero()[:, 0], t) for t in (g, x)]
    masked = reference.batch_norm_gradient(*padded, None, mean, invstd, 0.0, used)
    assert torch.allclose(masked[0][used], grad, atol=1e-5)
    assert bool((masked[0][~used] == 0).all())
    for a, b in zip(masked[1:], (grad_weight, grad_bias), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_batch_norm_gradient_edge_cases():
    mean, invstd = torch.zeros(3), torch.ones(3)
    one = reference.batch_norm_gradient(torch.randn(1, 3), torch.randn(1, 3), None, mean, invstd, 1e-5)
    assert bool((one[0] == 0).all())
    constant = torch.full((4, 3, 2, 2), 100.0)
    g = torch.randn(4, 3, 2, 2)
    grad = reference.batch_norm_gradient(g, constant, None, mean, invstd, 1e-5)[0]
    assert torch.allclose(grad, g - g.mean((0, 2, 3), keepdim=True), atol=1e-5)
    none = reference.batch_norm_gradient(g, constant, None, mean, invstd, 1e-5, torch.zeros(4, dtype=torch.bool))
    assert all(bool((t == 0).all()) for t in none)


def test_thresholds_from_batch_norm_are_means_of_rectified_normal_values():
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, -1.0, 2.0, -1.0, -9.0])
    z = torch.randn(200_000, 6, dtype=torch.float64) * weight.abs() + bias
    for top in (math.inf, 1.5):
        t = reference.batch_norm_threshold(weight, bias, 6, 1, top, 1)
        sample = z.clamp(0, top)
        error = sample.std(0) / math.sqrt(len(sample)) + 1e-6
        assert bool(((t[0] - sample.mean(0)).abs() < 5 * error).all()), (t, sample.mean(0))
    assert torch.equal(
        reference.batch_norm_threshold(None, None, 2, 1, math.inf, 3),
        torch.full((1, 6), 1 / math.sqrt(2 * math.pi), dtype=torch.float64).float(),
    )
    pooled = reference.batch_norm_threshold(None, torch.tensor([0.0, 40.0]), 2, 4, math.inf, 1)[0]
    assert float(pooled[0]) == pytest.approx(2.2 / math.sqrt(2 * math.pi), rel=0.03)
    assert float(pooled[1]) == pytest.approx(40, rel=0.03)


def test_the_threshold_of_a_sample_depends_on_it_alone():
    x = torch.randn(5, 7, 40, 33).relu()
    together = reference.activation_threshold(x, "sample")
    assert together.shape == (5, 1)
    for n in range(5):
        assert torch.equal(reference.activation_threshold(x[n : n + 1], "sample"), together[n : n + 1])
    assert torch.allclose(together[:, 0], x.flatten(1).mean(1), rtol=1e-5)
    assert reference.activation_threshold(x, "batch").shape == ()


@pytest.mark.parametrize("prune", ["systematic", "bernoulli"])
@pytest.mark.parametrize("kind", ["norm", "range", "uniform"])
def test_pruning_is_unbiased(prune, kind):
    """E[kept row / p] = row, for rows of very different size; a capped row is always kept."""
    g = torch.randn(12, 6) * torch.logspace(-0.6, 0.8, 12)[:, None]
    importance = reference.importance(g, kind)
    p = torch.tensor(selection.inclusion_probabilities(importance.tolist(), 4), dtype=torch.float64)[:, None]
    assert kind == "uniform" or float(p.max()) == 1.0
    draws = []
    for n in range(1500):
        rows, scale = selection.select(importance, keys(n), prune, Fraction(1, 3))
        valid = rows >= 0
        if prune == "systematic":
            assert rows.tolist() == sorted(set(rows.tolist()))
            assert len(rows) == 4
        full = torch.zeros_like(g)
        full[rows[valid].long()] = reference.kept_gradient(g, rows, scale)
        draws.append(full)
    assert_mean(torch.stack(draws), g, g.double() ** 2 * (1 - p) / p)


def test_topk_is_the_largest_rows_without_rescaling():
    importance = torch.tensor([1.0, 5.0, 3.0, 5.0])
    rows, scale = selection.select(importance, keys(1), "topk", Fraction(1, 2))
    assert rows.tolist() == [1, 3]
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_water_filling_sums_to_the_count(count):
    importance = [0.0, 1e-6, 1.0, 2.0, 50.0, 1000.0, 1000.0, float("inf")]
    p = selection.inclusion_probabilities(importance, count)
    assert all(0 <= q <= 1 for q in p)
    assert sum(p) == pytest.approx(count)
    assert p == sorted(p)


def test_zero_gradients_keep_count_rows_and_stay_zero():
    rows, scale = selection.select(torch.zeros(8), keys(1), "systematic", Fraction(1, 4))
    assert len(rows) == 2
    assert scale.tolist() == [4.0, 4.0]


def test_non_finite_rows_are_kept_first():
    importance = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    for n in range(20):
        rows, _ = selection.select(importance, keys(n), "systematic", Fraction(1, 4))
        assert rows.tolist() == [1]


def test_weight_gradient_is_the_gradient_of_alpha_sign():
    """Through alpha = mean |W| and the straight-through sign, against autograd on the same expression."""
    w = (torch.randn(4, 3, 3, 3) * 0.8).requires_grad_()
    grad_hat = torch.randn(4, 3, 3, 3)

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            return torch.where(v < 0, -1.0, 1.0)

        @staticmethod
        def backward(ctx, g):
            (v,) = ctx.saved_tensors
            return g * (v.abs() <= 1)

    alpha = w.abs().mean((1, 2, 3), keepdim=True)
    (alpha * Sign.apply(w)).backward(grad_hat)
    scale = reference.weight_scale(w.detach(), "xnor")
    got = reference.weight_gradient(grad_hat, w.detach(), scale, "xnor")
    assert torch.allclose(got, w.grad, atol=1e-5)


def test_codes_and_masks():
    x = torch.tensor([[-2.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5]])
    assert reference.activation_bits(x, None).tolist() == [[False, False, True, True, True, True, True]]
    assert reference.activation_mask(x, None).tolist() == [[False, True, True, True, True, True, False]]
    t = torch.tensor(0.6)
    assert reference.activation_bits(x, t).tolist() == [[False] * 5 + [True, True]]
    assert reference.activation_mask(x, t).tolist() == [[False] * 4 + [True, True, False]]
    assert reference.activation_mask(torch.tensor([[0.9, 1.1]]), torch.tensor(0.1)).tolist() == [[True, False]]


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 130])
def test_packing_round_trips(channels):
    bits = torch.rand(3, channels, 2, 5) > 0.5
    assert torch.equal(packing.unpack_rows(packing.pack_rows(bits), channels), bits)
    weight = torch.rand(17, channels, 3, 2) > 0.5
    assert torch.equal(packing.unpack_panels(packing.pack_panels(weight), 17, channels), weight)
    assert torch.equal(packing.unpack_panels_t(packing.pack_panels_t(weight), 17, channels), weight)
    codes = torch.randint(0, 8, (3, channels, 2, 5))
    assert torch.equal(packing.unpack_planes(packing.pack_planes(codes, 3), channels), codes)
    assert torch.equal(packing.unpack_lanes(packing.pack_lanes(codes, 3), channels, 3, (2, 5)), codes)


def test_popcount_formulas():
    """The five formulas of packing.py, on random bits."""
    a, w, g = (torch.rand(100) > 0.5 for _ in range(3))
    sign = lambda b: 2 * b.long() - 1  # noqa: E731
    xor = lambda p, q: int((p ^ q).sum())  # noqa: E731
    assert int((sign(a) * sign(w)).sum()) == 100 - 2 * xor(a, w)
    assert int((a.long() * sign(w)).sum()) == int(w.sum()) - xor(a, w)
    assert int((g.long() * a.long()).sum()) == int((g & a).sum())
    assert int((g.long() * sign(a)).sum()) == 2 * int((g & a).sum()) - int(g.sum())
