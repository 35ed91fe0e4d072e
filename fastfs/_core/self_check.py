"""Whether the native core measures right here: every op against its reference, on small tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfs import _functional, reference
from fastfs._core.checks import DTYPES
from fastfs._core.optimizer_rules import OptimizerRule

__all__ = ["self_check"]

# Largest error of a sum, as a multiple of the sum of its absolute terms.
TOLERANCE = {"float64": 1e-13, "other": 2e-6}


def self_check(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Measures small layers of `dtype`, with backward vectors of every dtype, natively and with the reference.

    Returns:
        What differs by more than the native core promises; empty if nothing does.
    """
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, kind)

    shapes = [(33, 257), (129,), (), (0, 3), (64, 65)]
    failures: list[str] = []
    for other in DTYPES:
        before = [make(shape, dtype) for shape in shapes]
        after = [(x.double() + 0.1 * make(tuple(x.shape), torch.float64)).to(dtype) for x in before]
        backward = [make(shape, other) for shape in shapes]
        for layers in (before, after, backward):
            layers[-1] = layers[-1].t()  # not contiguous
        after[1][7] = float("inf")
        tolerance = TOLERANCE["float64" if dtype == other == torch.float64 else "other"]
        label = f"backward {str(other).removeprefix('torch.')}"
        native = _functional.feature_stats(before, after, backward, backend="native")
        expected = reference.feature_stats(before, after, backward)
        assert not isinstance(expected, list)
        failures += _differing(f"feature_stats, {label}", native.sums, expected.sums, expected.names, tolerance)
        rows = _functional.feature_stats(before[0], after[0], backward[0], per_row=True, backend="native")
        expected = reference.feature_stats(before[0], after[0], backward[0], per_row=True)
        assert not isinstance(expected, list)
        failures += _differing(f"per_row, {label}", rows.sums, expected.sums, expected.names, tolerance)
        updates = _functional.update_stats(before, backward, backend="native")
        wanted = reference.update_stats(before, backward)
        failures += _differing(f"update_stats, {label}", updates.sums, wanted.sums, wanted.names, tolerance)
        failures += _rows(before[0], other)
    for rule in OptimizerRule if dtype in (torch.float32, torch.float64) else (OptimizerRule.LINEAR,):
        failures += _step(rule, [make(shape, dtype).abs() + 0.5 for shape in ((33, 257), (129,))])
    return failures


def _rows(x: Tensor, dtype: torch.dtype) -> list[str]:
    """Some rows of a tensor, cast to another dtype, with their squared norms."""
    rows = torch.tensor([5, 0, 32, 5], device=x.device)
    copies, squares = torch.ops.fastfs.gather_rows(x, rows, 1, dtype)
    wanted, norms = reference.gather_rows(x, rows, 1, dtype)
    failures = [] if torch.equal(copies, wanted) else [f"gather_rows to {dtype}"]
    tolerance = TOLERANCE["float64" if x.dtype == torch.float64 else "other"]
    return failures + _differing("gather_rows", squares[:, None], norms[:, None], ("squares",), tolerance)


def _step(rule: OptimizerRule, tensors: list[Tensor]) -> list[str]:
    """What an optimizer did, by one of its closed forms."""
    second = [] if rule.states == 1 else [t * 2.0 for t in tensors]
    states = tensors, [t.flip(0) for t in tensors], [t * 0.5 for t in tensors], second
    coefficients = torch.full((len(tensors), len(rule.coefficients)), 0.125, dtype=torch.float64)
    native = _functional.optimizer_stats(rule, *states, coefficients, backend="native")
    wanted = reference.optimizer_stats(rule, *states, coefficients)
    tolerance = TOLERANCE["float64" if tensors[0].dtype == torch.float64 else "other"]
    return _differing(f"optimizer_stats, {rule.name}", native.sums, wanted.sums, wanted.names, 4 * tolerance)


def _differing(label: str, got: Tensor, expected: Tensor, names: tuple[str, ...], tolerance: float) -> list[str]:
    got, expected = got.cpu(), expected.cpu()
    if got.shape != expected.shape:
        return [f"{label}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"]
    column = {name: expected[..., i] for i, name in enumerate(names)}
    failures = []
    for i, name in enumerate(names):
        want, have = expected[..., i], got[..., i]
        if name in ("nonfinite", "count"):
            allowed = torch.zeros_like(want)
        elif name == "update_dot_backward":
            allowed = tolerance * column["abs_update_dot_backward"]
        elif name in ("before_dot_update", "dot"):  # Cauchy-Schwarz: no less than the sum of the absolute terms
            left = column["before_sq" if name == "before_dot_update" else "gradient_sq"]
            allowed = tolerance * (left * column["update_sq"]).sqrt()
        else:
            allowed = tolerance * want
        agrees = torch.where(want.isfinite(), (have - want).abs() <= allowed, ~have.isfinite())
        if not bool(agrees.all()):
            failures.append(f"{label}: {name}")
    return failures
