"""The result of a comparison of runs: what parts first, as text, table and JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastfs._utils.extras import frame

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["ALL_LAYERS", "Parting", "RunComparison"]

ALL_LAYERS = "all layers"
"""Name of the median over layers, which is tested with replicates."""

_MANY = 1000.0  # standard errors that need no more digits


@dataclass(frozen=True)
class Parting:
    """The first step at which a quantity of two sides differs by more than noise.

    Attributes:
        second: label of the run, or of the group of runs.
        first: label of what it is compared with.
        step: number of the optimizer step.
        layer: name of the layer; ``"all layers"`` for the median over layers.
        key: name of the quantity or ratio, such as ``"parameter_update_norm"``.
        quantity: the same in words.
        value: value of the second side, geometric mean of a group for ratios.
        reference: value of the first side.
        change: the factor between them or, if ``ratio`` is false, the difference; without the common change of all
            layers where the noise is their spread.
        ratio: whether ``change`` is a factor.
        errors: size of the change in standard errors.
        p: p-value of the single test.
        noise: where the standard error comes from: ``"rounding"``, ``"layers"`` or ``"replicates"``.
        others: number of other layers in which the quantity parts at the same step.
    """

    second: str
    first: str
    step: int
    layer: str
    key: str
    quantity: str
    value: float
    reference: float
    change: float
    ratio: bool
    errors: float
    p: float
    noise: str
    others: int

    @property
    def change_text(self) -> str:
        """The change as a factor or, near 1, in percent; a difference with its sign."""
        if not self.ratio:
            return f"{self.change:+.3g}"
        return f"{100 * (self.change - 1):+.2g} %" if abs(self.change - 1) < 0.01 else f"x{self.change:.4g}"

    def __str__(self) -> str:
        return f"{self.quantity} of {self.layer}: {self.change_text} ({_errors(self.errors)} standard errors)"


def _errors(errors: float, more: str = "more than ") -> str:
    return f"{more}{_MANY:.0f}" if abs(errors) > _MANY else f"{abs(errors):.3g}"


_NOISE = {
    "rounding": "both runs were in the same state before this step, so the noise is rounding",
    "layers": "the noise is the spread over the other layers, whose common factor is removed",
    "replicates": "the noise is the variance between runs of a group",
}

_APART = (
    "They start in different states (another seed, other data, or a late first measurement), so that only the sizes of "
    "parameter updates are compared, layer against layer."
)


@dataclass(frozen=True)
class RunComparison:
    """What :func:`fastfs.compare` found. ``str()`` says what parts first.

    Attributes:
        labels: of the runs of the first side.
        against: of the runs of the second side; empty if every run is compared with the first one.
        layers: names of the common layers.
        steps: common measured steps.
        equal: labels of the runs whose numbers are all equal to those of the first one.
        same_state: labels of the runs that are in the same state as the first one before the first common step.
        untested: labels of the runs of which nothing can be said without replicates.
        confidence: probability that runs of one setting raise no false alarm.
        partings: for each run, the first parting of each quantity, in the order of steps; at equal steps, what
            the optimizer determines comes first, then the earliest layer.
        missing: where one run has no numbers at a step at which the other one has, as after it diverged.
        notes: what was left out, and which settings differ.
    """

    labels: tuple[str, ...]
    against: tuple[str, ...]
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    equal: tuple[str, ...]
    same_state: tuple[str, ...]
    untested: tuple[str, ...]
    confidence: float
    partings: tuple[Parting, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def parted(self) -> bool:
        """Whether a quantity parts, or one run has no more numbers."""
        return bool(self.partings or self.missing)

    @property
    def first(self) -> Parting | None:
        """The first parting of all runs; None if nothing parts."""
        return min(self.partings, key=lambda parting: parting.step, default=None)

    def of(self, label: str) -> tuple[Parting, ...]:
        """Return the partings of one run.

        Args:
            label: of the run.

        Returns:
            Its partings, the first one first.
        """
        return tuple(parting for parting in self.partings if parting.second == label)

    def to_frame(self) -> DataFrame:
        """Return one row per parting, with the attributes of :class:`Parting` as columns.

        Returns:
            A DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        names = [field.name for field in dataclasses.fields(Parting)]
        return frame({name: [getattr(parting, name) for parting in self.partings] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return everything as mappings, lists, texts and numbers.

        Returns:
            The attributes by name, and the text as ``verdict``.
        """
        return {"parted": self.parted, "verdict": str(self).split("\n"), **dataclasses.asdict(self)}

    def table(self) -> Table:
        """Return the partings as a rich table; ``errors`` is the size of the change in standard errors."""
        several = len({one.second for one in self.partings}) > 1
        grid = Table(title="Where each quantity parts first", title_justify="left")
        for column in (*["run"][:several], "quantity", "layer"):
            grid.add_column(column, overflow="fold")
        for column in ("step", "first", "second", "change", "errors"):
            grid.add_column(column, justify="right", no_wrap=True)
        for one in self.partings:
            values = (f"{one.step:,}", f"{one.reference:.3g}", f"{one.value:.3g}")
            numbers = (*values, one.change_text, _errors(one.errors, ">"))
            grid.add_row(*map(escape, (*[one.second][:several], one.quantity, one.layer, *numbers)))
        return grid

    def __str__(self) -> str:
        """Return one line on what was compared, and one or two for each run."""
        steps = f"{len(self.steps)} measured steps ({self.steps[0]:,} to {self.steps[-1]:,})"
        lines = [
            f"{len(self.layers)} layers and {steps} in common; a false alarm in any of them has a probability of at "
            f"most {1 - self.confidence:.2g}."
        ]
        sides = [(", ".join(self.against), ", ".join(self.labels))] if self.against else []
        for label, reference in sides or [(label, self.labels[0]) for label in self.labels[1:]]:
            lines += self._about(label, reference)
        lines += [f"{text}." for text in self.missing]
        return "\n".join(lines)

    def _about(self, label: str, reference: str) -> list[str]:
        head = f"{label} against {reference}"
        if label in self.equal:
            return [f"{head}: equal in every number."]
        found = self.of(label)
        if label in self.untested:
            return [f"{head}: nothing can be said. {_APART} Fewer than three layers have them; give more runs."]
        how = "" if self.against else "Both start in the same state." if label in self.same_state else _APART
        if not found:
            until = " where both have numbers" if self.missing else ""
            return [f"{head}: nothing parts{until}. {how}".rstrip()]
        one = found[0]
        at_once = [other.quantity.lower() for other in found[1:] if other.step == one.step]
        also = f" At this step also: {', '.join(at_once)}." if at_once else ""
        more = f" (and {one.others} more layers)" if one.others else ""
        return [f"{head}: part first at step {one.step:,}, {one}{more}; {_NOISE[one.noise]}.{also} {how}".rstrip()]
