"""From sums on the device to rows on the host, in batches, without making the device wait.

One transfer per measured step carries the sums of all layers and the loss. On a GPU it goes to pinned memory behind
an event that later steps only look at; rows are made and written once it has passed.
"""

from __future__ import annotations

import platform
import time
import uuid
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from fastfs.monitor.layers import Layer
from fastfs.monitor.sinks import Row, Sink
from fastfs.stats import FeatureStats

__all__ = ["QUANTITIES", "SCHEMA", "Measurement", "Recorder", "header"]

SCHEMA = 1
"""Version of the record's format: raised when a column changes its meaning or goes."""

QUANTITIES = (
    "angle",
    "cos_angle",
    "update_rms",
    "relative_update",
    "feature_rms",
    "backward_rms",
    "noise_floor",
    "valid",
    "nonfinite",
    "count",
)
"""Columns that come from :class:`fastfs.FeatureStats`, under the names that they have there."""


@dataclass(frozen=True)
class Measurement:
    """One measured step.

    ``stats`` has shape (L,) and may be on any device, ``loss`` is a scalar; ``seconds`` is host time.
    """

    step: int
    time: float
    stats: FeatureStats
    micro_batches: int
    loss: Tensor | float | None
    seconds: float


class _Transfer:
    """A copy of a tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.to("cpu")

    def ready(self) -> bool:
        return self._event is None or bool(self._event.query())

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Recorder:
    """Turns measurements into rows and hands them to the sinks, in order.

    A sink that raises is reported by one warning and does not get those rows; training goes on.
    """

    def __init__(self, layers: Sequence[Layer], sinks: Sequence[Sink], head: Mapping[str, Any]) -> None:
        self._names = [layer.name for layer in layers]
        self._sinks = tuple(sinks)
        self._run = head["run"]
        self._pending: deque[tuple[Measurement, _Transfer]] = deque()
        self._failed: set[int] = set()
        with ExitStack() as undo:
            for sink in self._sinks:
                sink.open(head)
                undo.callback(sink.close)
            undo.pop_all()

    def push(self, measurement: Measurement) -> None:
        """Start the transfer; does not wait."""
        sums = measurement.stats.sums.reshape(-1)
        loss = measurement.loss
        payload = torch.cat([sums, loss.to(sums).reshape(1)]) if isinstance(loss, Tensor) else sums
        self._pending.append((measurement, _Transfer(payload)))

    def drain(self, *, wait: bool = False) -> None:
        """Write the measurements that have arrived, or all of them."""
        while self._pending and (wait or self._pending[0][1].ready()):
            measurement, transfer = self._pending.popleft()
            rows = self._rows(measurement, transfer.wait())
            for index, sink in enumerate(self._sinks):
                self._write(index, sink, rows)

    def close(self) -> None:
        """Write what is left and close every sink, also if one of them fails: that is a warning."""
        failures: list[str] = []
        try:
            self.drain(wait=True)
        finally:
            for sink in self._sinks:
                try:
                    sink.close()
                except Exception as error:
                    failures.append(f"{type(sink).__name__} ({type(error).__name__}: {error})")
        if failures:
            warnings.warn(
                f"fastfs.Monitor: could not be closed: {', '.join(failures)}. The others are.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _write(self, index: int, sink: Sink, rows: list[Row]) -> None:
        try:
            sink.write(rows)
        except Exception as error:
            if index not in self._failed:
                self._failed.add(index)
                warnings.warn(
                    f"fastfs.Monitor: {type(sink).__name__} failed at step {rows[0]['step'] if rows else '?'} "
                    f"({type(error).__name__}: {error}); its rows are lost, training goes on. Said once.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _rows(self, measurement: Measurement, host: Tensor) -> list[Row]:
        loss: Any = measurement.loss
        if isinstance(loss, Tensor):
            loss, host = host[-1].item(), host[:-1]
        stats = FeatureStats(host.reshape(len(self._names), -1))
        columns = {name: getattr(stats, name).tolist() for name in QUANTITIES}
        common = {"kind": "measured", "run": self._run, "step": measurement.step, "time": measurement.time}
        tail = {
            "loss": loss,
            "micro_batches": measurement.micro_batches,
            "measure_seconds": measurement.seconds,
        }
        return [
            {**common, "layer": i, "name": name, **{key: column[i] for key, column in columns.items()}, **tail}
            for i, name in enumerate(self._names)
        ]


def header(
    model: nn.Module, optimizer: torch.optim.Optimizer, layers: Sequence[Layer], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The first line of a run: what ran, where, on what."""
    parameters = list(model.parameters())
    model_type = type(getattr(model, "_orig_mod", model))
    devices = dict.fromkeys(str(p.device) for p in parameters)
    return {
        "kind": "header",
        "schema": SCHEMA,
        "run": uuid.uuid4().hex[:12],
        "started": datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="seconds"),
        "mode": "batch",
        "model": model_type.__qualname__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)),
        "device": ", ".join(devices),
        "device_name": ", ".join(
            torch.cuda.get_device_name(d)
            if torch.device(d).type == "cuda"
            else platform.processor() or platform.machine()
            for d in devices
        ),
        "optimizer": type(optimizer).__qualname__,
        "layers": [layer.name for layer in layers],
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "metadata": dict(metadata),
    }
