"""`optimizer_stats` of parts of parameters: the same bits as of slices, for every rule and dtype, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfs._core import ops
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from fastfs._stats import ParameterStats
from tests.helpers.cases import RULES, step_arguments, step_inputs
from tests.helpers.compare import assert_same

# torch's own, when its compiler is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

SHAPES = ((40, 1000), (3,), (70001,), (0, 4))
PIECES = [[0, 0, 40000], [2, 17, 30001], [0, 8192, 8192], [1, 1, 2], [3, 0, 0], [2, 70001, 0], [2, 0, 70001], [0, 1, 1]]


def sliced(arguments: Any, pieces: list[list[int]]) -> Any:
    """The arguments whose tensors are the pieces."""
    rule, *lists, table = arguments
    parts = [
        [each[i].reshape(-1)[begin : begin + count] for i, begin, count in pieces] if each else [] for each in lists
    ]
    return rule, *parts, table[[i for i, _, _ in pieces]]


def cut(arguments: Any, pieces: list[list[int]], backend: Any = None) -> Tensor:
    rule, gradients, parameters, first, second, table = arguments
    rows = table[[i for i, _, _ in pieces]].contiguous()
    table = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 3)
    options: dict[str, Any] = {"pieces": table, "backend": backend}
    return optimizer_stats(rule, gradients, parameters, first, second, rows, **options).sums


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_a_piece_has_the_bits_of_the_slice(
    rule: OptimizerRule, dtype: torch.dtype, backend: str | None, where: str, device: str
) -> None:
    arguments: list[Any] = list(
        step_arguments(rule, [step_inputs(rule, shape, dtype, device=device) for shape in SHAPES])
    )
    if where == "device":
        arguments[-1] = arguments[-1].to(device)
    expected = optimizer_stats(*sliced(arguments, PIECES), backend=backend).sums
    assert_same(cut(arguments, PIECES, backend), expected)


SIZES = (1, 100, 8192, 20000)
ARGUMENTS = step_arguments(
    OptimizerRule.ADAM, [step_inputs(OptimizerRule.ADAM, (size,), torch.float32) for size in SIZES]
)


@st.composite
def any_pieces(draw: Any) -> list[list[int]]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        index = draw(st.integers(0, len(SIZES) - 1))
        begin = draw(st.integers(0, SIZES[index]))
        found.append([index, begin, draw(st.integers(0, SIZES[index] - begin))])
    return found


@settings(max_examples=60, deadline=None)
@given(any_pieces())
def test_any_pieces(pieces: list[list[int]]) -> None:
    assert_same(cut(ARGUMENTS, pieces), optimizer_stats(*sliced(ARGUMENTS, pieces)).sums)


def test_no_piece() -> None:
    assert cut(ARGUMENTS, []).shape == (0, len(ParameterStats.names))


def test_a_tensor_with_gaps_can_be_read_as_a_whole(device: str) -> None:
    rule = OptimizerRule.ADAM
    layouts = ("contiguous", "transposed", "contiguous", "padded_rows")
    tensors = [step_inputs(rule, (30, 50), layouts=layouts, device=device), step_inputs(rule, (9,), device=device)]
    arguments = step_arguments(rule, tensors)
    assert_same(cut(arguments, [[0, 0, 1500], [1, 0, 9]]), optimizer_stats(*arguments).sums)


def test_fakes_and_compilation(device: str) -> None:
    rule = OptimizerRule.ADAM
    arguments = step_arguments(rule, [step_inputs(rule, shape, device=device) for shape in ((5, 3), (7,))])
    pieces = torch.tensor([[0, 3, 4], [1, 0, 7], [0, 0, 1]])
    table = arguments[-1][pieces[:, 0]]

    def call(*x: Any) -> Tensor:
        return optimizer_stats(rule, *x[:5], pieces=x[5]).sums

    real = call(*arguments[1:5], table, pieces)
    with FakeTensorMode() as mode:
        tensors = [[mode.from_tensor(x) for x in part] for part in arguments[1:5]]
        fake = call(*tensors, mode.from_tensor(table), mode.from_tensor(pieces))
    assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, real.device.type)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arguments[1:5], table, pieces), real)


ERRORS = {
    r"^piece 1: there is no tensor 2 among 2$": torch.tensor([[0, 0, 1], [2, 0, 1]]),
    r"^piece 0: there is no tensor -1 among 2$": torch.tensor([[-1, 0, 1], [0, 0, 1]]),
    r"^piece 0: 1 elements from element -1 on are not within tensor 0 of 3$": torch.tensor([[0, -1, 1], [0, 0, 1]]),
    r"^piece 1: -1 elements from element 1 on are not within": torch.tensor([[0, 0, 1], [0, 1, -1]]),
    r"^piece 1: 2 elements from element 2 on are not within tensor 1 of 3$": torch.tensor([[0, 0, 1], [1, 2, 2]]),
    r"^piece 1: 9223372036854775807 elements from element 2 on are": torch.tensor([[0, 0, 1], [1, 2, 2**63 - 1]]),
    r"^piece 1: 1 elements from element 4 on are not within tensor 0": torch.tensor([[0, 0, 1], [0, 4, 1]]),
    r"^pieces: expected contiguous int64 of shape \(P, 3\) on the CPU, got torch.int32": torch.ones(2, 3).int(),
    r"^pieces: expected contiguous int64 of shape \(P, 3\) on the CPU, got torch.int64 of shape \(2, 2\)": torch.ones(
        2, 2
    ).long(),
    r"^pieces: expected contiguous int64 of shape \(P, 3\) on the CPU, got torch.int64 of shape \(3,\)": torch.ones(
        3
    ).long(),
    r"^pieces: expected contiguous int64 .* on meta$": torch.ones(2, 3, device="meta").long(),
    r"^coefficients: expected float64 of shape \(3, 4\) for rule ADAM": torch.tensor([[0, 0, 1]] * 3),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str, backend: Any) -> None:
    x, table = [torch.ones(3), torch.ones(3)], torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        optimizer_stats(1, x, x, x, x, table, pieces=ERRORS[message], backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_cannot_be_cut(backend: Any) -> None:
    x, table = [torch.ones(3, 4)], torch.ones(1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^piece 0: tensor 0 is not contiguous, it can only be read as a whole$"):
        optimizer_stats(1, x, x, [torch.ones(4, 3).T], x, table, pieces=torch.tensor([[0, 0, 6]]), backend=backend)
    with pytest.raises(TypeError, match=r"^pieces: expected a tensor or None, got list$"):
        optimizer_stats(1, x, x, x, x, table, pieces=[[0, 0, 6]], backend=backend)


@pytest.mark.skipif(ops._C is None, reason="needs the native core")
@pytest.mark.parametrize("row", [[1, 0, 1], [-1, 0, 1], [0, 7, 6], [0, -1, 1], [0, 0, -1], [0, 2**62, 2**62]])
def test_the_core_itself_refuses(row: list[int]) -> None:
    x, out = [torch.ones(12)], torch.empty(1, len(ParameterStats.names), dtype=torch.float64)
    table = torch.ones(1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="piece 0: expected"):
        ops._C.linear_stats_cpu((x, x, x), table, out, 1, torch.tensor([row]))
    gap = [torch.ones(24)[::2]]
    with pytest.raises(ValueError, match="piece 0: expected a contiguous layer"):
        ops._C.linear_stats_cpu((x, gap, x), table, out, 1, torch.tensor([[0, 0, 6]]))
    with pytest.raises(ValueError, match="expected pieces: contiguous int64 of P x 3"):
        ops._C.linear_stats_cpu((x, x, x), table, out, 1, torch.tensor([[0, 0, 0], [6, 6, 6], [0, 0, 0]]).T[:1, ::2])
    with pytest.raises(ValueError, match="expected no pieces"):
        ops._C.update_stats_cpu((x, x), False, out[:, :5], 1, torch.tensor([[0, 0, 6]]))
