"""What `Monitor(details=True)` records of weight matrices, against hooks, clones and float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fastfs
from tests.helpers.detail_cases import CASES, DetailCase, Shared, Watch, quantities, shared_calls

STEPS = 3
AUTOCAST = [replace(case, name=f"{case.name}-autocast", autocast=True) for case in CASES if case.name != "shared"]


def trained(case: DetailCase, path: Path, **settings: Any) -> tuple[pd.DataFrame, list[dict[str, dict[str, float]]]]:
    """Trains with a monitor; returns what it records, and the same by hand, step by step."""
    torch.manual_seed(3)
    model = case.model()
    optimizers = case.optimizers(model)
    by_hand = []
    with fastfs.Monitor(
        model, optimizers, every=1, details=True, layers=case.layers, path=path, alerts=(), verbose=False, **settings
    ):
        for step in range(STEPS):
            batches = [case.batch(step * case.micro_batches + i) for i in range(case.micro_batches)]
            states = []
            model.zero_grad()
            for batch in batches:
                states.append(torch.get_rng_state())
                (case.value(model, batch) / case.micro_batches).backward()
            before = by_hooks(model, case, batches, states)
            for optimizer in optimizers:
                optimizer.step()
            by_hand.append(quantities(before, by_hooks(model, case, batches, states)))
    return fastfs.monitor.load_details(path), by_hand


def by_hooks(model: nn.Module, case: DetailCase, batches: list[Any], states: list[torch.Tensor]) -> Any:
    """The inputs of all matrices on the batches of a step, with the parameters as they are now."""
    if isinstance(model, Shared):
        with torch.no_grad():
            return {n: [(w.clone(), x) for w, x in c] for n, c in shared_calls(model, batches[0][0]).items()}
    now, watch = torch.get_rng_state(), Watch(model)
    with torch.no_grad():
        for batch, state in zip(batches, states, strict=True):
            torch.set_rng_state(state)
            case.value(model, batch)
    torch.set_rng_state(now)
    return watch.remove()


def compared(table: pd.DataFrame, by_hand: list[dict[str, dict[str, float]]]) -> pd.DataFrame:
    """The recorded values with the expected ones."""
    rows = []
    for (step, name, quantity), group in table.groupby(["step", "name", "quantity"]):
        want = by_hand[step].get(name, {}).get(quantity)
        if want is not None:
            (found,) = group.to_dict("records")
            rows.append({**found, "want": want})
    return pd.DataFrame(rows)


EXPERTS = r"experts\.(?:gate_up|down)_proj$"


@pytest.mark.parametrize("case", [*CASES, *AUTOCAST], ids=lambda case: case.name)
def test_all_rows(case: DetailCase, tmp_path: Path) -> None:
    table, by_hand = trained(case, tmp_path / "a.jsonl", rows=None)
    both = compared(table, by_hand)
    assert len(both) == sum(len(values) for step in by_hand for values in step.values())
    assert both["standard_error"].isna().all()
    unknown = both["value"].isna()
    experts = both["name"].str.contains(EXPERTS)
    assert set(both[unknown & experts]["quantity"]) <= {"own_motion", "inherited_motion", "motion_cosine"}
    allowed = {"the change of its input is below five times what rounding may produce"} if case.autocast else set()
    assert set(both[~experts]["why"].dropna()) <= allowed
    # Under autocast, inputs that no module is given are computed in float64 by hand, and in bfloat16 by the model.
    coarse = both["name"].str.contains(r"out_proj|down_proj$") if case.autocast else experts & False
    for rows, limit in ((~unknown & ~coarse, 1e-5), (~unknown & coarse, 2e-2)):
        assert np.allclose(both["value"][rows], both["want"][rows], rtol=limit, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sampled_rows(case: DetailCase, tmp_path: Path) -> None:
    table, by_hand = trained(case, tmp_path / "a.jsonl", rows=24)
    both = compared(table, by_hand)
    both = both[both["value"].notna()]
    away = np.abs(both["value"] - both["want"]) / both["standard_error"]
    exact = both["standard_error"].isna() | (both["standard_error"] == 0)  # no more rows than are kept, or no motion
    assert np.allclose(both["value"][exact], both["want"][exact], rtol=1e-5)
    assert (away[~exact] > 2).mean() < 0.1  # of normal variables 4.6 %; those of one step share their rows
    assert away[~exact].max() < 6
