"""Sums from a sample of the parameters on a real GPU: pieces, and censuses that nobody waits for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from benchmarks.ops.graphs import nothing_waits
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from fastfs._monitor.measure.sampled_calls import SampledCalls
from fastfs._monitor.measure.update_meter import UpdateMeter
from tests.helpers.cases import step_arguments, step_inputs
from tests.helpers.compare import assert_same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("count", [1, 300, 2000])
@pytest.mark.parametrize("there", [False, True])
def test_many_pieces(count: int, there: bool) -> None:
    """More than a table of a launch holds, with coefficients in the table and in device memory."""
    rule = OptimizerRule.ADAM
    arguments = step_arguments(rule, [step_inputs(rule, (n,), device="cuda") for n in (300000, 70001)])
    _, *lists, table = arguments
    numbers = torch.arange(count)
    pieces = torch.stack([numbers % 2, numbers * 34, numbers % 77], dim=1)
    parts = [[each[i][begin : begin + n] for i, begin, n in pieces.tolist()] for each in lists]
    rows = table[pieces[:, 0]]
    rows = rows.cuda() if there else rows
    found = optimizer_stats(rule, lists[0], lists[1], lists[2], lists[3], rows, pieces=pieces).sums
    assert_same(found, optimizer_stats(rule, parts[0], parts[1], parts[2], parts[3], rows).sums)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_nothing_waits_and_estimates_are_near(kind: type[torch.optim.Optimizer]) -> None:
    parameters = [torch.randn(256, 256, device="cuda", requires_grad=True) for _ in range(3)]
    optimizer = kind(parameters, lr=0.01)  # type: ignore[call-arg]
    exact, sampled = UpdateMeter(optimizer), UpdateMeter(optimizer, sampled=SampledCalls(4, least=64))
    estimates = 0
    for step in range(12):
        for p in parameters:
            p.grad = torch.randn_like(p)
        watch = nothing_waits if step else nullcontext  # the first step makes what is kept
        exact.before()
        with watch():
            sampled.before()
        optimizer.step()
        truth = exact.after().stats.dot
        with watch():
            found = sampled.after(exact=False)
        assert found.sampling is not None
        error = found.sampling[:, 0].sqrt()
        estimates += int((error > 0).sum())
        assert ((found.stats.dot - truth).abs() <= 6 * error + 1e-6 * truth.abs()).all()
        torch.cuda.synchronize()  # so that a census has arrived at the next step
    assert estimates == 3 * 8  # all but the censuses, at the steps 1, 2, 4 and 8
