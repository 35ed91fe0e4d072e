"""Numbers as aligned text, for the repr of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def table(
    values: dict[str, Any],
    columns: tuple[str, ...],
    shape: torch.Size,
    most: int = 40,
    names: Sequence[str] | None = None,
) -> list[str]:
    """Lines of an aligned table, one line per layer, with its name or index; the middle of a long one is left out."""
    flat = {name: torch.tensor(values[name], device="cpu").reshape(-1).tolist() for name in columns}
    size = shape.numel()
    rows = list(range(size))
    if size > most:
        rows = [*rows[: most // 2], -1, *rows[-most // 2 :]]

    def label(i: int) -> str:
        if names is not None:
            return names[i]
        return (
            ",".join(str(int(part)) for part in torch.unravel_index(torch.tensor(i, device="cpu"), shape))
            if shape
            else ""
        )

    lines = [["", *columns]]
    for i in rows:
        lines.append(["..."] * (len(columns) + 1) if i < 0 else [label(i), *(_cell(flat[name][i]) for name in columns)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns) + 1)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _cell(value: float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
