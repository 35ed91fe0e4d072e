"""Write docs/auto_layers.md: the layers that ``layers="auto"`` selects on real architectures, with an assessment.

    python -m benchmarks.auto_layers [docs/auto_layers.md]

Requires torchvision, timm, transformers and peft. Stops if a selection differs from the one that was assessed.
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

_HEAD = """# Layers selected by `layers="auto"`

`python -m benchmarks.auto_layers` builds a small version of each model with random weights, selects the layers, and
runs one forward and one backward with hooks. Every row was assessed by hand; the command stops if a selection has
changed since. [blocks.py](../fastfs/_network/blocks.py) describes how blocks are found.

- **ran**, **gradient**: how many of the layers ran in the forward, and how many had a nonzero gradient.
- **cuts**: how many layers are [cuts](theory.md) in the graph of that forward, and why the first of the others is not.
  Parameters with uses in several places (tied embeddings, an encoder whose output all decoder blocks read, skip
  connections) are part of the architecture; no choice of layers changes them.
"""


def row(entry: Entry, picked: Picked) -> list[str]:
    """Return the cells of one row.

    Raises:
        ValueError: the selected layers differ from those that were assessed.
    """
    names = picked.names
    if (len(names), names[0], names[-1]) != (entry.count, entry.first, entry.last):
        raise ValueError(
            f"{entry.name}: assessed {entry.count} layers, {entry.first} to {entry.last}; now selected: {len(names)}, "
            f"{names[0]} to {names[-1]}: assess them again"
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
    """Return a section of the document."""
    lines = [f"## {title}", "", "| model | layers | first | last | ran | gradient | cuts | verdict |", "|" + "---|" * 8]
    lines += [f"| {' | '.join(row(entry, fresh(entry.build)))} |" for entry in entries]
    return [*lines, ""]


def main(path: Path) -> None:
    """Build all models and write the document."""
    warnings.simplefilter("ignore")  # deprecation warnings of the libraries
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
