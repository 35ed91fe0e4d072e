"""Damaged Parquet parts: the others are read, with one warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fastfs
from fastfs._record.reading.load import read_header
from fastfs._record.record import Record
from fastfs._record.sinks.parquet_sink import ParquetSink
from tests.helpers import report_cases as cases
from tests.helpers.damaged_records import GROUPS, NAMES, ROWS, sentence


def parts(folder: Path) -> Any:
    folder.mkdir()
    sink = ParquetSink(folder, part_rows=4)
    sink.open(cases.header(NAMES, groups=GROUPS))
    for step in range(6):
        line = cases.measured(ROWS, step)
        scalars = {name: line[name] for name in ("loss", "micro_batches", "overhead_seconds", "loss_scale")}
        sink.write([Record("measured", step, line["time"], scalars, line["layers"])])
        sink.flush()
    sink.close()
    return folder


def test_torn_and_foreign_parts_are_left_out(tmp_path: Path) -> None:
    good = parts(tmp_path / "good.parquet")
    whole = fastfs.load(good)
    names = sorted(path.name for path in good.iterdir())
    assert len(names) == 7
    generator = np.random.default_rng(0)
    for trial in range(25):
        folder = parts(tmp_path / f"{trial}.parquet")
        victim = folder / names[1 + trial % 6]
        data = bytearray(victim.read_bytes())
        if trial % 3 == 0:
            data = data[: int(generator.integers(0, len(data)))]
        elif trial % 3 == 1:
            at = int(generator.integers(0, len(data) - 8))
            data[at : at + 8] = generator.bytes(8)
        else:
            table = pd.read_parquet(victim)
            column = list(table)[trial % len(table.columns)]
            pd.DataFrame({**table, column: ["x"] * len(table)}).to_parquet(victim)
            data = bytearray(victim.read_bytes())
        victim.write_bytes(data)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = fastfs.load(folder)
            except ValueError as error:
                sentence(error)
                continue
        assert len(told) <= 1
        for warning in told:
            assert "cannot be read and is left out" in sentence(warning.message)
            missing = set(whole["step"]) - set(found["step"])
            assert len(missing) == 1
            pd.testing.assert_frame_equal(
                found.reset_index(drop=True),
                whole[~whole["step"].isin(missing)].reset_index(drop=True),
                check_dtype=False,
            )


def test_a_folder_of_foreign_parts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    Path(folder / "part-x-000000.parquet").write_bytes(b"PAR1 nothing of the sort")
    for read in (fastfs.load, read_header):
        with pytest.raises(ValueError, match=r"holds no run of fastfs\.Monitor .part part-x-000000\.parquet: "):
            read(folder)
