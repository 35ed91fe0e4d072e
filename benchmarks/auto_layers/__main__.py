"""Writes docs/auto_layers.md: what ``layers="auto"`` picks on real architectures, and what was found on looking at it.

    python -m benchmarks.auto_layers [docs/auto_layers.md]

Needs torchvision, timm, transformers and peft. Stops if something else is picked than what was looked at.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks.auto_layers.libraries import timm_entries, torchvision_entries, transformers_entries
from benchmarks.auto_layers.measure import Picked, fresh
from benchmarks.auto_layers.parts import Entry
from benchmarks.auto_layers.styles import style_entries

_HEAD = """# What `layers="auto"` picks

`python -m benchmarks.auto_layers` builds each model small and with random weights, picks the layers, and runs one
forward and one backward with hooks. Every row was looked at; the command stops if something else is picked than what
was judged. How the blocks are found is in [blocks.py](../fastfs/_network/blocks.py).

- **ran**, **gradient**: how many of the layers ran in the forward, and got a gradient other than zero.
- **cuts**: how many are [cuts](theory.md) by the graph of that forward; else the reason at the first that is none.
  Parameters that act in several places (tied embeddings, an encoder whose output all decoder blocks take, skip
  connections) are of the architecture, and no choice of layers changes them.
"""


def row(entry: Entry, picked: Picked) -> list[str]:
    """Cells of the table.

    Raises:
        ValueError: the layers are not those that were judged.
    """
    names = picked.names
    if (len(names), names[0], names[-1]) != (entry.count, entry.first, entry.last):
        raise ValueError(
            f"{entry.name}: judged {entry.count} layers, {entry.first} to {entry.last}; now there are {len(names)}, "
            f"{names[0]} to {names[-1]}: look at them again"
        )
    last = "" if len(names) == 1 else f"`{names[-1]}`"
    cuts = f"{picked.cuts}" if picked.reason is None else f"{picked.cuts}; {picked.reason}"
    return [
        entry.name,
        str(len(names)),
        f"`{names[0]}`",
        last,
        f"{picked.ran}",
        f"{picked.reached}",
        cuts,
        entry.verdict,
    ]


def table(title: str, entries: Sequence[Entry]) -> list[str]:
    """A section of the document."""
    lines = [f"## {title}", "", "| model | layers | first | last | ran | gradient | cuts | verdict |", "|" + "---|" * 8]
    lines += [f"| {' | '.join(row(entry, fresh(entry.build)))} |" for entry in entries]
    return [*lines, ""]


def main(path: Path) -> None:
    """Builds all models and writes the document."""
    warnings.simplefilter("ignore")  # of the libraries, about their own future
    version = importlib.metadata.version
    torch = version("torch").partition("+")[0]
    lines = [_HEAD, f"torch {torch}.", ""]
    lines += table("Styles of public scripts, written by hand", style_entries())
    lines += table(f"torchvision {version('torchvision').partition('+')[0]}", torchvision_entries())
    lines += table(f"timm {version('timm')}", timm_entries())
    both = f"transformers {version('transformers')}, peft {version('peft')}"
    lines += table(both, transformers_entries())
    path.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/auto_layers.md"))
