"""Generated training loops against numbers by hand: nothing valid is wrong, nothing is missing without a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.monitor import fuzz
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.recipe import AXES, Recipe, possible, random_recipe, shrink
from tests.fuzz.runs import run
from tests.fuzz.world import differences

LOOPS, CHUNKS = 100, 10


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The models are tiny, and other threads would only spin."""
    threads(1)


def assert_right(recipes: list[Recipe]) -> None:
    """Every loop that fails is told, the first one with as few ingredients as it can have."""
    failed = [(recipe, verdict.faults) for recipe in recipes if (verdict := judge(recipe)).faults]
    if failed:
        kind = failed[0][1][0].split(":")[0]
        smallest = shrink(failed[0][0], lambda recipe: any(f.startswith(kind) for f in judge(recipe).faults))
        told = [(smallest, judge(smallest).faults), *failed[1:]]
        listed = "\n".join(f"{recipe}\n    {faults[0]} (and {len(faults) - 1} more)" for recipe, faults in told)
        pytest.fail(f"{len(failed)} of {len(recipes)} loops:\n{listed}", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_every_ingredient_alone(axis: Any) -> None:
    recipes = [possible(Recipe(**{axis: value})) for value in AXES[axis]]
    assert_right(recipes)


@pytest.mark.slow
@pytest.mark.parametrize("monitor", AXES["monitor"])
@pytest.mark.parametrize("axis", ["body", "call", "optimizer"])
def test_every_monitor_with_every_ingredient(axis: str, monitor: Any) -> None:
    """A third of them each time, another one for every monitor."""
    turn = AXES["monitor"].index(monitor) % 3
    recipes = [possible(Recipe(scale=0.1, monitor=monitor, **{axis: value})) for value in AXES[axis][turn::3]]
    assert_right(recipes)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_loops(chunk: Any) -> None:
    size = LOOPS // CHUNKS
    assert_right([random_recipe(seed) for seed in range(chunk * size, (chunk + 1) * size)])


@pytest.mark.slow
@pytest.mark.graphs
@pytest.mark.parametrize("monitor", ["batch", "amplify", "jvp"])
def test_compiled_loops(monitor: str) -> None:
    assert_right([Recipe(compiled="aot_eager", monitor=monitor, optimizer="adamw", clip="norm")])


# The judge itself


def test_the_hand_changes_nothing() -> None:
    for seed in range(30):
        recipe = random_recipe(seed)
        plain, hand = run(recipe, monitored=False), run(recipe, monitored=False, hand=True)
        assert not [x for a, b in zip(plain.pictures, hand.pictures, strict=True) for x in differences(a, b)], recipe


@pytest.mark.parametrize("monitor", AXES["monitor"])
def test_most_rows_of_a_plain_loop_are_valid(monitor: Any) -> None:
    """A judge of valid rows would be content with none."""
    verdict = judge(Recipe(monitor=monitor, scale=0.1))
    assert verdict.faults == []
    assert verdict.counts["valid"] >= 0.9 * verdict.counts["measured rows"] > 0
    assert verdict.counts["decreases"] > 0


@pytest.mark.parametrize(
    ("column", "factor"),
    [("angle", 1.03), ("update_rms", 0.97), ("aligned_decrease", 1.01), ("gradient_norm", 0.99), ("residual", 3.0)],
)
def test_the_judge_sees_a_wrong_number(column: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fuzz import judge as module

    def wrong(recipe: Recipe, *, monitored: bool, hand: bool = False) -> object:
        outcome = run(recipe, monitored=monitored, hand=hand)
        for row in (row for rows in outcome.rows for row in rows if row["kind"] == "measured"):
            row[column] = row[column] and row[column] * factor
        return outcome

    monkeypatch.setattr(module, "run", wrong)
    verdict: Verdict = judge(Recipe(scale=0.1))
    assert verdict.faults


def test_a_recipe_is_the_same_loop_every_time() -> None:
    first, second = (judge(random_recipe(5)) for _ in range(2))
    assert first == second
    assert str(random_recipe(5)) == str(random_recipe(5))
    assert eval(str(random_recipe(5)), {"Recipe": Recipe}) == random_recipe(5)


def test_shrinking_keeps_what_is_needed() -> None:
    recipe = possible(Recipe(seed=3, body="gru", clip="norm", optimizer="adam", zero="zeros"))
    smallest = shrink(recipe, lambda r: r.clip == "norm" and r.body == "gru")
    assert smallest == dataclasses.replace(recipe, optimizer="sgd", zero="none")


def test_the_benchmark_counts_loops_by_ingredient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fuzz.json"
    fuzz.main(["--loops", "2", "--first", "1", "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert result["total"]["loops"] == 2
    ingredients = {name for seed in (1, 2) for name in random_recipe(seed).ingredients or ["nothing"]}
    assert set(result["by ingredient"]) == ingredients
    assert "loops by ingredient" in capsys.readouterr().out


def test_shadows_in_float64_draw_the_same_masks() -> None:
    masks = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        masks.append(torch.nn.functional.dropout(torch.ones(8, 6, dtype=dtype), 0.2) != 0)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
