"""The argument lists of every operation on a layer of the grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fqt_compile.kernels import program
from fqt_compile.kernels.operands import output_size
from fqt_compile.kernels.operations import OPERATIONS as REFERENCE
from support.grid import LAYERS, PROGRAM_LAYERS, Call, Layer, Operands, gradients, operands, seeded


def _activation_calls(layer: Layer, o: Operands) -> dict[str, list[Call]]:
    special = o.x.clone()
    if special.numel():
        special.view(-1)[:: max(1, special.numel() // 9)] = torch.tensor(math.nan)
        special.view(-1)[:1] = -0.0
    variants = [o.x, o.x.movedim(1, -1).contiguous().movedim(-1, 1), o.x.bfloat16(), o.x.half(), special, o.x.relu()]
    bits, mask = REFERENCE["pack_activation"](o.x, None)
    by_row, by_channel = (torch.linspace(-0.1, 1.2, n) for n in o.x.shape[:2])
    if layer.batch > 1:
        by_row[1] = math.nan
    thresholds = (None, *map(torch.tensor, (0.25, 0.75, math.nan)), by_row[:, None], by_channel[None])
    return {
        "check_finite": [(o.x, "layer")],
        "activation_threshold": [(x, rule) for x in variants for rule in ("sample", "batch")],
        "pack_activation": [(x, t) for x in variants for t in thresholds] + [(o.x, None, o.x)],
        "unpack_activation": [(bits, layer.in_channels, code) for code in ("sign", "threshold")],
        "apply_mask": [(x.to(d), mask) for x in variants[:2] for d in (torch.float32, torch.bfloat16, torch.float64)],
    }


def _float_calls(layer: Layer, o: Operands) -> dict[str, list[Call]]:
    made: dict[str, list[Call]] = {
        "fused_activation": _program_calls(layer, o),
        "fused_gradient": _gradient_calls(layer, o),
        "gradient_moments": _moments_calls(layer, o),
    }
    made |= {"pack_bool": [], "unpack_bool": [], "channel_moments": [], "max_pool_gradient": []}
    masks = [o.x > 0, (o.x > 0).movedim(1, -1).contiguous().movedim(-1, 1)]
    made["pack_bool"] = [(mask,) for mask in masks]
    made["unpack_bool"] = [(REFERENCE["pack_bool"](masks[0]), layer.in_channels)]
    scale, bias = (torch.rand(layer.in_channels, generator=seeded(layer)) for _ in range(2))
    for largest, dtype in ((40, torch.int16), (32767, torch.int16), (10**6, torch.int32)):
        acc = (o.x * largest / 5).clamp(-largest, largest).to(dtype)
        made["channel_moments"] += [(acc, scale, b, largest) for b in (None, bias) if layer.batch]
    floats = [o.x, o.x.movedim(1, -1).contiguous().movedim(-1, 1), o.x.bfloat16(), o.x + 100] if layer.batch else []
    made["float_moments"] = [(x,) for x in floats]
    if len(layer.size) != 2 or min(layer.size) < 2 or not layer.batch:
        return made
    x = o.x.relu()  # many ties
    x.view(-1)[:: max(1, x.numel() // 5)] = math.nan
    for window in (([2, 2], [2, 2], [0, 0]), ([3, 3], [2, 2], [1, 1]), ([2, 1], [1, 3], [1, 0])):
        g = torch.randn(*x.shape[:2], *output_size(layer.size, *window), generator=seeded(layer))
        variants = ((g, x), (g, x.movedim(1, -1).contiguous().movedim(-1, 1)), (g, x.bfloat16()), (g.bfloat16(), x))
        made["max_pool_gradient"] += [(g, [x], program.VALUES, *window) for g, x in variants]
        if layer.name in PROGRAM_LAYERS:
            operands = [(o.x * 30).to(torch.int16), scale, bias, scale, bias - 0.5]
            made["max_pool_gradient"].append((g, operands, PROGRAMS["batch-norm-relu"], *window))
    return made


PROGRAMS = {
    "convert": "full|t0=mul(x0,0.5)",
    "batch-norm-relu": "full,channel,channel,channel,channel"
    "|t0=mul(x0,x1)|t1=sub(t0,x2)|t2=mul(t1,x3)|t3=add(t2,x4)|t4=relu(t3)",
    "residual": "full,full,channel|t0=mul(x0,x2)|t1=add(t0,x1)|t2=relu(t1)",
    "prelu": "full,channel|t0=gt(x0,0.0)|t1=mul(x0,x1)|t2=where(t0,x0,t1)|t3=bfloat16(t2)",
    "hardtanh": "full,channel|t0=div(x0,x1)|t1=maximum(t0,-1.0)|t2=minimum(t1,1.0)|t3=neg(t2)|t4=abs(t3)",
}


POOLED = "full,channel,channel|t0=mul(x0,x1)|t1=pool(t0)|t2=add(t1,x2)|t3=relu(t2)"


def _program_calls(layer: Layer, o: Operands) -> list[Call]:
    """Programs over operands of every dtype, kept and not kept; a pool where the layer is an image."""
    if not layer.batch or layer.name not in PROGRAM_LAYERS:
        return []
    x = o.x.clone()
    x.view(-1)[:: max(1, x.numel() // 5)] = math.nan
    integers = (o.x * 30).to(torch.int16)
    vectors = [torch.rand(layer.in_channels, generator=seeded(layer)) - 0.3 for _ in range(4)]
    made: list[Call] = []
    for name, text in PROGRAMS.items():
        full, channel = text.split("|")[0].split(",").count("full"), text.split("|")[0].split(",").count("channel")
        sources = [integers, o.x.bfloat16()] if name == "residual" else [x, o.x]
        operands = [*sources[:full], *vectors[:channel]]
        for code, values, below in (("sign", False, True), ("threshold", True, False), ("threshold", False, True)):
            made.append((operands, text, code, [], values, below))
        known = torch.linspace(-0.1, 0.7, layer.in_channels)[None]
        made.append((operands, text, "threshold", [], name == "prelu", True, None, known))
        made.append((operands, text, "threshold", [], name == "prelu", False, None, None, "batch"))
    if len(layer.size) == 2:
        for window in ([2, 2, 2, 2, 0, 0], [3, 3, 2, 2, 1, 1]):
            made.append(([integers.int(), *vectors[:2]], POOLED, "threshold", window, window[0] == 2, True))
            made.append(([x, *vectors[:2]], POOLED, "sign", window, False, False))
            made.append(([integers, *vectors[:2]], POOLED, "threshold", window, False, True, None, known))
            made.append(([x, *vectors[:2]], POOLED, "threshold", window, False, True, None, None, "batch"))
    return made


GRADIENT_PROGRAMS = {
    "masked": "full,bits|t0=where(x1,0.0,x0)",
    "batch-norm": "full,full,channel,channel,channel|t0=mul(x1,x2)|t1=add(t0,x3)|t2=sub(x0,t1)|t3=mul(t2,x4)",
    "recomputed-mask": "full,full,full,channel,bits"
    "|t0=add(x0,x1)|t1=mul(x2,x3)|t2=le(t1,0.0)|t3=where(t2,0.0,t0)|t4=where(x4,t3,x0)",
    "dequantized": "full,row,map,row,bits|t0=mul(x1,x0)|t1=mul(x3,x2)|t2=add(t0,t1)|t3=where(x4,t2,0.0)",
}


def _gradient_calls(layer: Layer, o: Operands) -> list[Call]:
    """Programs over gradients, integers and bits, measured with and without a scale, and not measured."""
    if not layer.batch or layer.name not in PROGRAM_LAYERS:
        return []
    x = o.x.clone()
    x.view(-1)[:: max(1, x.numel() // 3)] = math.nan
    bits = REFERENCE["pack_bool"](o.x > 0.3)
    vectors = [torch.rand(layer.in_channels, generator=seeded(layer)) - 0.3 for _ in range(3)]
    made: list[Call] = []
    for text in GRADIENT_PROGRAMS.values():
        for first in (o.x, x, o.x.bfloat16(), torch.zeros_like(o.x)):
            full = (first, (o.x * 30).to(torch.int16), (o.x * 900).to(torch.int32))
            operands = _program_operands(text, full, vectors, bits)
            made += [(operands, text, True, vectors[0]), (operands, text, True, None), (operands, text, False)]
    return made


def _program_operands(text: str, full: Sequence[Tensor], channel: Sequence[Tensor], bits: Tensor) -> list[Tensor]:
    """One for every kind in the program, in order; those of rows and maps are made from the first full one."""
    x = full[-1].to(torch.float32)
    by_row = [x.flatten(1).mean(1), x.flatten(1).amax(1)]
    take = {"full": iter(full), "channel": iter(channel), "bits": iter((bits,)), "row": iter(by_row)}
    take["map"] = iter(((x[:1] * 7).to(torch.int32),))
    return [next(take[kind]) for kind in text.split("|")[0].split(",")]


def _moments_calls(layer: Layer, o: Operands) -> list[Call]:
    """Sums of a gradient times integers of both dtypes and floats, with and without a bias; of a few programs."""
    scale, bias = (torch.rand(layer.in_channels, generator=seeded(layer)) for _ in range(2))
    if not layer.batch:
        return []
    largest = {torch.int16: 32767, torch.int32: 2**30, torch.float32: 5, torch.bfloat16: 5}
    accs = [(o.x / o.x.abs().max() * limit).to(dtype) for dtype, limit in largest.items()]
    made: list[Call] = []
    for acc in accs:
        for g in (o.x, o.x.movedim(1, -1).contiguous().movedim(-1, 1)):
            vectors = [(scale, None), (scale, bias)] if not acc.is_floating_point() else [(None, None)]
            made += [([acc, g], program.SECOND, *known, bias) for known in vectors]
    if layer.name in PROGRAM_LAYERS:
        bits = REFERENCE["pack_bool"](o.x > 0.3)
        for name in ("batch-norm", "recomputed-mask", "dequantized"):
            text = GRADIENT_PROGRAMS[name]
            full = (o.x, (o.x * 30).to(torch.int16), (o.x * 900).to(torch.int32))
            made.append((_program_operands(text, full, [scale, bias, scale], bits), text, scale, bias, bias))
    return made


def _weight_calls(layer: Layer, o: Operands) -> dict[str, list[Call]]:
    channels_last = o.weight.movedim(1, -1).contiguous().movedim(-1, 1)
    strange = o.weight.transpose(0, 1).contiguous().transpose(0, 1)
    bits, scale = REFERENCE["quantize_weight"](o.weight, "xnor")
    weights = (o.weight, channels_last, strange, o.weight.bfloat16())
    grad_hat = torch.randn(o.weight.shape, generator=seeded(layer))
    grads = (grad_hat, grad_hat.movedim(1, -1).contiguous().movedim(-1, 1))
    return {
        "quantize_weight": [(w, mode) for w in weights for mode in ("xnor", "none")],
        "transpose_weight": [(bits, layer.in_channels, layer.out_channels)],
        "unpack_weight": [(bits, scale, layer.in_channels)],
        "weight_gradient": [(g, w, scale, mode) for g in grads for w in weights for mode in ("xnor", "none")],
    }


def _selection_calls(layer: Layer, o: Operands) -> dict[str, list[Call]]:
    kinds = ("norm", "range", "uniform")
    special = gradients(o.g)
    importances = [REFERENCE["row_importance"](o.g, "norm")]
    if layer == LAYERS[0]:  # the special ones depend on no layer
        importances += [torch.rand(n, generator=torch.Generator().manual_seed(n)) ** 4 for n in (1, 3, 37, 100)]
        importances += [torch.zeros(9), torch.ones(16), torch.tensor([1.0, math.nan, 2.0, math.inf, 2.0, 0.0])]
    prunes = ("systematic", "bernoulli", "topk", "none")
    keeps = ((1, 4), (1, 3), (9, 10), (1, 1))
    return {
        "row_importance": [(g, kind) for name, g in special.items() for kind in kinds if name != "minus-zero"],
        "channel_importance": [
            (g, *rows, kind) for g in (o.g, special["channels-last"]) for rows in o.rows.values() for kind in kinds
        ],
        "select": [(r, o.seed, 3, p, *keep) for r in importances for p in prunes for keep in keeps],
        "prune_rows": [(o.g, r, s) for r, s in o.rows.values() if s is not None],
        "keep_rows": [(g, r, s) for g in (o.g, o.g.bfloat16()) for r, s in o.rows.values() if s is not None]
        if o.g.shape[0]
        else [],
        "gather_words": [(REFERENCE["pack_activation"](o.x, None)[0], r) for r, _ in o.rows.values()]
        if o.x.shape[0]
        else [],
        "gather_rows": [(o.x, r) for r, _ in o.rows.values()] if o.x.shape[0] else [],
        "scatter_rows": [(o.x[: r.shape[0]], r, o.x.shape[0]) for r, _ in o.rows.values()],
    }


def measured(g: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes of rows and channels as `fused_gradient` gives them."""
    if not g.numel():
        return torch.zeros(2, g.shape[0]), torch.zeros(2, g.shape[1])
    _, rows, channels = REFERENCE["fused_gradient"]([g], "full|t0=mul(x0,1.0)", True, scale)
    return rows, channels


def _quantize_calls(o: Operands) -> dict[str, list[Call]]:
    scale = torch.rand(o.g.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1
    special = gradients(o.g)
    by_row = [(g, scale, *o.rows["systematic"], o.seed, 5, 4) for g in special.values()]
    by_row += [(o.g, None, *rows, o.seed, 5, bits) for rows in o.rows.values() for bits in (1, 3, 8)]
    by_row += [(g, scale, *o.rows["systematic"], o.seed, 5, 1) for g in special.values()]
    by_row += [(g, scale, *o.rows["systematic"], o.seed, 5, 4, False, None, False) for g in special.values()]
    kept = [
        (rows, REFERENCE["keep_rows"](o.g, rows[0], torch.ones(len(rows[0])))) for rows in o.rows.values() if len(o.g)
    ]
    by_row += [(g, scale, *rows, o.seed, 5, 4, True) for rows, g in kept]
    by_row += [(g, scale, *o.rows["systematic"], o.seed, 5, 4, False, measured(g, scale)[0]) for g in special.values()]
    by_row += [(g, scale, *rows, o.seed, 5, 4, True, measured(g, scale)[0]) for rows, g in kept]
    systematic = o.rows["systematic"]
    by_channel = [(g, *systematic, *c, o.seed, 6, 4) for g in special.values() for c in o.channels.values()]
    by_channel += [
        (o.g, *rows, *c, o.seed, 6, bits) for rows in o.rows.values() for c in o.channels.values() for bits in (1, 3, 8)
    ]
    by_channel += [(g, *systematic, None, None, o.seed, 6, 1) for g in special.values()]
    by_channel += [(g, *systematic, None, None, o.seed, 6, 4, False, None, False) for g in special.values()]
    by_channel += [(g, *rows, *c, o.seed, 6, 4, True) for rows, g in kept for c in o.channels.values()]
    by_channel += [
        (g, rows, None, *c, o.seed, 6, 4, True, measured(g, scale)[1])
        for (rows, _), g in kept
        for c in o.channels.values()
    ]
    return {"quantize_rows": by_row, "quantize_channels": by_channel}


def product_calls(layer: Layer, o: Operands) -> dict[str, list[Call]]:
    x_bits, mask = REFERENCE["pack_activation"](o.x, None)
    w_bits, alpha = REFERENCE["quantize_weight"](o.weight, "xnor")
    w_bits_t = REFERENCE["transpose_weight"](w_bits, layer.in_channels, layer.out_channels)
    channels, geometry = (layer.in_channels, layer.out_channels), (layer.stride, layer.padding)
    made: dict[str, list[Call]] = {name: [] for name in ("grad_input_product", "grad_weight_product", "grad_weight")}
    made["output_product"] = [
        (x_bits, w_bits, *channels, code, *geometry, narrow)
        for code in ("sign", "threshold")
        for narrow in (False, True)
    ]
    made["dequantize_rows"], made["dequantize_grad_input"], made["dequantize_grad_weight"] = [], [], []
    for bits, (name, (rows, row_scale)) in zip((1, 2, 4, 8, 3), o.rows.items(), strict=True):
        planes, s, z = REFERENCE["quantize_rows"](o.g, None, rows, row_scale, o.seed, 5, bits)
        made["dequantize_rows"].append((planes, s, z, rows, layer.out_channels, layer.batch))
        made["grad_input_product"].append((planes, w_bits_t, *channels, layer.size, *geometry))
        acc, weight_sum = REFERENCE["grad_input_product"](*made["grad_input_product"][-1])
        made["dequantize_grad_input"] += [
            (acc, weight_sum, s, z, rows, mask, compact) for compact in (False, True)[: 1 + bool(layer.batch)]
        ]
        for kept, channel_scale in o.channels.values():
            lanes, s, z = REFERENCE["quantize_channels"](o.g, rows, row_scale, kept, channel_scale, o.seed, 6, bits)
            width = layer.out_channels if kept is None else kept.shape[0]
            for code in ("sign", "threshold"):
                sizes = (layer.output, layer.kernel, *geometry)
                made["grad_weight_product"].append((lanes, x_bits, rows, layer.in_channels, width, code, *sizes))
            if kept is None:
                shared = (lanes, x_bits, rows, s, z)
                weights = (o.weight, o.weight.movedim(1, -1).contiguous().movedim(-1, 1))
                made["grad_weight"] += [
                    (*shared, w, alpha, mode, code, layer.output, *geometry)
                    for w, mode, code in zip(weights, ("xnor", "none"), ("sign", "threshold"), strict=True)
                ]
            if name in ("systematic", "bernoulli"):
                acc, code_sum = REFERENCE["grad_weight_product"](*made["grad_weight_product"][-1])
                made["dequantize_grad_weight"].append((acc, code_sum, s, z, kept, layer.out_channels))
    return made


@functools.cache
def calls(layer: Layer) -> dict[str, list[Call]]:
    """Operation -> argument lists."""
    o = operands(layer)
    makers: list[dict[str, list[Call]]] = [
        _activation_calls(layer, o),
        _float_calls(layer, o),
        _weight_calls(layer, o),
        _selection_calls(layer, o),
    ]
    makers += [_quantize_calls(o), product_calls(layer, o)]
    return {name: made for maker in makers for name, made in maker.items()}


@functools.cache
def expected(layer: Layer, operation: str, number: int) -> Any:
    """The reference's result for one argument list."""
    return REFERENCE[operation](*calls(layer)[operation][number])
