"""What is on disk after a process was killed, forked or exited without closing its monitor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastfs

ROOT = str(Path(__file__).parents[2])


def run(script: str, *arguments: Any, status: int = 0, timeout: int = 300) -> Any:
    """Runs a script in a new interpreter that can import the helpers of the tests."""
    head = f"import sys; sys.path.insert(0, {ROOT!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == status, done.stderr
    return done


# Kills children that record to three files, at random moments; prints what each had been given, and when.
KILLS = """
    import json, os, random, signal, time
    from tests.helpers.record_cases import *
    from fastfs._record.writing.recorder import Recorder
    from fastfs._record.sinks.parquet_sink import ParquetSink
    from fastfs._record.sinks.targets import as_sink
    from fastfs._record.sinks.tensorboard_sink import TensorBoardSink

    folder, kills = sys.argv[1], int(sys.argv[2])

    def train(path, pipe):
        sinks = [as_sink(path + "/a.jsonl"), ParquetSink(path + "/a.parquet", part_seconds=0.05),
                 TensorBoardSink(path + "/tb")]
        one = Recorder(sinks, head(), alerts=(), flush_seconds=0.05, capacity=4096)
        for step in range(1_000_000):
            one.push(payload(step, 40), decode)
            one.poll()
            os.write(pipe, f"{step} {time.time()}\\n".encode())
            time.sleep(0.001)

    generator = random.Random(0)
    for number in range(kills):
        path = f"{folder}/{number}"
        os.mkdir(path)
        out, into = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(out)
                train(path, into)
            finally:
                os._exit(1)
        os.close(into)
        with os.fdopen(out) as file:
            first = file.readline()
            time.sleep(generator.random() * (2.5 if number % 5 == 0 else 0.5))
            os.kill(child, signal.SIGKILL)
            killed = time.time()
            lines = [first, *file]
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        given = [line.split() for line in lines if line.endswith("\\n")]
        with open(path + "/given.json", "w") as file:
            json.dump({"killed": killed, "given": [(int(s), float(t)) for s, t in given]}, file)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_every_file_can_be_read_and_has_what_was_due(tmp_path: Path) -> None:
    kills = 25
    run(KILLS, tmp_path, kills)
    total = 0
    for number in range(kills):
        folder = tmp_path / str(number)
        told = json.loads((folder / "given.json").read_text())
        # A row is due after 0.05 s (twice that for Parquet); the rest of the time is for a busy machine to write it.
        due = [step for step, time in told["given"] if time < told["killed"] - 1.5]
        events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
        events.Reload()
        found = {
            "jsonl": fastfs.load(folder / "a.jsonl")["step"].unique().tolist(),
            "parquet": fastfs.load(folder / "a.parquet")["step"].unique().tolist(),
            "tensorboard": [e.step for e in events.Scalars("fastfs/loss")] if events.Tags()["scalars"] else [],
        }
        for name, steps in found.items():
            assert steps == list(range(len(steps))), (number, name)
            assert len(steps) >= len(due), (number, name)
            total += len(steps)
    assert total > 10 * kills


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_that_goes_on_has_every_step_once(tmp_path: Path) -> None:
    script = """
        import os, signal
        from tests.helpers.record_cases import *
        from fastfs._record.writing.recorder import Recorder
        from fastfs._record.sinks.targets import as_sink
        folder, start, resumed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resumed"
        header = head(resumed_at=start) if resumed else head()
        sinks = [as_sink(folder + "/a.jsonl"), as_sink(folder + "/a.parquet")]
        one = Recorder(sinks, header, alerts=(), flush_seconds=60.0)
        for step in range(start, start + 10):
            one.push(payload(step), decode)
            if step == start + 7:
                assert one.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run(script, tmp_path, 0, "new", status=-signal.SIGKILL)
    run(script, tmp_path, 5, "resumed", status=-signal.SIGKILL)
    run(script, tmp_path, 13, "resumed", status=-signal.SIGKILL)
    for name in ("a.jsonl", "a.parquet"):
        table = fastfs.load(tmp_path / name)
        assert table["step"].tolist() == [step for step in range(21) for _ in range(4)], name
        assert table["run"].unique().tolist() == ["a"]
        assert [header.get("resumed_at") for header in table.attrs["headers"]] == [None, 5, 13]


@pytest.mark.slow
def test_what_waits_is_written_when_the_interpreter_exits(tmp_path: Path) -> None:
    script = """
        from tests.helpers.record_cases import *
        from fastfs._record.writing.recorder import Recorder
        from fastfs._record.sinks.targets import as_sink
        folder = sys.argv[1]
        sinks = [as_sink(folder + "/a.jsonl"), as_sink(folder + "/a.parquet"), as_sink("tensorboard:" + folder)]
        one = Recorder(sinks, head(), flush_seconds=600.0)
        for step in range(5):
            one.push(payload(step), decode)
        if sys.argv[2] == "raise":
            raise KeyError("the training failed")
    """
    for way, status in (("return", 0), ("raise", 1)):
        folder = tmp_path / way
        folder.mkdir()
        run(script, folder, way, status=status)
        for name in ("a.jsonl", "a.parquet"):
            assert fastfs.load(folder / name)["step"].unique().tolist() == [0, 1, 2, 3, 4]


def test_a_sink_that_hangs_does_not_keep_the_interpreter(tmp_path: Path) -> None:
    script = """
        import time
        import fastfs._record.writing.recorder as record
        from tests.helpers.record_cases import *
        record._EXIT_SECONDS = 0.2
        class Hanging(Collecting):
            def write(self, records):
                time.sleep(1000)
        one = record.Recorder([Hanging()], head(), flush_seconds=0.0)
        one.push(payload(0), decode)
    """
    done = run(script, timeout=60)
    assert "the sinks did not finish within 0.2 s" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_writes_nor_hangs(tmp_path: Path) -> None:
    script = """
        import os, threading, time, warnings
        from tests.helpers.record_cases import *
        from fastfs._record.writing.recorder import Recorder
        from fastfs._record.sinks.targets import as_sink
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 deprecates forks with threads
        one = Recorder([as_sink(sys.argv[1] + "/a.jsonl")], head(), flush_seconds=0.0)
        late = payload(10_000)  # before the forks: torch does not support new tensors in a child of a threaded process
        stop = threading.Event()
        def push():
            step = 0
            while not stop.is_set():
                one.push(payload(step), decode)
                step += 1
                time.sleep(0.002)
            print("pushed", step)
        thread = threading.Thread(target=push)
        thread.start()
        for number in range(8):  # at any moment, also while a lock is held
            child = os.fork()
            if not child:
                one.push(late, decode)
                one.put(measured(10_001))
                one.poll()
                assert one.flush() is True
                one.state_dict() if number % 2 else one.close()
                if number == 0:
                    del one
                sys.exit(0) if number < 4 else os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        thread.join()
        one.close()
    """
    done = run(script, tmp_path, timeout=120)
    (pushed,) = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("pushed")]
    assert fastfs.load(tmp_path / "a.jsonl")["step"].unique().tolist() == list(range(pushed))
    assert (tmp_path / "a.jsonl").read_bytes().count(b'"header"') == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_of_a_data_loader_leave_the_record_alone(tmp_path: Path) -> None:
    script = """
        import torch, warnings
        from tests.helpers.record_cases import *
        from fastfs._record.writing.recorder import Recorder
        from fastfs._record.sinks.targets import as_sink
        warnings.simplefilter("ignore", DeprecationWarning)
        one = Recorder([as_sink(sys.argv[1] + "/a.jsonl")], head(), flush_seconds=0.0)
        data = torch.utils.data.TensorDataset(torch.arange(40))
        loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
        for step, _ in enumerate(loader):
            one.push(payload(step), decode)
            one.poll()
        one.close()
    """
    run(script, tmp_path, timeout=120)
    assert fastfs.load(tmp_path / "a.jsonl")["step"].unique().tolist() == list(range(10))
