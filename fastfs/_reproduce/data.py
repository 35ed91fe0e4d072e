"""Real data available on every machine: the standard library's source as text, and scikit-learn's digits."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastfs._utils.extras import load

__all__ = ["Text", "digits", "minibatches", "stdlib_text", "windows"]


@dataclass(frozen=True)
class Text:
    """Text as a uint8 tensor (bytes,), with its number of files and SHA-256."""

    tokens: Tensor
    files: int
    sha256: str


def stdlib_text(max_bytes: int = 4_000_000) -> Text:
    """Read the modules (``*.py``) of the running Python's standard library, concatenated in alphabetical order.

    Args:
        max_bytes: largest size; the last file may be truncated.

    Returns:
        The text.

    Raises:
        ValueError: ``max_bytes`` is below 1.
        FileNotFoundError: this Python has no source of its standard library.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes: expected at least 1, got {max_bytes}")
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py"), key=lambda p: p.name):
        if size >= max_bytes:
            break
        parts.append(path.read_bytes()[: max_bytes - size])
        size += len(parts[-1])
    data = b"".join(parts)
    if not data:
        raise FileNotFoundError(f"no source of the standard library (*.py) in {folder}")
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Text(tokens, files=len(parts), sha256=hashlib.sha256(data).hexdigest())


def windows(text: Text, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches of random windows: tokens and the tokens that follow, each int64 (batch, length).

    Args:
        text: the text.
        batch: number of windows per batch.
        length: tokens per window.
        seed: seed of the positions.

    Yields:
        Inputs and targets.

    Raises:
        ValueError: the text is not longer than ``length``.
    """
    if text.tokens.numel() <= length:
        raise ValueError(f"text of {text.tokens.numel()} bytes is too short for windows of {length} + 1")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(text.tokens.numel() - length, (batch, 1), generator=generator)
        window = text.tokens[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]


def digits() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits, standardized as a whole.

    Returns:
        Images, float32 (1797, 64), and labels, int64 (1797,).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    images, labels = load("sklearn.datasets", "demo", "the data of digits").load_digits(return_X_y=True)
    inputs = torch.as_tensor(images, dtype=torch.float32)
    return (inputs - inputs.mean()) / inputs.std(), torch.as_tensor(labels, dtype=torch.int64)


def minibatches(inputs: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless random batches, without replacement within an epoch and without incomplete batches.

    Args:
        inputs: (n, ...) data.
        labels: (n,) labels.
        batch: rows per batch.
        seed: seed of the order.

    Yields:
        Rows of the inputs and of the labels.

    Raises:
        ValueError: ``batch`` is below 1 or larger than the data.
    """
    if not 1 <= batch <= len(inputs):
        raise ValueError(f"batch: expected 1 to {len(inputs)}, got {batch}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(inputs) - batch + 1, batch):
            rows = order[start : start + batch]
            yield inputs[rows], labels[rows]
