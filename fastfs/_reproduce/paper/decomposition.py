"""The components of a feature update, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas

from fastfs._reproduce.paper.angles import LAW_NAMES, run_layer
from fastfs._reproduce.paper.study import Advance, Outcome, StudySettings, over_seeds

__all__ = ["decompose"]

_STEP = 1e-3


def decompose(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute (d): df_l split in two ways, as root mean squares over seeds, in units of the rms of f_0.

    By origin: ``own`` is due to the update of V_l and exactly along -b_l; ``carried`` is the effect of df_{l-1} through
    the layer. By direction: ``aligned`` is the component along -b_l, ``orthogonal`` the rest, which does not change the
    loss to first order. ``carried_aligned`` is the aligned part of ``carried``; the orthogonal part is all carried.

    Args:
        settings: sizes and seeds.
        advance: progress callback.

    Returns:
        The table and its headline values.
    """
    seeds = settings.seed_list(5, 3)
    depth, width = settings.pick(200, 100), 200
    steps = run_layer(seeds, depth=depth, width=width, advance=lambda n: advance(n / len(seeds)))
    root = np.sqrt(width)
    cosine = steps.cos_angle[:, :, 1:]
    total, own = steps.update_rms[:, :, 1:], steps.own_norm[:, :, 1:] / root
    aligned, orthogonal = total * cosine, total * np.sqrt(np.maximum(1 - cosine**2, 0.0))
    carried_aligned = aligned - own
    carried = np.hypot(carried_aligned, orthogonal)
    # Rates are automatic, so every matrix contributes step/L to the decrease: D_l = step l/L (section 2).
    decrease = aligned * root * steps.backward_norm[:, :, 1:] / (_STEP * np.arange(1, depth + 1) / depth)
    parts = {
        "total": total,
        "own": own,
        "carried": carried,
        "aligned": aligned,
        "carried_aligned": carried_aligned,
        "orthogonal": orthogonal,
    }

    def rms(values: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.sqrt(np.mean(values**2, axis=0))
        return result

    rows = [
        pandas.DataFrame(
            {
                "branch_scale": name,
                "depth": depth,
                "width": width,
                "layer": np.arange(1, depth + 1),
                **{part: rms(values[:, n]) for part, values in parts.items()},
                "decrease_over_formula": decrease[:, n].mean(axis=0),
                "seeds": len(seeds),
            }
        )
        for n, name in enumerate(LAW_NAMES)
    ]
    values = {}
    for n, name in enumerate(LAW_NAMES):
        values[f"formula,beta={name}"] = over_seeds(decrease[:, n, -1])
        values[f"orthogonal,beta={name}"] = over_seeds((orthogonal / total)[:, n, -1])
    return Outcome(pandas.concat(rows, ignore_index=True), values)
