"""The header of a run: its model, optimizer, device and settings."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from fastfs._record.columns import SCHEMA
from fastfs._record.encoding import to_json
from fastfs._version import __version__

__all__ = ["checked_metadata", "make_header"]


def make_header(
    model: nn.Module,
    optimizer: str,
    layers: Sequence[str],
    metadata: Mapping[str, Any],
    *,
    run: str | None = None,
    resumed_at: int | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Builds a header.

    Args:
        model: the watched model.
        optimizer: class of the optimizer whose steps are counted.
        layers: names of the watched layers, in the order of the columns.
        metadata: of the user, representable in JSON.
        run: id of a run that continues; a new id by default.
        resumed_at: first optimizer step of a run that continues.
        groups: members of each group of layers. The values of groups follow those of the layers in every column.
        settings: of the monitor (``mode``, ``every``, ``rows``, ``memory_bytes``, ...).

    Returns:
        The header.
    """
    parameters = list(model.parameters())
    devices = dict.fromkeys(str(p.device) for p in parameters)
    header = {
        "kind": "header",
        "schema": SCHEMA,
        "fastfs": __version__,
        "run": run or uuid.uuid4().hex[:12],
        "started": datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="seconds"),
        "mode": "batch",
        "model": type(getattr(model, "_orig_mod", model)).__qualname__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)),
        "device": ", ".join(devices),
        "device_name": ", ".join(
            torch.cuda.get_device_name(d)
            if torch.device(d).type == "cuda"
            else platform.processor() or platform.machine()
            for d in devices
        ),
        "optimizer": optimizer,
        **settings,
        "layers": list(layers),
        "groups": {name: list(members) for name, members in (groups or {}).items()},
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "metadata": dict(metadata),
    }
    if resumed_at is not None:
        header["resumed_at"] = resumed_at
    return header


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copies the user's metadata.

    Returns:
        The copy; empty if there are no metadata.

    Raises:
        TypeError: not a dictionary, or JSON cannot represent it.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    result = dict(metadata)
    try:
        to_json(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata: expected a dictionary that JSON can hold: {error}") from error
    return result
