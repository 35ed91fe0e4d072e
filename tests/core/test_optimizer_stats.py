"""The op behind UpdateMeter: sums, layouts, extremes, determinism, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfs import reference
from fastfs._core import ops
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from fastfs._stats import ParameterStats
from tests.helpers.cases import LARGE, LAYOUTS, RULES, SHAPES, run_apart, step_arguments, step_inputs
from tests.helpers.compare import assert_close, assert_same, optimizer_truth

UPDATE = ParameterStats.names.index("update_sq")

# torch's own, when its compiler is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def many(
    rule: OptimizerRule, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES, device: str = "cpu"
) -> Any:
    """Parameters of all shapes, their tensors in all layouts."""
    names = [name for name in LAYOUTS if not name.startswith(("expanded", "one_value", "overlapping"))]
    result = []
    for i, shape in enumerate(shapes):
        layouts = tuple(names[(i * k + k) % len(names)] for k in (1, 2, 3, 4))
        result.append(step_inputs(rule, shape, dtype, layouts, device=device))
    return result


def check(rule: OptimizerRule, parameters: Any, device: str = "cpu", backend: str | None = None) -> Tensor:
    arguments = step_arguments(rule, parameters)
    sums = optimizer_stats(*arguments, backend=backend).sums
    for i, tensors in enumerate(parameters):
        assert_close(sums[i], optimizer_truth(rule, tensors, arguments[-1][i]), what=f"{rule} {tensors[0].shape}")
    return sums


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_sums(rule: OptimizerRule, dtype: torch.dtype, backend: str | None, device: str) -> None:
    check(rule, many(rule, dtype, (*SHAPES, LARGE), device), device, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "dtype"), RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, rule: OptimizerRule, dtype: torch.dtype, device: str) -> None:
    for shape, others in itertools.product([(3, 1), (2, 8, 6, 7), (30, 768)], (layout, "contiguous")):
        layouts = (layout, others, layout, others)
        tensors = step_inputs(rule, shape, dtype, layouts, device=device)
        sums = check(rule, [tensors], device)
        # Whole layers are read in the order of their memory.
        if layout not in ("channels_last", "reversed_dims", "transposed", "expanded_first"):
            dense = tuple(x.contiguous() for x in tensors)
            assert_same(sums, optimizer_stats(*step_arguments(rule, [dense])).sums, layout)


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_the_state_may_be_the_gradient_or_the_parameter_itself(rule: OptimizerRule, dtype: torch.dtype) -> None:
    g, w, *s = step_inputs(rule, (100, 7), dtype)
    tensors = (
        (g, w, g)
        if rule is OptimizerRule.LINEAR
        else (g, w, s[0], s[1] if rule is not OptimizerRule.RMSPROP else w.mul(0.1))
    )
    check(rule, [tensors])


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_a_copy_of_the_parameter_gives_the_exact_update(rule: OptimizerRule, dtype: torch.dtype) -> None:
    if rule is not OptimizerRule.LINEAR:
        pytest.skip("for the linear rule")
    old = torch.randn(5, 9999, dtype=dtype)
    new, g = old * (1 + 4 * torch.finfo(dtype).eps), torch.randn_like(old)
    table = torch.tensor([[1.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
    sums = optimizer_stats(rule, [g], [new], [old], [], table).sums[0]
    expected = (new.double() - old.double()).square().sum()
    assert sums[UPDATE].item() == pytest.approx(expected.item(), rel=1e-6 if dtype != torch.float64 else 1e-12)


def stats_of_copies(old: Tensor, new: Tensor) -> ParameterStats:
    """Of the step from `old` to `new`, with a gradient of ones."""
    table = torch.tensor([[1.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
    return optimizer_stats(OptimizerRule.LINEAR, [torch.ones_like(old)], [new], [old], [], table)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", [1e-4, 1e-2, 3.0])
@pytest.mark.parametrize("radial", [-0.5, 0.0, 0.5])
def test_rotation_and_radial_growth(dtype: torch.dtype, step: float, radial: float, device: str) -> None:
    old = torch.randn(999, dtype=dtype, device=device)
    new = old + step * (torch.randn_like(old) + radial * old)
    stats, relative = stats_of_copies(old, new), 1e-9 if dtype == torch.float64 else 2e-5
    a, b = old.double(), new.double()
    chord = (a / a.norm() - b / b.norm()).norm()
    assert stats.rotation.item() == pytest.approx(2 * (chord / 2).asin().item(), rel=relative)
    growth = ((b - a) @ (b + a) / (a.norm() * (a.norm() + b.norm()))).item()
    assert stats.radial_growth.item() == pytest.approx(growth, rel=relative, abs=relative * step)


def test_rotation_and_radial_growth_of_special_steps() -> None:
    w, zero = torch.tensor([3.0, 0.0, 4.0]), torch.zeros(3)
    across = torch.tensor([-4.0, 0.0, 3.0])
    for old, new, rotation, growth in (
        (w, w, 0.0, 0.0),
        (w, 2 * w, 0.0, 1.0),
        (w, -w, torch.pi, 0.0),
        (w, across, torch.pi / 2, 0.0),
        (w, zero, torch.nan, -1.0),
        (zero, w, torch.nan, torch.inf),
        (zero, zero, torch.nan, torch.nan),
    ):
        stats = stats_of_copies(old, new)
        assert stats.rotation.item() == pytest.approx(rotation, rel=1e-6, abs=1e-6, nan_ok=True)
        assert stats.radial_growth.item() == pytest.approx(growth, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_no_update_of_nothing(rule: OptimizerRule, dtype: torch.dtype, device: str) -> None:
    """0 / 0 counts as no update: elements beyond the end are zeros, and so are parameters that were never used."""
    tensors = tuple(torch.zeros(1003, dtype=dtype, device=device) for _ in range(rule.states + 2))
    table = torch.zeros(1, len(rule.coefficients), dtype=torch.float64)
    table[:, 0] = -1.0
    for backend in ("native", "reference"):
        sums = optimizer_stats(*step_arguments(rule, [tensors], table), backend=backend).sums
        assert sums[0].tolist() == [0.0] * (len(ParameterStats.names) - 1) + [1003.0]


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_extremes(rule: OptimizerRule, dtype: torch.dtype, device: str) -> None:
    scales = (1e-4, 1e3) if dtype == torch.float16 else (1e-18, 1e-14, 1e14, 1e18)
    for scale, shape in itertools.product(scales, ((100,), (8192 + 100,))):
        g, w, *s = step_inputs(rule, shape, dtype, device=device)
        second = scale * scale if dtype in (torch.float64, torch.bfloat16) or 1e-15 < scale < 1e15 else 1.0
        by = {OptimizerRule.ADAM: (scale, second), OptimizerRule.RMSPROP: (second, second**0.5)}.get(
            rule, (scale, scale)
        )
        check(rule, [(g * scale, w, *(x * k for x, k in zip(s, by, strict=False)))], device)


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_non_finite_entries_of_gradient_and_parameter_are_counted(
    rule: OptimizerRule, dtype: torch.dtype, device: str
) -> None:
    tensors = step_inputs(rule, (3, 9000), dtype, device=device)
    tensors[0][0, 0], tensors[0][2, -1], tensors[1][1, 5] = torch.nan, torch.inf, -torch.inf
    tensors[2][0, 1] = torch.nan  # of the state: seen in the sums alone
    arguments = step_arguments(rule, [tensors])
    sums, expected = optimizer_stats(*arguments).sums[0], reference.optimizer_stats(*arguments).sums[0]
    assert sums[-2:].tolist() == expected[-2:].tolist() == [3.0, 27000.0]
    assert torch.equal(sums.isfinite(), expected.isfinite())
    assert not sums[:-2].isfinite().any()


# the same bits


def everything() -> list[Any]:
    """Arguments of all rules: sizes, layouts, tiny and huge values, several groups of chunks."""
    torch.manual_seed(0)
    result = []
    for rule, dtype in RULES:
        large = (LARGE,) if dtype == torch.float32 and rule in (OptimizerRule.LINEAR, OptimizerRule.ADAM) else ()
        parameters = many(rule, dtype, (*SHAPES, *large, (7,), (31,), (33,)))
        special = step_inputs(rule, (2, 20_003), dtype)
        special[0][0, ::3] = torch.finfo(dtype).tiny / 4
        special[1][1, ::5] = torch.finfo(dtype).max / 2
        result.append(step_arguments(rule, [*parameters, special]))
    return result


def test_number_of_threads(threads: Any) -> None:
    threads(1)
    data = everything()
    expected = [optimizer_stats(*x).sums for x in data]
    for n in (2, 3, 7):
        threads(n)
        for a, b in zip(data, expected, strict=True):
            assert_same(optimizer_stats(*a).sums, b, f"{n} threads")


APART = """
import hashlib
import torch
from fastfs._core import ops
from fastfs._functional import optimizer_stats
from tests.core.test_optimizer_stats import everything
torch.set_num_threads(2)
data = [optimizer_stats(*x).sums.view(torch.int64).flatten().tolist() for x in everything()]
print(ops.build_info()["instruction_set"], *(hashlib.sha256(repr(x).encode()).hexdigest()[:16] for x in data))
"""


@pytest.mark.slow
def test_instruction_sets() -> None:
    names = ops.build_info()["usable_instruction_sets"]
    found = {name: run_apart(APART, FASTFS_CPU=name).split() for name in names}
    for name, (used, *sums) in found.items():
        assert used == name
        differ = [RULES[i] for i, (a, b) in enumerate(zip(sums, found[names[0]][1:], strict=True)) if a != b]
        assert not differ, f"{name} and {names[0]} differ in {differ}"


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_neighbours_and_alignment(rule: OptimizerRule, dtype: torch.dtype, device: str) -> None:
    parameters = many(rule, dtype, (*SHAPES, LARGE), device)
    arguments = step_arguments(rule, parameters)
    together = optimizer_stats(*arguments).sums
    for i in (3, 8, 13, len(parameters) - 1):
        tensors = parameters[i]
        alone = step_arguments(rule, [tensors], arguments[-1][i : i + 1])
        assert_same(optimizer_stats(*alone).sums[0], together[i])
        if all(x.is_contiguous() for x in tensors):
            moved = tuple(LAYOUTS["misaligned_by_3"](x) for x in tensors)
            alone = step_arguments(rule, [moved], arguments[-1][i : i + 1])
            assert_same(optimizer_stats(*alone).sums[0], together[i])


# the dispatcher


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_opcheck(rule: OptimizerRule, dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("expecttest")
    op = torch.ops.fastfs.optimizer_stats.default
    for requires_grad in (False, True):
        parameters = [
            tuple(x.detach().requires_grad_(requires_grad) for x in step_inputs(rule, shape, dtype, device=device))
            for shape in ((5, 3), (7,), (), (0, 3))
        ]
        torch.library.opcheck(op, step_arguments(rule, parameters))


@pytest.mark.parametrize(("rule", "dtype"), RULES)
def test_fakes_and_compilation(rule: OptimizerRule, dtype: torch.dtype, device: str) -> None:
    arguments = step_arguments(rule, [step_inputs(rule, shape, dtype, device=device) for shape in ((5, 3), (7,))])
    real = optimizer_stats(*arguments).sums
    with FakeTensorMode() as mode:
        tensors = [[mode.from_tensor(x) for x in part] for part in arguments[1:5]]
        fake = optimizer_stats(rule, *tensors, mode.from_tensor(arguments[5])).sums  # type: ignore[call-arg]
    assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, real.device.type)
    compiled = torch.compile(lambda *x: optimizer_stats(*x).sums, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arguments), real)


def test_inference_mode_and_profiler() -> None:
    with torch.inference_mode(), torch.profiler.profile(acc_events=True) as profiler:
        check(OptimizerRule.ADAM, [step_inputs(OptimizerRule.ADAM, (10,))])
    assert "fastfs::optimizer_stats" in {event.key for event in profiler.key_averages()}


def test_no_parameters() -> None:
    for rule, backend in itertools.product(OptimizerRule, (None, "reference")):
        table = torch.zeros(0, len(rule.coefficients), dtype=torch.float64)
        assert optimizer_stats(*step_arguments(rule, [], table), backend=backend).shape == (0,)


# errors


ERRORS = {
    r"^rule: expected one of 0 \(LINEAR\), 1 \(ADAM\), 2 \(ADAMAX\), 3 \(RMSPROP\), got 7$": {"rule": 7},
    r"^second: rule LINEAR has one state, expected an empty list, got 2 tensors$": {"rule": 0},
    r"^expected the same number of layers in every argument, got 2 in gradients, 2 in parameters, 1 in first": {
        "first": [torch.ones(3)]
    },
    r"^layer 1: parameters has shape \(1,\), expected \(3,\) as gradients has$": {
        "parameters": [torch.ones(3), torch.ones(1)]
    },
    r"^layer 0: second has dtype torch.float64, expected torch.float32 as gradients has$": {
        "second": [torch.ones(3).double(), torch.ones(3)]
    },
    r"^layer 1: parameters has dtype torch.int64, expected one of torch.float16": {
        "parameters": [torch.ones(3), torch.ones(3).long()]
    },
    r"^coefficients: expected float64 of shape \(2, 4\) for rule ADAM \(cw, cs, r, e\), got torch.float64 of shape "
    r"\(2, 3\)$": {"coefficients": torch.ones(2, 3, dtype=torch.float64)},
    r"^coefficients: expected float64 of shape \(2, 4\) for rule ADAM \(cw, cs, r, e\), got torch.float32": {
        "coefficients": torch.ones(2, 4)
    },
    r"^coefficients: expected them on cpu, got meta$": {
        "coefficients": torch.ones(2, 4, dtype=torch.float64, device="meta")
    },
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str, backend: str | None) -> None:
    names = ("gradients", "parameters", "first", "second")
    arguments: dict[str, Any] = {
        "rule": 1,
        **{name: [torch.ones(3), torch.ones(3)] for name in names},
        "coefficients": torch.ones(2, 4, dtype=torch.float64),
        **ERRORS[message],  # type: ignore[dict-item]
    }
    with pytest.raises(ValueError, match=message):
        optimizer_stats(**arguments, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_types(backend: str | None) -> None:
    x, table = [torch.ones(3)], torch.ones(1, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^gradients: expected a sequence of tensors, got a tensor$"):
        optimizer_stats(1, x[0], x, x, x, table, backend=backend)
    with pytest.raises(TypeError, match=r"^coefficients: expected a tensor, got list$"):
        optimizer_stats(1, x, x, x, x, [1.0] * 4, backend=backend)
    half = [torch.ones(3, dtype=torch.float16)]
    with pytest.raises(ValueError, match=r"^layer 0: rule ADAM takes float32 and float64, got torch.float16$"):
        optimizer_stats(1, half, half, half, half, table, backend=backend)


def test_the_op_itself_refuses() -> None:
    x, y, table = [torch.ones(3)], [torch.ones(3, dtype=torch.bfloat16)], torch.ones(1, 4, dtype=torch.float64)
    op = torch.ops.fastfs.optimizer_stats
    with pytest.raises(ValueError, match="9 is not a valid OptimizerRule"):
        op(9, x, x, x, x, table)
    with pytest.raises(ValueError, match="expected no second state"):
        op(0, x, x, x, x, table)
    with pytest.raises(ValueError, match="layer 0: expected float32 or float64"):
        op(1, y, y, y, y, table)
    with pytest.raises(ValueError, match="layer 0: expected tensors of one dtype"):
        op(0, x, x, y, [], table)
    with pytest.raises(ValueError, match="expected coefficients: contiguous float64 of 1 x 4"):
        op(0, x, x, x, [], table[:, :3])
    with pytest.raises(ValueError, match="expected coefficients: contiguous float64 of 4 x 4"):
        op(0, x * 4, x * 4, x * 4, [], table.expand(4, 4).tril().T)
