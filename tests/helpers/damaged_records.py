"""A record with every kind of line, and strategies that damage its lines."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pandas as pd
from hypothesis import strategies as st

from fastfs._record.reading.jsonl_reader import RowReader
from fastfs._record.reading.store import Store
from fastfs._record.reading.table import make_table
from tests.helpers import report_cases as cases

NAMES = ["blocks.0", "blocks.1", "head"]
GROUPS = {"blocks": NAMES[:2]}
ROWS = [*NAMES, *GROUPS]


def plain_lines() -> Any:
    """Lines of all kinds: a run, its resumption, and another run."""
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


def encode(line: Any) -> Any:
    return json.dumps(line, separators=(",", ":")).encode()


def write(path: Any, raws: Any, end: Any = b"\n") -> Any:
    path.write_bytes(b"\n".join(raws) + end)
    return path


def rows_of(table: Any) -> Any:
    """The rows of each record as text, in which NaN differs from a number."""
    found = {}
    table = table.astype({name: "float64" for name in table if table[name].dtype == "int64"})  # floats where some lack
    for key, part in table.groupby(["run", "kind", "step"], sort=False):
        found[key] = part.drop(columns=[c for c in part if c not in WHOLE_COLUMNS]).to_csv(index=False)
    return found


def read_twice(path: Any) -> tuple[Any, ...]:
    """Reads with and without the native reader, which must agree. Returns the table or the error, and the warnings."""
    results = []
    for native in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                reader = RowReader(path, store := Store(), native=native)
                reader.read()
                reader.rejected.warn(1)
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


def sentence(error: Any) -> Any:
    text = str(error)
    assert text, repr(error)
    assert "\n" not in text
    assert len(text) < 1000
    return text


WHOLE_COLUMNS = {
    *("kind", "run", "step", "time", "layer", "name", "group"),
    *(name for line in LINES if line["kind"] == "measured" for name in line["layers"]),
    *("loss", "micro_batches", "overhead_seconds", "loss_scale", "choices", "choices_changed"),
}


SCALARS = [None, True, False, 0, -1, 7, 2**63, 10**400, 0.5, -1e308, 5e-324, "", "x", "nan", "1.5", "\ud800", "é"]
VALUES = st.sampled_from(
    [*SCALARS, [], {}, [None], ["x"], [True] * 4, [1.0] * 4, [1.0] * 3, {"a": 1}, math.inf, math.nan]
)


def places(value: Any, prefix: Any = ()) -> Iterator[Any]:
    yield prefix
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*prefix, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*prefix, index))


@st.composite
def damaged(draw: Any, line: Any) -> Any:
    """Damages a line in one place. Returns bytes."""
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
def damaged_records(draw: Any) -> tuple[Any, ...]:
    """Damages up to two lines. Returns all lines and the indices of the damaged ones."""
    raws = [encode(line) for line in LINES]
    touched = draw(st.lists(st.integers(0, len(LINES) - 1), min_size=1, max_size=2, unique=True))
    for index in touched:
        raws[index] = draw(damaged(LINES[index]))
    return raws, touched
