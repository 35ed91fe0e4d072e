"""Records as TensorBoard scalars. Needs the extra ``tensorboard``."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfs._record.columns import COLUMNS, QUANTITIES, ROW_KINDS
from fastfs._record.record import Record
from fastfs._record.schema import row_names
from fastfs._record.sinks.folders import make_folders, remove_folders

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import RecordWriter
    from torch.utils.tensorboard.summary import custom_scalars
    from torch.utils.tensorboard.summary import text as text_summary
except ImportError as missing:
    raise ImportError('fastfs: a TensorBoard sink needs tensorboard: pip install "fastfs[tensorboard]"') from missing

__all__ = ["TensorBoardSink"]

_HIDDEN = frozenset(column.name for column in COLUMNS if not column.tensorboard)


class TensorBoardSink:
    """Writes scalars ``fastfs/<column>/<layer>`` with their step and time; alerts and skipped steps as text.

    Each batch of records is a single write of whole events to the sink's own file, so that a killed process leaves at
    worst an event that readers skip. A write that fails in the middle is undone before it is tried again. A resumed run
    gets a further file, and TensorBoard drops the steps that it repeats. On the page "Custom Scalars", one chart
    for each quantity shows all layers, and another one all groups.

    Args:
        logdir: created if missing; ``tensorboard --logdir`` with it or a parent folder shows the run.
        predicted: whether to write predicted records, too: their ``update_rms`` as ``predicted_update_rms``, other
            columns under the names that measured records use. Event files then grow quickly.
        layout: whether to write that page. TensorBoard shows one such page for each folder, so leave it out if another
            writer writes its own.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, logdir: str | os.PathLike[str], *, predicted: bool = False, layout: bool = True) -> None:
        self.logdir = Path(logdir)
        self._layout = layout
        self._predicted = predicted
        self._descriptor: int | None = None
        self._size = 0
        self._names: list[str] = []
        self._files: list[Path] = []
        self._made = make_folders(self.logdir)

    def open(self, header: Mapping[str, Any]) -> None:
        self.close()  # a resumed run gets its own file
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
        if self._layout:
            events.append(_event(custom_scalars(_charts(header)), step or 0, time.time()))
        self._append(events)

    def write(self, records: Sequence[Record]) -> None:
        self._append([event for record in records if (event := self._event(record)) is not None])

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        """Closes the sink and removes what it created."""
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
        if record.kind not in ROW_KINDS or (record.kind == "predicted" and not self._predicted):
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
            os.ftruncate(self._descriptor, self._size)  # nobody else writes to this file
            raise
        self._size += sent


def _charts(header: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Returns, for each kind of rows and each quantity, a chart of the tags that match a pattern."""
    groups = "|".join(map(re.escape, header.get("groups") or ()))
    patterns = {
        "layers": f"(?!(?:{groups})$).+" if groups else ".+",
        **({"groups": f"(?:{groups})$"} if groups else {}),
    }
    return {
        f"fastfs: {rows}": {
            column.display.label: ("Multiline", [f"^fastfs/{column.name}/{pattern}"])
            for column in QUANTITIES
            if column.display
        }
        for rows, pattern in patterns.items()
    }


def _shown(name: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value) and name not in _HIDDEN


def _scalar(tag: str, value: Any) -> Any:
    return Summary.Value(tag=tag, simple_value=float(value))


def _event(summary: Any, step: int, wall_time: float) -> Event:
    return Event(summary=summary, step=step, wall_time=wall_time)
