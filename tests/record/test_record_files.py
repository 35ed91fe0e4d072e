"""Files that a monitor writes: strict JSON for any numbers, complete when the process dies, readable."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfs
from fastfs._record.columns import ALWAYS_PER_STEP, PER_LAYER, SCHEMA
from fastfs._record.reading.load import read_header
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs.models import ResNet
from fastfs.monitor import Record
from tests.helpers.monitor_cases import measured_into, rows, sgd, train

QUANTITIES = {"angle", "cos_angle", "update_rms", "relative_update", "feature_rms", "backward_rms", "valid", "count"}


def record(path: Any, steps: int = 3, every: int = 1, lr: float = 0.05, **options: Any) -> Any:
    torch.manual_seed(0)
    model = ResNet(8, 16, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=every, path=path, **options):
        train(model, optimizer, steps)
    return model


def strict(line: Any) -> Any:
    def refuse(constant: Any) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_header_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.jsonl"
    model = record(path, steps=3, every=2, metadata={"data": "made up", "lr": math.nan})
    header, *lines = [strict(line) for line in path.read_text().splitlines()]
    assert header.pop("started").startswith("20")
    assert header.pop("torch") == torch.__version__
    assert len(header.pop("run")) == 12
    assert header.pop("python")
    assert header.pop("device_name")
    assert header == {
        "kind": "header",
        "schema": SCHEMA,
        "fastfs": fastfs.__version__,
        "mode": "batch",
        "model": "ResNet",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "float32",
        "device": "cpu",
        "optimizer": "SGD",
        "layers": ["blocks.0", "blocks.1"],
        "every": 2,
        "aligned_every": None,
        "aligned_fraction": 0.25,
        "rows": 1024,
        "samples": None,
        "details": False,
        "casts": [],
        "nonlinear": False,
        "memory_bytes": 2**29,
        "untrained": [],
        "groups": {},
        "metadata": {"data": "made up", "lr": None},
    }
    assert [(line["kind"], line["step"]) for line in lines] == [("structure", 0), ("measured", 0), ("measured", 2)]
    structure, *lines = lines
    assert structure["layers"] == {"cut": [True, True], "reason": [None, None], "parameters": [2, 3]}
    for line in lines:
        assert line["layers"].keys() >= QUANTITIES
        assert all(len(column) == 2 for column in line["layers"].values())
        assert line["micro_batches"] == 1
        assert line["overhead_seconds"] > 0


def test_the_reader_returns_what_sinks_received(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    seen: list[Any] = []
    record(path, sinks=[measured_into(seen)], rows=4, quantiles=(0.5,))
    table = fastfs.load(path)
    quantiles = {"cos_angle_q50", "update_rms_q50"}
    assert (
        set(table.columns)
        == {"kind", "run", "step", "time", "layer", "name", "group"} | {*PER_LAYER, *ALWAYS_PER_STEP} | quantiles
    )
    for row, (_, line) in zip(seen, table.iterrows(), strict=True):
        assert row.keys() <= set(table.columns)
        assert line.drop(list(row)).isna().all()
        for key in row.keys() - {"loss", "why"}:
            assert line[key] == row[key] or (row[key] is None and math.isnan(line[key])), key
        assert (line["why"], row["why"]) == (None, None)
    assert table["loss"].isna().all()
    assert table["valid"].dtype == bool
    assert table["layer"].dtype == table["count"].dtype == "int64"
    assert read_header(path)["layers"] == ["blocks.0", "blocks.1"]


def test_undefined_numbers_are_null(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record(path, steps=1, lr=0.0)
    lines = [strict(line) for line in path.read_text().splitlines()]
    (columns,) = [line["layers"] for line in lines if line["kind"] == "measured"]
    assert columns["angle"] == columns["cos_angle"] == [None] * 2
    assert columns["valid"] == [False] * 2
    table = fastfs.load(path)
    assert table["angle"].isna().all()
    assert (table["update_rms"] == 0).all()


def test_nan_and_inf_in_the_features_are_counted_and_written(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = sgd(model)
    monitor = fastfs.Monitor(model, optimizer, layers="0", path=path)
    x, y = rows(0)
    x[0, 0] = math.inf
    loss = F.cross_entropy(model(x), y)
    monitor.log(loss=loss)
    loss.backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=r"entries are NaN|the loss is nan"):
        monitor.close()
    line, *_alerts = [strict(line) for line in path.read_text().splitlines()][2:]
    columns = line["layers"]
    assert columns["nonfinite"][0] > 0
    assert columns["valid"] == [False]
    assert (columns["angle"], line["loss"]) == ([None], None)
    table = fastfs.load(path)
    assert table["nonfinite"][0] == columns["nonfinite"][0]
    assert [alert["rule"] for alert in table.attrs["alerts"]] == ["nonfinite", "nonfinite"]


def test_a_second_run_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record(path, steps=2)
    first = path.read_bytes()
    record(path, steps=1)
    assert path.read_bytes().startswith(first)
    table = fastfs.load(path)
    assert table["run"].nunique() == 2
    assert len(table) == 6
    assert read_header(path)["run"] == table["run"].iloc[-1]
    assert read_header(path, run=table["run"].iloc[0])["run"] == table["run"].iloc[0]


def test_every_cut_of_a_record_can_be_read(tmp_path: Path) -> None:
    path, cut = tmp_path / "record.jsonl", tmp_path / "cut.jsonl"
    record(path, steps=2)
    data = path.read_bytes()
    header = data.index(b"\n") + 1
    for size in range(header, len(data), 7):
        cut.write_bytes(data[:size])
        complete = max(data[:size].count(b"\n") - 2, 0)  # without header and structure
        assert len(fastfs.load(cut)) in (2 * complete, 2 * complete + 2)  # one more if only its newline is missing


def test_a_run_after_a_torn_line_starts_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record(path, steps=2)
    path.write_bytes(path.read_bytes()[:-20])
    record(path, steps=1)
    table = fastfs.load(path)
    assert len(table) == 2 + 2
    assert table["run"].nunique() == 2


def test_a_torn_line_elsewhere_is_left_out_with_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record(path, steps=3)
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:30]
    path.write_text("\n".join(lines) + "\n")
    with pytest.warns(RuntimeWarning, match=r"record\.jsonl, line 4: cannot be read and is left out") as caught:
        table = fastfs.load(path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert list(zip(table["step"], table["layer"], strict=True)) == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_a_record_must_start_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record(path, steps=1)
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([*others, first]) + "\n")
    with pytest.raises(ValueError, match=r"record\.jsonl, line 1: expected the header of a record"):
        fastfs.load(path)


@pytest.mark.parametrize("text", ["", "hello\nworld\n", "[1]\n[2]\n", '{"a": 1}\n{"a": 2}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.jsonl"):
        fastfs.load(path)


def test_rows_are_on_disk_after_a_flush(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, path=path) as monitor:
        for step in range(3):
            train(model, optimizer, 1)
            assert monitor.flush()
            assert len(fastfs.load(path)) == 2 * (step + 1)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    script = f"""
        import os, signal, torch, fastfs
        from fastfs.models import ResNet
        model = ResNet(8, 16, 2, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = fastfs.Monitor(model, optimizer, layers="blocks.[01]$", every=1, path={str(path)!r})
        for step in range(6):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            if step == 4:
                monitor.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert fastfs.load(path)["step"].tolist()[:10] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_default_place_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record(None, steps=1)
    assert len(fastfs.load("record.jsonl")) == 2


def test_two_monitors_can_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    with (
        fastfs.Monitor(model, optimizer, layers=["blocks.0"], every=1, path=path),
        fastfs.Monitor(model, optimizer, layers=["blocks.1"], every=1, path=path),
    ):
        train(model, optimizer, 3)
    table = fastfs.load(path)
    assert table.groupby("run")["name"].unique().map(list).tolist() in (
        [["blocks.0"], ["blocks.1"]],
        [["blocks.1"], ["blocks.0"]],
    )


def test_a_sink_can_be_an_object_and_a_path(tmp_path: Path) -> None:
    calls = []

    class Mine:
        def open(self, header: dict[str, Any]) -> None:
            calls.append(("open", header["schema"]))

        def write(self, records: Sequence[Record]) -> None:
            calls.append(("write", [(record.kind, record.step) for record in records]))

        def close(self) -> None:
            calls.append(("close",))

    record(None, steps=2, sinks=[Mine(), os.fspath(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"])
    assert [(name, *steps) for name, *steps in calls if name != "write"] == [("open", SCHEMA), ("close",)]
    assert [entry for name, *batches in calls[1:-1] for batch in batches for entry in batch] == [
        ("structure", 0),
        ("measured", 0),
        ("measured", 1),
    ]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


class Remembering:
    """Counts its calls, and fails in the method that it is told to."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[Any] = []
        self.fail = fail

    def _do(self, what: Any) -> None:
        self.calls.append(what)
        if what == self.fail:
            raise OSError(f"no {what}")

    def open(self, header: dict[str, Any]) -> None:
        self._do("open")

    def write(self, records: Sequence[Record]) -> None:
        self._do("write")

    def close(self) -> None:
        self._do("close")


def test_sinks_opened_so_far_are_closed_if_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    original = JsonlSink.close
    monkeypatch.setattr(JsonlSink, "close", lambda self: (closed.append(self.path.name), original(self)))  # type: ignore[func-returns-value]
    first, second, third = Remembering(), Remembering("open"), Remembering()
    with pytest.raises(OSError, match="no open"):
        record(tmp_path / "a.jsonl", sinks=[first, second, third])
    assert [sink.calls for sink in (first, second, third)] == [["open", "close"], ["open"], []]
    assert set(closed) == {"a.jsonl"}
    closed.clear()
    with pytest.raises(TypeError, match="sink: expected a path"):
        record(tmp_path / "b.jsonl", sinks=[3])
    assert closed == ["b.jsonl"]


def test_a_sink_that_fails_to_close_is_a_warning_and_the_others_close() -> None:
    first, second = Remembering("close"), Remembering()
    with pytest.warns(RuntimeWarning, match=r"could not be closed: Remembering .OSError: no close") as caught:
        record(None, steps=1, sinks=[first, second])
    assert len(caught) == 1
    assert second.calls == ["open", "write", "close"]


def test_a_closed_sink_refuses_records(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "record.jsonl")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write([])


def test_without_pandas_the_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "record.jsonl", steps=1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"fastfs.load needs pandas: pip install .fastfs.pandas."):
        fastfs.load(tmp_path / "record.jsonl")
