"""Copies the paragraphs of ``fastfs explain`` and of the report page to ``docs/guide.md``.

python -m scripts.guide
"""

from __future__ import annotations

import re
from pathlib import Path

from fastfs._report.guide import source

__all__ = ["PAGE", "written"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
_BEGIN, _END = "<!-- paragraphs, written by scripts/guide.py -->", "<!-- end -->"


def written(page: str) -> str:
    """Returns the page with the paragraphs of this version between its two marks."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    text = re.sub(r"^<!-- .* -->\n\n", "\n", source(), flags=re.MULTILINE)
    text = re.sub(r"^## ", "### ", text, flags=re.MULTILINE)
    return f"{before}{_BEGIN}\n\n{text.strip()}\n\n{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
