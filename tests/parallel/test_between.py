"""Which rank stands apart from the others: broken ranks are named, and clean runs raise nothing.

The numbers of most runs are drawn: sums of a rank's batch with the scatter that batches of small networks have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastfs
from fastfs._record.ranks.between import Comparison
from fastfs._record.ranks.merging import MergedRows
from fastfs._record.record import Record
from fastfs._record.writing.alerts import Alerts
from fastfs._stats import FeatureStats
from fastfs.monitor import RankApart
from tests.helpers.parallel_cases import LAYERS, ddp, global_batch, make_model, make_optimizer
from tests.helpers.processes import run_ranks

COUNT = 4096.0
HEADER = {"run": "r", "layers": ["embed", "blocks.0", "blocks.1", "norm"]}
# What a fault multiplies: cosine, speed, backward and features, as measured in small networks.
FAULTS = {
    "doubled signal": (1.0, 1.0, 2.0, 1.0),
    "labels shuffled": (0.6, 1.0, 2.2, 1.0),
    "inputs times 3": (1.0, 2.5, 1.0, 2.8),
    "zero inputs": (0.7, 0.5, 2.0, 0.0),
}


def sums_of(cosine: Any, speed: Any, backward: Any, features: Any) -> Any:
    """Returns sums (..., 9) of batches with these root mean squares."""
    sums = np.zeros((*np.shape(cosine), 9))
    columns = {
        "update_dot_backward": -COUNT * cosine * speed * backward,
        "update_sq": COUNT * speed**2,
        "backward_sq": COUNT * backward**2,
        "before_sq": COUNT * features**2,
        "count": COUNT,
    }
    for name, values in columns.items():
        sums[..., FeatureStats.names.index(name)] = values
    return sums


def draw(
    seed: int, ranks: int, steps: int, noise: float, *, tail: float | None = None, fault: Any = None, start: int = 0
) -> list[Any]:
    """Draws the sums of a run, (B, L, 9) for each step; ``fault`` is that of rank 1, from a step on."""
    random = np.random.default_rng(seed)
    layers = len(HEADER["layers"])
    found = []
    for step in range(steps):
        # What batches have in common moves all layers; a part of the scatter is that of a layer.
        shape = (4, ranks, 1), (4, ranks, layers)
        common, own = (random.normal(size=s) if tail is None else random.standard_t(tail, size=s) for s in shape)
        relative = noise * np.array([0.4, 0.4, 1.0, 0.3])[:, None, None] * (0.8 * common + 0.6 * own)
        trend = np.exp(-0.05 * step)
        cosine = np.clip(0.4 * (1 + relative[0]), -0.99, 0.99)
        speed, backward, features = (size * np.exp(relative[i + 1]) for i, size in enumerate((1e-2, 1e-4 * trend, 1.0)))
        sizes = [cosine, speed, backward, features]
        if fault is not None and step >= start:
            for values, factor in zip(sizes, FAULTS[fault], strict=True):
                values[1] *= factor
        found.append(sums_of(*sizes))
    return found


def apart(steps: list[Any]) -> list[list[int | None]]:
    """Returns the column ``rank_apart`` of each step."""
    comparison, found = Comparison(), []
    for sums in steps:
        shape = sums.shape[1]
        rows = MergedRows(
            sums.sum(axis=0), np.zeros((shape, 6)), None, np.zeros(shape), None, sums, [*range(len(sums))]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(comparison.columns(rows)["rank_apart"])
    return found


def raised(columns: list[Any]) -> list[Any]:
    """Returns step, value and message of the alerts."""
    alerts, found = Alerts([RankApart()], HEADER), []
    for step, column in enumerate(columns):
        more, failed = alerts.update(Record("measured", step, 0.0, {}, {"rank_apart": column}))
        assert not failed
        found += [(each.step, each.scalars["value"], each.scalars["message"]) for each in more]
    return found


@pytest.mark.parametrize("tail", [None, 5.0, 3.0])
@pytest.mark.parametrize(("ranks", "runs"), [(4, 12), (8, 12), (64, 10)])
def test_clean_runs_raise_nothing(ranks: int, runs: int, tail: float | None) -> None:
    columns = [apart(draw(100 * ranks + i, ranks, 30, 0.3 / 2 ** (i % 5), tail=tail)) for i in range(runs)]
    assert [raised(column) for column in columns] == [[]] * runs
    if tail is None:  # single steps may name a rank by chance
        cells = [rank is not None for column in columns for step in column for rank in step]
        assert np.mean(cells) < 0.02


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ranks", [4, 8, 64])
def test_a_broken_rank_is_named_within_three_measured_steps(ranks: int, fault: str) -> None:
    for seed in range(5):
        columns = apart(draw(seed, ranks, 20, 0.05, fault=fault, start=8))
        assert all(1 in column for column in columns[8:])
        ((step, value, message),) = [each for each in raised(columns) if each[0] >= 8]
        assert (step, value) == (10, 1.0)
        assert message.startswith("rank 1 stands apart from the other ranks at 'embed'")
        assert message.endswith("3 measured steps in a row")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("ranks", "noise", "steps"), [(4, 0.02, 3), (4, 0.05, 6), (8, 0.05, 3), (64, 0.1, 3)])
def test_a_rank_that_is_broken_from_the_start(ranks: int, noise: float, steps: int, fault: str) -> None:
    """Four batches alone do not show how far batches scatter, so that the first steps have to make up for it."""
    columns = apart(draw(1, ranks, 20, noise, fault=fault))
    first = raised(columns)[0]
    assert first[1] == 1.0
    assert first[0] < steps


def test_fewer_than_four_batches_have_no_rank_apart() -> None:
    assert apart(draw(0, 3, 5, 0.01, fault="doubled signal")) == [[None] * 4] * 5
    assert apart(draw(0, 1, 5, 0.01)) == [[None] * 4] * 5


def test_small_differences_are_none_however_exact_the_others() -> None:
    steps = draw(0, 8, 5, 0.0)
    for sums in steps:
        sums[1] *= 1.1
    assert apart(steps) == [[None] * 4] * 5
    for sums in steps:
        sums[1, :, FeatureStats.names.index("backward_sq")] *= 2
    assert apart(steps) == [[1] * 4] * 5


def test_ranks_without_numbers_do_not_count() -> None:
    steps = draw(0, 8, 6, 0.05)
    for sums in steps:
        sums[2, 1] = np.nan
        sums[3, 1] = 0.0  # no tokens: 0 of 0
    assert raised(apart(steps)) == []
    for sums in steps[2:]:
        sums[4, 1, FeatureStats.names.index("before_sq")] = 0.0  # features that are 0, unlike those of the others
    assert [column[1] for column in apart(steps)[2:]] == [4] * 4


def test_another_rank_or_layer_is_another_row() -> None:
    none, one, two = [None] * 4, [None, 1, None, None], [None, 2, None, None]
    assert raised([one, one, none, one, one]) == []
    assert raised([one, one, two, one, one, two]) == []
    assert raised([one, one, [1, None, None, None], one, one]) == []
    assert [each[:2] for each in raised([one, one, [2, 1, 2, 2], one])] == [(2, 1.0)]
    assert [each[0] for each in raised([one] * 5 + [none] + [one] * 4)] == [2, 8]
    ((_, value, message),) = raised([[3, 3, 3, 3]] * 3)
    assert value == 3.0
    assert message == (
        "rank 3 stands apart from the other ranks at 'embed', 'blocks.0', 'blocks.1' and 1 more: its data or its loss "
        "differs from theirs, 3 measured steps in a row"
    )


def train(path: str, broken: bool, steps: int) -> None:
    """Trains with batches of few rows; the loss of rank 2 is doubled from the middle on if ``broken``."""
    import warnings

    rank = dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of gloo
        model, ranks, own = ddp(make_model(torch.float32))
    optimizer = make_optimizer(model, "adamw")
    options: dict[str, Any] = {"layers": LAYERS, "every": 1, "path": Path(path), "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the alerts
        with fastfs.Monitor(model, optimizer, alerts=[RankApart()], **options):
            for step in range(steps):
                # Four times the batch of the helper for each rank.
                parts = [global_batch(1000 * rank + 10 * step + i, torch.float32) for i in range(ranks)]
                x, y = (torch.cat(each) for each in zip(*parts, strict=True))
                loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
                optimizer.zero_grad()
                (loss * (4.0 if broken and rank == 2 and step >= steps // 2 else 1.0)).backward()
                optimizer.step()
    assert own == rank


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_real_runs_of_four_ranks(tmp_path: Path, broken: bool) -> None:
    steps = 30
    run_ranks(train, 4, timeout=120, path=str(tmp_path / "record.jsonl"), broken=broken, steps=steps)
    table = fastfs.load(tmp_path / "record.jsonl")
    alerts = table.attrs["alerts"]
    assert table["step"].nunique() == steps
    if not broken:
        assert alerts == []
        return
    (alert,) = alerts
    assert (alert["rule"], alert["value"], alert["layer"]) == ("rank apart", 2.0, None)
    assert alert["step"] == steps // 2 + 2
