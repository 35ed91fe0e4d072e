"""What one rank contributes to the record of a step: sums that add, and facts that are known on the host."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["KINDS", "SPREAD", "Array", "Place", "RankPart", "Share"]

Array = npt.NDArray[np.float64]

KINDS = ("measured", "predicted", "skipped")

SPREAD = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
"""Pairs of <b, df>, |df|^2 and |b|^2 (0, 1, 2), in the order in which their covariances are stored."""


class Share(NamedTuple):
    """Parameters that are spread over the ranks in the same way, and the part of them that a rank holds.

    Attributes:
        key: Names and sizes of the mesh axes over which they are sharded; equal on all ranks.
        shards: Number of different shards.
        shard: Which one this rank holds.
        summands: Number of ranks among which the gradients of a shard are sums; each of them counts as a shard.
    """

    key: str
    shards: int
    shard: int
    summands: int = 1


@dataclass(frozen=True)
class Place:
    """Where a rank stands among the ranks of the run.

    Attributes:
        rank: Its number.
        ranks: Numbers of all ranks.
        peers: Ranks that hold parts of the same copy of the model, this one included.
        weight: w in "gradient used = w times the sum over ranks of their gradients"; None for 1 / number of batches.
        shares: The kinds of parameters, in the order of the sums over parameters.
        stage: Number of its pipeline stage, and ...
        stages: ... how many there are.
        layers: Numbers of its layers among those of the record; None for all, in this order.
    """

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    peers: tuple[int, ...] = (0,)
    weight: float | None = None
    shares: tuple[Share, ...] = (Share("", 1, 0),)
    stage: int = 0
    stages: int = 1
    layers: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Place:
        """Restores what ``asdict`` has made, perhaps through JSON."""
        return cls(
            values["rank"],
            tuple(range(ranks) if isinstance(ranks := values["ranks"], int) else ranks),
            tuple(values["peers"]),
            values["weight"],
            tuple(Share(*each) for each in values["shares"]),
            values["stage"],
            values["stages"],
            None if values["layers"] is None else tuple(values["layers"]),
        )


@dataclass
class RankPart:
    """What one rank contributes to the record of a step.

    Attributes:
        kind: ``measured``, ``predicted`` or ``skipped``.
        step: Number of the optimizer step.
        time: Seconds since 1970.
        place: Where the rank stands.
        scalars: Values per step, for the record.
        facts: What the host knows besides; values that JSON can represent. ``touched``: per parameter whether it has
            received a gradient (0 or 1); ``ran`` and ``cut``: per layer, ``cut`` is None if it is unknown. Measured:
            ``rows``: kept and all rows of each layer; ``margin``: how many standard errors <b, df> may be off, per
            layer; ``method``; ``structure``, if it differs from the last one; ``placed``, see
            ``placements.placed``, by the number of a layer. Predicted: ``counts``: elements of the backward vectors.
            Skipped: ``before``: whether the step itself is still to come. Measured with details, ``details``:
            ``weights``, ``heads``, ``activations`` and ``experts``, lists of entries [name, number of slices of the
            arrays, layer, ...], or ``why`` there are none.
        arrays: Float64 arrays by name, of L layers, C kinds of parameters, Q quantiles. Measured: ``sums`` (L, 9) as in
            ``FeatureStats.names``, ``spread`` (L, 6) covariances of <b, df>, |df|^2, |b|^2 relative to these,
            ``reason`` (L,), ``amplified`` (L,), ``quantiles`` (L, 2, Q), perhaps ``curvature`` (L,),
            ``nonlinear`` (L, 6), see ``nonlinear_columns``, ``loss_change`` (2,), how the loss changed and the rounding
            error of that; from ranks with peers ``inputs``, numbers that follow from the inputs. Predicted:
            ``backward_norm`` (L,), perhaps
            ``accumulated`` (), 0 if gradients were written to between micro-batches. Both: ``aligned`` (C, L, 4) with
            decrease, |w|^2, |dw|^2, |g|^2, and ``dots`` (C, L, 2) with <g, dw>, <w, dw>, which older files lack, see
            ``Aligned``; ``casts`` (C, L, 9 for each of ``facts["casts"]``), see ``CastSamples``; ``variance`` (C, L) of
            the decrease by sampling; ``decrease_reason`` (L,); in a pipeline, and with ``loss_change``, ``total`` (C,),
            the decrease over all parameters of the stage. From several ranks of a mode with a residual ``odd`` (3, L),
            see ``update_estimates.odd_part``, and ``eps`` (L,), the spacing at 1 of the coarsest numbers. With details
            ``weight_sums`` (W, 9), see ``weight_sums.SUMS``, ``weight_covariances`` (W, 9, 9), ``weight_changed`` (W,),
            ``head_logits`` (H,), ``expert_tokens`` (E,) and ``activation_sums`` (A, 5): units, dead ones, entries,
            saturated ones, and the variance of these.
    """

    kind: str
    step: int
    time: float
    place: Place = field(default_factory=Place)
    scalars: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, bool]:
        """The step, and whether it is the step itself or gradients that were thrown away before it: the order."""
        return self.step, not self.facts.get("before", False)

    @property
    def size(self) -> int:
        """Approximate number of values, for memory bounds."""
        return 16 + len(self.scalars) + sum(array.size for array in self.arrays.values())

    def to_bytes(self) -> bytes:
        """Encodes the part: a line of JSON, and then the arrays as they are in memory."""
        place = asdict(self.place)
        if self.place.ranks == tuple(range(count := len(self.place.ranks))):  # thousands of numbers otherwise
            place["ranks"] = count
        head = {
            "kind": self.kind,
            "step": self.step,
            "time": self.time,
            "place": place,
            "scalars": self.scalars,
            "facts": self.facts,
            "arrays": {name: list(array.shape) for name, array in self.arrays.items()},
        }
        flat = [np.ascontiguousarray(array, dtype="<f8").tobytes() for array in self.arrays.values()]
        return json.dumps(head, separators=(",", ":")).encode() + b"\n" + b"".join(flat)

    @classmethod
    def from_bytes(cls, data: bytes) -> RankPart:
        """Decodes what :meth:`to_bytes` has made.

        Returns:
            The part.

        Raises:
            ValueError: It is something else, or was cut off.
        """
        head, found, rest = data.partition(b"\n")
        try:
            values = json.loads(head)
            arrays, start = {}, 0
            for name, shape in values["arrays"].items():
                if not all(type(size) is int and size >= 0 for size in shape):
                    raise ValueError(f"an array has the shape {shape}")
                count = math.prod(shape)
                if len(rest) < start + 8 * count:
                    raise ValueError("the arrays are cut off")
                arrays[name] = np.frombuffer(rest, dtype="<f8", count=count, offset=start).reshape(shape).copy()
                start += 8 * count
            if not found or start != len(rest):
                raise ValueError("its length is not that of its arrays")
            part = cls(**{**values, "place": Place.from_dict(values["place"]), "arrays": arrays})
            _check(part)
            return part
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"expected the part of a rank, got {len(data)} bytes that are none: {error}") from None


def _check(part: RankPart) -> None:
    """Raises ValueError if the values by which parts are sorted have other types than they should."""
    place = part.place
    numbers = (part.step, place.rank, *place.ranks, *place.peers)
    if part.kind not in KINDS or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("kind, step or ranks are none")
    if place.rank not in place.ranks or place.rank not in place.peers or not place.shares:
        raise ValueError("the rank has no place")
    if type(part.time) is not float or not math.isfinite(part.time):
        raise ValueError("its time is none")
    if not isinstance(part.scalars, dict) or not isinstance(part.facts, dict):
        raise ValueError("scalars and facts are not given by name")
