"""Payloads, records and sinks for the tests of recording."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastfs._record.columns import SCHEMA
from fastfs._record.record import Record
from fastfs._record.writing.recorder import Recorder

LAYERS = ["blocks.0", "blocks.1", "blocks.2"]


def head(run: str = "a", layers: Any = LAYERS, groups: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "header",
        "schema": SCHEMA,
        "run": run,
        "started": "2026-01-01T00:00:00+00:00",
        "layers": list(layers),
        "groups": {"all": list(layers)} if groups is None else groups,
        "metadata": {},
        **more,
    }


def measured(step: int, layers: int = 3, groups: int = 1, loss: float = 0.5, **columns: Any) -> Any:
    """Builds a healthy record. A column is given as a list, or as one value for all layers."""
    n = layers + groups
    values = {
        "angle": [1.0 + 0.1 * i + 0.001 * step for i in range(n)],
        "cos_angle": [0.5] * n,
        "update_rms": [0.01] * n,
        "relative_update": [0.02] * n,
        "backward_rms": [0.1] * n,
        "valid": [True] * n,
        "why": [None] * n,
        "method": ["plain"] * n,
        "nonfinite": [0] * n,
        "count": [64] * n,
        "residual": [0.1] * n,
        **{key: value if isinstance(value, list) else [value] * n for key, value in columns.items()},
    }
    scalars = {"loss": loss, "micro_batches": 1, "overhead_seconds": 0.25, "loss_scale": None}
    return Record("measured", step, 100.0 + step, scalars, values)


def predicted(step: int, layers: int = 3, groups: int = 1) -> Any:
    n = layers + groups
    columns = {"aligned_decrease": [0.001 * step] * n, "update_rms": [0.03, *[None] * (n - 1)]}
    return Record("predicted", step, 100.0 + step, {"loss": 0.5, "overhead_seconds": 0.0}, columns)


def alert(step: int, layer: str = "blocks.1") -> Any:
    scalars = {"rule": "nonfinite", "layer": layer, "value": 2.0, "message": "2 entries are NaN or infinite"}
    return Record("alert", step, 100.0 + step, scalars)


def payload(step: int, size: int = 4, device: str = "cpu") -> Any:
    return torch.full((size,), float(step), dtype=torch.float64, device=device)


def decode(host: Any) -> list[Any]:
    """Decodes a payload that holds the number of its step."""
    assert host.device.type == "cpu"
    assert (host == host[0]).all(), host
    return [measured(int(host[0]))]


class Collecting:
    """A sink that keeps its records and can be made to fail or hang."""

    def __init__(self) -> None:
        self.headers: list[Mapping[str, Any]] = []
        self.records: list[Any] = []
        self.error: BaseException | None = None
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def open(self, header: Mapping[str, Any]) -> None:
        self.headers.append(header)

    def write(self, records: Sequence[Record]) -> None:
        self.entered.set()
        self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.records += records

    def close(self) -> None:
        self.closed += 1

    @property
    def steps(self) -> Any:
        return [record.step for record in self.records if record.kind == "measured"]

    def of(self, kind: Any) -> Any:
        return [record for record in self.records if record.kind == kind]


SOON = 20.0


def until(condition: Any, seconds: Any = SOON) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


def recorder(*sinks: Any, **options: Any) -> Any:
    options = {"alerts": (), "flush_seconds": 60.0, "retry_seconds": 0.02, **options}
    return Recorder(sinks, head(), **options)
