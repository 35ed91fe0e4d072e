"""Format numbers as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["columns", "table"]


def table(
    values: dict[str, Any],
    names: tuple[str, ...],
    shape: torch.Size,
    most: int = 40,
) -> list[str]:
    """Return an aligned table with one line per layer and its index; the middle of a long table is omitted."""
    flat = {name: torch.tensor(values[name], device="cpu").reshape(-1).tolist() for name in names}

    def label(i: int) -> str:
        return (
            ",".join(str(int(part)) for part in torch.unravel_index(torch.tensor(i, device="cpu"), shape))
            if shape
            else ""
        )

    return columns({"": [label(i) for i in range(shape.numel())], **flat}, most)


def columns(values: Mapping[str, Sequence[Any]], most: int = 40) -> list[str]:
    """Return an aligned table with a header and one line per entry; the middle of a long table is omitted."""
    rows = [[_cell(value) for value in row] for row in zip(*values.values(), strict=True)]
    if len(rows) > most:
        rows = [*rows[: most // 2], ["..."] * len(values), *rows[-most // 2 :]]
    lines = [list(values), *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(values))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
