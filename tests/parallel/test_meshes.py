"""The record of a run on several ranks is that of one process on the global batch, and training stays what it is."""

from __future__ import annotations

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

MESHES = [
    ("ddp", 2, {}),
    ("ddp", 3, {"accumulate": 2, "clip": 0.1, "optimizer": "sgd"}),
    ("fsdp", 2, {"accumulate": 2}),
    ("fsdp", 4, {"clip": 0.05, "optimizer": "adamw_fused"}),
    ("fsdp_keep", 2, {"optimizer": "adamw_foreach"}),
    ("fsdp_compiled", 2, {}),
    ("fsdp_recomputed", 2, {}),
    ("hsdp", 4, {"clip": 0.05}),
    ("offload", 2, {}),
    ("tp", 2, {"accumulate": 2}),
    ("tp", 4, {"optimizer": "sgd"}),
    ("tp_sequence", 2, {}),
    ("tp_fsdp", 4, {"accumulate": 2}),
    ("tp_sequence_fsdp", 4, {}),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The record of one process, by the options of the loop."""
    known: dict[str, Any] = {}

    def table(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in known:
            path = tmp_path_factory.mktemp("alone") / "record.jsonl"
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


@pytest.mark.parametrize(("mesh", "ranks", "options"), MESHES, ids=["-".join((m, str(n), *o)) for m, n, o in MESHES])
def test_sums_are_those_of_the_global_batch(
    mesh: str, ranks: int, options: dict[str, Any], tmp_path: Path, alone: Any
) -> None:
    path = tmp_path / "record.jsonl"
    found = run_ranks(with_and_without, ranks, mesh=mesh, path=str(path), **options)
    many, one = fastfs.load(path), alone(**options)
    assert_same_record(many, one)
    assert many["ranks"].tolist() == [ranks] * len(many)
    assert many["gradient_scale"].to_numpy() == pytest.approx(one["gradient_scale"].to_numpy(), abs=1e-9)
    assert many.attrs["headers"][-1]["ranks"] == ranks
    assert found[0]["layers"]
    assert len(many) == len(found[0]["layers"]) * STEPS
    assert list(tmp_path.iterdir()) == [path]
    norms = many["gradient_norm"].to_numpy(dtype=float), one["gradient_norm"].to_numpy(dtype=float)
    known = ~np.isnan(norms[0])
    assert known.any()
    assert known.all() or "sequence" in mesh  # norm layers have summands of their gradients
    np.testing.assert_allclose(norms[0][known], norms[1][known], rtol=1e-10)
