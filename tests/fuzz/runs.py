"""Runs of generated training loops, with monitors and without."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

import fastfs
from tests.fuzz.bodies import LAYERS
from tests.fuzz.hand import SAMPLES, Hand, Numbers
from tests.fuzz.loop import Loop
from tests.fuzz.recipe import Recipe
from tests.fuzz.trial import Trial
from tests.fuzz.world import Picture, global_state, picture

__all__ = ["STEPS", "Outcome", "run"]

STEPS = 4


@dataclass
class Outcome:
    """What a run was, and what a monitor said of it.

    Attributes:
        pictures: of everything that training owns, after every step and at the end.
        numbers: by hand, per iteration; None where there was no step.
        rows: per monitor.
        marks: per monitor, number of the step in the record -> iteration.
        said: warnings of the monitor's, and why it was not attached.
    """

    pictures: list[Picture] = field(default_factory=list)
    numbers: list[Numbers | None] = field(default_factory=list)
    rows: list[list[dict[str, Any]]] = field(default_factory=list)
    marks: list[dict[int, int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def run(recipe: Recipe, *, monitored: bool, hand: bool = False) -> Outcome:
    """Train, with monitors or without; without, take the numbers by hand.

    Neither the one nor the other may change what is trained.
    """
    if recipe.compiled != "none":
        torch._dynamo.reset()
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as said, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        trial = Trial(recipe)
        loop = Loop(trial, Hand(trial) if hand else None, stack)
        monitors = _attach(loop, outcome, stack) if monitored else []
        loop.late(monitors)
        for step in range(STEPS):
            outcome.numbers.append(loop.step(step))
            outcome.pictures.append(_picture(loop))
        for monitor in monitors:
            monitor.close()
        outcome.marks = loop.marks
        outcome.pictures.append(_picture(loop))
    outcome.said += [str(w.message) for w in said if "fastfs" in str(w.message)]
    return outcome


def _picture(loop: Loop) -> Picture:
    trial = loop.trial
    roots = {
        "model": trial.inner,
        "outer": trial.outer,
        "optimizers": trial.optimizers,
        "losses": trial.losses,
        "scaler": None if loop.scaler is None else [loop.scaler.get_scale(), loop.scaler.state_dict()],
    }
    return picture(roots) | global_state()


def _attach(loop: Loop, outcome: Outcome, stack: contextlib.ExitStack) -> list[fastfs.Monitor]:
    trial, recipe = loop.trial, loop.trial.recipe
    modes: dict[str, list[dict[str, Any]]] = {
        "aligned": [{"every": 2, "aligned_every": 1}],
        "amplify": [{"amplify": True}],
        "jvp": [{"mode": "jvp"}],
        "probe": [{"mode": "probe", "probe": Hand.probe(trial)}],
        "two monitors": [{}, {"every": 2, "aligned_every": 1}],
        "every second": [{"every": 2}],
        "samples": [{"samples": SAMPLES}],
        "samples amplify": [{"samples": SAMPLES, "amplify": True}],
        "samples jvp": [{"samples": SAMPLES, "mode": "jvp"}],
        "few rows": [{"rows": 1024, "quantiles": (0.5,), "groups": {"all": r".*"}}],
    }
    attached = []
    for options in modes.get(recipe.monitor, [{}]):
        rows: list[dict[str, Any]] = []
        sink = functools.partial(_keep, rows)
        keywords: dict[str, Any] = {
            "layers": LAYERS.get(recipe.body, r"blocks\.\d+$"),
            "every": 1,
            "rows": None,
        } | options
        optimizer = loop.sam or (trial.optimizers[0] if len(trial.optimizers) == 1 else trial.optimizers)
        try:
            monitor = fastfs.Monitor(
                loop.model, optimizer, scaler=loop.scaler, sinks=[sink], alerts=(), verbose=False, **keywords
            )
        except (TypeError, ValueError) as error:  # refused: said clearly
            outcome.said.append(f"fastfs.Monitor refused: {error}")
            continue
        stack.callback(monitor.close)
        attached.append(monitor)
        outcome.rows.append(rows)
    return attached


def _keep(seen: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """With None for what is not finite, as in the file."""
    for row in rows:
        seen.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
