#!/usr/bin/env python3
"""Writes the tables of columns in docs/ from their declarations in fastfs/_record/columns.py.

    python scripts/record_columns.py [--check]

With --check nothing is written, and the exit status is 1 if a page is not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fastfs._record.column import Column
from fastfs._record.columns import COLUMNS, PER_LAYER, quantile_name

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKED = re.compile(r"(<!-- columns per (layer|step), .*? -->\n).*?(<!-- end -->\n)", re.DOTALL)


def table(columns: Sequence[Column]) -> str:
    """A Markdown table with a row for each column."""
    sources = any(column.source for column in columns)
    head = ["column", "records", "type", "unit", "meaning", *(["source"] if sources else [])]
    rows = [head, ["---"] * len(head)]
    for column in columns:
        kinds = ", ".join("m" if kind == "measured" else "p" for kind in column.kinds)
        row = [f"`{column.name}`", kinds, column.type, column.unit, column.meaning]
        rows.append(row + ([column.source] if sources else []))
    if quantiles := [column for column in columns if column.quantiles]:
        names = ", ".join(f"`{quantile_name(column.name, 0.1)}`" for column in quantiles)
        units = "as the column"
        meaning = "quantiles of the rows' own values, with `quantiles=(0.1, ...)`"
        rows.append([f"{names}, ...", "m", "number", units, meaning, ""])
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in escaped)


def updated(text: str) -> tuple[str, int]:
    """A page with up-to-date tables, and the number of tables."""

    def replace(match: re.Match[str]) -> str:
        layers = match[2] == "layer"
        return f"{match[1]}\n{table([c for c in COLUMNS if (c.name in PER_LAYER) == layers])}\n{match[3]}"

    return MARKED.subn(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    outdated = False
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        new, _ = updated(text)
        if new != text:
            outdated = True
            if not arguments.check:
                page.write_text(new)
    return int(outdated and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
