"""From numbers on the device to records in the sinks, without making the device or the training loop wait."""

from __future__ import annotations

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

from fastfs._monitor.record.alerts import Alerts, checked_streaks
from fastfs._monitor.record.exception_text import in_words
from fastfs._monitor.record.record import COLUMNS, SCHEMA, Record, as_line
from fastfs._monitor.record.ring import Decode, Ring
from fastfs._monitor.record.schema import Checker
from fastfs._monitor.record.sink_queue import Outlet
from fastfs._monitor.record.sinks import Sink, to_json
from fastfs._monitor.record.writer import Message, Writer

__all__ = ["COLUMNS", "SCHEMA", "Record", "Recorder", "check_recorder_state"]

_EXIT_SECONDS = 10.0
_MESSAGES = 1000


class Recorder:
    """Takes payloads on the device and records on the host, in order, and sees to it that they reach the sinks.

        recorder = Recorder(sinks, header)
        recorder.push(payload, decode)      # a copy on the device; decode(host tensor) -> records, in another thread
        recorder.poll()                     # once a step: raises what there is to say in this thread

    ``push``, ``put`` and ``poll`` never wait: not for the device, not for a sink. If the sinks do not keep up, records
    are dropped: one warning says so, and an ``alert`` of the rule ``dropped`` in the record says how many and where.
    Errors of sinks and of ``decode`` become warnings. Memory is bounded by ``capacity``, ``most_entries`` and
    ``backlog``. A record is due at the sinks ``flush_seconds`` after it came, also while the loop rests.

    A forked child of the process (a DataLoader's worker) has no part in it: there, every method does nothing. What
    waits when the interpreter exits or the recorder is collected is written then, for ten seconds at most.

    Args:
        sinks: opened here, in order; if one fails to, those before it are closed again and take back what they made
            (``discard``, where a sink has it).
        header: the first line; holds ``run`` and ``layers``. With the ``run`` of an earlier one and ``resumed_at`` the
            run goes on.
        alerts: rules, see :mod:`fastfs._monitor.record.alerts`; the default rules if None, ``()`` for none.
        on_alert: called by :meth:`poll` in the training thread with every alert as a dictionary (``run``, ``step``,
            ``time``, ``rule``, ``layer``, ``value``, ``message``). An exception in it becomes a warning, except for
            KeyboardInterrupt, SystemExit and GeneratorExit: these are meant for the training thread.
        flush_seconds: how long a record may wait before it goes to the host and the sinks.
        capacity: float64 numbers in each of the two buffers on the device; grows only if one payload is larger.
        most_entries: payloads and records that may wait in the buffer.
        backlog: numbers that are kept for each sink that fails.
        retry_seconds: pause before a failing sink is tried again; doubles up to a minute.

    Raises:
        Exception: whatever a sink's ``open`` raises.
        TypeError: a rule that is none, or ``on_alert`` that cannot be called.
        ValueError: a setting out of range, or a header that no reader would take.
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
            outlets = [Outlet(sink, backlog, retry_seconds, self._messages.append) for sink in sinks]
            self._writer = Writer(self._ring, outlets, rules, self._messages, float(flush_seconds))
            undo.pop_all()
        self._finalizer = weakref.finalize(self, _finish, self._writer, self._pid)

    @property
    def run(self) -> str:
        """Id of the run."""
        return str(self.header["run"])

    @property
    def dropped(self) -> int:
        """Records dropped so far because the sinks did not keep up."""
        return self._writer.dropped

    @property
    def device_bytes(self) -> int:
        """Memory on the training device that recording takes, at most."""
        return self._ring.device_bytes

    def push(self, payload: Tensor, decode: Decode) -> None:
        """Copy a payload to the ring, in the order of the current stream; does not wait for anything.

        Args:
            payload: 1-D float64 tensor of any length, on any device. May be changed afterwards.
            decode: called later in the writer's thread with the payload on the host, as a tensor of its own.

        Raises:
            ValueError: not a 1-D float64 tensor, or the recorder is closed.
        """
        if payload.dim() != 1 or payload.dtype != torch.float64:
            raise ValueError(
                f"payload: expected a 1-D float64 tensor, got shape {tuple(payload.shape)} of {payload.dtype}"
            )
        if not self._forked():
            self._writer.push(payload, decode)

    def put(self, record: Record) -> None:
        """Add a record that is on the host already, in order with the payloads."""
        if not self._forked():
            self._writer.put(record)

    def poll(self) -> list[Record]:
        """Raise warnings and call ``on_alert`` for what has come up since the last call, in this thread.

        Returns:
            The alerts, most often none.
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
        """Bring everything to the sinks and wait for that.

        Returns:
            False if it took longer than ``timeout`` seconds, or a sink did not take it.
        """
        if self._forked():
            return True
        done = self._writer.flush(timeout)
        self.poll()
        return done

    def close(self, timeout: float = 30.0) -> None:
        """Write everything, close every sink, end the thread. A second call does nothing.

        Warns:
            RuntimeWarning: what could not be written or closed within ``timeout`` seconds.
        """
        if self._closed:
            return
        self._closed = True
        if not self._forked():
            _say_what_failed(self._writer, self._writer.stop(timeout), timeout, self._messages.append)
        self._finalizer.detach()  # not before: if this is interrupted, the exit of the interpreter writes the rest
        if self._forked():
            return
        self.poll()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on recording: its id and the state of the alerts. Flushes."""
        if self._forked():
            return {"run": self.run, "alerts": {}}
        self.flush()
        return {"run": self.run, "alerts": self._writer.alerts.state_dict()}

    def discard(self) -> None:
        """Close without a record: attaching failed. Sinks take back what they made, where they can.

        To be called before anything has been recorded.
        """
        if self._closed or self._forked():
            return
        self._writer.discard()
        self.close()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of the alerts. The id of the run goes into the header of a new recorder instead.

        Raises:
            ValueError: not what :meth:`state_dict` gave; the entry is named.
        """
        check_recorder_state(state)
        if not self._forked():
            self._writer.alerts.load_state_dict(state["alerts"])

    def resume(self, header: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Go on with an earlier run, before anything has been recorded: its header goes to the sinks.

        Args:
            header: with the ``run`` of the earlier one, ``resumed_at``, and ``replaces``: the run that the first
                header was for, of which no row will come.
            state: what :meth:`state_dict` gave then.
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
                text = f"fastfs.Monitor: on_alert failed ({in_words(error)})"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
        where = "" if scalars["layer"] is None else f"layer {scalars['layer']!r}: "
        text = f"fastfs.Monitor: step {record.step}: {where}{scalars['message']} [{scalars['rule']}]"
        warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _forked(self) -> bool:
        """In a child the writer's thread does not exist, and its lock may be held for ever."""
        return os.getpid() != self._pid


def check_recorder_state(state: Any) -> None:
    """Raises ValueError if that is not what :meth:`Recorder.state_dict` gives; names the entry."""
    if not isinstance(state, Mapping):
        raise ValueError(f"load_state_dict: recorder: expected a dictionary, got {type(state).__name__}")
    run = state.get("run")
    if not isinstance(run, str) or not run:
        raise ValueError(f"load_state_dict: recorder: run: expected the id of a run, got {run!r:.100}")
    try:
        checked_streaks(state.get("alerts"))
    except ValueError as error:
        raise ValueError(f"load_state_dict: recorder: {error}") from None


def _say_what_failed(writer: Writer, ended: bool, timeout: float, say: Callable[[str], None]) -> None:
    if not ended:
        say(
            f"fastfs.Monitor: the sinks did not finish within {timeout:g} s: about {writer.waiting()} records are not "
            "written."
        )
        return
    for outlet in writer.outlets:
        missing = len(outlet) + outlet.lost
        if missing or outlet.error is not None:
            error = outlet.error
            why = "" if error is None else f" ({in_words(error)})"
            say(f"fastfs.Monitor: {outlet.name}: {missing or 'some'} records could not be written{why}.")
    if writer.unclosed:
        say(f"fastfs.Monitor: could not be closed: {', '.join(writer.unclosed)}. The others are.")


def _finish(writer: Writer, pid: int) -> None:
    """At the exit of the interpreter or when the recorder is collected."""
    if os.getpid() != pid:
        return
    _say_what_failed(writer, writer.stop(_EXIT_SECONDS), _EXIT_SECONDS, writer.messages.append)
    while writer.messages:
        message = writer.messages.popleft()
        text = message if isinstance(message, str) else f"fastfs.Monitor: {message.scalars['message']}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
