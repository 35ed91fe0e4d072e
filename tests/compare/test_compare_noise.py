"""The statistics of a comparison: false alarms under the null, detection, and their parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastfs._compare.compare import compare_runs
from fastfs._compare.measures import MEASURES
from fastfs._compare.noise import level_of, of_pair, of_replicates, same_state
from fastfs._compare.result import ALL_LAYERS
from fastfs._compare.runs import align
from tests.helpers.recorded_runs import made, noisy

pytest.importorskip("scipy")
MEASURE = {one.key: one for one in MEASURES}


def most(share: float, times: int) -> float:
    """Four standard deviations of a binomial above its mean."""
    return times * share + 4 * math.sqrt(times * share * (1 - share))


@pytest.mark.parametrize("layers", [3, 40])
@pytest.mark.parametrize("tails", [None, 3.0])
@pytest.mark.parametrize("sides", [(1, 1), (3, 3), (1, 4)])
def test_runs_of_one_setting_seldom_part(layers: int, tails: float | None, sides: tuple[int, int]) -> None:
    """With a common part, layers of different scale and heavy tails, over all quantities and steps."""
    rng = np.random.default_rng(layers)
    times = 60
    against = 0 if sides == (1, 1) else sides[1]
    alarms = sum(
        bool(compare_runs([noisy(rng, layers, 6, str(i), tails=tails) for i in range(sum(sides))], against).partings)
        for _ in range(times)
    )
    assert alarms <= most(0.05, times)


def test_p_values_of_replicates_are_not_too_small() -> None:
    rng = np.random.default_rng(0)
    measure = MEASURE["feature_rms"]
    runs = [noisy(rng, 300, 10, str(i)) for i in range(6)]
    p = of_replicates(align(runs), measure, np.arange(6) >= 3).p[:-1]
    for level in (0.5, 0.1, 0.01):
        assert (p < level).mean() <= level * 1.1
    assert (p < 0.5).mean() > 0.2  # nor much too large


def test_p_values_of_a_pair_are_not_too_small() -> None:
    """Of layers with the same scale; the degrees of freedom are bounded and the noise is counted twice."""
    rng = np.random.default_rng(1)
    columns = [{"parameter_update_norm": np.exp(0.1 * rng.standard_normal((300, 6)))} for _ in range(2)]
    aligned = align([made(c, label=str(i)) for i, c in enumerate(columns)])
    p = of_pair(aligned, MEASURE["parameter_update_norm"], same_state(aligned)).p
    for level in (0.5, 0.1, 0.01):
        assert (p < level).mean() <= level


def test_a_layer_apart_is_found_among_quiet_ones() -> None:
    rng = np.random.default_rng(2)
    for layers in (3, 10, 100):
        first, second = (
            {"parameter_update_norm": np.exp(1e-4 * rng.standard_normal((layers, 3))) * common} for common in (1.0, 3.0)
        )
        second["parameter_update_norm"][1] *= 1.3
        found = compare_runs([made(first, label="a"), made(second, label="b")]).first
        assert found is not None
        assert (found.layer, found.step, found.noise) == ("layer 1", 0, "layers")
        assert found.change == pytest.approx(1.3, rel=1e-2)  # without the common factor of 3
        assert found.others == 0


def test_a_layer_that_changes_by_itself_from_step_to_step_does_not_part() -> None:
    """An embedding, whose update follows the tokens of the batch, among layers that hardly vary."""
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(100):
        runs = []
        for label in "ab":
            values = np.exp(1e-3 * rng.standard_normal((12, 6)))
            values[0] *= np.exp(0.1 * rng.standard_normal(6))
            runs.append(made({"parameter_update_norm": values}, label=label))
        alarms += bool(compare_runs(runs).partings)
    assert alarms <= most(0.05, 100)


def test_replicates_find_what_all_layers_share() -> None:
    rng = np.random.default_rng(4)
    runs = []
    for i in range(8):
        own = np.exp(0.2 * rng.standard_normal((5, 2)))  # of the layer; averaged out in the median
        runs.append(made({"feature_rms": own * (4.0 if i >= 4 else 1.0)}, label=str(i)))
    comparison = compare_runs(runs, 4)
    assert comparison.first is not None
    assert comparison.first.change == pytest.approx(4.0, rel=0.3)
    layers = of_replicates(align(runs), MEASURE["feature_rms"], np.arange(8) >= 4)
    assert layers.difference.shape == (6, 2)
    assert ALL_LAYERS not in comparison.layers


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-4])
def test_states_are_the_same_up_to_rounding(apart: float) -> None:
    state: dict[str, Any] = {
        name: np.full((3, 2), value)
        for name, value in (("feature_rms", 1.0), ("backward_rms", 1e-4), ("gradient_norm", 0.1))
    }
    other = {name: values.copy() for name, values in state.items()}
    other["backward_rms"][2, 1] *= 1 + apart
    same, largest = same_state(align([made(state, label="a"), made(other, label="b")]))
    assert same.tolist() == [True, apart < 1e-5]
    assert largest == pytest.approx([0.0, apart / (1 + apart)])
    other["gradient_norm"][0, 0] = np.nan
    assert not same_state(align([made(state, label="a"), made(other, label="b")]))[0][0]


def test_the_noise_of_feature_updates_in_low_precision() -> None:
    """A difference of 5 % in the speed is rounding if the update is 4 times the noise floor, not if it is 1e5 times."""
    for floor, parted in ((2.5e-3, False), (1e-7, True)):
        columns = []
        for factor in (1.0, 1.05):
            state = {name: np.full((3, 1), 1.0) for name in ("feature_rms", "backward_rms", "gradient_norm")}
            update = {"update_rms": np.array([[0.01], [0.01], [0.01 * factor]])}
            floors = {"noise_floor": np.full((3, 1), floor), "relative_update": np.full((3, 1), 0.01)}
            columns.append({**state, **update, **floors})
        found = compare_runs([made(c, label=str(i)) for i, c in enumerate(columns)])
        assert bool(found.partings) is parted


def test_levels_add_up() -> None:
    steps = np.arange(100_000)
    levels = level_of(steps, np.full(len(steps), 7), 0.95)
    assert 0.0499 < 7 * levels.sum() <= 0.05
    assert level_of(steps[:3], np.full(3, 7), 0.95) == pytest.approx(levels[:3])  # whatever follows
