"""Comparisons of real runs: what parts first, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastfs
from fastfs._cli.app import app
from fastfs._compare.result import ALL_LAYERS
from tests.helpers.recorded_runs import NAMES, train

pytest.importorskip("pandas")
pytest.importorskip("scipy")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: list[dict[str, Any]], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + end)
    return path


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_twin_with_another_rate_of_one_layer_parts_in_that_layer(tmp_path: Path, optimizer: str) -> None:
    first = train(tmp_path / "a.jsonl", optimizer=optimizer)
    for layer in range(5):
        second = train(tmp_path / f"{layer}.jsonl", optimizer=optimizer, changed=layer)
        comparison = fastfs.compare([first, second])
        found = comparison.first
        assert found is not None
        assert (found.step, found.layer, found.noise) == (0, NAMES[layer], "rounding")
        assert found.key == "update_per_gradient"
        assert found.change == pytest.approx(1.1, rel=1e-4)
        assert found.value / found.reference == pytest.approx(found.change)
        assert found.errors > 1000
        moved = {one.key for one in comparison.partings if one.step == 0}
        assert {"parameter_update_norm", "update_rms", "angle", "aligned_decrease"} <= moved
        assert not moved & {"feature_rms", "backward_rms", "gradient_norm"}  # those before the step
        assert comparison.same_state == (f"{layer}.jsonl",)
        assert f"part first at step 0, Parameter update / gradient of {NAMES[layer]}: x1.1" in str(comparison)


def test_a_change_of_all_layers_shows_between_twins(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl")
    second = train(tmp_path / "b.jsonl", every=3, steps=7, changed=0, factor=1.0)
    assert fastfs.compare([first, second]).equal == ("b.jsonl",)
    every = [train(tmp_path / f"{i}.jsonl", optimizer="AdamW", width=width) for i, width in enumerate((16, 24))]
    assert "different parameters" in " ".join(fastfs.compare(every).notes)


def test_equal_runs_are_equal_in_every_number(tmp_path: Path) -> None:
    comparison = fastfs.compare([train(tmp_path / "a.jsonl"), train(tmp_path / "b.jsonl")])
    assert comparison.equal == ("b.jsonl",)
    assert comparison.partings == ()
    assert str(comparison).endswith("b.jsonl against a.jsonl: equal in every number.")


def test_two_seeds_of_a_setting_do_not_part(tmp_path: Path) -> None:
    runs = [train(tmp_path / f"{seed}.jsonl", seed=seed, optimizer="AdamW") for seed in range(6)]
    comparison = fastfs.compare(runs)
    assert comparison.partings == ()
    assert comparison.equal == comparison.same_state == comparison.untested == ()
    assert "nothing parts. They start in different states" in str(comparison)
    assert fastfs.compare(runs[:3], against=runs[3:]).partings == ()


def test_replicates_show_a_change_of_all_layers(tmp_path: Path) -> None:
    first = [train(tmp_path / f"a{seed}.jsonl", seed=seed) for seed in range(4)]
    second = [train(tmp_path / f"b{seed}.jsonl", seed=10 + seed, changed=3, factor=2.0) for seed in range(4)]
    comparison = fastfs.compare(first, against=second)
    found = comparison.first
    assert found is not None
    assert (found.step, found.layer, found.noise) == (0, "blocks.3", "replicates")
    assert found.second == "b0.jsonl, b1.jsonl, b2.jsonl, b3.jsonl"
    assert found.change == pytest.approx(2.0, rel=1e-3)
    assert comparison.labels + comparison.against == tuple(f"{side}{i}.jsonl" for side in "ab" for i in range(4))
    one_against_four = fastfs.compare(second[:1], against=first).first
    assert one_against_four is not None
    assert one_against_four.change == pytest.approx(0.5, rel=1e-3)


def test_a_frozen_layer_parts(tmp_path: Path) -> None:
    found = fastfs.compare([train(tmp_path / "a.jsonl"), train(tmp_path / "b.jsonl", changed=2, factor=0.0)]).first
    assert found is not None
    assert (found.step, found.layer, found.value) == (0, "blocks.2", 0.0)


def test_layers_steps_and_groups_that_not_every_run_has(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl", every=2, groups={"late": r"blocks\.[34]"})
    second = train(tmp_path / "b.jsonl", every=3, layers=r"^blocks\.[0-2]$", changed=1)
    comparison = fastfs.compare([first, second])
    assert comparison.layers == NAMES[:3]
    assert comparison.steps == (0, 6)
    assert comparison.first is not None
    assert (comparison.first.layer, comparison.first.step) == ("blocks.1", 0)
    assert comparison.notes == (
        "a.jsonl: left out blocks.3, blocks.4, which not every run has",
        "a.jsonl: 2 measured steps left out, not in every run",
        "a.jsonl: groups are left out, they are totals of layers",
        "b.jsonl: 1 measured steps left out, not in every run",
        "different every: 2 in a.jsonl, 3 in b.jsonl",
    )


def test_runs_of_one_record(tmp_path: Path) -> None:
    record = train(tmp_path / "a.jsonl")
    train(record, changed=2)
    train(record)
    first, second, third = dict.fromkeys(line["run"] for line in lines_of(record))
    comparison = fastfs.compare([record])
    assert comparison.labels == tuple(f"{record}::{run}" for run in (first, second, third))
    assert comparison.equal == (f"{record}::{third}",)
    assert {one.second for one in comparison.partings} == {f"{record}::{second}"}
    assert not fastfs.compare([f"{record}::{first}", f"{record}::{third}"]).partings
    with pytest.raises(ValueError, match=rf"no run 'x' in the record; it has: {first}, {second}, {third}"):
        fastfs.compare([f"{record}::x", record])
    with pytest.raises(ValueError, match=f"are the same run, {third}"):
        fastfs.compare([record, f"{record}::{third}"])


def test_a_killed_run_is_compared_as_far_as_it_came(tmp_path: Path) -> None:
    first, second = train(tmp_path / "a.jsonl"), train(tmp_path / "b.jsonl", changed=4)
    text = second.read_text()
    second.write_text(text[: text.rindex('"angle"') + 20])  # the last line is torn
    comparison = fastfs.compare([first, second])
    assert comparison.steps == (0, 3)
    assert comparison.first is not None
    assert comparison.first.layer == "blocks.4"
    assert comparison.notes == ("a.jsonl: 1 measured steps left out, not in every run",)


def test_one_measured_step_is_enough_for_twins_and_not_for_seeds(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl", steps=1)
    found = fastfs.compare([first, train(tmp_path / "b.jsonl", steps=1, changed=1)]).first
    assert found is not None
    assert found.layer == "blocks.1"
    comparison = fastfs.compare([first, train(tmp_path / "c.jsonl", steps=1, seed=1)])
    assert comparison.untested == ("c.jsonl",)
    assert "nothing can be said" in str(comparison)


def test_two_layers_are_too_few_to_compare_seeds(tmp_path: Path) -> None:
    runs = [train(tmp_path / f"{seed}.jsonl", seed=seed, layers=r"^blocks\.[01]$") for seed in range(2)]
    assert fastfs.compare(runs).untested == ("1.jsonl",)


def test_rows_that_are_not_valid_do_not_count(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl")
    lines = lines_of(train(tmp_path / "b.jsonl", changed=2))
    for line in lines:
        if line["kind"] == "measured":
            line["layers"]["valid"] = [False] * 5
            line["layers"]["why"] = ["a test"] * 5
    comparison = fastfs.compare([first, write(tmp_path / "c.jsonl", lines)])
    keys = {one.key for one in comparison.partings if one.step == 0}
    assert keys <= {"update_per_gradient", "update_per_parameter", "parameter_update_norm", "aligned_decrease",
                    "parameter_norm", "parameter_rotation", "parameter_radial_update"}  # fmt: skip
    assert comparison.first is not None
    assert comparison.first.layer == "blocks.2"


def test_unknown_columns_and_missing_numbers(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl")
    lines = lines_of(train(tmp_path / "b.jsonl", changed=2))
    for line in lines:
        if line["kind"] == "measured":
            line["layers"]["future"] = [1.0, 2.0, 3.0, 4.0, 5.0]
            for column in ("parameter_update_norm", "gradient_norm"):
                line["layers"][column] = [None] * 5
    comparison = fastfs.compare([first, write(tmp_path / "c.jsonl", lines)])
    assert comparison.untested == ("c.jsonl",)  # without the gradients, the states are not known to be the same


def test_a_run_that_diverged_is_compared_while_it_has_numbers(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl")
    lines = lines_of(train(tmp_path / "b.jsonl"))
    last = [line for line in lines if line["kind"] == "measured"][-1]
    last["layers"] = {name: [None] * 5 for name in last["layers"]}
    diverged = write(tmp_path / "c.jsonl", lines)
    for runs in ([first, diverged], [diverged, first]):
        comparison = fastfs.compare(runs)
        assert comparison.partings == comparison.equal == ()
        assert comparison.missing == ("c.jsonl: numbers are missing from step 6 on that a.jsonl has",)
        assert comparison.parted
        assert str(comparison).endswith("c.jsonl: numbers are missing from step 6 on that a.jsonl has.")
    assert CliRunner().invoke(app, ["diff", str(first), str(diverged)]).exit_code == 1


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder"):
        fastfs.compare([first, tmp_path / "none.jsonl"])
    with pytest.raises(ValueError, match=r"at least two runs, got only .*a\.jsonl with one run"):
        fastfs.compare([first])
    with pytest.raises(ValueError, match=r"at least two runs, got none"):
        fastfs.compare([])
    with pytest.raises(ValueError, match=r"runs: expected at least one"):
        fastfs.compare([], against=[first, tmp_path / "a.jsonl"])
    with pytest.raises(ValueError, match=r"no layer in common: a.jsonl has blocks.0.*; h.jsonl has head"):
        fastfs.compare([first, train(tmp_path / "h.jsonl", layers="^head$")])
    header = write(tmp_path / "header.jsonl", lines_of(train(tmp_path / "b.jsonl"))[:1])
    with pytest.raises(ValueError, match=r"header.jsonl: the run has no measured rows yet"):
        fastfs.compare([first, header])
    later = [line for line in lines_of(tmp_path / "b.jsonl") if line.get("step") != 0]
    for line in later:
        line["step"] = line.get("step", 0) + 1
    with pytest.raises(ValueError, match=r"no measured step in common: a.jsonl has 0, 3, 6; later.jsonl has 4, 7"):
        fastfs.compare([first, write(tmp_path / "later.jsonl", later)])
    with pytest.raises(ValueError, match=r"confidence: expected a number in \(0, 1\), got 1"):
        fastfs.compare([first, tmp_path / "b.jsonl"], confidence=1)


def test_a_resumed_run_counts_as_one(tmp_path: Path) -> None:
    first = train(tmp_path / "a.jsonl")
    lines = lines_of(train(tmp_path / "b.jsonl"))
    again = {**lines[0], "resumed_at": 3}
    at = next(i for i, line in enumerate(lines) if line.get("step") == 3)
    resumed = [*lines[: at + 1], again, *lines[at:]]
    assert fastfs.compare([first, write(tmp_path / "c.jsonl", resumed)]).equal == ("c.jsonl",)


def test_tables_and_json(tmp_path: Path) -> None:
    runs = [train(tmp_path / f"{i}.jsonl", changed=[None, 1, 2][i]) for i in range(3)]
    comparison = fastfs.compare(runs)
    table = comparison.to_frame()
    assert list(dict.fromkeys(table["second"])) == ["1.jsonl", "2.jsonl"]
    assert table["layer"].iloc[0] == "blocks.1"
    assert comparison.of("2.jsonl")[0].layer == "blocks.2"
    result = json.loads(json.dumps(comparison.to_dict()))
    assert result["parted"] is True
    assert result["partings"][0]["layer"] == "blocks.1"
    assert ALL_LAYERS not in {one["layer"] for one in result["partings"]}
