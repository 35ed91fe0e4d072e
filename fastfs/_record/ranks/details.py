"""What ``Monitor(details=True)`` records of the inside of layers, from what the ranks have sent of one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastfs._record import row_reasons
from fastfs._record.detail_columns import DETAIL_COLUMNS, DETAIL_FIELDS
from fastfs._record.ranks.part import Array, RankPart
from fastfs._record.ranks.weight_sums import MOTIONS, QUANTITIES_OF_WEIGHTS, SUMS, is_noise, weight_quantities

__all__ = ["details_of"]

_FIELDS = tuple(one.name for one in DETAIL_FIELDS)
_SHARDED = "the ranks hold parts of one model, of which single matrices and layers are not put together"
_UNUSED = "no product with it was seen in the forward"
_CHANGED = "the step has changed which rows the matrix is applied to"
_ROUNDED = "the change of its input is below five times what rounding may produce"
_UNDEFINED = "it is 0 / 0, or there are numbers that are not finite"
_LOGITS = "the largest logit of every query is 0, as after its subtraction, or there are NaN"
_RANKS = "not known of the batches of several ranks together"
_UNUSABLE = (*row_reasons.OTHER_FORWARDS, row_reasons.MISSING_RANKS)

Why = Callable[[int | None], str | None]
Layers = dict[str, list[float]]


class _Entries:
    """Entries of a record: one value of one quantity, for a parameter, a layer, or one of its heads or experts."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in _FIELDS}

    def add(
        self,
        name: str,
        quantity: str,
        index: int | None,
        value: float | None,
        error: float | None = None,
        why: str | None = None,
    ) -> None:
        if why is None and (value is None or not math.isfinite(value)):
            why = _UNDEFINED
        if why is not None:
            value = error = None
        for each, given in zip(_FIELDS, (name, quantity, index, value, error, why), strict=True):
            self.columns[each].append(given)


def details_of(parts: Sequence[RankPart], reasons: Sequence[int]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Returns columns per layer and the columns of a record of details.

    Args:
        parts: Of one measured step, all with details.
        reasons: Codes of ``row_reasons`` of all layers.

    Returns:
        Values per layer by column, and lists of equal lengths by the fields of an entry. If nothing is known, there is
        one entry without a name, which says why.
    """
    entries = _Entries()
    layers = {one.name: [math.nan] * len(reasons) for one in DETAIL_COLUMNS}
    unusable = [row_reasons.REASONS[code] if code in _UNUSABLE else None for code in reasons]
    refused: str | None = next((each.facts["details"]["why"] for each in parts if "why" in each.facts["details"]), None)
    if any(len(part.place.peers) > 1 or part.place.stages > 1 for part in parts):
        refused = _SHARDED

    def why(layer: int | None) -> str | None:
        if refused is not None:
            return refused
        codes = unusable if layer is None else unusable[layer : layer + 1]
        return next((text for text in codes if text is not None), None)

    for add in (_add_weights, _add_heads, _add_activations, _add_experts):
        add(parts, why, entries, layers)
    if refused is not None and not entries.columns["name"]:
        entries.add("", "", None, None, why=refused)
    return layers, entries.columns


def _merged(
    parts: Sequence[RankPart], kind: str, arrays: Sequence[str]
) -> dict[str, list[tuple[list[Any], list[Any]]]]:
    """Returns what each rank says of an entry of the facts, and its slices of the arrays, by the name of the entry."""
    found: dict[str, list[tuple[list[Any], list[Any]]]] = {}
    for part in parts:
        start = 0
        for name, count, *facts in part.facts["details"].get(kind, ()):
            own = [part.arrays[each][start : start + count] for each in arrays] if count else []
            start += count
            found.setdefault(name, []).append((facts, own))
    return found


def _one_layer(every: Sequence[tuple[list[Any], list[Any]]]) -> int | None:
    """Returns the layer of an entry, None if ranks that have something to say name several or none."""
    layers = {facts[0] for facts, own in every if own}
    return layers.pop() if len(layers) == 1 else None


def _add_weights(parts: Sequence[RankPart], why: Why, entries: _Entries, layers: Layers) -> None:
    by_layer: dict[int, list[tuple[Array, bool]]] = {}
    arrays = ("weight_sums", "weight_covariances", "weight_changed")
    for name, every in _merged(parts, "weights", arrays).items():
        layer = _one_layer(every)
        missing = why(layer) or next((facts[3] for facts, _ in every if facts[3] is not None), None)
        every = [each for each in every if each[1]]  # a rank may not use an expert
        missing = missing or (None if every else _UNUSED)
        sums = sum((own[0][0] for _, own in every), start=np.zeros(len(SUMS)))
        covariances = sum((own[1][0] for _, own in every), start=np.zeros((len(SUMS), len(SUMS))))
        changed = _CHANGED if any(own[2][0] for _, own in every) else None
        motions = next((facts[4] for facts, _ in every if facts[4] is not None), changed)
        sampled = any(facts[2] for facts, _ in every)
        fans = {facts[1] for facts, _ in every}
        found = weight_quantities(sums, covariances if sampled else None, fans.pop() if len(fans) == 1 else 0)
        if layer is not None and missing is None:
            by_layer.setdefault(layer, []).append((sums, motions is None))
        noisy = is_noise(sums)
        for quantity, (value, error) in found.items():
            reason = missing or (motions if quantity in MOTIONS else None)
            if reason is None and noisy and quantity in MOTIONS[1:]:
                reason = _ROUNDED
            entries.add(name, quantity, None, value, error if sampled else None, reason)
    for layer, own in by_layer.items():
        total = weight_quantities(np.sum([sums for sums, _ in own], axis=0), None, 0)
        for quantity in QUANTITIES_OF_WEIGHTS:
            if quantity in layers and (quantity not in MOTIONS or all(known for _, known in own)):
                layers[quantity][layer] = total[quantity][0]


def _add_heads(parts: Sequence[RankPart], why: Why, entries: _Entries, layers: Layers) -> None:
    by_layer: dict[int, list[float]] = {}
    for name, every in _merged(parts, "heads", ("head_logits",)).items():
        layer = _one_layer(every)
        missing = why(layer) or next((facts[1] for facts, _ in every if facts[1] is not None), None)
        if missing is not None or len({len(own[0]) for _, own in every}) > 1:
            entries.add(name, "attention_logit_max", None, None, why=missing or _RANKS)
            continue
        values = np.max([own[0] for _, own in every], axis=0)
        for head, value in enumerate(values.tolist()):
            entries.add(name, "attention_logit_max", head, value, why=_LOGITS if math.isnan(value) else None)
        if layer is not None:
            by_layer.setdefault(layer, []).extend(values.tolist())
    for layer, found in by_layer.items():
        layers["attention_logit_max"][layer] = float(np.max(found))  # NaN if one is


def _add_activations(parts: Sequence[RankPart], why: Why, entries: _Entries, layers: Layers) -> None:
    by_layer: dict[int, list[tuple[Array, int]]] = {}
    for name, every in _merged(parts, "activations", ("activation_sums",)).items():
        layer = _one_layer(every)
        missing = why(layer) or next((facts[2] for facts, _ in every if facts[2] is not None), None)
        units, dead, count, saturated, variance = sum((own[0][0] for _, own in every if own), start=np.zeros(5))
        error = math.sqrt(variance) / count if any(facts[1] for facts, _ in every) else None
        ranks = _RANKS if len(every) > 1 else None  # a unit is dead if it is on all of them
        entries.add(name, "dead_share", None, dead / units, why=missing or ranks)
        entries.add(name, "saturated_share", None, saturated / count, error, missing)
        if layer is not None and missing is None:
            by_layer.setdefault(layer, []).append((np.array([units, dead, count, saturated]), len(every)))
    for layer, own in by_layer.items():
        units, dead, count, saturated = np.sum([sums for sums, _ in own], axis=0)
        layers["saturated_share"][layer] = saturated / count
        if all(ranks == 1 for _, ranks in own):
            layers["dead_share"][layer] = dead / units


def _add_experts(parts: Sequence[RankPart], why: Why, entries: _Entries, layers: Layers) -> None:
    by_layer: dict[int, list[float]] = {}
    for name, every in _merged(parts, "experts", ("expert_tokens",)).items():
        layer = _one_layer(every)
        missing = why(layer)
        if missing is not None or len({len(own[0]) for _, own in every}) > 1:
            entries.add(name, "expert_tokens", None, None, why=missing or _RANKS)
            continue
        tokens = np.sum([own[0] for _, own in every], axis=0)
        for expert, value in enumerate(tokens.tolist()):
            entries.add(name, "expert_tokens", expert, value)
        load = float(tokens.max() / tokens.mean())
        entries.add(name, "expert_load_max", None, load)
        if layer is not None:
            by_layer.setdefault(layer, []).append(load)
    for layer, loads in by_layer.items():
        layers["expert_load_max"][layer] = max(loads)
