"""Sums over the parameters of a rank, added over shards, are those of one process; training has the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastfs
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._monitor.measure.update_meter import UpdateMeter
from fastfs._record import decrease_reasons
from fastfs._stats import ParameterStats
from tests.helpers.parallel_measurements import measured, over_shards
from tests.helpers.processes import run_ranks
from tests.helpers.sharded_cases import OPTIMIZERS, local_part, mesh

SUMS = slice(0, ParameterStats.names.index("nonfinite"))


def runs(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measures several trainings on this rank."""
    return [measured(**case) for case in cases]


def assert_as_in_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["same"]
        assert rank["warnings"] == []
        assert rank["names"] == alone["names"]
    assert len(alone["parameters"]) == len(ranks[0]["parameters"]) == 3
    for step, expected in enumerate(alone["parameters"]):
        found = over_shards(ranks, step)
        assert expected[:, 0].abs().min() > 0
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-22)


@pytest.mark.slow
def test_every_optimizer_under_fsdp() -> None:
    cases = [
        {"optimizer": name, "clip": clip} for name, clip in [*((name, False) for name in OPTIMIZERS), ("fused", True)]
    ]
    found = run_ranks(runs, 2, cases=[{"setup": setup, **case} for case in cases for setup in ("single", "fsdp")])
    for index in range(len(cases)):
        assert_as_in_one_process([rank[2 * index + 1] for rank in found], found[0][2 * index])


SETUPS = ("ddp", "hybrid", "tensor", "both", "fsdp", "offload")


@pytest.mark.slow
def test_every_way_to_spread_parameters() -> None:
    """Four ranks: biases of five and eight elements are empty, or short, on some of them."""
    found = run_ranks(runs, 4, timeout=240, cases=[{"setup": setup} for setup in ("single", *SETUPS)])
    for index, setup in enumerate(SETUPS, start=1):
        ranks = [rank[index] for rank in found]
        keys = {each.key for each in ranks[0]["classes"]}
        expected = {
            "ddp": {""},
            "hybrid": {"shards:2"},
            "tensor": {"", "tp:4"},
            "both": {"dp:2", "dp:2,tp:2"},
        }
        assert keys == expected.get(setup, {"data:4"})
        assert_as_in_one_process(ranks, found[0][0])


def odd_placements() -> dict[str, Any]:
    """Steps on gradients that are partial sums, or sharded in another way, and a partial parameter."""
    over, found = mesh(), {}
    torch.manual_seed(0)
    whole, gradient = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    pieces = {"partial": DTensor.from_local(gradient / 2, over, [Partial()])}
    pieces["whole"] = distribute_tensor(gradient, over, [Replicate()])
    pieces["columns"] = distribute_tensor(gradient, over, [Shard(1)])
    for name, given in pieces.items():
        p = torch.nn.Parameter(distribute_tensor(whole, over, [Replicate() if name == "partial" else Shard(0)]))
        other = torch.nn.Parameter(distribute_tensor(whole, over, [Shard(0)]))
        optimizer = torch.optim.SGD([p, other], lr=0.1)
        meter = UpdateMeter(optimizer)
        other.grad = distribute_tensor(gradient, over, [Shard(0)])
        p.grad = given
        for _ in range(2):
            meter.before()
            start = local_part(p).detach().clone()
            optimizer.step()
            update = meter.after()
        moved = (local_part(p) - start).square().sum()
        found[name] = update.reason.tolist(), update.stats.sums[0], moved.item(), bool(meter.passed), meter.summed
    partial = torch.nn.Parameter(DTensor.from_local(whole, over, [Partial()]))
    partial.grad = DTensor.from_local(whole, over, [Partial()])
    try:
        UpdateMeter(torch.optim.SGD([partial], lr=0.1), names=lambda _: ["blocks.0.weight"]).before()
    except ValueError as error:
        found["error"] = str(error)
    return found


def functional() -> dict[Any, Any]:
    """The stateless measurements of DTensors."""
    over, found = mesh(), {}
    torch.manual_seed(1)
    a, b, c = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    table = torch.tensor([[0.0, -0.1, 0.0, 0.0]], dtype=torch.float64)
    for backend in ("native", "reference"):
        for name, placement in (("shard", Shard(0)), ("replicate", Replicate())):
            x, y, z = (distribute_tensor(each, over, [placement]) for each in (a, b, c))
            found[backend, name] = (
                fastfs.feature_stats(x, y, z, backend=backend).sums,
                fastfs.feature_stats([x], [y], [z], per_row=True, backend=backend)[0].sums,
                fastfs.update_stats([x], [y], backend=backend).sums[0],
                fastfs.optimizer_stats(OptimizerRule.LINEAR, [x], [y], [x], [], table, backend=backend).sums[0],
            )
        partial = DTensor.from_local(a, over, [Partial()])
        try:
            fastfs.feature_stats([a, x], [b, y], [c, partial], backend=backend)
        except ValueError as error:
            found[backend, "error"] = str(error)
    found["alone"] = (
        fastfs.feature_stats(a, b, c).sums,
        fastfs.feature_stats(a, b, c, per_row=True).sums,
        fastfs.update_stats(a, b).sums,
        fastfs.optimizer_stats(OptimizerRule.LINEAR, [a], [b], [a], [], table).sums[0],
    )
    return found


def both() -> tuple[dict[str, Any], dict[Any, Any]]:
    """Runs both on the same ranks."""
    result = odd_placements(), functional()
    dist.barrier()
    return result


def test_partial_sums_are_refused_and_local_parts_measured() -> None:
    ranks = run_ranks(both, 2)
    for odd, _ in ranks:
        for name in ("partial", "whole", "columns"):
            reasons, sums, moved, passed, summed = odd[name]
            stats = ParameterStats(sums)
            if name == "whole":  # of which the own rows count
                assert reasons == [decrease_reasons.FINE] * 2
                assert stats.dot.item() == pytest.approx(-moved / 0.1, rel=1e-12)
                assert stats.gradient_sq.item() == pytest.approx(moved / 0.01, rel=1e-12)
                continue
            assert stats.gradient_sq.isnan()
            if name == "partial":  # half of the gradient, whose update is -lr times all of it
                assert reasons == [decrease_reasons.FINE] * 2
                assert summed == [0]
                assert stats.dot.item() == pytest.approx(-moved / 0.1 / 2, rel=1e-12)
            else:
                assert reasons == [decrease_reasons.SPREAD, decrease_reasons.FINE]
                assert summed == []
                assert stats.dot.isnan()
            assert stats.update_sq.item() == pytest.approx(moved, rel=1e-12)
            assert moved > 0
            assert passed
        assert odd["error"].startswith("parameter 'blocks.0.weight' is a partial sum over ranks (data:2:partial)")
    for backend in ("native", "reference"):
        for index, expected in enumerate(ranks[0][1]["alone"]):
            parts = [functional[backend, "shard"][index] for _, functional in ranks]
            added = torch.cat(parts) if index == 1 else torch.stack(parts).sum(0)
            torch.testing.assert_close(added, expected, rtol=1e-12, atol=1e-13)
            for _, functional in ranks:
                torch.testing.assert_close(functional[backend, "replicate"][index], expected, rtol=1e-12, atol=1e-13)
        message = ranks[0][1][backend, "error"]
        assert message.startswith("layer 1: backward is a partial sum over ranks")
        assert "redistribute" in message
