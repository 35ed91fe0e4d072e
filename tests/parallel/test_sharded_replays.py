"""Second forwards of sharded models: features as in one process, and FSDP2 as training has left it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastfs._record import row_reasons
from fastfs._stats import FeatureStats
from tests.helpers.parallel_measurements import layers_of, measured
from tests.helpers.processes import run_ranks


def runs(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measures several trainings on this rank."""
    return [measured(**case) for case in cases]


def assert_as_in_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["same"]
        assert rank["warnings"] == []
        assert rank["codes"] == alone["codes"] == [[0] * 5] * 2
        for what in ("cut", "why", "upstream"):
            assert rank[what] == alone[what]
    for step, expected in enumerate(alone["features"]):
        found = layers_of(ranks, step)
        stats = FeatureStats(expected)
        assert stats.update_sq.min() > 0
        assert stats.backward_sq.min() > 0
        rounding = FeatureStats.names.index("rounding_sq")
        found[:, rounding] = expected[:, rounding]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-20)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"setup": "ddp"}, {}),
    ({"setup": "fsdp"}, {}),
    ({"setup": "kept"}, {}),
    ({"setup": "released"}, {}),
    ({"setup": "root only"}, {}),
    ({"setup": "offload"}, {}),
    ({"setup": "tensor"}, {}),
    ({"setup": "fsdp"}, {"recompute": True}),
    ({"setup": "tensor"}, {"recompute": True}),
    ({"setup": "fsdp"}, {"parts": 2}),
    ({"setup": "fsdp"}, {"evaluate": True}),
]


@pytest.mark.slow
def test_two_ranks() -> None:
    others: list[dict[str, Any]] = [{}, {"recompute": True}, {"parts": 2}, {"evaluate": True}]
    cases: list[dict[str, Any]] = [{"setup": "single", **options} for options in others] + [
        {**a, **b} for a, b in CASES
    ]
    found = run_ranks(runs, 2, timeout=240, cases=cases)
    for index, (_, options) in enumerate(CASES, start=len(others)):
        assert_as_in_one_process([rank[index] for rank in found], found[0][others.index(options)])


@pytest.mark.slow
def test_four_ranks() -> None:
    setups = ("hybrid", "both", "fsdp", "tensor")
    found = run_ranks(runs, 4, timeout=240, cases=[{"setup": setup} for setup in ("single", *setups)])
    for index in range(1, len(setups) + 1):
        assert_as_in_one_process([rank[index] for rank in found], found[0][0])
    assert found[0][0]["upstream"] == [2, 8, 14, 20, 22]


@pytest.mark.slow
@pytest.mark.graphs
def test_compiled_blocks() -> None:
    found = run_ranks(runs, 2, timeout=240, cases=[{"setup": "compiled alone"}, {"setup": "compiled"}])
    assert_as_in_one_process([rank[1] for rank in found], found[0][0])


@pytest.mark.slow
def test_mixed_precision_and_features_that_are_dtensors() -> None:
    cases = [
        {"setup": "mixed", "dtype": torch.float32},
        {"setup": "sequence"},
        {"setup": "partial"},
        {"setup": "single"},
    ]
    found = run_ranks(runs, 2, timeout=240, cases=cases)
    for rank in found:
        assert all(run["same"] for run in rank)
        assert all(run["warnings"] == [] for run in rank)
        mixed, sequence, partial, _ = rank
        assert mixed["codes"] == sequence["codes"] == [[0] * 5] * 2
        assert partial["codes"] == [[0, 0, row_reasons.PARTIAL, 0, row_reasons.PARTIAL, 0]] * 2
        assert sequence["placed"][0] == ["rows"] * 4 + ["replicate"]
        assert partial["placed"][0] == [None, "replicate", None, None, "replicate", None]
    alone = found[0][-1]["features"][0]
    halves = sum(rank[1]["features"][0] for rank in found)
    rounding = FeatureStats.names.index("rounding_sq")
    halves[:, rounding] = alone[:, rounding]
    torch.testing.assert_close(halves[:4], alone[:4], rtol=1e-10, atol=1e-20)
