"""The first line of a run: what ran, where, on what."""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from fastfs._monitor.record.record import SCHEMA
from fastfs._version import __version__

__all__ = ["make_header"]


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
    """A header.

    Args:
        model: the model that is watched.
        optimizer: the class of the optimizer whose steps count.
        layers: names of the watched layers, in the order of the record.
        metadata: the user's own, that JSON can hold.
        run: id of the run that goes on here; a new one by default.
        resumed_at: the next optimizer step of a run that goes on.
        groups: names of groups of layers, with their members; their columns come after those of the layers.
        settings: how the monitor was set up (``mode``, ``every``, ``rows``, ``memory_bytes``, ...).
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
