"""Long runs, killed runs, copies, several monitors at once, monitors closed at odd moments."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastfs
from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs.models import ResNet
from tests.helpers.monitor_cases import measured_into, rows, sgd, train, watched

ROOT = str(Path(__file__).parents[2])


@pytest.mark.slow
def test_nothing_grows_over_ten_thousand_steps(tmp_path: Path, threads: Any) -> None:
    threads(1)
    model = ResNet(8, 4, 1, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = fastfs.Monitor(
        model,
        optimizer,
        layers=["blocks.0"],
        every=50,
        aligned_every=1,
        sinks=[tmp_path / "a.jsonl", tmp_path / "a.parquet"],
        flush_seconds=0.1,
        alerts=(),
    )
    x, y = rows(0)

    def steps(number: Any) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    def size() -> tuple[Any, ...]:
        assert monitor.flush()
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
        waiting = monitor._recorder._writer.waiting() + len(monitor._recorder._messages)
        return len(objects), tensors, tracemalloc.get_traced_memory()[0], waiting

    steps(1000)
    tracemalloc.start()
    try:
        steps(1000)
        early = size()
        steps(8000)
        late = size()
    finally:
        tracemalloc.stop()
    device_bytes = monitor._recorder.device_bytes
    monitor.close()
    assert late[0] <= early[0] + 50, "Python objects"
    assert late[1] <= early[1], "tensors"
    assert late[2] <= early[2] + 100_000, "bytes"  # 12 a step are allowed; a record takes a hundred times that
    assert late[3] == early[3] == 0, "records that wait"
    assert device_bytes <= 2**24
    table = fastfs.load(tmp_path / "a.jsonl")
    assert table["step"].tolist() == list(range(10_000))
    assert (table["kind"] == "measured").sum() == 200
    assert fastfs.load(tmp_path / "a.parquet")["step"].tolist() == list(range(10_000))


def held_bytes() -> Any:
    gc.collect()
    return sum(passed.bytes for passed in gc.get_objects() if issubclass(type(passed), ForwardCapture))


# Trains until it is killed; says which step it has reached.
KILLED = """
    import sys
    import torch
    import fastfs
    from fastfs.models import ResNet
    from tests.helpers.monitor_cases import sgd, train, rows

    torch.set_num_threads(1)
    folder = sys.argv[1]
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    sinks = [folder + "/a.jsonl", folder + "/a.parquet", "tensorboard:" + folder + "/tb"]
    monitor = fastfs.Monitor(model, optimizer, every=5, aligned_every=1, sinks=sinks, flush_seconds=0.05, alerts=())
    while True:
        train(model, optimizer, 1, lambda _: rows(monitor.step % 7))
        if monitor.step == 40:
            monitor.flush()
        print(monitor.step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("after", [41, 60, 137])
def test_a_killed_run_leaves_files_that_can_be_read(after: int, tmp_path: Path) -> None:
    head = f"import sys; sys.path.insert(0, {ROOT!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= after:
                break
        child.kill()
        assert child.wait(60) == -signal.SIGKILL
    for name in ("a.jsonl", "a.parquet"):
        table = fastfs.load(tmp_path / name)
        found = table["step"].unique().tolist()
        assert found == list(range(len(found))), name
        assert len(found) >= 40, name  # what was flushed
        assert not table.duplicated(["step", "layer"]).any()
        measured = table[table["kind"] == "measured"]
        assert set(measured["step"]) == {step for step in found if step % 5 == 0}
        assert measured["angle"].between(0, 3.15).all()


def test_copies_in_the_middle_of_a_measured_step_are_not_watched() -> None:
    torch.manual_seed(0)
    model, optimizer, seen, monitor = watched(aligned_every=1, every=2)
    for step in range(4):
        x, y = rows(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        loss.backward()
        for other in others:
            F.cross_entropy(other(x), y).backward()
            assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
            with torch.no_grad():
                for a, b in zip(model(x), other(x), strict=True):
                    assert torch.equal(a, b)
        optimizer.step()
    monitor.close()
    assert [(row["step"], row["micro_batches"]) for row in seen] == [(0, 1)] * 3 + [(2, 1)] * 3


def test_monitors_of_all_modes_at_once_do_not_see_each_other() -> None:
    x, y = rows(50)
    probe = (x, lambda out: F.cross_entropy(out, y))
    modes = [
        {"every": 1},
        {"mode": "probe", "probe": probe, "every": 2},
        {"mode": "jvp", "every": 1},
        {"amplify": True, "every": 2, "aligned_every": 1},
    ]

    def run(chosen: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3)
        optimizer = sgd(model)
        found: list[list[Any]] = [[] for _ in chosen]
        monitors = [
            fastfs.Monitor(model, optimizer, sinks=[measured_into(seen)], **options)
            for seen, options in zip(found, chosen, strict=True)
        ]
        train(model, optimizer, 4)
        for monitor in monitors:
            monitor.close()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        return found, [p.detach().clone() for p in model.parameters()]

    together, parameters = run(modes)
    _, plain = run([])
    assert all(torch.equal(a, b) for a, b in zip(parameters, plain, strict=True))
    for options, among_others in zip(modes, together, strict=True):
        ((alone,), _) = run([options])
        assert len(alone) == len(among_others) == 3 * (4 // options["every"])
        for a, b in zip(alone, among_others, strict=True):
            assert a["valid"], a["why"]
            for key in ("step", "angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "method"):
                assert a[key] == b[key], (options, key)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before forward", "in forward", "after forward", "in backward", "after backward"])
def test_a_monitor_closed_in_the_middle_of_a_step(when: str) -> None:
    def run(attach: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3)
        optimizer = sgd(model)
        seen: list[Any] = []
        sink = [measured_into(seen)]
        monitor = fastfs.Monitor(model, optimizer, every=1, aligned_every=1, sinks=sink) if attach else None

        def close(*_: Any) -> None:
            if monitor is not None:
                monitor.close()

        train(model, optimizer, 1)
        x, y = rows(1)
        optimizer.zero_grad()
        if when == "before forward":
            close()
        hook = model.blocks[1].register_forward_hook(close) if when == "in forward" else None
        out = model(x)
        if hook is not None:
            hook.remove()
        if when == "after forward":
            close()
        if when == "in backward":
            out.register_hook(close)
        F.cross_entropy(out, y).backward()
        if when == "after backward":
            close()
        optimizer.step()
        train(model, optimizer, 1)
        if monitor is not None:
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            assert held_bytes() == 0
        return [p.detach().clone() for p in model.parameters()], seen

    (plain, _), (same, seen) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert [row["step"] for row in seen] == [0, 0, 0]


def test_a_monitor_that_is_left_by_an_exception_is_closed_and_has_written(tmp_path: Path) -> None:
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)

    def interrupted() -> None:
        with fastfs.Monitor(model, optimizer, every=1, path=tmp_path / "a.jsonl"):
            train(model, optimizer, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(m._forward_hooks for m in model.modules())
    assert fastfs.load(tmp_path / "a.jsonl")["step"].max() == 2
    train(model, optimizer, 1)


def test_an_exception_between_backward_and_step_with_predictions_leaves_nothing_behind() -> None:
    def run(fail: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3)
        optimizer = sgd(model)
        seen: list[Any] = []
        monitor = fastfs.Monitor(model, optimizer, every=3, aligned_every=1, sinks=[seen.extend])
        train(model, optimizer, 1)
        if fail:
            F.cross_entropy(model(rows(9)[0]), rows(9)[1]).backward()  # and no step: the loop caught something
        train(model, optimizer, 3)
        monitor.close()
        return [row for row in seen if row["kind"] in ("measured", "predicted")], seen

    (clean, _), (hurt, all_rows) = run(False), run(True)
    for a, b in zip(clean, hurt, strict=True):
        for key in ("kind", "step", "aligned_decrease", "update_rms", "backward_rms"):
            assert a[key] == b[key], key
    assert [row["step"] for row in all_rows if row["kind"] == "skipped"] == [1]
