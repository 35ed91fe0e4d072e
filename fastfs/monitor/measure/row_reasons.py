"""Why a row is not valid, as codes that devices can hold and sentences for the record."""

from __future__ import annotations

__all__ = ["REASONS"]

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
    "torch.compile has other random numbers than the eager forward that this mode needs",
    "a micro-batch of the step was left out",
    "parameters were written to between the forward and the step",
    "the layer did not run",
    "the layer runs inside a torch.func transform, where its features cannot be seen",
    "the layer is outside the autograd graph",
    "there is no room for its rows in memory=",
    "the layer ran another number of times, or on other shapes, in the second forward",
    "a second forward with the parameters of the first gives other features",
    "the forward ran with other weights than the model's own (torch.func.functional_call)",
    "the inputs depend on trained parameters, whose effect a second forward does not see",
    "gradients were written to between the micro-batches of the step",
    "the forward detaches something that depends on parameters: its first-order change is not complete",
    "the layer runs inside a graph of torch.compile, which can be seen from torch 2.13 on",
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
    IN_GRAPH,
) = range(len(REASONS))
