"""Records with damaged lines: read without them and with a word about it, or refused in one sentence."""

from __future__ import annotations

import json
import math
import warnings
from copy import deepcopy
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import fastfs
from fastfs._cli.app import app
from fastfs._monitor.record.parquet_sink import ParquetSink
from fastfs._monitor.record.record import Record
from fastfs._report import read_header
from fastfs._report.jsonl_reader import RowReader
from fastfs._report.page import page_data, write_page
from fastfs._report.store import Store
from fastfs._report.table import make_table
from fastfs._report.watch import watch
from tests.helpers import report_cases as cases

NAMES = ["blocks.0", "blocks.1", "head"]
GROUPS = {"blocks": NAMES[:2]}
ROWS = [*NAMES, *GROUPS]


def plain_lines():
    """Two starts of a run with all kinds of lines, and another run."""
    lines = [cases.header(NAMES, groups=GROUPS), cases.structure(NAMES)]
    lines += [cases.measured(ROWS, 0), cases.predicted(ROWS, 1), cases.alert(1, layer="head"), cases.measured(ROWS, 2)]
    lines.append({"kind": "skipped", "run": "r1", "step": 3, "time": 1.0, "reason": "infinite gradients"})
    lines += [cases.measured(ROWS, 4), cases.header(NAMES, groups=GROUPS, resumed_at=4)]
    lines += [cases.measured(ROWS, 4, seed=3), cases.predicted(ROWS, 5), cases.measured(ROWS, 6)]
    lines += [cases.header(NAMES[:2], run="r2"), cases.measured(NAMES[:2], 0, run="r2")]
    for line in lines:
        if line["kind"] == "measured":
            line["layers"]["linear"] = [True, None, *[False] * (len(line["layers"]["angle"]) - 2)]
            line["layers"]["cos_angle_q10"] = line["layers"]["angle"]
            line["layers"]["decrease_why"] = ["clipped", *[None] * (len(line["layers"]["angle"]) - 1)]
            line["choices"], line["choices_changed"] = 64, 0
    return lines


LINES = plain_lines()
HEADERS = [i for i, line in enumerate(LINES) if line["kind"] == "header"]


def encode(line):
    return json.dumps(line, separators=(",", ":")).encode()


def write(path, raws, end=b"\n"):
    path.write_bytes(b"\n".join(raws) + end)
    return path


def rows_of(table):
    """Rows of every record, as text that tells NaN from a number."""
    found = {}
    table = table.astype({name: "float64" for name in table if table[name].dtype == "int64"})  # floats where some lack
    for key, part in table.groupby(["run", "kind", "step"], sort=False):
        found[key] = part.drop(columns=[c for c in part if c not in WHOLE_COLUMNS]).to_csv(index=False)
    return found


def read_twice(path):
    """By the native reader and by the other one, which have to agree; the table and the warnings, or the error."""
    results = []
    for native in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                reader = RowReader(path, store := Store(), native=native)
                reader.read()
                reader.left_out.warn(1)
                table = make_table(store, reader.headers, reader.others)
            except ValueError as error:
                table = error
        results.append((table, [str(w.message) for w in said]))
    (first, told), (second, told_too) = results
    assert told == told_too
    if isinstance(first, ValueError):
        assert str(first) == str(second)
    else:
        assert set(first) == set(second)
        pd.testing.assert_frame_equal(first, second[list(first)])
    return first, told


def sentence(error):
    text = str(error)
    assert text, repr(error)
    assert "\n" not in text
    assert len(text) < 1000
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


WHOLE_COLUMNS = {
    *("kind", "run", "step", "time", "layer", "name", "group"),
    *(name for line in LINES if line["kind"] == "measured" for name in line["layers"]),
    *("loss", "micro_batches", "overhead_seconds", "loss_scale", "choices", "choices_changed"),
}


@pytest.fixture(scope="module")
def whole(folder):
    path = write(folder / "whole.jsonl", map(encode, LINES))
    table, told = read_twice(path)
    assert not told
    assert len(table) == 6 * 4 + 2
    return rows_of(table)


# What is done to a line

SCALARS = [None, True, False, 0, -1, 7, 2**63, 10**400, 0.5, -1e308, 5e-324, "", "x", "nan", "1.5", "\ud800", "é"]
VALUES = st.sampled_from(
    [*SCALARS, [], {}, [None], ["x"], [True] * 4, [1.0] * 4, [1.0] * 3, {"a": 1}, math.inf, math.nan]
)


def places(value, prefix=()):
    yield prefix
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*prefix, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*prefix, index))


@st.composite
def damaged(draw, line):
    """A line in which one thing is other than it was, as bytes."""
    line = deepcopy(line)
    how = draw(st.sampled_from(["replace", "delete", "add", "twice", "cut", "bytes", "foreign", "spaces"]))
    raw = encode(line)
    if how in ("replace", "delete"):
        place = draw(st.sampled_from([p for p in places(line) if p]))
        inner = line
        for key in place[:-1]:
            inner = inner[key]
        if how == "delete":
            del inner[place[-1]]
        else:
            inner[place[-1]] = draw(VALUES)
        return encode(line)
    if how == "add":
        inner = draw(st.sampled_from([line, *([line["layers"]] if isinstance(line.get("layers"), dict) else [])]))
        inner[draw(st.sampled_from(["angle", "loss", "layer", "name", "kind", "valid", "other", ""]))] = draw(VALUES)
        return encode(line)
    if how == "twice":
        return raw[:-1] + b"," + encode({draw(st.sampled_from(list(line))): draw(VALUES)})[1:]
    if how == "cut":
        return raw[: draw(st.integers(1, len(raw) - 1))]
    if how == "spaces":
        return json.dumps(line, indent=None, separators=(" ,  ", " : ")).encode() + b" \r"
    if how == "foreign":
        return draw(
            st.sampled_from(
                [b"[" * 100_000, b'{"a":' * 50_000, b"null", b"0", b"{}", b"\xff\xfe", b"\xef\xbb\xbf" + raw, b'"x"',
                 b"1" * 5000, raw.replace(b"0.", b"00."), raw.replace(b":", b":-"), raw.decode().encode("utf-16-le")]
            )
        )  # fmt: skip
    at = draw(st.integers(0, len(raw) - 1))
    return raw[:at] + draw(st.binary(max_size=3)).replace(b"\n", b"") + raw[at + draw(st.integers(0, 2)) :]


@st.composite
def damaged_records(draw):
    """All lines, up to two of them damaged; which ones."""
    raws = [encode(line) for line in LINES]
    touched = draw(st.lists(st.integers(0, len(LINES) - 1), min_size=1, max_size=2, unique=True))
    for index in touched:
        raws[index] = draw(damaged(LINES[index]))
    return raws, touched


@settings(max_examples=150)
@given(damaged_records())
def test_damaged_lines_do_not_touch_the_others(folder, whole, record):
    raws, touched = record
    path = write(folder / "damaged.jsonl", raws)
    table, told = read_twice(path)
    for text in told:
        sentence(text)
    assert len(told) <= 1
    if isinstance(table, ValueError):
        sentence(table)
        assert set(touched) & set(HEADERS), table
    elif not set(touched) & set(HEADERS):
        changed = {(LINES[i].get("run"), LINES[i]["kind"], LINES[i].get("step")) for i in touched}
        found = rows_of(table)
        for key, text in whole.items():
            if key not in changed:
                assert found[key] == text
        for _, part in table.groupby("run"):
            assert not part.duplicated(["kind", "step", "layer"]).any() or changed


@settings(max_examples=40)
@given(damaged_records())
def test_the_page_and_the_terminal_show_what_can_be_read(folder, record):
    path = write(folder / "shown.jsonl", record[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".* left out", category=RuntimeWarning)
        for show in (
            lambda: write_page(path, folder / "page.html"),
            lambda: watch(path, once=True, console=Console(file=StringIO(), width=100)),
            lambda: read_header(path),
        ):
            try:
                show()
            except ValueError as error:
                sentence(error)


@settings(max_examples=15)
@given(damaged_records())
def test_commands_end_with_a_sentence(folder, record):
    path = write(folder / "named.jsonl", record[0])
    for command in (["report", str(path), "-o", str(folder / "cli.html")], ["watch", "--once", str(path)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        if done.exit_code:
            sentence(done.stderr.strip())
            assert done.stderr.startswith(f"fastfs {command[0]}: ")


def test_every_cut_of_the_file_reads_as_far_as_it_goes(folder, whole):
    data = b"\n".join(map(encode, LINES)) + b"\n"
    first = len(encode(LINES[0]))
    for size in [*range(0, first, 40), *range(first, len(data), 211)]:
        path = folder / "cut.jsonl"
        path.write_bytes(data[:size])
        table, told = read_twice(path)
        assert not told, (size, told)
        if not isinstance(table, ValueError):
            assert len(table) % 2 == 0


def test_an_unknown_column_is_kept_if_it_is_well_formed(folder):
    for values, kept in (
        (["a", None, "b", "c"], True),
        ([1, 2.5, None, 3], True),
        ([None] * 4, True),
        ([True, False, None, True], True),
        ([1, "a", None, 2], False),
        ([1, True, None, 2], False),
        ([[1], 2, 3, 4], False),
        ([1, 2, 3], False),
        ("abcd", False),
    ):
        lines = deepcopy(LINES[:3])
        lines[2]["layers"]["later"] = values
        table, told = read_twice(write(folder / "later.jsonl", map(encode, lines)))
        assert (len(table), len(told)) == ((4, 0) if kept else (0, 1)), values
        if kept:
            assert [None if pd.isna(v) else v for v in table["later"]] == values
    lines = [*deepcopy(LINES[:3]), deepcopy(LINES[5])]
    lines[2]["layers"]["later"], lines[3]["layers"]["later"] = [1.0] * 4, ["x", None, "y", "z"]
    table, _ = read_twice(write(folder / "later.jsonl", map(encode, lines)))
    assert [None if pd.isna(v) else v for v in table["later"]] == [1.0] * 4 + ["x", None, "y", "z"]


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "header", "schema": 2, "run": "r1", "layers": ["other"], "groups": {}},
        {"kind": "header", "schema": True, "run": "r1", "layers": NAMES},
        {"kind": "header", "schema": 2, "layers": NAMES},
        {"kind": "measure", "run": "r1", "step": 1, "time": 1.0},
        {"kind": "measured", "run": "r9", "step": 1, "time": 1.0, "layers": {"angle": [1.0] * 4}},
        {"kind": "measured", "run": "r1", "step": True, "time": 1.0, "layers": {"angle": [1.0] * 4}},
        {"kind": "measured", "run": "r1", "step": 1, "time": "1", "layers": {"angle": [1.0] * 4}},
        {"kind": "measured", "run": "r1", "step": 1, "time": 1.0, "layers": {"angle": [True, 1.0, 1.0, 1.0]}},
        {"kind": "measured", "run": "r1", "step": 1, "time": 1.0, "layers": {"valid": [1, 1, 1, 1]}},
        {"kind": "measured", "run": "r1", "step": 1, "time": 1.0, "layers": {"count": [1.5] * 4}},
        {"kind": "measured", "run": "r1", "step": 1, "time": 1.0, "layers": {"loss": [1.5] * 4}},
        {"kind": "measured", "run": "r1", "step": 1, "time": 1.0, "layers": {}},
        {"kind": "measured", "run": "r1", "step": 1, "time": 1.0, "angle": 2.0, "layers": {"angle": [1.0] * 4}},
        {"kind": "alert", "run": "r1", "step": 1, "time": 1.0, "rule": 3, "message": "x"},
    ],
)  # fmt: skip
def test_lines_that_are_not_of_the_format_are_left_out(folder, whole, line):
    lines = [encode(one) for one in LINES]
    lines.insert(3, encode(line))
    path = write(folder / "odd.jsonl", lines)
    table, told = read_twice(path)
    assert rows_of(table) == whole
    assert len(told) == 1
    assert "odd.jsonl, line 4: cannot be read and is left out (" in told[0]
    with pytest.warns(RuntimeWarning, match="line 4: cannot be read and is left out"):
        fastfs.load(path)


def test_many_bad_lines_are_one_warning(folder, whole):
    lines = [encode(line) for line in LINES]
    lines[2:2] = [b"{}"] * 1000
    with pytest.warns(
        RuntimeWarning, match=r"line 3, 4, .*, \.\.\.: 1000 lines cannot be read and are left out"
    ) as told:
        table = fastfs.load(write(folder / "many.jsonl", lines))
    assert len(told) == 1
    assert rows_of(table) == whole


@pytest.mark.parametrize(
    "start", [b"\x00" * 100, b"hello\n", b"\x1f\x8b\x08", b"[1, 2]\n", b'{"a": 1}\n', b"{" * 100_000]
)
def test_other_files_are_refused_in_one_sentence(folder, start):
    path = folder / "other.jsonl"
    path.write_bytes(start)
    for read in (fastfs.load, read_header, lambda p: watch(p, once=True), lambda p: write_page(p, folder / "o.html")):
        with pytest.raises(ValueError, match=r"other\.jsonl") as caught:
            read(path)
        sentence(caught.value)


def test_a_report_reads_what_load_reads(folder):
    from fastfs._report.read import load_compact

    path = write(folder / "both.jsonl", map(encode, LINES))
    assert page_data(load_compact(path), run="r1") == page_data(fastfs.load(path), run="r1")


# Parquet


def parts(folder):
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


def test_torn_and_foreign_parts_are_left_out(tmp_path):
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


def test_a_folder_of_foreign_parts_is_refused(tmp_path):
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    Path(folder / "part-x-000000.parquet").write_bytes(b"PAR1 nothing of the sort")
    for read in (fastfs.load, read_header):
        with pytest.raises(ValueError, match=r"holds no run of fastfs\.Monitor .part part-x-000000\.parquet: "):
            read(folder)
