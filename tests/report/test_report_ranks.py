"""``fastfs report`` of a run on several ranks: how many there are, and which one stands apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastfs
from fastfs._report.page import page_data
from tests.helpers import report_cases as cases


def summary_of(folder: Path, lines: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """Returns the box of the ranks, the sentences, and the keys of the menu."""
    data = page_data(fastfs.load(cases.write(folder / "record.jsonl", lines)))
    boxes = {box["label"]: box for box in data["cards"]}
    return boxes.get("Ranks"), data["findings"], [each["key"] for each in data["measured"]["quantities"]]


def test_a_run_of_one_rank_says_nothing_of_ranks(tmp_path: Path) -> None:
    box, said, menu = summary_of(tmp_path, cases.run_lines(4, 20))
    assert box is None
    assert not any("rank" in sentence for sentence in said)
    assert "rank_angle_sd" not in menu


def test_all_ranks_in_every_row(tmp_path: Path) -> None:
    box, said, menu = summary_of(tmp_path, cases.with_ranks(cases.run_lines(4, 20, every=2), 8))
    assert box == {"label": "Ranks", "value": "8", "note": "all of them in every row"}
    assert not any("rank" in sentence for sentence in said)
    assert "rank_angle_sd" in menu
    assert "rank_apart" not in menu


def test_ranks_that_are_missing(tmp_path: Path) -> None:
    box, said, _ = summary_of(tmp_path, cases.with_ranks(cases.run_lines(4, 20, every=2), 8, missing_from=13))
    assert box == {"label": "Ranks", "value": "7 of 8", "note": "since step 13"}
    assert said[0] == "The numbers are those of 7 of 8 ranks since step 13."
    lines = cases.with_ranks(cases.run_lines(4, 20, every=2), 8)
    for line in lines:
        if line.get("step") in (6, 7):
            line["ranks"] = 5
    box, said, _ = summary_of(tmp_path, lines)
    assert box is not None
    assert box["note"] == "all of them in all but 2 rows"
    assert said[0] == "Ranks are missing in 2 of 20 rows, most at step 6 (5 of 8 ranks)."


def test_a_rank_that_stands_apart_is_named_with_layers_and_steps(tmp_path: Path) -> None:
    lines = cases.with_ranks(cases.run_lines(4, 20, every=2), 8, apart=(3, 1, 10))
    _, said, _ = summary_of(tmp_path, lines)
    assert said[0] == "Rank 3 stands apart at blocks.1, between steps 10 and 18."
    for line in lines:
        if line["kind"] == "measured" and line["step"] % 4 == 0:
            line["layers"]["rank_apart"] = [None] * 4  # never three times in a row
    _, said, _ = summary_of(tmp_path, lines)
    assert not any("apart" in sentence for sentence in said)
