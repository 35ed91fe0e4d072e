"""Alignment of weight matrices and their updates with their inputs, and what moves their outputs.

Of y = W x, with x' and W' = W + dW after the step, y' - y = dW x' + W dx: own and inherited motion. Per matrix and
step, sums over kept rows of all calls (`SUMS`) give all quantities; those of micro-batches and ranks add. Norms of
matrices are Frobenius norms.

Source: the alignment of W and dW with x, |W x| / (|W| |x|) and |dW x| / (|dW| |x|), is that of Kosson et al., "Weight
Decay may matter more than muP for Learning Rate Transfer in Practice", arXiv 2510.19093; as an exponent of the fan-in,
log_n of rms(W x) / (rms(W) rms(x)), it is the log alignment ratio of Everett et al., "Scaling Exponents Across
Parameterizations and Optimizers", arXiv 2407.05872. Own and inherited motion are the two terms of the refined
coordinate check of Haas et al., "On the Surprising Effectiveness of Large Learning Rates under Standard Width Scaling",
arXiv 2505.22491.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs._monitor.capture.sampling import RowChoice, RowSampler
from fastfs._network.precision import SINGLE, product_coarseness
from fastfs._network.weight_products import MatrixView, Product
from fastfs._record.ranks.weight_sums import SUMS

__all__ = ["AT_ONCE", "ForwardProducts", "KeptProduct", "WeightMotion", "wide"]

AT_ONCE = 1 << 22
"""Numbers of an intermediate result, at most."""


@dataclass
class KeptProduct:
    """One call of a matrix in the forward before the step, and the rows of its input that were kept.

    Attributes:
        product: The call, without its tensors.
        view: Which part of which parameter the matrix is.
        rows: Kept rows of the input, (k, ...).
        shape: Shape of all rows.
        choice: Which rows were kept.
        noise: Variance of an entry of dx by rounding, relative to the square of an entry of x.
        chosen: First and last of the choices of rows so far that say which rows these are.
        repeated: Whether the call was found again in the forward after the step.
    """

    product: Product
    view: MatrixView
    rows: Tensor
    shape: torch.Size
    choice: RowChoice
    noise: float
    chosen: tuple[int, int]
    repeated: bool = False


@dataclass
class _Total:
    """Sums over the calls of one parameter."""

    fan_in: int
    sums: Tensor
    covariances: Tensor
    changed: Tensor
    sampled: bool = False
    unpaired: bool = False

    def __iadd__(self, other: _Total) -> _Total:
        self.fan_in = self.fan_in if self.fan_in == other.fan_in else 0
        self.sums = self.sums + other.sums
        self.covariances = self.covariances + other.covariances
        self.changed = self.changed | other.changed
        self.sampled, self.unpaired = self.sampled or other.sampled, self.unpaired or other.unpaired
        return self


class _Comparison:
    """Compares what rows were chosen by before and after the step, from some place on, as far as it is needed."""

    def __init__(self) -> None:
        self._count = 0
        self._same_shapes = True
        self._flags: list[Tensor] = []

    def extend(self, before: Sequence[Tensor], after: Sequence[Tensor], device: torch.device) -> Tensor | None:
        """Returns whether any of these differ, bool (); None if they cannot be compared.

        Args:
            before: What rows were chosen by before the step, at least as many as in the last call.
            after: The same after it.
            device: Of the result.
        """
        for a, b in zip(before[self._count :], after[self._count :], strict=False):
            self._same_shapes = self._same_shapes and a.shape == b.shape
            if self._same_shapes:
                self._flags.append((a != b).any().to(device, non_blocking=True))
        self._count = max(self._count, min(len(before), len(after)))
        if not self._same_shapes or len(before) != len(after):
            return None
        changed = torch.stack(self._flags).any() if self._flags else torch.zeros((), dtype=torch.bool, device=device)
        self._flags = [changed]
        return changed


class ForwardProducts:
    """The products of one forward before the step, what chose their rows, and the sums when they are repeated after it.

    Attributes:
        kept: By the part of a parameter, its calls in order.
        orders: What rows were chosen by.
        bytes: Charged to the memory budget.
    """

    def __init__(self) -> None:
        self.kept: dict[MatrixView, list[KeptProduct]] = {}
        self.orders: list[Tensor] = []
        self.bytes = 0
        self.restart()

    def restart(self) -> None:
        """Forgets the forward after the step."""
        self.again: Counter[MatrixView] = Counter()
        self.totals: dict[int, _Total] = {}
        self.compared: dict[tuple[int, int], _Comparison] = {}  # by the places in the two forwards
        for kept in (each for calls in self.kept.values() for each in calls):
            kept.repeated = False


class WeightMotion:
    """Adds up the products of a step with each trained matrix.

    Args:
        parameters: The trained parameters.
        sampler: Chooses rows.
        device: Of the sums.
    """

    def __init__(self, parameters: Sequence[Tensor], sampler: RowSampler, device: torch.device) -> None:
        self._parameters = parameters
        self._sampler = sampler
        self._device = device
        self._before: dict[int, Tensor] = {}  # values before the step

    def keep(self, forward: ForwardProducts, kept: KeptProduct) -> None:
        """Keeps a call before the step, and a copy of the matrix."""
        number = kept.view.parameter
        if number not in self._before:
            self._before[number] = self._parameters[number].detach().clone()
        forward.kept.setdefault(kept.view, []).append(kept)

    def clear(self) -> None:
        """Forgets the step."""
        self._before = {}

    def repeat(
        self,
        forward: ForwardProducts,
        product: Product,
        view: MatrixView,
        orders: Sequence[Tensor],
        chosen: tuple[int, int],
    ) -> None:
        """Adds a call that is repeated after the step.

        Args:
            forward: The forward before it.
            product: The call.
            view: Which part of which parameter the matrix is.
            orders: What rows have been chosen by so far.
            chosen: First and last of those that say which rows these are.
        """
        number, calls = forward.again[view], forward.kept.get(view, [])
        forward.again[view] += 1
        if number >= len(calls) or calls[number].shape != product.rows.shape:
            return
        kept = calls[number]
        comparison = forward.compared.setdefault((kept.chosen[0], chosen[0]), _Comparison())
        changed = comparison.extend(forward.orders[slice(*kept.chosen)], orders[slice(*chosen)], self._device)
        if changed is None:
            return
        kept.repeated = True
        total = self._add(forward.totals, kept, self.rows(product, kept.choice))
        total.changed = total.changed | changed

    def total(self, forwards: Iterable[ForwardProducts]) -> dict[int, _Total]:
        """Returns the sums of all forwards, by the number of the parameter, and forgets the step."""
        found: dict[int, _Total] = {}
        for forward in forwards:
            for calls in forward.kept.values():
                for kept in (each for each in calls if not each.repeated):
                    self._add(forward.totals, kept, None)
            for view in {*forward.kept, *forward.again}:
                calls = forward.kept.get(view, [])
                if view.parameter in forward.totals and not (len(calls) == forward.again[view] == _repeated(calls)):
                    forward.totals[view.parameter].unpaired = True
            for number, total in forward.totals.items():
                if number in found:
                    found[number] += total
                else:
                    found[number] = total
        self.clear()
        return found

    def rows(self, product: Product, choice: RowChoice) -> Tensor:
        """Copies rows of the input of a call, (k, ...)."""
        flat = product.rows.detach().reshape(choice.total, -1)
        return self._sampler.keep(flat, choice).values.view(choice.kept, *product.rows.shape[1:])

    def _add(self, totals: dict[int, _Total], kept: KeptProduct, after: Tensor | None) -> _Total:
        rows = self._row_sums(kept, after).to(self._device, non_blocking=True)
        k, n = kept.choice.kept, kept.choice.total
        covariances = rows.new_zeros(len(SUMS), len(SUMS))
        if k < n:
            away = rows - rows.mean(dim=0)
            covariances = away.t() @ away * (n * n / k * (1.0 - k / n) / (k - 1))
        unchanged = torch.zeros((), dtype=torch.bool, device=self._device)
        total = _Total(kept.product.fan_in, rows.sum(dim=0) * (n / k), covariances, unchanged, sampled=k < n)
        if kept.view.parameter in totals:
            totals[kept.view.parameter] += total
        else:
            totals[kept.view.parameter] = total
        return totals[kept.view.parameter]

    def _row_sums(self, kept: KeptProduct, after: Tensor | None) -> Tensor:
        """Returns what each row adds to `SUMS`, float64 (k, len(SUMS))."""
        product, parameter = kept.product, self._parameters[kept.view.parameter].detach()
        w = wide(kept.view.of(self._before[kept.view.parameter]), product.kind)
        update = wide(kept.view.of(parameter), product.kind) - w
        squares = [torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in (w, update)]
        found = []
        size = max(w[..., 0].numel(), kept.rows[0].numel(), w.shape[0])
        step = max(AT_ONCE // size, 1)
        for first in range(0, kept.choice.kept, step):
            x = wide(kept.rows[first : first + step], product.kind)
            input_sq = product.squares(x)
            output, new = product.apply(w, x), product.apply(update, x)
            columns = {
                "output": _dot(output, output),
                "weight_bound": squares[0] * input_sq,
                "update": _dot(new, new),
                "update_bound": squares[1] * input_sq,
            }
            if after is not None:
                moved = wide(after[first : first + step], product.kind)
                own, inherited = product.apply(update, moved), product.apply(w, moved - x)
                columns["own"], columns["inherited"] = _dot(own, own), _dot(inherited, inherited)
                columns["own_dot_inherited"] = _dot(own, inherited)
                columns["input_update"] = product.squares(moved - x)
                columns["input_noise"] = kept.noise * input_sq
            zeros = torch.zeros_like(input_sq)
            found.append(torch.stack([columns.get(name, zeros) for name in SUMS], dim=1))
        return torch.cat(found)


def _repeated(calls: Sequence[KeptProduct]) -> int:
    return sum(kept.repeated for kept in calls)


def wide(x: Tensor, kind: str) -> Tensor:
    """Returns a tensor in float32, or in float64 where products in float32 would be rounded more coarsely."""
    coarse = product_coarseness(kind, x.device.type) > SINGLE
    return x.to(torch.float64 if coarse or x.dtype is torch.float64 else torch.float32)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns the dot products of rows, in float64: squares of small updates are too small for float32."""
    return (a.double() * b.double()).flatten(1).sum(dim=1)
