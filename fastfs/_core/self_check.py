"""Compares the native core with the reference on small tensors: every measurement, and the row ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs import _functional, reference
from fastfs._core.checks import DTYPES
from fastfs._core.measurements import MEASUREMENTS, KernelSpec, MeasurementSpec
from fastfs._stats import Stats

__all__ = ["Example", "examples", "self_check"]

# Largest error of a sum, as a multiple of the sum of its absolute terms.
TOLERANCE = {"float64": 1e-13, "other": 2e-6}
SHAPES = ((33, 257), (129,), (), (0, 3), (64, 65))


@dataclass(frozen=True)
class Example:
    """Arguments of an op.

    Attributes:
        measurement: The measurement.
        label: What is special about the arguments.
        arguments: Of the op, of the reference and of the public function.
        tolerance: Largest error of a sum, as a multiple of the sum of its absolute terms.
    """

    measurement: MeasurementSpec
    label: str
    arguments: tuple[Any, ...]
    tolerance: float


def examples(
    measurement: MeasurementSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    seed: int = 0,
    finite: bool = False,
) -> Iterator[Example]:
    """Yields arguments for every kernel that takes `dtype`, and every dtype of the last input that it takes.

    The tensors of the last shape are not contiguous.

    Args:
        measurement: The measurement.
        dtype: Of all inputs but the last.
        device: Of the tensors. Coefficients are on the CPU.
        shapes: One per layer, two at least. The last one has two dimensions, the second one at least 8 entries.
        seed: Of the values.
        finite: Whether all values are finite; else the second layer has an infinite entry.
    """
    generator = torch.Generator().manual_seed(seed)

    def layer(number: int, kernel: KernelSpec, kind: torch.dtype, near: list[Tensor] | None) -> Tensor:
        x = torch.randn(shapes[number], generator=generator, dtype=torch.float64)
        if kernel.coefficients:  # states of optimizers, some under a root or in a denominator
            x = x.abs() + 0.5
        last = number == len(shapes) - 1
        if near is not None:
            x = near[number].to(x).t() + 0.1 * x if last else near[number].to(x) + 0.1 * x
        x = x.to(device, kind)
        return x.t() if last else x

    for rule, kernel in enumerate(measurement.kernels):
        if dtype.itemsize == 2 and not kernel.sixteen_bit:
            continue
        for other in (dtype,) if kernel.coefficients else DTYPES:
            lists: dict[str, list[Tensor]] = {}
            for place, given in enumerate(measurement.inputs):
                kind = other if place == kernel.inputs - 1 else dtype
                near = None if given.near is None else lists[given.near]
                used = range(len(shapes)) if place < kernel.inputs else range(0)
                lists[given.name] = [layer(number, kernel, kind, near) for number in used]
            if not finite:
                lists[measurement.inputs[1].name][1].view(-1)[7] = torch.inf
            exact = dtype == other == torch.float64
            tolerance = TOLERANCE["float64" if exact else "other"] * (4 if kernel.coefficients else 1)
            arguments: tuple[Any, ...] = tuple(lists.values())
            if measurement.ruled:
                table = torch.full((len(shapes), kernel.coefficients), 0.01, dtype=torch.float64)
                arguments = rule, *arguments, table
            yield Example(measurement, f"{kernel.name} with {_name(other)}", arguments, tolerance)


def self_check(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Measures small layers of `dtype` natively and with the reference.

    Returns:
        What differs by more than the native core promises; empty if nothing does.
    """
    failures: list[str] = []
    for measurement in MEASUREMENTS:
        for example in examples(measurement, dtype, device):
            failures += compare(example)
            if measurement.per_row:
                failures += compare(example, per_row=True)
    x = torch.randn((33, 257), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)
    for other in DTYPES:
        failures += _rows(x, other)
    return failures


def compare(example: Example, *, per_row: bool = False) -> list[str]:
    """The sums of an example that are further from the reference than its tolerance."""
    name, options = example.measurement.name, {"per_row": True} if per_row else {}
    native = getattr(_functional, name)(*example.arguments, backend="native", **options)
    expected = getattr(reference, name)(*example.arguments, **options)
    label = f"{name}, {example.label}{', per row' if per_row else ''}"
    pairs = zip(native, expected, strict=True) if per_row else [(native, expected)]
    return [found for pair in pairs for found in _differing(label, *pair, example.tolerance)]


def _rows(x: Tensor, dtype: torch.dtype) -> list[str]:
    """Some rows of a tensor, cast to another dtype, with their squared norms."""
    rows = torch.tensor([5, 0, 32, 5], device=x.device)
    copies, squares = torch.ops.fastfs.gather_rows(x, rows, 1, dtype)
    wanted, norms = reference.gather_rows(x, rows, 1, dtype)
    failures = [] if torch.equal(copies, wanted) else [f"gather_rows to {_name(dtype)}"]
    tolerance = TOLERANCE["float64" if x.dtype == torch.float64 else "other"]
    if not bool(((squares - norms).abs() <= tolerance * norms).all()):
        failures.append(f"gather_rows to {_name(dtype)}: squares")
    return failures


def _differing(label: str, got: Stats, expected: Stats, tolerance: float) -> list[str]:
    have, want = got.sums.cpu(), expected.sums.cpu()
    if have.shape != want.shape:
        return [f"{label}: shape {tuple(have.shape)} instead of {tuple(want.shape)}"]
    column = dict(zip(expected.names, want.unbind(dim=-1), strict=True))
    failures = []
    for i, (name, value) in enumerate(column.items()):
        a, b = expected.factors.get(name, ("", ""))
        if name in ("nonfinite", "count"):
            allowed = torch.zeros_like(value)
        elif f"abs_{name}" in column:
            allowed = tolerance * column[f"abs_{name}"]
        elif a != b:  # Cauchy-Schwarz: no less than the sum of the absolute terms
            allowed = tolerance * (column[f"{a}_sq"] * column[f"{b}_sq"]).sqrt()
        else:
            allowed = tolerance * value
        agrees = torch.where(value.isfinite(), (have[..., i] - value).abs() <= allowed, ~have[..., i].isfinite())
        if not bool(agrees.all()):
            failures.append(f"{label}: {name}")
    return failures


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
