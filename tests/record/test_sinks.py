"""Files of every sink, read back by the programs that they are made for."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastfs
from fastfs._record.record import Record
from fastfs._record.sinks.callable_sink import CallableSink
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.parquet_sink import ParquetSink
from fastfs._record.sinks.protocol import PartlyWrittenError
from fastfs._record.sinks.tensorboard_sink import TensorBoardSink
from fastfs._record.writing.recorder import Recorder
from tests.helpers.record_cases import LAYERS, alert, decode, head, measured, payload, predicted

SKIPPED = Record("skipped", 3, 103.0, {"reason": "the gradient scaler found infinities"})
STRUCTURE = Record(
    "structure", 0, 99.0, {}, {"cut": [True, True, False], "reason": [None, None, "branch"], "parameters": [8, 8, 8]}
)
RECORDS = [STRUCTURE, measured(0), predicted(1), predicted(2), SKIPPED, alert(3), measured(4, angle=math.nan)]


def filled(sink: Any, header: Any = None, records: Any = RECORDS) -> Any:
    sink.open(header or head())
    sink.write(records[:3])
    sink.write(records[3:])
    sink.close()
    return sink


def tensorboard(folder: Path) -> Any:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def texts(events: Any, tag: Any) -> Any:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


# JSON lines


def test_jsonl_has_a_line_for_each_record(tmp_path: Path) -> None:
    filled(JsonlSink(tmp_path / "new" / "a.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()]
    assert lines[0] == head()
    assert [line["kind"] for line in lines[1:]] == [record.kind for record in RECORDS]
    assert {line["run"] for line in lines} == {"a"}
    first = lines[2]
    assert first["layers"]["angle"] == RECORDS[1].columns["angle"]
    assert (first["loss"], first["loss_scale"], first["time"]) == (0.5, None, 100.0)
    assert lines[-1]["layers"]["angle"] == [None] * 4
    assert lines[6] == {"kind": "alert", "run": "a", "step": 3, "time": 103.0, **alert(3).scalars}


def test_a_write_cut_short_says_how_much_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.open(head())
    line = len((json.dumps({**head()}, separators=(",", ":")) + "\n").encode())
    write, left = os.write, [3000]

    def full(descriptor: Any, data: Any) -> Any:
        take = min(left[0], len(data))
        left[0] -= take
        if not take:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:take])

    records = [measured(step) for step in range(20)]
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(PartlyWrittenError, match="No space left") as caught:
        sink.write(records)
    monkeypatch.undo()
    assert 0 < caught.value.written < 10
    sink.write(records[caught.value.written :])
    sink.close()
    assert line < 3000
    table = fastfs.load(tmp_path / "a.jsonl")  # without a warning: the torn line was written again
    assert table["step"].unique().tolist() == list(range(20))
    assert len(table) == 20 * 4


DISK_FULL = """
    import os, resource, signal, sys, warnings
    sys.path.insert(0, {root!r})
    from tests.helpers.record_cases import *
    from fastfs._record.writing.recorder import Recorder
    from fastfs._record.sinks.targets import as_sink
    warnings.simplefilter("always")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    one = Recorder(
        [as_sink({target!r})], head(), alerts=(), flush_seconds=0.0, retry_seconds=0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, limit[1]))
    for step in range(40):
        one.put(measured(step))
        one.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert one.flush()
    one.put(measured(40))
    one.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "tensorboard:tb"])
def test_a_full_disk_loses_nothing_once_there_is_room_again(tmp_path: Path, name: str) -> None:
    target = name.replace("tb", str(tmp_path / "tb")) if ":" in name else str(tmp_path / name)
    script = textwrap.dedent(DISK_FULL).format(root=str(Path(__file__).parents[2]), target=target)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "File too large" in done.stderr
    if ":" in name:
        steps = [event.step for event in tensorboard(tmp_path / "tb").Scalars("fastfs/angle/blocks.0")]
    else:
        steps = fastfs.load(tmp_path / name)["step"].unique().tolist()
    assert steps == list(range(41))


def test_files_are_not_limited_here() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# Functions


def test_a_function_gets_plain_rows() -> None:
    rows: list[Any] = []
    filled(CallableSink(rows.extend))
    assert [row["kind"] for row in rows] == (
        ["structure"] + ["measured"] * 4 + ["predicted"] * 8 + ["skipped", "alert"] + ["measured"] * 4
    )
    assert rows[0] == {
        "kind": "structure", "run": "a", "step": 0, "time": 99.0, "layers": STRUCTURE.columns
    }  # fmt: skip
    second, group = rows[2], rows[4]
    assert list(second)[:7] == ["kind", "run", "step", "time", "layer", "name", "group"]
    assert (second["layer"], second["name"], second["angle"], second["loss"]) == (1, "blocks.1", 1.1, 0.5)
    assert (group["layer"], group["name"], group["group"]) == (3, "all", True)
    assert rows[13] == {"kind": "skipped", "run": "a", "step": 3, "time": 103.0, "reason": SKIPPED.scalars["reason"]}
    assert rows[14]["layer"] == "blocks.1"
    assert math.isnan(rows[-1]["angle"])


# TensorBoard


def test_tensorboard_shows_scalars_at_their_steps_and_alerts_as_text(tmp_path: Path) -> None:
    filled(TensorBoardSink(tmp_path))
    events = tensorboard(tmp_path)
    scalars = events.Tags()["scalars"]
    assert "fastfs/update_rms/all" in scalars
    assert {f"fastfs/angle/{name}" for name in LAYERS} <= set(scalars)
    assert not [tag for tag in scalars if "count" in tag or "why" in tag or "predicted" in tag]
    (angle,) = events.Scalars("fastfs/angle/blocks.1")  # NaN is left out
    assert (angle.step, angle.wall_time) == (0, 100.0)
    assert angle.value == pytest.approx(1.1)
    assert [(e.step, e.value) for e in events.Scalars("fastfs/loss")] == [(0, 0.5), (4, 0.5)]
    assert texts(events, "fastfs/alerts") == [(3, "**nonfinite** blocks.1: 2 entries are NaN or infinite")]
    assert texts(events, "fastfs/skipped")[0][1].startswith("the gradient scaler")
    assert '"run": "a"' in texts(events, "fastfs/run")[0][1]


def test_tensorboard_can_show_every_step(tmp_path: Path) -> None:
    filled(TensorBoardSink(tmp_path, predicted=True))
    events = tensorboard(tmp_path)
    assert [e.step for e in events.Scalars("fastfs/predicted_update_rms/blocks.0")] == [1, 2]
    assert [e.step for e in events.Scalars("fastfs/aligned_decrease/blocks.2")] == [1, 2]
    assert [e.step for e in events.Scalars("fastfs/update_rms/blocks.0")] == [0, 4]


def test_tensorboard_drops_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    filled(TensorBoardSink(tmp_path), records=[measured(step) for step in range(10)])
    filled(TensorBoardSink(tmp_path), head(resumed_at=6), [measured(step, loss=0.25) for step in range(6, 12)])
    scalars = tensorboard(tmp_path).Scalars("fastfs/loss")
    assert [(event.step, event.value) for event in scalars] == [(s, 0.5 if s < 6 else 0.25) for s in range(12)]


def test_torn_event_files_are_read_up_to_the_tear(tmp_path: Path) -> None:
    filled(TensorBoardSink(tmp_path), records=[measured(step) for step in range(5)])
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for size in range(len(data) - 900, len(data), 97):
        path.write_bytes(data[:size])
        assert [e.step for e in tensorboard(tmp_path).Scalars("fastfs/loss")] in ([0, 1, 2, 3], [0, 1, 2])


# Parquet


def test_parquet_gives_the_table_that_jsonl_gives(tmp_path: Path) -> None:
    filled(JsonlSink(tmp_path / "a.jsonl"))
    filled(ParquetSink(tmp_path / "a.parquet", part_rows=5))
    first, second = fastfs.load(tmp_path / "a.jsonl"), fastfs.load(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(first, second)
    assert first.attrs == second.attrs
    whole = pd.read_parquet(tmp_path / "a.parquet")  # as other programs read it
    assert whole["angle"].notna().sum() == 4
    assert len(whole) == len(first)


def test_parquet_parts_are_written_when_due(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, part_seconds=1000.0, part_rows=8)
    sink.open(head())
    assert len(list(tmp_path.iterdir())) == 1  # the header
    assert sink.due() is None
    sink.write([measured(0)])
    assert sink.due() > 900.0
    sink.write([measured(1)])
    assert sink.due() == 0.0
    sink.flush()
    sink.flush()
    assert len(list(tmp_path.iterdir())) == 2
    assert sink.due() is None
    sink.write([measured(2)])
    sink.close()
    sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-a-00000{i}.parquet" for i in range(3)]
    with pytest.raises(ValueError, match="closed"):
        sink.write([measured(3)])
    with pytest.raises(ValueError, match="expected part_seconds >= 0 and part_rows >= 1"):
        ParquetSink(tmp_path, part_rows=0)


def test_parquet_parts_are_written_even_if_the_loop_pauses(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, part_seconds=0.1)
    one = Recorder([sink], head(), alerts=(), flush_seconds=0.05)
    one.push(payload(5), decode)
    for _ in range(400):
        if len(fastfs.load(tmp_path)):
            break
        one._writer._thread.join(0.05)
    assert fastfs.load(tmp_path)["step"].tolist() == [5] * 4
    one.close()


def test_a_part_that_cannot_be_written_is_kept_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ParquetSink(tmp_path, part_rows=1)
    one = Recorder([sink], head(), alerts=(), flush_seconds=60.0, retry_seconds=60.0)
    original = sink._write_part

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "_write_part", full)
    one.put(measured(0))
    with pytest.warns(RuntimeWarning, match="ParquetSink failed to flush .OSError.*No space"):
        assert not one.flush()
    one.put(measured(1))
    assert not one.flush()
    monkeypatch.setattr(sink, "_write_part", original)
    assert one.flush()
    one.close()
    assert fastfs.load(tmp_path)["step"].unique().tolist() == [0, 1]


def test_parquet_removes_temporary_files_that_its_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".part-a-000004.tmp").write_bytes(b"torn")
    (tmp_path / ".part-b-000004.tmp").write_bytes(b"somebody writes here")
    filled(ParquetSink(tmp_path))
    assert not (tmp_path / ".part-a-000004.tmp").exists()
    assert (tmp_path / ".part-b-000004.tmp").exists()
    assert len(fastfs.load(tmp_path)) == 16
