"""The table of options, wherever its markers stand: ``python docs/option_table.py`` writes it anew.

Its source is `fqt_compile.config`, where every option is declared once.
"""

from __future__ import annotations

from pathlib import Path

from fqt_compile.config import option_table

ROOT = Path(__file__).parents[1]
START = "<!-- options: written by python docs/option_table.py -->\n"
END = "<!-- end of options -->\n"


def pages() -> list[Path]:
    """The pages that have the table."""
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if START in page.read_text()]


def renewed(text: str) -> str:
    """The text of a page with the table as it should be."""
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {END.strip()!r} behind {START.strip()!r}")
    return f"{before}{START}{option_table()}{END}{after}"


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text()))
