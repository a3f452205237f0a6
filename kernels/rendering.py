"""Rendering templates: where they are, and the constants that Python modules define for them."""

from __future__ import annotations

from pathlib import Path

import jinja2

from . import noise, packing, reference, selection

TEMPLATES = Path(__file__).parent / "templates"
PROGRAM_TEMPLATES = ("fused_activation", "fused_gradient", "gradient_moments", "max_pool_gradient")
"""Rendered with a pointwise program."""

GEOMETRY = (
    *("batch", "words", "in_channels", "out_channels", "channels", "in_h", "in_w", "out_h", "out_w"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
)
"""Fields of the C++ struct that describes a convolution, in order; all int64."""

PARAMETERS = {
    "word": packing.WORD,
    "panel": packing.PANEL,
    "lane_tile": packing.LANE_TILE,
    "lanes": reference.LANES,
    "block": reference.BLOCK,
    "row_block": reference.ROW_BLOCK,
    "multipliers": [hex(m) for m in noise.MULTIPLIERS],
    "non_finite_importance": repr(selection.NON_FINITE_IMPORTANCE),
    "geometry": GEOMETRY,
}


def environment(directory: Path) -> jinja2.Environment:
    """Templates of a directory, strict about undefined names."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
