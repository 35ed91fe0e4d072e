"""Offline runs of W&B, and what is in their files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

from tests.helpers.record_cases import until

BLOCK = 32768


def offline_run(folder: Path, **more: Any) -> Any:
    """Starts a run whose file is below a folder, and sends nothing anywhere."""
    settings = wandb.Settings(mode="offline", x_disable_stats=True, console="off", silent=True)
    return wandb.init(project="test", dir=str(folder), settings=settings, **more)


def records(folder: Path, *, finished: bool = True) -> list[Any]:
    """Returns the records of the only run below a folder.

    W&B writes them in a process of its own. If the run was finished, this function waits for the last one.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: list[Any] = []

    def complete() -> bool:
        found[:] = parsed(path.read_bytes())
        return not finished or any(record.WhichOneof("record_type") == "exit" for record in found)

    until(complete)
    return found


def parsed(data: bytes) -> Iterator[Any]:
    """Yields the records of a file: blocks of parts with checksum, length and kind."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at < len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        if len(data) < at + 7 or len(data) < at + 7 + (length := struct.unpack("<IHB", data[at : at + 7])[1]):
            return  # is being written
        kind = data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Returns the rows of the history."""
    found = [record.history for record in records(folder, **options) if record.WhichOneof("record_type") == "history"]
    return [{one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in row.item} for row in found]


def of_kind(folder: Path, kind: str) -> list[Any]:
    """Returns the records of a kind, such as ``alert`` and ``metric``."""
    return [getattr(one, kind) for one in records(folder) if one.WhichOneof("record_type") == kind]
