"""The interface of the monitor to its record: payloads and records in, warnings and alerts out."""

from __future__ import annotations

import atexit
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastfs._record.encoding import to_json
from fastfs._record.exception_text import exception_text
from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.exchange import Alone, Collector
from fastfs._record.ranks.part import RankPart
from fastfs._record.record import Record, as_line
from fastfs._record.schema import Checker
from fastfs._record.sinks.protocol import Sink
from fastfs._record.writing.alerts import Alerts, checked_streaks
from fastfs._record.writing.ring import Decode, Ring
from fastfs._record.writing.sink_queue import SinkQueue
from fastfs._record.writing.writer import Message, Writer

__all__ = ["Recorder", "check_recorder_state"]

_EXIT_SECONDS = 10.0
_MESSAGES = 1000


class Recorder:
    """Brings payloads on the device and records on the host to the sinks, in order and in the background.

    Usage::

        recorder = Recorder(sinks, header)
        recorder.push(payload, decode)      # copies on the device; decode(host tensor) -> records, in another thread
        recorder.poll()                     # once per step: issues pending warnings in this thread

    ``push``, ``put`` and ``poll`` wait neither for the device nor for a sink. If the sinks are too slow, records are
    dropped: one warning says so, and an ``alert`` of the rule ``dropped`` in the record says how many and where.
    Errors of sinks and of ``decode`` become warnings. Memory is bounded by ``capacity``, ``most_entries`` and
    ``backlog``. A record reaches the sinks within ``flush_seconds``, even if the training loop pauses.

    In a forked child of the process (a DataLoader's worker), every method does nothing. Records that wait when the
    interpreter exits or the recorder is collected are written then, for at most ten seconds.

    Args:
        sinks: opened in order. If one fails to open, the previous ones remove what they created (``discard``) or, if
            they have no such method, are closed.
        header: with ``run`` and ``layers``. With the ``run`` of an earlier header and ``resumed_at``, it continues
            that run.
        alerts: rules, see :class:`Alerts`; the default rules if None, ``()`` for none.
        on_alert: called by :meth:`poll` in the training thread with every alert as a dictionary (``run``, ``step``,
            ``time``, ``rule``, ``layer``, ``value``, ``message``). Its exceptions become warnings, except
            KeyboardInterrupt, SystemExit and GeneratorExit, which are raised in the training thread.
        flush_seconds: the longest time that a record waits before it goes to the host and the sinks.
        capacity: float64 numbers in each of the two buffers on the device; grows only if one payload is larger.
        most_entries: payloads and records that may wait in the buffer.
        backlog: numbers that are kept for each failing sink.
        retry_seconds: first pause before a failing sink is retried; doubles up to a minute.
        collector: makes, from a function that takes warnings, what turns the parts of the ranks into records; by
            default :class:`Alone`, for a run of one process.

    Raises:
        Exception: whatever a sink's ``open`` raises.
        TypeError: an entry of ``alerts`` that is not a rule, or ``on_alert`` is not callable.
        ValueError: a setting is out of range, or readers would not accept the header.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        header: Mapping[str, Any],
        *,
        alerts: Sequence[Any] | None = None,
        on_alert: Callable[[dict[str, Any]], object] | None = None,
        flush_seconds: float = 5.0,
        capacity: int = 1 << 19,
        most_entries: int = 8192,
        backlog: int = 500_000,
        retry_seconds: float = 1.0,
        collector: Callable[[Callable[[str], None]], Collector] | None = None,
    ) -> None:
        for name, seconds in (("flush_seconds", flush_seconds), ("retry_seconds", retry_seconds)):
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if not number or not math.isfinite(seconds) or seconds < 0:
                raise ValueError(f"{name}: expected a finite number of seconds >= 0, got {seconds!r}")
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"on_alert: expected a function of an alert, got {on_alert!r}")
        for name, value in (("capacity", capacity), ("most_entries", most_entries), ("backlog", backlog)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        Checker().check_bytes(to_json(dict(header)).encode())
        self.header = dict(header)
        self._on_alert = on_alert
        self._messages: deque[Message] = deque(maxlen=_MESSAGES)
        self._pid = os.getpid()
        self._closed = False
        self._ring = Ring(capacity, most_entries)
        rules = Alerts(alerts, self.header)
        with ExitStack() as undo:
            for sink in sinks:
                sink.open(self.header)
                undo.callback(getattr(sink, "discard", sink.close))
            queues = [SinkQueue(sink, backlog, retry_seconds, self._messages.append) for sink in sinks]
            collects = Alone(Assembler(self.header)) if collector is None else collector(self._messages.append)
            self._writer = Writer(self._ring, collects, queues, rules, self._messages, float(flush_seconds))
            undo.pop_all()
        self._finalizer = weakref.finalize(self, _finish, self._writer, self._pid)
        atexit.register(self._finalizer)  # before what existed before this recorder, such as a tracker's run, ends
        for sink in sinks:
            if (bind := getattr(sink, "bind", None)) is not None:
                bind(self._writer.flush)

    @property
    def run(self) -> str:
        """The id of the run."""
        return str(self.header["run"])

    @property
    def dropped(self) -> int:
        """Number of records dropped so far because the sinks were too slow."""
        return self._writer.dropped

    @property
    def device_bytes(self) -> int:
        """Upper bound of the memory on the training device."""
        return self._ring.device_bytes

    def push(self, payload: Tensor, decode: Decode) -> None:
        """Copies a payload to the ring on the current stream, without waiting.

        Args:
            payload: 1-D float64 tensor of any length, on any device. It may be changed afterwards.
            decode: called later in the writer's thread with a copy of the payload on the host.

        Raises:
            ValueError: not a 1-D float64 tensor, or the recorder is closed.
        """
        if payload.dim() != 1 or payload.dtype != torch.float64:
            raise ValueError(
                f"payload: expected a 1-D float64 tensor, got shape {tuple(payload.shape)} of {payload.dtype}"
            )
        if not self._forked():
            self._writer.push(payload, decode)

    def put(self, record: RankPart | Record) -> None:
        """Adds a part or record that is on the host already, in order with the payloads."""
        if not self._forked():
            self._writer.put(record)

    def poll(self) -> list[Record]:
        """Issues the warnings and calls ``on_alert`` for the alerts since the last call, in this thread.

        Returns:
            The alerts, usually none.
        """
        if not self._messages or self._forked():
            return []
        alerts: list[Record] = []
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Record):
                alerts.append(message)
                self._alert(message)
            else:
                warnings.warn(message, RuntimeWarning, stacklevel=3)
        return alerts

    def flush(self, timeout: float = 30.0) -> bool:
        """Waits until the sinks have everything.

        Returns:
            False after ``timeout`` seconds, or if a sink failed.
        """
        if self._forked():
            return True
        done = self._writer.flush(timeout)
        self.poll()
        return done

    def close(self, timeout: float = 30.0) -> None:
        """Writes everything, closes the sinks and ends the thread. A second call does nothing.

        Warns:
            RuntimeWarning: something could not be written or closed within ``timeout`` seconds.
        """
        if self._closed:
            return
        self._closed = True
        if not self._forked():
            _report_failures(self._writer, self._writer.stop(timeout), timeout, self._messages.append)
        atexit.unregister(self._finalizer)
        self._finalizer.detach()  # after stopping: if that is interrupted, the interpreter writes the rest at exit
        if self._forked():
            return
        self.poll()

    def state_dict(self) -> dict[str, Any]:
        """Flushes, and returns what a run needs to continue: its id and the state of the alerts."""
        if self._forked():
            return {"run": self.run, "alerts": {}}
        self.flush()
        return {"run": self.run, "alerts": self._writer.alerts.state_dict()}

    def discard(self) -> None:
        """Closes the sinks and removes what they created, because attaching failed.

        Must be called before anything is recorded.
        """
        if self._closed or self._forked():
            return
        self._writer.discard()
        self.close()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of the alerts. The id of the run belongs in the header of a new recorder instead.

        Raises:
            ValueError: not a state of :meth:`state_dict`; the message names the entry.
        """
        check_recorder_state(state)
        if not self._forked():
            self._writer.alerts.load_state_dict(state["alerts"])

    def resume(self, header: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Continues an earlier run. Must be called before anything is recorded.

        Args:
            header: for the sinks, with the ``run`` of the earlier one, ``resumed_at``, and ``replaces``: the run of
                this recorder's first header, which will have no rows.
            state: of :meth:`state_dict` of the earlier run.
        """
        check_recorder_state(state)
        self.header = dict(header)
        self._writer.reopen(self.header)
        self.load_state_dict(state)

    def _alert(self, record: Record) -> None:
        scalars = record.scalars
        if self._on_alert is not None:
            try:
                self._on_alert(as_line(record, self.run))
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:
                text = f"fastfs.Monitor: on_alert failed ({exception_text(error)})"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
        where = "" if scalars["layer"] is None else f"layer {scalars['layer']!r}: "
        text = f"fastfs.Monitor: step {record.step}: {where}{scalars['message']} [{scalars['rule']}]"
        warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _forked(self) -> bool:
        """Whether this is a forked child, where the writer's thread does not exist and its lock may stay locked."""
        return os.getpid() != self._pid


def check_recorder_state(state: Any) -> None:
    """Checks a state of :meth:`Recorder.state_dict`.

    Raises:
        ValueError: not such a state; the message names the entry.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"load_state_dict: recorder: expected a dictionary, got {type(state).__name__}")
    run = state.get("run")
    if not isinstance(run, str) or not run:
        raise ValueError(f"load_state_dict: recorder: run: expected the id of a run, got {run!r:.100}")
    try:
        checked_streaks(state.get("alerts"))
    except ValueError as error:
        raise ValueError(f"load_state_dict: recorder: {error}") from None


def _report_failures(writer: Writer, ended: bool, timeout: float, warn: Callable[[str], None]) -> None:
    if not ended:
        warn(
            f"fastfs.Monitor: the sinks did not finish within {timeout:g} s: about {writer.waiting()} records are not "
            "written."
        )
        return
    for queue in writer.queues:
        missing = len(queue) + queue.lost
        if missing or queue.error is not None:
            error = queue.error
            why = "" if error is None else f" ({exception_text(error)})"
            warn(f"fastfs.Monitor: {queue.name}: {missing or 'some'} records could not be written{why}.")
    if writer.unclosed:
        warn(f"fastfs.Monitor: could not be closed: {', '.join(writer.unclosed)}. The others were closed.")


def _finish(writer: Writer, pid: int) -> None:
    """Runs when the interpreter exits or the recorder is collected."""
    if os.getpid() != pid:
        return
    _report_failures(writer, writer.stop(_EXIT_SECONDS), _EXIT_SECONDS, writer.messages.append)
    while writer.messages:
        message = writer.messages.popleft()
        text = message if isinstance(message, str) else f"fastfs.Monitor: {message.scalars['message']}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
