"""Why a row is not valid: codes, and sentences for the record."""

from __future__ import annotations

__all__ = ["OTHER_FORWARDS", "REASONS"]

REASONS: tuple[str | None, ...] = (
    None,
    "values that are not finite",
    "no update of the features",
    "no backward vector",
    "rounding noise",
    "amplified beyond the linear range",
    "rounding noise in a layer below",
    "the feature speed formula does not hold: rounding has changed the Jacobian",
    "the angle is too small for this precision",
    "rounding is biased: the features differ from those in float32",
    "torch.compile draws other random numbers than the eager forward that this mode needs",
    "a micro-batch of the step was left out",
    "parameters were written to between the forward and the step",
    "the layer did not run",
    "the layer runs inside a torch.func transform, where its features cannot be seen",
    "the layer is outside the autograd graph",
    "the rows of the layer do not fit into memory=",
    "the layer ran a different number of times, or on different shapes, in the second forward",
    "a second forward with the parameters of the first gives other features",
    "the forward ran with other weights than the model's own (torch.func.functional_call)",
    "the inputs depend on trained parameters, whose effect a second forward does not see",
    "gradients were written to between the micro-batches of the step",
    "the forward detaches something that depends on parameters: its first-order change is not complete",
    "parameters changed between the beginning of the step and the evaluation of its closure",
    "the layer runs inside a graph of torch.compile, which can be seen from torch 2.13 on",
    "the layer runs several times in recomputations, and its backward vectors cannot be matched to the runs",
    "the first dimension of the features does not count the samples of the batch, which samples= needs",
    "the chosen samples alone have other features than in the batch, as with batch norm, dropout, or routing with a "
    "capacity, which samples= does not allow",
    "the chosen samples were not run alone before the step, as samples= needs",
    "ranks of the run are missing: the numbers are those of the others",
    "ranks that should hold the same features or parameters report different sums",
    "ranks that hold parts of the same rows have kept different rows: raise memory=",
    "the backward vector is a partial sum over ranks (DTensor Partial), or is spread over them in another way than the "
    "features: give the layer's output the placements that its gradient has (redistribute), or a local tensor",
)

(
    OK,
    NONFINITE,
    NO_UPDATE,
    NO_BACKWARD,
    NOISE,
    NONLINEAR,
    BELOW,
    JACOBIAN,
    SMALL_ANGLE,
    BIASED,
    OTHER_MASKS,
    LEFT_OUT,
    WRITTEN,
    NOT_RUN,
    TRANSFORMED,
    NO_GRAPH,
    NO_ROOM,
    OTHER_CALLS,
    UNREPEATED,
    OTHER_WEIGHTS,
    DEPENDENT,
    REWRITTEN,
    DETACHED,
    MOVED,
    IN_GRAPH,
    UNMATCHED,
    NO_SAMPLES,
    NOT_ALONE,
    UNCHECKED,
    MISSING_RANKS,
    RANKS_DIFFER,
    OTHER_ROWS,
    PARTIAL,
) = range(len(REASONS))

OTHER_FORWARDS = (LEFT_OUT, WRITTEN, OTHER_CALLS, UNREPEATED, OTHER_WEIGHTS, DEPENDENT, REWRITTEN, MOVED, RANKS_DIFFER)
"""More than the step has happened between the forwards that a row compares, or they are of different inputs."""
