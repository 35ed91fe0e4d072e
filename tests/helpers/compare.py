"""The truth, in numpy's extended precision, and the only tolerances.

Nothing here shares code with the reference or the native core. Which sums there are follows from their declaration in
`fastfs._stats`.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastfs._stats import ParameterStats, Stats, UpdateStats

# |error| <= relative * sum|terms| + absolute * count. The absolute part is what float loses to underflow.
RELATIVE = {torch.float64: 1e-13}
RELATIVE_SINGLE = 2e-6
ABSOLUTE = {torch.float64: 2.0**-1022}
ABSOLUTE_SINGLE = 2.0**-126

# Of the double-precision reference, whatever the dtype.
REFERENCE = 1e-13


@dataclass(frozen=True)
class Truth:
    """Exact sums, and the sums of absolute terms that errors are measured by: (..., names)."""

    sums: np.ndarray
    sizes: np.ndarray
    count: np.ndarray
    relative: float
    absolute: float


def feature_truth(before: Tensor, after: Tensor, backward: Tensor, *, per_row: bool = False) -> Truth:
    """The nine sums of finite inputs: (9,), or (rows, 9) with `per_row`."""
    f, g, b = (_values(x, per_row) for x in (before, after, backward))
    df = g - f
    rounding = (_rows(_spacing(before), per_row) ** 2 + _rows(_spacing(after), per_row) ** 2) / 12
    terms = [df * b, df * df, b * b, f * f, f * df, np.abs(df * b), rounding, np.zeros_like(f), np.ones_like(f)]
    return _truth(terms, before.dtype, backward.dtype)


def update_truth(gradient: Tensor, update: Tensor) -> Truth:
    """The sums of finite inputs, as in `UpdateStats.names`: (names,)."""
    vectors = {"gradient": _values(gradient, False), "update": _values(update, False)}
    return _truth(_products(UpdateStats, vectors), gradient.dtype, update.dtype)


def _products(kind: type[Stats], vectors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The terms of the sums of products, of the non-finite entries (there are none) and of the count."""
    like = next(iter(vectors.values()))
    return [*(vectors[a] * vectors[b] for a, b in kind.factors.values()), np.zeros_like(like), np.ones_like(like)]


def assert_close(actual: Tensor, truth: Truth, *, relative: float | None = None, what: str = "") -> None:
    """Every sum within the error budget; `relative` replaces the one of the dtype."""
    assert actual.dtype == torch.float64
    got = actual.detach().cpu().numpy().astype(np.longdouble)
    assert got.shape == truth.sums.shape, f"{what}: shape {got.shape}, expected {truth.sums.shape}"
    error = np.abs(got - truth.sums)
    budget = (relative or truth.relative) * truth.sizes + truth.absolute * truth.count[..., None]
    budget[..., -2:] = 0  # counts are exact
    worst = f"{what}\ngot      {got}\nexpected {truth.sums}\nerror    {error}\nbudget   {budget}"
    assert np.all(error <= budget), worst


def assert_close_squares(actual: Tensor, rows: Tensor, *, relative: float | None = None, what: str = "") -> None:
    """The squared norms (k,) of finite rows (k, width) within the error budget of their dtype."""
    assert actual.dtype == torch.float64
    truth = (_numpy(rows).astype(np.longdouble) ** 2).sum(axis=1)
    got = actual.detach().cpu().numpy().astype(np.longdouble)
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, expected {truth.shape}"
    budget = (relative or RELATIVE.get(rows.dtype, RELATIVE_SINGLE)) * truth + ABSOLUTE[torch.float64] * rows.shape[1]
    assert np.all(np.abs(got - truth) <= budget), f"{what}\ngot      {got}\nexpected {truth}"


def assert_same_values(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """The same dtype, shape and values, NaN for NaN, and the same signs of zeros: a cast has no tolerance."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    a, b = actual.detach().cpu(), expected.detach().cpu()
    same = ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
    assert bool(same.all()), f"{what}\ngot      {a[~same]}\nexpected {b[~same]}"


def assert_step(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", summed: Tensor | None = None
) -> None:
    """Sums of a step, (names,), against those of the tensors before and after it, which `dtype` rounds.

    The parameter after the step is off by its rounding, a few per element, and a gradient that has to be taken out of a
    sum (`summed`: a momentum buffer) by the rounding of that sum. Beyond that, 1e-9 for float64 and for the others the
    error of sums in float.
    """
    got, truth = (x.detach().cpu().numpy().astype(np.longdouble) for x in (actual, expected))
    eps, relative = torch.finfo(dtype).eps, 1e-9 if dtype == torch.float64 else 5e-6
    names, factors = ParameterStats.names, ParameterStats.factors
    norms = {a: np.sqrt(truth[names.index(name)]) for name, (a, b) in factors.items() if a == b}
    size = 0.0 if summed is None else float(summed.double().norm())
    moved = 4 * eps * norms["parameter"] + relative * norms["update"]
    turned = 40 * eps * norms["gradient"] + 4 * eps * size + relative * norms["gradient"]
    errors = {"update": moved, "gradient": turned, "parameter": relative / 2 * norms["parameter"]}
    budgets = {name: norms[a] * errors[b] + norms[b] * errors[a] for name, (a, b) in factors.items()}
    budgets["update_sq"] += moved**2
    budget = np.array([budgets.get(name, 0) for name in names])
    error = np.abs(got - truth)
    assert np.all(error <= budget), f"{what}\ngot      {got}\nexpected {truth}\nerror    {error}\nbudget   {budget}"


def optimizer_truth(rule: int, tensors: tuple[Tensor, ...], coefficients: Tensor) -> Truth:
    """The sums of finite inputs, as in `ParameterStats.names`: (names,). `tensors`: gradient, parameter, states."""
    g, w, *s = (_values(x, False) for x in tensors)
    c = coefficients.cpu().numpy().astype(np.longdouble)
    gradients = [g, c[3] * s[0]] if rule == 0 else [g]
    if rule == 0:
        updates = [c[0] * w, c[1] * g, c[2] * s[0]]
    elif rule == 1:
        updates = [c[0] * w, c[1] * s[0] / _nonzero(c[2] * np.sqrt(s[1]) + c[3])]
    elif rule == 2:
        updates = [c[0] * s[0] / _nonzero(s[1])]
    else:
        below = _nonzero(np.sqrt(s[0] - c[2] * s[1] ** 2) + c[3])
        updates = [c[0] * w / below, c[1] * g / below]
    vectors = {"gradient": np.sum(gradients, axis=0), "update": np.sum(updates, axis=0), "parameter": w}
    truth = _truth(_products(ParameterStats, vectors), *(x.dtype for x in tensors))
    # Errors are measured by the parts of dw and g, before they cancel.
    parts = {"gradient": np.abs(gradients).sum(axis=0), "update": np.abs(updates).sum(axis=0), "parameter": np.abs(w)}
    sizes = [x.sum(axis=-1) for x in _products(ParameterStats, parts)]
    return dataclasses.replace(truth, sizes=np.stack(sizes, axis=-1))


def _nonzero(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1, x)


def assert_same(a: Tensor, b: Tensor, what: str = "") -> None:
    """The same bits."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.cpu().reshape(-1).view(torch.uint8)), (
        f"{what}: not the same bits\n{a}\n{b}\ndifference {a - b}"
    )


def assert_same_kind(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Where a sum is NaN or infinite, the other is the same."""
    actual, expected = actual.cpu(), expected.cpu()
    message = f"{what}\ngot      {actual}\nexpected {expected}"
    assert torch.equal(actual.isfinite(), expected.isfinite()), message
    odd = ~expected.isfinite()
    assert torch.equal(actual[odd].nan_to_num(nan=0.5), expected[odd].nan_to_num(nan=0.5)), message
    assert torch.equal(actual[..., -2:], expected[..., -2:]), message


def _truth(terms: list[np.ndarray], *dtypes: torch.dtype) -> Truth:
    double = torch.float64 in dtypes
    return Truth(
        sums=np.stack([t.sum(axis=-1) for t in terms], axis=-1),
        sizes=np.stack([np.abs(t).sum(axis=-1) for t in terms], axis=-1),
        count=np.asarray(terms[-1].sum(axis=-1)),
        relative=RELATIVE[torch.float64] if double else RELATIVE_SINGLE,
        absolute=ABSOLUTE[torch.float64] if double else ABSOLUTE_SINGLE,
    )


def _rows(values: np.ndarray, per_row: bool) -> np.ndarray:
    if not per_row:
        return values.reshape(-1)
    width = values.shape[-1] if values.ndim else 1
    return values.reshape(int(np.prod(values.shape[:-1])), width)


def _numpy(x: Tensor) -> np.ndarray:
    """The values of x, exactly; bfloat16 as float32."""
    x = x.detach().cpu().resolve_neg().contiguous()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _values(x: Tensor, per_row: bool) -> np.ndarray:
    return _rows(_numpy(x).astype(np.longdouble), per_row)


def _spacing(x: Tensor) -> np.ndarray:
    """Spacing of the dtype at each value; 0 at 0 and, except for float16, below the smallest normal number."""
    info = torch.finfo(x.dtype)
    values = np.abs(_numpy(x).astype(np.longdouble))
    _, exponents = np.frexp(values)
    result = np.ldexp(np.longdouble(info.eps), exponents - 1)
    if x.dtype == torch.float16:
        return np.where(values == 0, np.longdouble(0), np.maximum(result, np.longdouble(2.0**-24)))
    return np.where(values < info.tiny, np.longdouble(0), result)


def assert_identity(actual: Tensor, expected: Tensor, *, holds: bool, what: str = "") -> None:
    """<b, df> and the sum of <g, dw>, in float64: equal up to rounding where the identity holds, else not."""
    close = torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
    assert close == holds, f"{what}: <b, df> = {actual}, sum of <g, dw> = {expected}, identity expected: {holds}"


def assert_matrix(actual: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """Every entry within `relative` of the largest entry: what a product of matrices can give."""
    assert actual.shape == expected.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    worst = (actual.double() - expected.double()).abs().max().item()
    size = expected.double().abs().max().item()
    assert size > 0, f"{what}: nothing but zeros is expected, which anything small would pass"
    assert worst <= relative * size, f"{what}: off by {worst}, the largest entry is {size}"


def assert_estimate(value: Tensor, error: Tensor, exact: Tensor, *, sigmas: float, what: str = "") -> None:
    """Estimates within `sigmas` of their standard errors, which have to be there."""
    assert bool((error > 0).all()), f"{what}: standard errors {error}"
    off = (value - exact).abs() / error
    assert bool((off <= sigmas).all()), f"{what}: {off} standard errors off: {value} +- {error}, exact {exact}"
