"""Why the update of a parameter, or the decrease of the loss by it, is not known: codes and sentences."""

from __future__ import annotations

__all__ = [
    "CHANGED",
    "EMPTY",
    "FINE",
    "MISSING_RANKS",
    "MOVED",
    "NOTHING",
    "NOT_THE_UPDATE",
    "RANKS_DIFFER",
    "REASONS",
    "REWRITTEN",
    "SETTINGS",
    "SPREAD",
    "STRUCTURE",
    "UNSEEN",
]

REASONS: tuple[str, ...] = (
    "",
    "something other than the optimizer's update changed a parameter in the step: a hook, a clamp, a step in the step",
    "hyper-parameters changed while the step ran, and rounding hides which ones it used",
    "the step rewrote the gradients",
    "gradients were changed between backward and step by more than a factor",
    "gradients were changed between backward and step by an unknown factor: all compared elements are zero",
    "gradients were not computed by a backward that was seen",
    "parameters changed between the beginning of the step and the evaluation of its closure",
    "the parameters upstream are not known: no measured step has run the same parts of the model",
    "no parameter is known to be upstream: the layer did not run, or the graph hides it",
    "ranks of the run are missing that hold parameters upstream",
    "ranks that should hold the same parameters report different sums",
    "the gradient is a partial sum over ranks (DTensor Partial), or is spread over them in another way than the "
    "parameter",
)
"""A sentence for every code, in the order of the codes."""

(
    FINE,
    NOT_THE_UPDATE,
    SETTINGS,
    REWRITTEN,
    CHANGED,
    EMPTY,
    UNSEEN,
    MOVED,
    STRUCTURE,
    NOTHING,
    MISSING_RANKS,
    RANKS_DIFFER,
    SPREAD,
) = range(len(REASONS))
