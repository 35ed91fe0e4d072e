"""The published numbers, and the bands in which ours have to lie. No other module states them.

Published ranges of means over seeds vary by about 0.03 themselves, and ours are means over few seeds too. A value
passes if it lies in the range, widened by ``margin`` and by ``errors`` standard errors of ours. Small sizes
(``--quick``) use fewer seeds, so their errors are larger, and a separate margin where the size itself changes the
number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastfs._reproduce.paper.study import Value

__all__ = ["PUBLISHED", "Check", "Published", "check"]

_NOTEBOOKS = "authors' notebooks"
_PAPER = "paper"
_THEORY = "identity"


@dataclass(frozen=True)
class Published:
    """A published number.

    Attributes:
        figure: name of the figure that computes it.
        key: key of the value in that figure.
        what: description.
        low: lower end of the published range; a claim such as "tends to 0" is the range that it implies at this size.
        high: upper end of the published range.
        source: origin: the authors' notebooks, a statement of the paper, or an identity.
        margin: permitted deviation from the range.
        quick_margin: permitted deviation at quick sizes.
        errors: number of standard errors of ours that are permitted in addition; 0 for exponents.
    """

    figure: str
    key: str
    what: str
    low: float
    high: float
    source: str = _NOTEBOOKS
    margin: float = 0.03
    quick_margin: float = 0.03
    errors: float = 2.0

    @property
    def text(self) -> str:
        """The published range as text."""
        if math.isinf(self.high):
            return f">= {self.low:g}"
        if self.low == -math.inf:
            return f"<= {self.high:g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


# Output angle (radians) by sqrt(L) beta: range, and variation of the published means at that size.
_ANGLES = {"0.1": (0.07, 0.08, 0.005), "0.5": (0.34, 0.37, 0.03), "1": (0.65, 0.70, 0.03), "2": (1.04, 1.05, 0.03)}
_MLP_ANGLE = 1.45
_MUP = {5: 1.6, 10: 2.4, 20: 3.6, 40: 5.3}


def _angle(figure: str, c: str, suffix: str = "") -> Published:
    low, high, margin = _ANGLES[c]
    quick = margin * 5 / 3  # standard errors from few seeds are inaccurate
    where = suffix.removeprefix(",")
    what = f"output angle, sqrt(L) beta = {c}" + (f", {where}" if where else "")
    return Published(figure, f"c={c}{suffix}", what, low, high, margin=margin, quick_margin=quick)


PUBLISHED: tuple[Published, ...] = (
    *(_angle("a", c) for c in ("0.5", "1", "2")),
    Published("a", "beta=1/L", "output angle, beta = 1/L: tends to 0", 0.0, 0.08, _PAPER, 0.0, 0.04),
    Published("a", "mlp", "output angle of the MLP: towards pi/2", _MLP_ANGLE, math.pi / 2, _PAPER, 0.0, 0.03),
    *(_angle("b", c, f",L={depth}") for c in ("0.5", "1", "2") for depth in (30, 100)),
    Published("b", "mlp,L=100", "output angle of the MLP, L = 100", _MLP_ANGLE, _MLP_ANGLE),
    *(
        Published("b", f"c={c},range", f"sqrt(L) beta = {c}: means differ over depth by", 0, 0.06, _PAPER, 0.02, 0.04)
        for c in ("0.5", "1", "2")
    ),
    *(_angle("c", c, f",L={depth}") for c in _ANGLES for depth in (30, 100, 500)),
    Published("c", "range", "means differ over depth, at any sqrt(L) beta, by", 0, 0.08, _PAPER, 0.02, 0.04),
    *(
        Published("d", f"formula,beta={law}", f"aligned part / formula, beta = {law}", 1, 1, _THEORY, 0.01, 0.02)
        for law in ("1/L", "0.5/sqrt(L)", "1/sqrt(L)", "2/sqrt(L)")
    ),
    *(Published("e", f"ntk,L={depth}", f"MLP, NTK, L = {depth}: S (median)", 0.1, 0.3) for depth in _MUP),
    *(
        Published("e", f"mup,L={depth}", f"MLP, MF + muP, L = {depth}: S", s, s, margin=0.04 * s, quick_margin=0.08 * s)
        for depth, s in _MUP.items()
    ),
    *(Published("e", f"fsc,L={depth}", f"MLP, FSC, L = {depth}: S", 0.7, 0.9) for depth in _MUP),
    Published("e", "mup,exponent", "MLP, MF + muP: S ~ L^p, p", 0.5, 0.5, _PAPER, 0.12, 0.2, 0.0),
    Published("e", "fsc,exponent", "MLP, FSC: S ~ L^p, p", 0.0, 0.0, _PAPER, 0.15, 0.25, 0.0),
    *(
        Published("e", f"resnet {beta},exponent", f"ResNet, beta = {beta}: S ~ L^p, p", 0, 0, _PAPER, 0.08, 0.12, 0.0)
        for beta in ("1/sqrt(L)", "1/L")
    ),
    Published("f", "exponent", "cos ~ c^p at large c: p", -1, -1, _PAPER, 0.1, 0.25, 0.0),
    Published("f", "constant", "c cos at the largest c: about 1", 1, 1, _PAPER, 0.15, 0.15),
    Published("g", "exponent", "cos(theta_l) ~ l^p in MLPs: p", -0.5, -0.5, _PAPER, 0.06, 0.15, 0.0),
    Published("h", "prediction", "M1/sqrt(M2) against the measured cosine", 0, 0.03, _PAPER, 0.0, 0.07),
    Published("h", "kernel", "b'Kb/(|b||Kb|) against the measured cosine", 0, 0.005, _THEORY, 0.0, 0.005),
    Published("h", "probes", "random probes against exact moments, in errors", 0, 4, _THEORY, 0.0, 0.0),
)


@dataclass(frozen=True)
class Check:
    """A published number beside ours. ``passed`` is None if the value was not computed at this size."""

    published: Published
    value: Value | None
    low: float
    high: float

    @property
    def passed(self) -> bool | None:
        """Whether our value lies in the band; NaN does not."""
        return None if self.value is None else self.low <= self.value.mean <= self.high


def check(values: Mapping[str, Mapping[str, Value]], *, quick: bool) -> list[Check]:
    """Compare every published number of the given figures with ours.

    Args:
        values: figure -> key -> value.
        quick: whether the values are of quick sizes.

    Returns:
        One check per published number.

    Raises:
        KeyError: a full-size figure lacks a published value.
    """
    return [_check(entry, values[entry.figure], quick) for entry in _of(values)]


def _of(figures: Iterable[str]) -> list[Published]:
    wanted = set(figures)
    return [entry for entry in PUBLISHED if entry.figure in wanted]


def _check(entry: Published, values: Mapping[str, Value], quick: bool) -> Check:
    if entry.key not in values:
        if not quick:
            raise KeyError(f"figure {entry.figure} has no value {entry.key!r}, but one is published")
        return Check(entry, None, entry.low, entry.high)
    value = values[entry.key]
    error = 0.0 if math.isnan(value.error) else entry.errors * value.error
    margin = (entry.quick_margin if quick else entry.margin) + error
    return Check(entry, value, entry.low - margin, entry.high + margin)
