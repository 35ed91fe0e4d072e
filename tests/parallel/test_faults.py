"""Faults on one rank: training is what it is without a monitor, nothing hangs, and the record says what is missing.

A selection; ``python -m benchmarks.parallel.faults`` injects many more.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import fastfs
from tests.helpers.fatal_cases import killed, without_server
from tests.helpers.fault_cases import SITES, STEPS, Case, judge, run_cases
from tests.helpers.processes import run_ranks

# Parts of the measurement before all ranks have agreed to run their second forwards after the step.
EARLY = (
    "forward begins", "forward, a layer", "forward ends", "backward", "before the step", "parameters before",
    "parameters after", "check", "collect", "decide", "vote",
)  # fmt: skip
LATE = ("rows of a forward", "features of a forward", "take", "structure", "aligned", "observe", "encode")
AT = {"check": 0, "rows of a forward": 2, "features of a forward": 9, "forward, a layer": 5, "decide": 4, "vote": 4}


def exceptions(mesh: str, sites: tuple[str, ...], merge: str = "store") -> list[Case]:
    return [
        Case(number, "exception", mesh, merge, number % 2, AT.get(where, 2), where)
        for number, where in enumerate(sites, start=1)
    ]


def others(mesh: str) -> list[Case]:
    """Returns the other kinds of faults."""
    return [
        Case(50, "skipped step", mesh, "store", 1, 1),
        Case(51, "no rows", mesh, "store", 1, 1),
        Case(52, "stopped", mesh, "store", 1, 2),
        Case(53, "full disk", mesh, "store", 0, 0),
        Case(54, "torn write", mesh, "files", 1, 0),
        Case(55, "stopped", mesh, "files", 0, 1),
    ]


def run_all(folder: Path, cases: list[Case]) -> tuple[Any, list[str]]:
    """Runs an undisturbed training and cases on two ranks; returns the undisturbed rows, and what is wrong."""
    plain = Case(0, "none", cases[0].mesh, "store", 0, 0)
    found = run_ranks(run_cases, 2, cases=[asdict(case) for case in (plain, *cases)], folder=str(folder), timeout=240)
    table = fastfs.load(folder / "0")
    table = table[table["kind"] == "measured"]
    assert table["valid"].all()
    assert set(table["step"]) == set(range(STEPS))
    wrong: list[str] = []
    for number, case in enumerate(cases, start=1):
        own = judge(folder / f"{case.number}" / "record.jsonl", case, 2, table)
        own += [] if all(reports[number]["same"] for reports in found) else ["training differs"]
        hits = [reports[number]["fired"] for reports in found]
        own += [] if any(hits) or case.kind == "no rows" else ["the fault did not happen"]
        wrong += [f"{case}: {each}" for each in own]
    return table, wrong


@pytest.mark.slow
def test_one_rank_fails_while_second_forwards_communicate(tmp_path: Path) -> None:
    cases = exceptions("fsdp", (*EARLY, *LATE))
    _, wrong = run_all(tmp_path, cases)
    assert wrong == []
    for case in cases:
        table = fastfs.load(tmp_path / f"{case.number}")
        reasons = [line["reason"] for line in table.attrs["skipped"]]
        if case.where in EARLY:  # all ranks leave the step out, for the reason that one of them has
            assert len(reasons) == 1, case
            assert "not measured by all ranks: " in reasons[0] or case.where in ("decide", "vote"), case
            assert len(set(table[table["kind"] == "measured"]["step"])) == STEPS - 1, case
        if not case.where.startswith("forward"):  # such a forward is left out
            assert any("injected" in reason for reason in reasons), case


@pytest.mark.slow
def test_one_rank_fails_while_they_do_not(tmp_path: Path) -> None:
    sites = tuple(name for name in SITES if name not in ("decide", "vote", "to bytes", "merge", "inbox"))
    cases = [
        *exceptions("ddp", sites),
        Case(40, "exception", "ddp", "store", 1, 1, "to bytes"),
        Case(41, "exception", "ddp", "store", 0, 1, "merge"),
        Case(42, "exception", "ddp", "store", 0, 3, "inbox"),
        *others("ddp"),
        Case(60, "interrupt", "ddp", "store", 1, 2, "take"),
    ]
    _, wrong = run_all(tmp_path, cases)
    assert wrong == []


@pytest.mark.slow
def test_other_faults_while_second_forwards_communicate(tmp_path: Path) -> None:
    _, wrong = run_all(tmp_path, others("fsdp"))
    assert wrong == []


@pytest.mark.slow
def test_a_rank_is_killed_or_the_store_is_gone(tmp_path: Path) -> None:
    undisturbed, _ = run_all(tmp_path, [Case(1, "skipped step", "ddp", "store", 0, 1)])
    for name, case in {
        "store": Case(2, "killed", "ddp", "store", 1, 2),
        "writer": Case(3, "killed", "ddp", "store", 0, 2, "decode"),
        "files": Case(4, "killed", "ddp", "files", 1, 2, "take"),
    }.items():
        (tmp_path / name).mkdir()
        assert killed(tmp_path / name, case, 2, undisturbed) == []
    (tmp_path / "server").mkdir()
    assert without_server(tmp_path / "server", Case(5, "server gone", "ddp", "store", 0, 2), 2, undisturbed) == []
