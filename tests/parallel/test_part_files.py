"""The files of the ranks of a run as one record: the same as rank 0 writes, whatever is missing in them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas
import pytest

import fastfs
from fastfs._monitor.run_record import RunRecord, open_recorder
from fastfs._record.ranks.part_files import PartFiles, base_of, rank_files
from fastfs._record.reading.follow_parts import PartsFollower
from fastfs._record.reading.load import load_compact, read_header
from fastfs._record.reading.locate import find_record
from fastfs._record.schema import Checker
from fastfs._report.page import write_page
from fastfs._report.watch import watch
from tests.helpers.processes import run_ranks
from tests.helpers.rank_runs import RESUMED, STEPS, make_records

WORLD = 3
APART = ["run", "time", "overhead_seconds"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    run_ranks(make_records, WORLD, folder=str(folder), timeout=180)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "files", tmp_path / "run")
    return tmp_path / "run"


def rank_file(run: Path, rank: int) -> Path:
    return run / f"record.rank{rank}.jsonl"


def numbers(table: Any) -> Any:
    return table.drop(columns=APART).reset_index(drop=True)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_the_record_is_that_of_the_store(made: Path, run: Path) -> None:
    stored, found = fastfs.load(made / "store" / "record.jsonl"), fastfs.load(run / "record.jsonl")
    assert not (run / "record.jsonl").exists()
    # Quantiles of several ranks do not follow from theirs.
    assert numbers(found).equals(numbers(stored))
    assert (found["ranks"] == WORLD).all()
    assert found["valid"].dropna().all()
    assert set(found["step"]) == set(range(STEPS))
    for mine, theirs in zip(found.attrs["structure"], stored.attrs["structure"], strict=True):
        assert mine["layers"] == theirs["layers"]
    assert "rank" not in found.attrs["headers"][0]
    assert found.attrs["headers"][0]["ranks"] == WORLD


def test_every_path_stands_for_all_files(run: Path) -> None:
    whole = fastfs.load(run / "record.jsonl")
    for path in (run, run.parent, rank_file(run, 0), rank_file(run, 2)):
        assert fastfs.load(path).equals(whole)
        assert find_record(path) == run / "record.jsonl"
    assert len(load_compact(run / "record.jsonl")) == len(whole)
    assert read_header(rank_file(run, 1))["run"] == whole["run"].iloc[0]


def test_the_report_and_the_live_view(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = write_page(find_record(run), run.parent / "page.html").read_text()
    assert fastfs.load(run)["run"].iloc[0] in page
    watch(run, once=True)
    assert f"measured at step {STEPS - 2}, predicted at step {STEPS - 1}" in capsys.readouterr().out


@pytest.mark.parametrize("restarted", ["store_restarted", "files_restarted"])
def test_a_restart_of_all_ranks_continues_the_run(made: Path, restarted: str) -> None:
    whole, found = fastfs.load(made / "store"), fastfs.load(made / restarted)
    quantiles = [name for name in whole if "_q50" in name]
    pandas.testing.assert_frame_equal(numbers(found), numbers(whole.drop(columns=quantiles)), rtol=1e-12)
    headers = found.attrs["headers"]
    assert [header.get("resumed_at") for header in headers] == [None, RESUMED]
    assert len({header["run"] for header in headers}) == 1


# Files that are missing, torn, or of another run


def test_a_missing_file(run: Path) -> None:
    rank_file(run, 0).unlink()
    table = fastfs.load(run)
    assert (table["ranks"] == WORLD - 1).all()
    measured = table[table["kind"] == "measured"]
    assert not measured["valid"].any()
    assert all("ranks" in why for why in measured["why"])


def test_the_file_of_one_rank_alone_has_its_quantiles(run: Path) -> None:
    for rank in (0, 2):
        rank_file(run, rank).unlink()
    measured = fastfs.load(run).query("kind == 'measured'")
    assert (measured["ranks"] == 1).all()
    assert measured["cos_angle_q50"].notna().all()


def test_a_file_that_ends_early(run: Path) -> None:
    path = rank_file(run, 1)
    path.write_bytes(path.read_bytes()[: -len(lines_of(path)[-1]) // 2])
    whole, found = fastfs.load(run.parent / "run"), fastfs.load(run)
    assert whole.equals(found)
    assert list(found.groupby("step")["ranks"].first()) == [WORLD] * (STEPS - 1) + [WORLD - 1]


def test_every_cut_of_a_file_loads_without_a_word(run: Path) -> None:
    path = rank_file(run, 2)
    data = path.read_bytes()
    for size in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = fastfs.load(run)
            watch(run, once=True)
        assert set(table["ranks"]) <= {WORLD - 1, WORLD}
        assert not table[(table["ranks"] < WORLD) & (table["kind"] == "measured")]["valid"].any()


@pytest.mark.parametrize("damage", ["no json}", '{"kind":"part"}', "data", "foreign run"])
def test_a_line_that_cannot_be_read_loses_its_rank_in_one_step(run: Path, damage: str) -> None:
    path = rank_file(run, 1)
    lines = lines_of(path)
    number = 3
    if damage == "data":
        line = json.loads(lines[number])
        line["data"] = line["data"][:-8]
        damage = json.dumps(line, separators=(",", ":"))
    elif damage == "foreign run":
        damage = json.dumps({**json.loads(lines[number]), "run": "other"}, separators=(",", ":"))
    lines[number] = damage + "\n"
    path.write_text("".join(lines))
    with pytest.warns(RuntimeWarning, match=rf"record\.rank1\.jsonl, line {number + 1}: cannot be"):
        table = fastfs.load(run)
    short = table[table["ranks"] < WORLD]
    assert set(short["step"]) == {number - 1}
    assert not short["valid"].any()


def test_a_file_of_another_run(made: Path, run: Path) -> None:
    shutil.copy(rank_file(made / "files_restarted", 1), rank_file(run, 1))
    table = fastfs.load(run)
    runs = [header["run"] for header in fastfs.load(made / "files").attrs["headers"]]
    assert (table[table["run"] == runs[0]]["ranks"] == WORLD - 1).all()
    assert (table[table["run"] != runs[0]]["ranks"] == 1).all()


def test_a_rank_that_did_not_come_back_after_a_restart(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "files_restarted", tmp_path / "run")
    path = rank_file(tmp_path / "run", 1)
    lines = lines_of(path)
    second = next(number for number, line in enumerate(lines) if '"resumed_at"' in line)
    path.write_text("".join(lines[:second]))
    ranks = fastfs.load(tmp_path / "run").groupby("step")["ranks"].first()
    assert list(ranks) == [WORLD] * RESUMED + [WORLD - 1] * (STEPS - RESUMED)


def test_runs_one_after_the_other_in_the_same_files(made: Path, run: Path) -> None:
    for rank in range(WORLD):
        with rank_file(run, rank).open("a") as file:
            file.write(rank_file(made / "files_restarted", rank).read_text())
    table = fastfs.load(run)
    assert (table["ranks"] == WORLD).all()
    first, second = dict.fromkeys(table["run"])
    assert numbers(table[table["run"] == first]).equals(numbers(fastfs.load(made / "files")))
    assert len(table[table["run"] == second]) == len(fastfs.load(made / "files_restarted"))
    assert read_header(run, first)["run"] == first
    watch(run, once=True)


def test_a_record_of_the_same_name_is_read_too(made: Path, run: Path) -> None:
    shutil.copy(made / "store" / "record.jsonl", run / "record.jsonl")
    assert list(dict.fromkeys(fastfs.load(run)["run"])) == [
        fastfs.load(made / name)["run"].iloc[0] for name in ("store", "files")
    ]


def test_an_unknown_schema_is_refused(run: Path) -> None:
    path = rank_file(run, 1)
    path.write_text(path.read_text().replace('"schema":2', '"schema":99', 1))
    for read in (fastfs.load, read_header, lambda path: watch(path, once=True)):
        with pytest.raises(ValueError, match="schema 99; this version of fastfs reads"):
            read(run)


def test_other_files_with_such_a_name_stand_for_themselves(made: Path, tmp_path: Path) -> None:
    own = tmp_path / "record.rank3.jsonl"
    shutil.copy(made / "store" / "record.jsonl", own)
    assert base_of(own) is None
    assert find_record(own) == own
    assert len(fastfs.load(own)) == len(fastfs.load(made / "store"))
    with pytest.raises(FileNotFoundError):
        fastfs.load(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "given",
    [
        {"sinks": [print]}, {"path": "a.jsonl", "sinks": ["b.jsonl"]}, {"path": "a.parquet"},
        {"path": "tensorboard:a"}, {"alerts": [print]}, {"on_alert": print},
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_merged_records_is_refused(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    part = RunRecord(None, writes=True, rank=1, sends=False)
    values = {"path": None, "sinks": (), **given}
    with pytest.raises(ValueError, match='merge="files": expected '):
        open_recorder(header={"kind": "header", "schema": 2, "run": "a", "layers": ["x"]}, part=part, **values)
    assert list(tmp_path.iterdir()) == []


def test_parts_belong_to_files_of_ranks() -> None:
    checker = Checker()
    checker.check({"kind": "header", "schema": 2, "run": "a", "layers": ["x"]})
    line = {"kind": "part", "run": "a", "step": 0, "time": 1.0, "data": ""}
    with pytest.raises(ValueError, match="kind part: expected in the file of one rank only"):
        checker.check(line)
    checker.check({"kind": "header", "schema": 2, "run": "a", "layers": ["x"], "rank": 1})
    assert checker.check(line).kind == "part"
    with pytest.raises(ValueError, match="header: rank: expected an integer >= 0"):
        checker.check({"kind": "header", "schema": 2, "run": "b", "layers": ["x"], "rank": "1"})


# While the files grow


def test_following_gives_the_same_records_in_the_same_order(run: Path) -> None:
    whole = [line for line in PartFiles(run / "record.jsonl").lines() if line["kind"] != "structure"]
    contents = {path: path.read_bytes() for path in rank_files(run / "record.jsonl")}
    for line in whole:
        line.pop("time", None)
    for path in contents:
        path.unlink()
    follower = PartsFollower(run / "record.jsonl")
    assert not follower.poll().exists
    found: list[Any] = []
    sizes = dict.fromkeys(contents, 0)
    first, *_ = contents
    for path, data in contents.items():  # the headers, and then one rank after the other, in pieces
        sizes[path] = data.index(b"\n") + 1
        path.write_bytes(data[: sizes[path]])
    while any(sizes[path] < len(data) for path, data in contents.items()):
        for path, data in contents.items():
            sizes[path] = min(len(data), sizes[path] + (1500 if path == first else 2900))
            path.write_bytes(data[: sizes[path]])
            new = follower.poll()
            assert not new.restarted
            assert not new.unreadable
            found += [checked.line for checked in new.lines if checked.kind != "structure"]
    for line in found:
        line.pop("time", None)
    assert found == whole


def test_a_file_that_is_replaced_begins_anew(made: Path, run: Path) -> None:
    follower = PartsFollower(run / "record.jsonl")
    assert follower.poll().lines
    assert not follower.poll().lines
    for rank in range(WORLD):
        rank_file(run, rank).unlink()
        shutil.copy(rank_file(made / "files_restarted", rank), rank_file(run, rank))
    new = follower.poll()
    assert new.restarted
    steps = [checked.line["step"] for checked in new.lines if checked.kind in ("measured", "predicted")]
    assert steps == list(range(RESUMED, STEPS))  # of the last start
