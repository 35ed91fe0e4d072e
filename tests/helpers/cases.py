"""Inputs for the tests: dtypes x shapes x layouts."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfs._core.optimizer_rules import OptimizerRule

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A chunk of the native core has 8192 elements and a group of chunks 64 of them.
SHAPES = (
    (),
    (0,),
    (1,),
    (3,),
    (17,),
    (1000,),
    (8191,),
    (8193,),
    (3 * 8192 + 5,),
    (1, 1),
    (0, 5),
    (5, 0),
    (7, 1),
    (64, 33),
    (5, 8200),
    (2, 3, 4, 5),
    (2, 8, 6, 7),
    (3, 1, 257, 2),
)
LARGE = (64 * 8192 + 4099,)


def _misaligned(offset: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(x.numel() + offset)[offset:].view(x.shape).copy_(x)


def _padded(x: Tensor, *, step: int, extra: int) -> Tensor:
    """Rows of a wider buffer, every `step`-th element."""
    if x.dim() == 0:
        return x.new_zeros(4)[2].copy_(x)
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] * step + extra), torch.nan)
    return buffer[..., extra : extra + x.shape[-1] * step : step].copy_(x)


def _every_second_row(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x
    return x.new_full((2 * x.shape[0], *x.shape[1:]), torch.nan)[1::2].copy_(x)


def _transposed(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _reversed_dims(x: Tensor) -> Tensor:
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else _reversed_dims(x)


def _expanded_first(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() and x.numel() else x


def _expanded_last(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape) if x.dim() and x.numel() else x


def _one_value(x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].view((1,) * x.dim()).expand(x.shape) if x.numel() else x


def _overlapping(x: Tensor) -> Tensor:
    return x.reshape(-1).as_strided(x.shape, (1,) * x.dim()) if x.numel() else x


def _negative(x: Tensor) -> Tensor:
    return torch._neg_view(x.neg())


def _negative_imaginary(x: Tensor) -> Tensor:
    """The usual source of negative bits: the imaginary part of a conjugate view. Stride 2."""
    return torch.complex(x, -x).conj().imag if x.dtype in (torch.float32, torch.float64) else _negative(x)


# From a contiguous tensor to one of the layout: same shape and, unless expanded or overlapping, the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "misaligned_by_1": _misaligned(1),
    "misaligned_by_3": _misaligned(3),
    "padded_rows": lambda x: _padded(x, step=1, extra=3),
    "every_second_element": lambda x: _padded(x, step=2, extra=1),
    "every_second_row": _every_second_row,
    "transposed": _transposed,
    "reversed_dims": _reversed_dims,
    "channels_last": _channels_last,
    "expanded_first": _expanded_first,
    "expanded_last": _expanded_last,
    "one_value": _one_value,
    "overlapping": _overlapping,
    "negative": _negative,
    "negative_imaginary": _negative_imaginary,
}


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    backward_dtype: torch.dtype | None = None,
    layouts: tuple[str, str, str] = ("contiguous",) * 3,
    *,
    device: str = "cpu",
    step: float = 0.05,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """before, after and backward with a relative update of about `step`, from the global generator."""
    before = torch.randn(shape, dtype=torch.float64)
    after = before + step * torch.randn(shape, dtype=torch.float64)
    backward = torch.randn(shape, dtype=torch.float64) - 0.3 * (after - before) / step
    values = (before * scale, after * scale, backward * scale)
    dtypes = (dtype, dtype, backward_dtype or dtype)
    f, g, b = (LAYOUTS[layout](x.to(device, d)) for x, d, layout in zip(values, dtypes, layouts, strict=True))
    return f, g, b


def layers(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, *, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """before, after and backward of layers that mix dtypes, shapes and layouts."""
    names = list(LAYOUTS)
    result: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for i, shape in enumerate(shapes):
        mixed = (names[i % len(names)], names[(2 * i + 1) % len(names)], names[(3 * i + 2) % len(names)])
        parts = inputs(shape, DTYPES[i % 4], DTYPES[(i // 2) % 4], mixed, device=device)
        for into, part in zip(result, parts, strict=True):
            into.append(part)
    return result


# One row of coefficients for every rule, of a size that keeps all their terms.
COEFFICIENTS = {
    OptimizerRule.LINEAR: (-1e-2, -0.1, 0.3, -0.9),
    OptimizerRule.ADAM: (-1e-2, -0.1, 1.3, 1e-8),
    OptimizerRule.ADAMAX: (-0.1,),
    OptimizerRule.RMSPROP: (-1e-2, -0.1, 1.0, 1e-3),
}
# Rules with the dtypes that they take.
RULES = [
    (rule, dtype) for rule in OptimizerRule for dtype in DTYPES if rule is OptimizerRule.LINEAR or dtype.itemsize >= 4
]


def step_inputs(
    rule: OptimizerRule,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, ...] = ("contiguous",) * 4,
    *,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """Gradient, parameter after the step and the states of one parameter, from the global generator."""
    g, w, s = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    positive = torch.rand(shape, dtype=torch.float64) + 0.1
    states = {OptimizerRule.LINEAR: (s,), OptimizerRule.RMSPROP: (1 + positive, s.tanh())}.get(rule, (s, positive))
    values = (g, w, *states)
    result = [LAYOUTS[layout](x.to(device, dtype)) for x, layout in zip(values, layouts, strict=False)]
    return tuple(result)


def step_arguments(
    rule: OptimizerRule, parameters: Sequence[tuple[Tensor, ...]], coefficients: Tensor | None = None
) -> tuple[OptimizerRule, list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """The arguments of `optimizer_stats` for what `step_inputs` made; every parameter has its own coefficients."""
    if coefficients is None:
        row = torch.tensor([COEFFICIENTS[rule]], dtype=torch.float64)
        coefficients = row * torch.linspace(1, 2, len(parameters), dtype=torch.float64)[:, None]
        if rule is OptimizerRule.RMSPROP:
            coefficients[:, 2] = row[0, 2]
    lists = [list(x) for x in zip(*parameters, strict=True)] if parameters else [[]] * (rule.states + 2)
    return rule, lists[0], lists[1], lists[2], lists[3] if rule.states == 2 else [], coefficients


def run_apart(code: str, **environment: str) -> str:
    """The output of Python code in a process of its own, which finds the modules that this one finds."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
