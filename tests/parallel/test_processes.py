"""The helper that runs a function on several ranks."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.helpers.processes import RankError, run_ranks


def add(value: float) -> float:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item() + dist.get_rank()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        warnings.warn("a warning of rank one", UserWarning, stacklevel=1)
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert run_ranks(add, 2, value=1.5) == [4.5, 5.5]


def test_a_failure_shows_the_traceback_of_its_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1: Traceback[\s\S]*a warning of rank one"):
        run_ranks(fail_on_one, 2)


def test_a_hang_ends() -> None:
    with pytest.raises(RankError, match="not over after 1 s"):
        run_ranks(hang, 2, timeout=1)
