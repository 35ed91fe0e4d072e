"""Sinks that hang, fail, recover or never close: what the record loses, and that training is not affected."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfs
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.writing.alert_rules import Finding
from fastfs._record.writing.recorder import Recorder
from fastfs.monitor import Record
from tests.helpers.record_cases import SOON, Collecting, decode, head, measured, payload, recorder, until


def test_a_hanging_sink_drops_records_without_time_or_memory() -> None:
    sink = Collecting()
    sink.gate.clear()
    one = recorder(sink, capacity=400, flush_seconds=0.0)
    one.push(payload(0), decode)
    assert sink.entered.wait(SOON)
    start = time.perf_counter()
    for step in range(1, 1000):
        one.push(payload(step), decode)
    assert time.perf_counter() - start < 5.0
    with pytest.warns(RuntimeWarning, match="rows are dropped because the sinks are too slow") as caught:
        assert not one.flush(timeout=0.05)
    assert len(caught) == 1
    assert one.dropped == 999 - 100
    sink.gate.set()
    assert one.flush()
    assert sink.steps == list(range(101))
    (told,) = sink.of("alert")
    assert told.scalars["rule"] == "dropped"
    assert told.scalars["value"] == one.dropped
    one.push(payload(1000), decode)
    one.close()
    assert sink.steps[-1] == 1000


@pytest.mark.parametrize("then", ["push", "flush", "close"])
def test_an_interrupt_that_leaves_the_lock_held_blocks_nothing(then: str) -> None:
    """It may arrive after the last line of a ``with`` block and before the lock is released."""
    sink = Collecting()
    one = recorder(sink, flush_seconds=0.0)
    one.push(payload(0), decode)
    one._writer._lock.inner.acquire()
    if then == "push":
        one.push(payload(1), decode)
        until(lambda: sink.steps == [0, 1])
    elif then == "flush":
        assert one.flush(timeout=SOON)
    one.close(timeout=SOON)
    assert sink.steps == ([0, 1] if then == "push" else [0])


def test_close_does_not_wait_for_ever() -> None:
    sink = Collecting()
    sink.gate.clear()
    one = recorder(sink, flush_seconds=0.0)
    one.push(payload(0), decode)
    assert sink.entered.wait(SOON)
    with pytest.warns(RuntimeWarning, match=r"did not finish within 0.1 s: about \d+ records are not written"):
        one.close(timeout=0.1)
    sink.gate.set()
    until(lambda: sink.closed == 1)
    assert sink.steps == [0]


def test_a_failing_sink_warns_once_and_is_retried_and_others_go_on() -> None:
    bad, good = Collecting(), Collecting()
    bad.error = OSError(28, "No space left on device")
    one = recorder(bad, good, flush_seconds=0.0)

    def steps() -> None:
        for step in range(20):
            one.push(payload(step), decode)
            until(lambda step=step: len(good.steps) == step + 1)
            one.poll()

    with pytest.warns(RuntimeWarning, match=r"Collecting failed at step 0 \(OSError.*No space left.*kept") as caught:
        steps()
    assert len(caught) == 1
    assert not one.flush()
    bad.error = None
    until(lambda: bad.steps == list(range(20)))
    assert one.flush()
    one.close()
    assert good.steps == bad.steps


def test_close_warns_of_records_that_could_not_be_written() -> None:
    bad = Collecting()
    bad.error = OSError("gone")
    one = recorder(bad)
    for step in range(5):
        one.push(payload(step), decode)
    with pytest.warns(RuntimeWarning, match="gone") as caught:
        one.close()
    assert [str(w.message).split(": ")[1] for w in caught] == [
        "Collecting failed at step 0 (OSError",
        "Collecting",
    ]
    assert "5 records could not be written (OSError: gone)" in str(caught[1].message)


def test_the_backlog_of_a_failing_sink_is_bounded() -> None:
    bad = Collecting()
    bad.error = OSError("gone")
    size = measured(0).size
    one = recorder(bad, backlog=10 * size, flush_seconds=0.0)
    for step in range(50):
        one.put(measured(step))
    with pytest.warns(RuntimeWarning, match="gone"):
        assert not one.flush()
    (queue,) = one._writer.queues
    assert queue.report() == {"sink": "Collecting", "waiting": 10, "lost": 40, "values": 10 * size}
    bad.error = None
    with pytest.warns(RuntimeWarning, match="40 records could not be written"):
        one.close()
    assert bad.steps == list(range(40, 50))


def test_a_record_that_cannot_be_written_does_not_hold_up_the_others() -> None:
    class Picky(Collecting):
        def write(self, records: Sequence[Record]) -> None:
            if any(record.step == 2 for record in records):
                raise KeyError("angle")
            super().write(records)

    sink = Picky()
    one = recorder(sink)
    for step in range(6):
        one.put(measured(step))
    with pytest.warns(RuntimeWarning, match="KeyError|1 records could not be written"):
        one.close()
    assert sink.steps == [0, 1, 3, 4, 5]


def test_an_error_in_decode_loses_its_row_only() -> None:
    def broken(host: Any) -> None:
        raise ZeroDivisionError("in decode")

    sink = Collecting()
    one = recorder(sink)
    for step in range(6):
        one.push(payload(step), broken if step in (2, 3) else decode)
    with pytest.warns(RuntimeWarning, match="could not be decoded and is lost .ZeroDivisionError: in decode") as caught:
        one.close()
    assert len(caught) == 1
    assert sink.steps == [0, 1, 4, 5]


def test_warnings_are_raised_in_the_training_thread() -> None:
    sink = Collecting()
    sink.error = OSError("gone")
    one = recorder(sink, flush_seconds=0.0)
    one.put(measured(0))
    until(lambda: len(one._messages) == 1)
    with pytest.raises(RuntimeWarning, match="gone"):  # an error: the tests run with warnings as errors
        one.poll()
    sink.error = None
    one.close()


def test_a_sink_that_does_not_open_leaves_the_others_closed() -> None:
    class Bad(Collecting):
        def open(self, header: Mapping[str, Any]) -> None:
            raise OSError("no open")

    first, second, third = Collecting(), Bad(), Collecting()
    threads = threading.active_count()
    with pytest.raises(OSError, match="no open"):
        recorder(first, second, third)
    assert (first.closed, second.closed, third.headers) == (1, 0, [])
    assert threading.active_count() == threads


# Exceptions that do not derive from Exception end neither the thread nor training, and do not affect other sinks


class Panic(BaseException):
    """Derives from BaseException, like the exceptions of Rust extensions."""


class Speechless(Exception):
    def __str__(self) -> str:
        raise Panic


RAISED = [Panic("in Rust"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Speechless()]


class Raising(Collecting):
    """Raises in one of its methods."""

    def __init__(self, method: Any, error: Any) -> None:
        super().__init__()
        self.method, self.raised = method, error

    def _raise(self, method: Any) -> None:
        if method == self.method:
            raise self.raised

    def write(self, records: Sequence[Record]) -> None:
        self._raise("write")
        super().write(records)

    def flush(self) -> None:
        self._raise("flush")

    def due(self) -> Any:
        self._raise("due")
        return 0.0 if self.method == "flush" and self.records else None

    def close(self) -> None:
        super().close()
        self._raise("close")


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["write", "flush", "due", "close"])
def test_other_sinks_get_every_row_whatever_a_sink_raises(method: str, error: Any) -> None:
    bad, good = Raising(method, error), Collecting()
    one = recorder(bad, good, flush_seconds=0.0)

    def run() -> None:
        for step in range(10):
            one.push(payload(step), decode)
            until(lambda step=step: len(good.steps) == step + 1)
            one.poll()
        assert one._writer._thread.is_alive()
        one.close()

    with pytest.warns(RuntimeWarning, match=f"{type(error).__name__}: ") as told:
        run()
    assert good.steps == list(range(10))
    assert (bad.closed, good.closed) == (1, 1)
    assert sum("Raising failed" in str(w.message) for w in told) == (method != "close")
    assert bad.steps == ([] if method == "write" else list(range(10)))


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_later_rows_are_written_whatever_decode_or_a_rule_raises(error: Any) -> None:
    def broken(host: Any) -> None:
        raise error

    def rule(record: Any, header: dict[str, Any]) -> None:
        raise error

    sink = Collecting()
    one = recorder(sink, alerts=[rule])
    for step in range(4):
        one.push(payload(step), broken if step == 1 else decode)
    with pytest.warns(RuntimeWarning, match=type(error).__name__) as told:
        one.close()
    assert sink.steps == [0, 2, 3]
    assert sum("could not be decoded" in str(w.message) for w in told) == 1
    assert sum("alert rule rule failed" in str(w.message) for w in told) == 1


class Odd:
    """A rule with a fixed result."""

    name, steps = "odd", 1

    def __init__(self, findings: Any) -> None:
        self.findings = findings

    def check(self, record: Any, header: dict[str, Any]) -> Any:
        return self.findings


@pytest.mark.parametrize("findings", [None, 3, {("a",): 1}, {"blocks.0": 5}, {"blocks.0": Finding("x", "text")}])
def test_a_rule_with_an_invalid_result_causes_a_warning_and_loses_nothing(findings: Any) -> None:
    sink = Collecting()
    one = recorder(sink, alerts=[Odd(findings)])
    for step in range(3):
        one.put(measured(step))
    with pytest.warns(RuntimeWarning, match="alert rule odd failed"):
        one.close()
    assert sink.steps == [0, 1, 2]


def test_texts_of_rules_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    one = Recorder(
        [JsonlSink(path)], head(), alerts=[Odd({"blocks.0": Finding(torch.tensor(2.0), "half of a pair: \ud800")})]
    )
    one.put(measured(0))
    with pytest.warns(RuntimeWarning, match="half of a pair"):
        one.close()
    (alert,) = fastfs.load(path).attrs["alerts"]
    assert (alert["value"], alert["message"]) == (2.0, "half of a pair: \\ud800")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_on_alert_may_end_training(error: Any) -> None:
    def stop(alert: Any) -> None:
        raise error

    sink = Collecting()
    one = recorder(sink, on_alert=stop, alerts=[Odd({"blocks.0": Finding(1.0, "stop")})])
    one.put(measured(0))
    with pytest.raises(error):
        one.flush()
    one.close()
    assert sink.steps == [0]


@pytest.mark.parametrize("error", [Panic("no"), ValueError("no"), Speechless()])
def test_other_exceptions_of_on_alert_become_warnings(error: Any) -> None:
    def fails(alert: Any) -> None:
        raise error

    one = recorder(Collecting(), on_alert=fails, alerts=[Odd({"blocks.0": Finding(1.0, "stop")})])
    one.put(measured(0))
    with pytest.warns(RuntimeWarning, match=f"on_alert failed .{type(error).__name__}|stop") as told:
        one.close()
    assert len(told) == 2
