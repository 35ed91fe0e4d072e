"""Rows of a record against the numbers by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.hand import LayerNumbers
from tests.fuzz.recipe import Recipe
from tests.fuzz.runs import STEPS, Outcome, run
from tests.fuzz.world import differences

__all__ = ["Verdict", "judge"]

NORM = 0.02  # the monitor's own claim
SAME = 1e-3  # of two replays of the same forward: only sums differ
SUMS = 1e-3  # over parameters, whose rounding comes on top


@dataclass
class Verdict:
    """What is wrong with the record of a loop, and what was in it."""

    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def fault(self, kind: str, where: str, what: str) -> None:
        self.counts[f"fault: {kind}"] += 1
        self.faults.append(f"{kind}: {where}: {what}")


def judge(recipe: Recipe) -> Verdict:
    """Train with and without a monitor, and compare training and record."""
    verdict = Verdict()
    off = run(recipe, monitored=False, hand=True)
    try:
        on = run(recipe, monitored=True)
    except Exception as error:
        verdict.fault("training ended", "by the monitor", f"{type(error).__name__}: {error}"[:300])
        return verdict
    for number, (a, b) in enumerate(zip(off.pictures, on.pictures, strict=True)):
        if found := differences(a, b, 1):
            verdict.fault("training altered", f"after step {number}", found[0])
            return verdict
    for which, rows in enumerate(on.rows):
        _record(verdict, recipe, off, on, which, rows)
    verdict.counts["refused"] += any("refused" in text for text in on.said)
    return verdict


def _record(
    verdict: Verdict, recipe: Recipe, off: Outcome, on: Outcome, which: int, rows: list[dict[str, Any]]
) -> None:
    marks = on.marks[which]
    seen: set[int] = set()
    cosines: dict[str, list[float]] = {}  # of valid rows so far
    second = recipe.monitor in ("aligned", "every second") or which == 1
    for row in rows:
        name = str(row.get("name", "")).removeprefix("_orig_mod.").removeprefix("module.")
        if row["kind"] not in ("measured", "predicted") or row.get("group"):
            continue
        step = marks.get(row["step"])
        numbers = None if step is None else off.numbers[step]
        where = f"monitor {which}, step {row['step']}, {row['kind']} {name}"
        if row["kind"] == "measured":
            seen.add(row["step"])
        if numbers is not None and name not in numbers:
            continue  # a group
        layer = LayerNumbers() if numbers is None else numbers[name]
        _row(verdict, recipe, row, layer, where, bool(on.said))
        if row["kind"] == "predicted":
            _predicted(verdict, row, layer, where, cosines.get(name, []))
        elif row["valid"]:
            cosines.setdefault(name, []).append(row["cos_angle"])
    due = [number for number, step in marks.items() if not (second and number % 2) and off.numbers[step] is not None]
    skipped = {row["step"] for row in rows if row["kind"] == "skipped"}
    for number in due:
        if number not in seen and number not in skipped and not on.said:
            verdict.fault("no reason", f"monitor {which}, step {number}", "not measured, and nothing said")
    if len(marks) < STEPS - (recipe.scaler == "overflow") and not on.said:
        verdict.fault("step lost", f"monitor {which}", f"{len(marks)} of {STEPS} steps have a number of their own")


def _row(verdict: Verdict, recipe: Recipe, row: dict[str, Any], layer: LayerNumbers, where: str, said: bool) -> None:
    counts = verdict.counts
    counts[f"{row['kind']} rows"] += 1
    if row["kind"] == "measured":
        if row["valid"]:
            counts["valid"] += 1
            _features(verdict, recipe, row, layer, where)
        else:
            counts[f"not valid: {row['why']}"] += 1
            if not row["why"]:
                verdict.fault("no reason", where, "neither valid nor a reason")
        _consistent(verdict, row, where)
    if row["aligned_decrease"] is None:
        why = row.get("decrease_why")
        counts[f"no decrease: {why}"] += 1
        # It did not run, or nothing upstream of it is trained.
        absent = layer.same is None and (row["kind"] == "predicted" or row["why"])
        if not why and not said and not absent:
            verdict.fault("no reason", where, "no aligned_decrease and no reason")
    elif layer.exact is None and layer.decreases:  # it did not run: what is upstream of it was seen in another step
        counts["decreases of layers that did not run"] += 1
    else:
        counts["decreases"] += 1
        _decrease(verdict, row, layer, where)


def _features(verdict: Verdict, recipe: Recipe, row: dict[str, Any], layer: LayerNumbers, where: str) -> None:
    if layer.same is None or layer.exact is None:
        verdict.fault("valid and wrong", where, "nothing to measure by hand")
        return
    # Dropout of a transformer's attention draws other masks in float64, and 16 bits choose other experts and codes.
    low = recipe.precision in ("bfloat16", "autocast", "autocast inside") or recipe.body == "own casts"
    other = recipe.body == "transformer" and recipe.drop == "global"
    other |= low and recipe.body in ("experts", "codes")
    truths: list[tuple[str, tuple[Tensor, Tensor, Tensor], float]] = []
    # A forward on a few samples rounds in other ways than one on the batch.
    whole = recipe.monitor != "probe" and not recipe.monitor.startswith("samples")
    if row["method"] == "plain" and whole and recipe.compiled == "none":
        truths.append(("the same precision", layer.same, SAME))
    if not other:
        f, b, after = layer.exact
        if row["method"] == "jvp" and layer.linear is not None:
            after = f + layer.linear
        truths.append(("float64", (f, b, after), NORM))
    for what, (f, b, after), tolerance in truths:
        df = after - f
        root = math.sqrt(layer.entries)
        cosine = -torch.dot(df, b) / (df.norm() * b.norm())
        want = {
            "angle": float(cosine.clamp(-1, 1).arccos()),
            "update_rms": float(df.norm()) / root,
            "feature_rms": float(f.norm()) / root,
            "backward_rms": float(b.norm()) / root,
        }
        for key, value in want.items():
            got = row[key]
            if got is None or not abs(got - value) <= tolerance * abs(value):
                verdict.fault("valid and wrong", where, f"{key} {got}, by hand in {what} {value:.7g}")
                return
        if row["count"] != layer.entries:
            verdict.fault("valid and wrong", where, f"count {row['count']}, by hand {layer.entries}")


def _decrease(verdict: Verdict, row: dict[str, Any], layer: LayerNumbers, where: str) -> None:
    if not layer.decreases:
        verdict.fault("decrease wrong", where, f"{row['aligned_decrease']}, nothing to measure by hand")
        return
    checks = {"aligned_decrease": (layer.decreases, layer.rounding)}
    if layer.owned:
        checks["parameter_update_norm"] = ([layer.update_norm], layer.update_rounding)
        checks["gradient_norm"] = (layer.gradient_norms, layer.gradient_rounding)
    for key, (wanted, rounding) in checks.items():
        got = row[key]
        if got is None and key != "aligned_decrease":
            continue
        if not any(abs(got - want) <= SUMS * abs(want) + rounding + 1e-12 for want in wanted):
            hand = " or ".join(f"{want:.7g}" for want in dict.fromkeys(wanted))
            verdict.fault("decrease wrong", where, f"{key} {got}, by hand {hand}")
            return


def _predicted(verdict: Verdict, row: dict[str, Any], layer: LayerNumbers, where: str, cosines: list[float]) -> None:
    """The backward vector is the step's, and the speed is what the formula makes of it with an angle that was valid."""
    if row["backward_rms"] is not None and layer.same is not None:
        b = layer.same[1]
        want = float(b.norm()) / math.sqrt(b.numel())
        if not abs(row["backward_rms"] - want) <= NORM * want:
            verdict.fault("prediction wrong", where, f"backward_rms {row['backward_rms']}, by hand {want:.7g}")
            return
        if row["update_rms"] is not None and row["aligned_decrease"] is not None:
            verdict.counts["predicted speeds"] += 1
            sizes = [row["aligned_decrease"] / (cosine * want * b.numel()) for cosine in cosines if cosine]
            if not any(abs(row["update_rms"] - size) <= NORM * abs(size) for size in sizes):
                verdict.fault(
                    "prediction wrong", where, f"update_rms {row['update_rms']}, by the formula one of {sizes}"
                )


def _consistent(verdict: Verdict, row: dict[str, Any], where: str) -> None:
    """The residual is that of the row's own numbers."""
    keys = ("residual", "aligned_decrease", "cos_angle", "update_rms", "backward_rms", "count")
    if any(row[key] is None for key in keys) or row.get("method") == "amplified":
        return
    dot = row["cos_angle"] * row["update_rms"] * row["backward_rms"] * row["count"]
    if dot and row["valid"]:
        want = 1 - row["aligned_decrease"] / dot
        if not abs(row["residual"] - want) <= SUMS * (1 + abs(want)):
            verdict.fault("residual wrong", where, f"{row['residual']}, of its own row {want:.7g}")
