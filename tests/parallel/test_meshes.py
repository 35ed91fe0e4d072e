"""The record of a run on several ranks is that of one process on the global batch, and training stays what it is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastfs
from tests.helpers.parallel_cases import STEPS, with_and_without
from tests.helpers.processes import run_ranks

EXACT = (
    "angle",
    "cos_angle",
    "update_rms",
    "relative_update",
    "feature_rms",
    "backward_rms",
    "tangential_update",
    "aligned_decrease",
    "parameter_norm",
    "parameter_update_norm",
    "loss",
)
SAME = ("step", "kind", "name", "valid", "why", "decrease_why", "linear", "count", "rows")

MESHES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("ddp", {}),
        ("ddp", {"every": 2, "aligned_every": 1, "optimizer": "sgd"}),
        ("ddp", {"mode": "jvp"}),
        ("fsdp", {"accumulate": 2}),
        ("fsdp_keep", {"optimizer": "adamw_foreach"}),
        ("fsdp_compiled", {}),
        ("fsdp_recomputed", {}),
        ("offload", {}),
        ("tp", {"accumulate": 2}),
        ("tp_sequence", {"every": 2, "aligned_every": 1}),
    ],
    3: [("ddp", {"accumulate": 2, "clip": 0.1, "optimizer": "sgd"})],
    4: [
        ("fsdp", {"clip": 0.05, "optimizer": "adamw_fused"}),
        ("hsdp", {"clip": 0.05}),
        ("tp", {"optimizer": "sgd"}),
        ("tp_fsdp", {"accumulate": 2}),
        ("tp_sequence_fsdp", {}),
    ],
}
CASES = [(ranks, number) for ranks, cases in MESHES.items() for number in range(len(cases))]


def all_of(ranks: int, folder: str) -> list[int]:
    """Trains on every mesh of a number of ranks, with and without a monitor; returns how many layers were watched."""
    found = []
    for number, (mesh, options) in enumerate(MESHES[ranks]):
        watched = with_and_without(mesh, f"{folder}/{ranks}-{number}/record.jsonl", **options)
        found.append(len(watched["layers"]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def many(folder: Path) -> Any:
    """The record of a mesh, by the number of ranks and of the case; all of one number of ranks are run together."""

    @functools.cache
    def run(ranks: int) -> list[list[int]]:
        return run_ranks(all_of, ranks, timeout=400, ranks=ranks, folder=str(folder))

    def table(ranks: int, number: int) -> tuple[Any, Path, int]:
        layers = run(ranks)[0][number]
        path = folder / f"{ranks}-{number}" / "record.jsonl"
        return fastfs.load(path), path, layers

    return table


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """The record of one process, by the options of the loop."""
    known: dict[str, Any] = {}

    def table(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in known:
            path = folder / f"alone-{len(known)}.jsonl"
            with_and_without("single", str(path), **options)
            known[key] = fastfs.load(path)
        return known[key]

    return table


def assert_same_record(many: Any, one: Any, columns: tuple[str, ...] = EXACT, rtol: float = 1e-10) -> None:
    """Asserts that two tables have the same rows."""
    assert len(many) == len(one) > 0
    for column in SAME:
        mine, other = (table[column].astype(object).where(table[column].notna(), None) for table in (many, one))
        assert mine.tolist() == other.tolist(), column
    for column in columns:
        mine, other = (table[column].to_numpy(dtype=float) for table in (many, one))
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=0, err_msg=column)
    mine, other = (table["residual"].to_numpy(dtype=float) for table in (many, one))
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-10 if rtol <= 1e-10 else 1e-3)


@pytest.mark.parametrize(
    ("ranks", "number"), CASES, ids=["-".join((MESHES[r][n][0], str(r), *MESHES[r][n][1])) for r, n in CASES]
)
def test_sums_are_those_of_the_global_batch(ranks: int, number: int, many: Any, alone: Any) -> None:
    mesh, options = MESHES[ranks][number]
    (found, path, layers), one = many(ranks, number), alone(**options)
    assert_same_record(found, one)
    assert found["ranks"].tolist() == [ranks] * len(found)
    scales = (table["gradient_scale"].to_numpy(dtype=float) for table in (found, one))
    assert next(scales) == pytest.approx(next(scales), abs=1e-9, nan_ok=True)
    assert found.attrs["headers"][-1]["ranks"] == ranks
    assert layers * STEPS == len(found) > 0
    assert list(path.parent.iterdir()) == [path]
    norms = found["gradient_norm"].to_numpy(dtype=float), one["gradient_norm"].to_numpy(dtype=float)
    known = ~np.isnan(norms[0])
    assert known.any()
    assert known.all() or "sequence" in mesh  # norm layers have summands of their gradients
    np.testing.assert_allclose(norms[0][known], norms[1][known], rtol=1e-10)
