"""Records as TensorBoard scalars. Needs the extra ``tensorboard``."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfs._monitor.record.record import TABLED, Record, row_names
from fastfs._monitor.record.sinks import make_folders, remove_folders

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import RecordWriter
    from torch.utils.tensorboard.summary import text as text_summary
except ImportError as missing:
    raise ImportError('fastfs: a TensorBoard sink needs tensorboard: pip install "fastfs[tensorboard]"') from missing

__all__ = ["TensorBoardSink"]

_LEFT_OUT = ("count", "rows", "micro_batches", "choices")


class TensorBoardSink:
    """Scalars ``fastfs/<quantity>/<layer>`` at their step and time; alerts and skipped steps as text.

    Every batch of records is one write of whole events to the sink's own file, so that a killed process leaves at worst
    an event that readers skip. A write that fails in the middle is taken back before it is tried again. A run that is
    resumed gets a further file; TensorBoard then forgets the steps that are done again.

    Args:
        logdir: folder, made if missing; ``tensorboard --logdir`` of it or a parent shows the run.
        predicted: also write predicted records, one for every step: their ``update_rms`` as ``predicted_update_rms``,
            the rest under the names that measured ones have. Event files then grow fast.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, logdir: str | os.PathLike[str], *, predicted: bool = False) -> None:
        self.logdir = Path(logdir)
        self._predicted = predicted
        self._descriptor: int | None = None
        self._size = 0
        self._names: list[str] = []
        self._files: list[Path] = []
        self._made = make_folders(self.logdir)

    def open(self, header: Mapping[str, Any]) -> None:
        self.close()  # a run that is resumed gets a file of its own
        self._names = row_names(header)[0]
        start = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.fastfs"
        for number in itertools.count():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            path = self.logdir / f"{start}.{number}"
            try:
                self._descriptor = os.open(path, flags, 0o666)
                self._files.append(path)
                break
            except FileExistsError:
                continue
        self._size = 0
        events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        step = header.get("resumed_at")
        if step is not None:
            events.append(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
        about = f"```json\n{json.dumps(header, indent=1, default=str)}\n```"
        events.append(_event(text_summary("fastfs/run", about), step or 0, time.time()))
        self._append(events)

    def write(self, records: Sequence[Record]) -> None:
        self._append([event for record in records if (event := self._event(record)) is not None])

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        """Close, and take back what this sink made."""
        self.close()
        for path in self._files:
            path.unlink(missing_ok=True)
        remove_folders(self._made)

    def _event(self, record: Record) -> Event | None:
        if record.kind == "alert":
            layer = record.scalars.get("layer")
            text = f"**{record.scalars.get('rule')}** {'' if layer is None else layer}: {record.scalars.get('message')}"
            return _event(text_summary("fastfs/alerts", text), record.step, record.time)
        if record.kind == "skipped":
            text = str(record.scalars.get("reason"))
            return _event(text_summary("fastfs/skipped", text), record.step, record.time)
        if record.kind not in TABLED or (record.kind == "predicted" and not self._predicted):
            return None
        values = [_scalar(f"fastfs/{name}", value) for name, value in record.scalars.items() if _shown(name, value)]
        for quantity, column in record.columns.items():
            tag = f"predicted_{quantity}" if (record.kind, quantity) == ("predicted", "update_rms") else quantity
            values += [
                _scalar(f"fastfs/{tag}/{layer}", value)
                for layer, value in zip(self._names, column, strict=False)
                if _shown(quantity, value)
            ]
        return _event(Summary(value=values), record.step, record.time) if values else None

    def _append(self, events: Sequence[Event]) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.logdir}: this sink is closed")
        frames = io.BytesIO()
        writer = RecordWriter(frames)
        for event in events:
            writer.write(event.SerializeToString())
        data = frames.getbuffer()
        sent = 0
        try:
            while sent < len(data):
                sent += os.pwrite(self._descriptor, data[sent:], self._size + sent)
        except OSError:
            os.ftruncate(self._descriptor, self._size)  # the file is this sink's own
            raise
        self._size += sent


def _shown(name: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value) and name not in _LEFT_OUT


def _scalar(tag: str, value: Any) -> Any:
    return Summary.Value(tag=tag, simple_value=float(value))


def _event(summary: Any, step: int, wall_time: float) -> Event:
    return Event(summary=summary, step=step, wall_time=wall_time)
