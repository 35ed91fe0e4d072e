"""The memory that a call on a CUDA device gets beside its output: with a stand-in for the call, no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fastfs._core import ops

LIKE = torch.zeros(3)


@dataclass
class Call:
    """What `fastfs._C` has for a call; notes what it is launched with."""

    tickets: int
    stream: int = 7
    capturing: bool = False
    rows: int = 5
    seen: list[Any] = field(default_factory=list)

    @property
    def partial_bytes(self) -> Any:
        return 64 * self.tickets

    def launch(self, out: Any, partials: Any, tickets: Any) -> None:
        assert (out.shape, out.dtype, out.device) == ((self.rows, 9), torch.float64, LIKE.device)
        assert (partials == 0) == (tickets == 0) == (self.tickets == 0)
        self.seen.append(tickets)


@pytest.fixture(autouse=True)
def no_tickets_from_before() -> Iterator[None]:
    ops._tickets.cache_clear()
    yield
    ops._tickets.cache_clear()


def launched(call: Any) -> Any:
    ops._launch(call, LIKE, 9)
    return call.seen[-1]


def test_short_segments_need_no_memory() -> None:
    assert launched(Call(0)) == 0
    assert ops._tickets.cache_info().currsize == 0


def test_calls_on_one_stream_share_tickets_and_streams_do_not() -> None:
    first = launched(Call(10))
    assert launched(Call(1000)) == first
    assert launched(Call(10, stream=8)) != first
    assert launched(Call(5000)) != first  # more than there are
    kept = ops._tickets(LIKE.device, 7, 8192)  # that of the last call
    assert kept.numel() >= 5000
    assert not kept.any()


def test_a_graph_that_is_captured_gets_tickets_of_its_own() -> None:
    eager = launched(Call(10))
    assert launched(Call(10, capturing=True)) != eager
    assert launched(Call(10)) == eager
