"""Damaged lines: the others are read as if they were not there, with one warning."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings

import fastfs
from tests.helpers.damaged_records import (
    HEADERS,
    LINES,
    NAMES,
    damaged_records,
    encode,
    read_twice,
    rows_of,
    sentence,
    write,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def whole(folder: Any) -> Any:
    path = write(folder / "whole.jsonl", map(encode, LINES))
    table, told = read_twice(path)
    assert not told
    assert len(table) == 6 * 4 + 2
    return rows_of(table)


@pytest.mark.slow
@settings(max_examples=150)
@given(damaged_records())
def test_damaged_lines_do_not_affect_the_others(folder: Any, whole: Any, record: Any) -> None:
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


def test_a_truncated_file_is_read_up_to_the_cut(folder: Any, whole: Any) -> None:
    data = b"\n".join(map(encode, LINES)) + b"\n"
    first = len(encode(LINES[0]))
    for size in [*range(0, first, 40), *range(first, len(data), 211)]:
        path = folder / "cut.jsonl"
        path.write_bytes(data[:size])
        table, told = read_twice(path)
        assert not told, (size, told)
        if not isinstance(table, ValueError):
            assert len(table) % 2 == 0


def test_an_unknown_column_is_kept_if_it_is_well_formed(folder: Any) -> None:
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
def test_lines_that_do_not_conform_are_left_out(folder: Any, whole: Any, line: dict[str, Any]) -> None:
    lines = [encode(one) for one in LINES]
    lines.insert(3, encode(line))
    path = write(folder / "odd.jsonl", lines)
    table, told = read_twice(path)
    assert rows_of(table) == whole
    assert len(told) == 1
    assert "odd.jsonl, line 4: cannot be read and is left out (" in told[0]
    with pytest.warns(RuntimeWarning, match="line 4: cannot be read and is left out"):
        fastfs.load(path)


def test_many_bad_lines_are_one_warning(folder: Any, whole: Any) -> None:
    lines = [encode(line) for line in LINES]
    lines[2:2] = [b"{}"] * 1000
    with pytest.warns(
        RuntimeWarning, match=r"line 3, 4, .*, \.\.\.: 1000 lines cannot be read and are left out"
    ) as told:
        table = fastfs.load(write(folder / "many.jsonl", lines))
    assert len(told) == 1
    assert rows_of(table) == whole
