"""What an alert about the scale of gradients says: what was declared and found, and what explains the ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastfs._record.record import Record

__all__ = ["explanation", "likely_causes"]

_NEAR = 0.03  # relative distance of a ratio from what explains it
_CLOSE = 1e-4  # ... of a factor that is known precisely
_LARGE = 64.0  # powers of two from here on are likely loss scales


def explanation(
    ratio: float,
    factor: float,
    record: Record,
    header: Mapping[str, Any],
    window: int,
    *,
    least: bool = False,
    where: str = "",
) -> str:
    """Returns the message of an alert.

    Args:
        ratio: Scale of the gradients relative to what is declared.
        factor: The part of it that was applied after the backward.
        record: The last measured step.
        header: Of the run.
        window: Number of steps in which the scale was constant.
        least: Whether gradients are at least so large, since they were clipped.
        where: Layers whose parameters are affected; empty for all.
    """
    size = f"{'at least ' * least}{ratio:.4g} times as large as declared"
    said = [f"gradients{f' of the parameters {where}' if where else ''} are {size} over {window} measured steps"]
    declared, ranks = header.get("loss_weight"), header.get("ranks") or 1
    if isinstance(declared, (int, float)) and not where:
        said.append(f"w is declared as {declared:.4g} and found to be {declared * ratio:.4g}")
    elif ranks > 1 and not where:
        said.append("assumed is an average over the batches of the ranks")
    if not where and not least:
        inside, after = abs(ratio / factor - 1.0) > _NEAR, abs(factor - 1.0) > _NEAR
        places = ["in the loss or the backward"] * inside + ["between the backward and the step"] * after
        said.append(f"applied {' and '.join(places)}")
    causes = list(dict.fromkeys(likely_causes(ratio, factor, record, header, parts=bool(where))))
    other = "a hook or other code that scales gradients"
    said.append(f"likely: {', or '.join(causes[:3]) or other}")
    return "; ".join(said) + ". If it is meant, declare it with Monitor(loss_weight=)"


def likely_causes(
    ratio: float, factor: float, record: Record, header: Mapping[str, Any], *, parts: bool = False
) -> Iterator[str]:
    """Yields what may explain a ratio, the likeliest first.

    Args:
        ratio: See :func:`explanation`.
        factor: See :func:`explanation`.
        record: See :func:`explanation`.
        header: See :func:`explanation`.
        parts: Whether a part of the parameters is affected.
    """
    ranks = header.get("ranks") or 1
    scale = record.scalars.get("loss_scale")
    if isinstance(scale, (int, float)) and scale != 1:
        if _near(ratio, 1.0 / scale):
            yield "unscaled twice (GradScaler.unscale_ and once more by hand)"
        if _near(ratio, scale):
            yield "not unscaled"
    elif _near(abs(math.log2(ratio)), round(abs(math.log2(ratio))), 1e-4) and max(ratio, 1 / ratio) >= _LARGE:
        yield "a gradient scaler that the monitor was not given (Monitor(scaler=))"
    if ranks > 1 and parts:
        times = round(max(ratio, 1.0 / ratio))
        if ratio > 1:
            yield f"replicas on {times} ranks are counted {times} times (summed instead of averaged)"
        else:
            yield f"the gradients of {times} ranks are averaged where they have to be summed"
        return
    total = int(record.scalars.get("micro_batches") or 1)
    each = max(1, total // ranks)
    if ranks > 1 and _near(ratio, ranks):
        yield f"summed over the {ranks} ranks instead of averaged"
    if ranks > 1 and _near(ratio, 1.0 / ranks):
        yield f"averaged over the {ranks} ranks twice, or averaged where the sum is declared"
    if each > 1 and _near(ratio, 1.0 / each):
        yield f"{each} accumulated micro-batches divided twice, in the loss and in the gradients"
    if each > 1 and _near(ratio, each):
        yield f"{each} accumulated micro-batches not divided"
    if ranks > 1:
        if _near(ratio, ranks * each) and each > 1:
            yield f"neither averaged over {ranks} ranks nor over {each} micro-batches"
        if _near(ratio, 1.0 / ranks**2):
            yield f"averaged over the {ranks} ranks three times"
        times = round(max(ratio, 1.0 / ratio))
        if 1 < times < ranks and ranks % times == 0 and _near(max(ratio, 1.0 / ratio), times):
            word = "summed over" if ratio > 1 else "averaged once too often over"
            yield f"{word} {times} of the {ranks} ranks (replicas, or parts of a sequence)"
    if factor < 0.75 and _near(1.0 / factor, round(1.0 / factor), _CLOSE):
        yield f"divided by {round(1.0 / factor)} after the backward, by a number of micro-batches, samples or tokens"


def _near(value: float, expected: float, within: float = _NEAR) -> bool:
    return abs(value - expected) <= within * abs(expected)
