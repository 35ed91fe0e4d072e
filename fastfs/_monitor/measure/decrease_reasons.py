"""Why the update of a parameter, or its decrease of the loss, is not known: codes on the device, and sentences."""

from __future__ import annotations

__all__ = [
    "CHANGED",
    "EMPTY",
    "FINE",
    "MOVED",
    "NOTHING",
    "NOT_THE_UPDATE",
    "REASONS",
    "REWRITTEN",
    "SETTINGS",
    "STRUCTURE",
    "UNSEEN",
]

FINE, NOT_THE_UPDATE, SETTINGS, REWRITTEN, CHANGED, EMPTY, UNSEEN, MOVED, STRUCTURE, NOTHING = range(10)

REASONS: tuple[str, ...] = (
    "",
    "the step changed a parameter by something else than its optimizer's update: a hook, a clamp, a step in the step",
    "hyper-parameters changed while the step ran, and rounding hides which ones it used",
    "the step rewrote the gradients",
    "gradients were changed between backward and step by more than a factor",
    "gradients were changed between backward and step; the factor is not known, for all that was looked at is zero",
    "gradients came from elsewhere than a backward that was seen",
    "parameters moved between the begin of the step and the evaluation of its closure",
    "no measured step has run the same parts of the model: which parameters are upstream is not known",
    "no parameter is known to be upstream: the layer did not run, or the graph hides it",
)
"""A sentence per code."""
