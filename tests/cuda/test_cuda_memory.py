"""The memory of a real GPU at its ends: less than is needed, and tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs import ParameterStats, feature_stats, update_stats
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from tests.helpers.compare import assert_same

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
MIB = 2**20
ROWS, WIDTH = 2**19 + 1, 4100  # more than 2^31 elements


@pytest.fixture
def at_most() -> Iterator[Callable[[int], None]]:
    """Lets torch have so many bytes more than it holds."""

    def limit(more: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_result_that_does_not_fit(at_most: Callable[[int], None]) -> None:
    x = torch.ones(2**24, 1, device="cuda", dtype=BF16)
    long = torch.randn(3_000_017, device="cuda", dtype=BF16)
    expected = feature_stats(long, long, long).sums
    at_most(256 * MIB)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):  # 72 bytes a row
            feature_stats(x, x, x, per_row=True)
        assert_same(feature_stats(long, long, long).sums, expected)
    torch.cuda.set_per_process_memory_fraction(1.0)
    sums = feature_stats(x, x, x, per_row=True).sums
    assert sums.shape == (2**24, 9)
    assert (sums == sums[0]).all()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def test_training_goes_on_where_a_measurement_does_not_fit(at_most: Callable[[int], None]) -> None:
    """Inputs and features of the probe take 512 MiB each, those of the training 1 MiB.

    The monitor's own copy of the probe fits, and so does one for the forward, but not the features of the first layer.
    """
    x, large = torch.randn(256, 1024, device="cuda"), torch.randn(2**17, 1024, device="cuda")

    def train(watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Wide().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"mode": "probe", "probe": (large, lambda out: F.mse_loss(out, large))}
        trace: list[Tensor] = []
        with (
            fastfs.Monitor(
                model, optimizer, layers=r"blocks\.\d+$", every=2, sinks=[lambda rows: None], verbose=False, **options
            )
            if watch
            else nullcontext()
        ):
            for _ in range(6):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x)
                loss.backward()
                optimizer.step()
                trace.append(loss.detach())
        return [*trace, *(p.detach() for p in model.parameters())]

    expected = train(watch=False)
    at_most(1280 * MIB)
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError"):
        found = train(watch=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# More than 2^31 elements


def large(value: float, last: float) -> Tensor:
    """Rows of one value, the last of another."""
    x = torch.full((ROWS, WIDTH), value, device="cuda", dtype=BF16)
    x[-1] = last
    return x


@pytest.fixture(autouse=True)
def room(request: pytest.FixtureRequest) -> None:
    torch.cuda.empty_cache()
    if "elements" in request.node.name and torch.cuda.mem_get_info()[0] < 4 * 2 * ROWS * WIDTH:
        pytest.skip("needs 17 GB of free GPU memory")


def test_elements_per_row() -> None:
    f, g, b = large(1.0, 3.0), large(1.5, 7.0), large(2.0, 0.5)
    sums = feature_stats(f, g, b, per_row=True).sums
    assert sums.shape == (ROWS, 9)
    # The spacing of bfloat16 is 2^-7 at 1 and 1.5, 2^-6 at 3, 2^-5 at 7.
    rows = [
        [1.0, 0.25, 4.0, 1.0, 0.5, 1.0, 2 * 2.0**-14 / 12, 0.0, 1.0],
        [2.0, 16.0, 0.25, 9.0, 12.0, 2.0, (2.0**-12 + 2.0**-10) / 12, 0.0, 1.0],
    ]
    for row, terms in zip((0, ROWS - 1), rows, strict=True):
        assert sums[row].tolist() == pytest.approx([WIDTH * x for x in terms], rel=2e-6)
    assert (sums[:-1] == sums[0]).all()


def test_elements_of_updates() -> None:
    gradient, update = large(2.0, 0.5), large(-0.5, 4.0)
    n = (ROWS - 1) * WIDTH
    expected = [-n + 2.0 * WIDTH, n / 4 + 16.0 * WIDTH, 4.0 * n + WIDTH / 4, 0, n + WIDTH]
    assert update_stats(gradient, update).sums.tolist() == pytest.approx(expected, rel=2e-6)


def test_elements_of_a_step() -> None:
    gradient, parameter, momentum = large(2.0, 0.5), large(1.0, 3.0), large(4.0, 8.0)
    coefficients = torch.tensor([[-0.5, -0.25, 0.125, 0.0]], dtype=torch.float64)
    n = (ROWS - 1) * WIDTH
    # The update is -0.5 w - 0.25 g + 0.125 s.
    updates = [-0.5 * 1 - 0.25 * 2 + 0.125 * 4, -0.5 * 3 - 0.25 * 0.5 + 0.125 * 8]
    vectors = {"gradient": (2.0, 0.5), "update": updates, "parameter": (1.0, 3.0)}
    products = [(vectors[a], vectors[b]) for a, b in ParameterStats.factors.values()]
    expected = [*(x[0] * y[0] * n + x[1] * y[1] * WIDTH for x, y in products), 0, n + WIDTH]
    found = optimizer_stats(OptimizerRule.LINEAR, [gradient], [parameter], [momentum], [], coefficients).sums[0]
    assert found.tolist() == pytest.approx(expected, rel=2e-6)


def test_elements_of_a_tensor_that_rows_are_taken_from() -> None:
    x = large(1.0, 3.0)
    rows = torch.tensor([ROWS - 1, 0, ROWS - 2], device="cuda")
    out, squares = torch.ops.fastfs.gather_rows(x, rows, 1, torch.float32)
    assert [row.unique().tolist() for row in out] == [[3.0], [1.0], [1.0]]
    assert squares.tolist() == [9.0 * WIDTH, WIDTH, WIDTH]
    assert torch.equal(torch.ops.fastfs.row_squares(x, rows, 1), squares)
