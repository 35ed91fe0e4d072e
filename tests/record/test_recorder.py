"""From the device to the sinks: without waiting, with bounded memory, in order."""

from __future__ import annotations

import gc
import resource
import threading
import time
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ops.graphs import nothing_waits
from fastfs._record.record import Record
from fastfs._record.writing.recorder import Recorder
from tests.helpers.busy_device import occupied
from tests.helpers.record_cases import Collecting, decode, head, measured, payload, recorder, until


class NoItem(TorchDispatchMode):
    """Refuses operations that make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), func
        assert "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_payloads_and_records_arrive_in_order() -> None:
    sink = Collecting()
    one = recorder(sink)
    for step in range(0, 100, 2):
        one.push(payload(step, size=1 + step % 7), decode)
        one.put(measured(step + 1))
        assert one.poll() == []
    assert sink.steps == []  # not due yet
    assert one.flush()
    assert sink.steps == list(range(100))
    one.put(Record("skipped", 100, 0.0, {"reason": "overflow"}))
    one.close()
    one.close()
    assert sink.records[-1].kind == "skipped"
    assert sink.closed == 1
    assert sink.headers == [head()]
    with pytest.raises(ValueError, match="closed"):
        one.put(measured(0))


def test_rows_are_written_when_due_even_if_the_loop_pauses() -> None:
    sink = Collecting()
    one = recorder(sink, flush_seconds=0.05)
    one.push(payload(3), decode)
    until(lambda: sink.steps == [3])
    one.push(payload(4), decode)
    until(lambda: sink.steps == [3, 4])
    one.close()


def test_a_half_full_ring_is_emptied() -> None:
    sink = Collecting()
    one = recorder(sink, capacity=64)
    for step in range(8):
        one.push(payload(step), decode)
    until(lambda: sink.steps == list(range(8)))
    one.close()


def test_a_payload_larger_than_the_ring_makes_it_grow() -> None:
    sink = Collecting()
    one = recorder(sink, capacity=10)
    before = one.device_bytes
    one.push(payload(0, size=4), decode)
    one.push(payload(1, size=1000), decode)
    one.push(payload(2, size=4), decode)
    one.close()
    assert sink.steps == [0, 1, 2]
    assert one.device_bytes > before


def test_a_payload_can_be_changed_after_it_was_pushed() -> None:
    sink = Collecting()
    one = recorder(sink)
    same = payload(0)
    for step in range(5):
        same.fill_(step)
        one.push(same, decode)
    one.close()
    assert sink.steps == list(range(5))


def test_push_works_in_inference_mode_and_with_gradients() -> None:
    sink = Collecting()
    one = recorder(sink, capacity=16)
    with torch.inference_mode():
        one.push(payload(0), decode)
    one.push(payload(1).requires_grad_(), decode)
    assert one.flush()
    with torch.inference_mode():
        one.push(payload(2, size=40), decode)
    one.push(payload(3), decode)
    one.close()
    assert sink.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64)])
def test_other_payloads_are_refused(bad: Any) -> None:
    one = recorder()
    with pytest.raises(ValueError, match="expected a 1-D float64 tensor"):
        one.push(bad, decode)
    one.close()


@pytest.mark.parametrize("options", [{"flush_seconds": -1.0}, {"capacity": 0}, {"most_entries": 0}, {"backlog": 0}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected"):
        recorder(**options)


def test_nothing_in_the_step_path_waits_for_a_number() -> None:
    sink = Collecting()
    one = recorder(sink, capacity=32, flush_seconds=0.0)
    with NoItem():
        for step in range(20):
            one.push(payload(step), decode)
            one.poll()
            time.sleep(0.002)
    one.close()
    assert sink.steps == list(range(20))


@pytest.mark.gpu
def test_nothing_in_the_step_path_synchronises_the_device() -> None:
    sink = Collecting()
    one = recorder(sink, capacity=1000, flush_seconds=0.01)
    values = [payload(step, 100, "cuda") for step in range(200)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with nothing_waits():
        for step, value in enumerate(values):
            with torch.cuda.stream(side if step % 3 else torch.cuda.current_stream()):
                one.push(value, decode)
            one.poll()
            time.sleep(0.001)
    one.close()
    assert sink.steps == list(range(200))


@pytest.mark.gpu
def test_push_does_not_wait_for_a_busy_device() -> None:
    sink = Collecting()
    one = recorder(sink, flush_seconds=0.0)
    one.push(payload(0, device="cuda"), decode)
    torch.cuda.synchronize()
    free = occupied(1.0)
    value = payload(1, device="cuda")
    one.push(value, decode)
    one.poll()
    assert not free.query(), "the device was free before push and poll returned"
    one.close()
    assert sink.steps == [0, 1]


# Threads, several recorders, memory


def test_two_recorders_are_independent() -> None:
    sinks = Collecting(), Collecting()
    sinks[0].gate.clear()
    first, second = recorder(sinks[0], flush_seconds=0.0), recorder(sinks[1], flush_seconds=0.0)
    for step in range(50):
        first.push(payload(step), decode)
        second.push(payload(step + 1000), decode)
    second.close()
    assert sinks[1].steps == list(range(1000, 1050))
    sinks[0].gate.set()
    first.close()
    assert sinks[0].steps == list(range(50))


def test_many_threads_may_push_while_the_writer_writes() -> None:
    sink = Collecting()
    one = recorder(sink, capacity=1 << 12, flush_seconds=0.0)

    def work(start: Any) -> None:
        for step in range(start, start + 300):
            one.push(payload(step, size=1 + step % 5), decode)
            if step % 50 == 0:
                one.poll()

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.flush()
    assert one.dropped == 0
    one.close()
    assert sorted(sink.steps) == [1000 * i + step for i in range(4) for step in range(300)]
    for i in range(4):
        own = [step for step in sink.steps if step // 1000 == i]
        assert own == sorted(own)


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_steps(tmp_path: Path) -> None:
    columns = 5

    def wide(host: Any) -> list[Any]:
        return [Record("measured", 0, 0.0, {}, {f"c{i}": host[:10].tolist() for i in range(columns)})]

    one = Recorder(
        [_jsonl(tmp_path / "a.jsonl"), Collectless()],
        head(layers=[f"l{i}" for i in range(10)], groups={}),
        alerts=None,
        flush_seconds=0.05,
        capacity=20_000,
    )
    value = torch.rand(200, dtype=torch.float64)

    def steps(count: Any) -> None:
        for _ in range(count):
            one.push(value, wide)
            one.poll()
            while one._writer.waiting() > 60:
                time.sleep(0.002)
        one.flush()

    steps(1000)
    gc.collect()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        first, _ = tracemalloc.get_traced_memory()
        steps(9000)
        gc.collect()
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last - first < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss < 60_000  # KB, including the memory of tracemalloc
    buffers = [buffer.data.numel() for buffer in (one._ring._active, one._ring._spare) if buffer is not None]
    assert 1 <= len(buffers) <= 2
    assert set(buffers) == {20_000}
    assert one.device_bytes == 2 * 8 * 20_000
    assert one.dropped == 0
    one.close()
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 10_001


class Collectless(Collecting):
    def write(self, records: Sequence[Record]) -> None:
        pass


def _jsonl(path: Any) -> Any:
    from fastfs._record.sinks.jsonl_sink import JsonlSink

    return JsonlSink(path)


def test_waiting_records_are_written_when_the_recorder_is_collected() -> None:
    sink = Collecting()
    one = recorder(sink)
    one.push(payload(7), decode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del one
        gc.collect()
    assert sink.steps == [7]
    assert sink.closed == 1
