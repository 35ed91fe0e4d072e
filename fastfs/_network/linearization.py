"""Linearization of a model at one point: features, backward vectors, gradients, and first-order changes.

All results are functions of the parameter values on one batch, with the same random numbers, buffers and modes in each
call. The model is left unchanged: parameters, gradients, buffers and generators are as before. State that hooks or the
model's own forward keep elsewhere includes these forwards. Not thread-safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfs._network.feature_tensors import first_floating, kinds, with_features
from fastfs._network.input_copies import copy_arguments
from fastfs._network.journal import Journal
from fastfs._network.layers import AUTO, Layer, Selection, parameter_names, select_layers, unwrapped
from fastfs._network.perturbed import Perturbed, differentiable, load_forward_mode, tangents
from fastfs._network.state import ForwardState
from fastfs._network.structure import Edge, Structure, analyse, edge_of

__all__ = ["Evaluation", "Linearization", "LossFunction", "Visits"]

LossFunction = Callable[[Any, Any], Tensor]
"""A function of the model and the batch that returns the loss as a scalar tensor."""

Visits = tuple[Tensor, ...]
"""The tensors of one layer: one per time that it runs in a forward, nearly always exactly one."""


class Evaluation(NamedTuple):
    """Features of every layer and the loss, or the first-order changes of these; detached."""

    features: list[Visits]
    loss: Tensor


class _StopForward(BaseException):
    """Ends a forward at the requested layer. A BaseException, so that models do not catch it."""


class Linearization:
    """Runs one forward and one backward, and keeps features, backward vectors and gradients.

    Args:
        model: any network. Wrappers are removed, and compiled parts run eagerly.
        loss_fn: function of the model and the batch that returns the loss, a scalar that includes its own mean.
        batch: second argument of ``loss_fn``, copied for every forward.
        layers: the layers to watch, as for :class:`fastfs.Monitor`.
        parameters: regular expression, searched for in the names of the parameters to move; None moves all trainable
            ones.
        dtype: dtype to compute in, such as ``torch.float64``; parameters, buffers and inputs are cast to it.

    Attributes:
        layers: the L watched layers.
        originals: the model's own parameters that move. ``parameters`` holds their values in ``dtype``.
        names, parameters, gradients: of the P parameters that move. Gradients are zero where the loss has none.
        loss: 0-d tensor.
        features, backward: per layer, its visits. Backward vectors are dLoss/df, zero where the loss does not depend on
            f.
        structure: the parameters upstream of each layer, and which layers are cuts.

    Raises:
        TypeError: the loss is not a scalar tensor, a layer returns no floating-point tensor, or the batch holds an
            object that cannot be copied, such as an iterator.
        ValueError: no layer or parameter matches, the loss is not finite or depends on no parameter, or ``loss_fn``
            uses parameters from outside of the model that it receives.
        RuntimeError: in inference mode. From the methods: the forward is not repeatable, or the parameters have
            changed.

    Source: section 1 of "The Feature Speed Formula", arXiv 2311.18718.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batch: Any,
        *,
        layers: Selection = AUTO,
        parameters: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a function of the model and the batch, got {type(loss_fn).__name__}")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("expected to be called outside of torch.inference_mode(), which forbids gradients")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype!r}")
        self.layers = select_layers(model, layers)
        self.dtype = dtype
        self._loss_fn = loss_fn
        self._inner = unwrapped(model)
        moving = _moving(self._inner, parameters)
        self.names = list(moving)
        self.originals = list(moving.values())
        self._all = list(self._inner.parameters())  # including fixed ones, detached so that they are in no graph
        self._versions = [p._version for p in self._all]
        self._perturbed = Perturbed(model, self._all)
        values = [self._cast(p.detach()) for p in self._all]
        place = {id(p): i for i, p in enumerate(self._all)}
        self._places = [place[id(p)] for p in self.originals]
        self._values = values
        self.parameters = [values[i] for i in self._places]
        self._batch = copy_arguments(batch, lambda x: self._cast(x.detach().clone()))
        state = ForwardState.take(self._inner)
        self._journal = Journal()
        self._state = state if dtype is None else state.without_autocast(self._cast)
        self._repeats = False
        self._differentiate()

    def _differentiate(self) -> None:
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        features: list[list[Tensor]] = [[] for _ in self.layers]
        backward: list[list[Tensor]] = [[] for _ in self.layers]
        edges: list[list[Edge | None]] = [[] for _ in self.layers]

        def keep(layer: Layer, output: Tensor) -> None:
            visit = len(features[layer.index])
            features[layer.index].append(output.detach().clone())  # later operations may work in place
            backward[layer.index].append(torch.zeros_like(features[layer.index][-1]))
            edges[layer.index].append(edge_of(output))
            if output.requires_grad:

                def arrived(b: Tensor) -> None:
                    backward[layer.index][visit] = b.detach().clone()

                output.register_hook(arrived)

        def run(model: nn.Module) -> tuple[Tensor, Structure, tuple[Tensor | None, ...]]:
            loss = self._loss(model)
            found: tuple[Tensor | None, ...] = (None,)
            astray: tuple[Tensor | None, ...] = ()
            if loss.requires_grad:
                structure = analyse(edges, [loss], leaves, self.names)
                try:
                    found = torch.autograd.grad(loss, [*leaves, *self.originals], allow_unused=True)
                except RuntimeError as error:
                    if "use_reentrant" not in str(error):
                        raise
                    raise RuntimeError(
                        "reentrant checkpoints hide parameters from the graph: expected checkpoint(..., "
                        "use_reentrant=False), or no checkpoint during this measurement"
                    ) from error
                found, astray = found[: len(leaves)], found[len(leaves) :]
            stray = [name for name, g in zip(self.names, astray, strict=False) if g is not None]
            if stray:
                raise ValueError(f"loss_fn: it uses {stray[0]!r} from outside of the model that it is given")
            if all(g is None for g in found):
                raise ValueError(
                    f"loss_fn: the loss depends on none of the {len(leaves)} parameters of the model that it is given"
                )
            return loss, structure, found

        with self._seen(keep), self._applied(), torch.enable_grad():
            loss, self.structure, gradients = self._perturbed.within(self._placed(leaves), run)
        self.loss = loss.detach()
        if not bool(self.loss.isfinite()):
            raise ValueError(f"loss_fn: expected a finite loss, got {self.loss.item()}")
        self.features: list[Visits] = [tuple(visits) for visits in features]
        self.backward: list[Visits] = [tuple(visits) for visits in backward]
        pairs = zip(gradients, self.parameters, strict=True)
        self.gradients = [torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for g, p in pairs]

    def forward(self, values: Sequence[Tensor]) -> Evaluation:
        """Compute features and loss at other values of the parameters.

        Args:
            values: P tensors of the shapes and dtype of ``parameters``.

        Returns:
            Features of every layer, and the loss.

        Raises:
            RuntimeError: the forward at the original values does not reproduce the loss.
        """
        self._repeat()
        return self._run([v.detach() for v in values], lambda x: x.detach().clone())

    def jvp(self, directions: Sequence[Tensor]) -> Evaluation:
        """Compute the exact first-order changes of features and loss when the parameters move by ``directions``.

        Args:
            directions: P tensors of the shapes and dtype of ``parameters``.

        Returns:
            Changes of the features of every layer, and of the loss.

        Raises:
            NotImplementedError: an operation of the model has no forward-mode derivative in torch.
            RuntimeError: the forward at the original values does not reproduce the loss.
        """
        self._repeat()
        load_forward_mode()
        self._check(directions, "directions")
        with self._perturbed.duals(self.parameters, directions) as duals:
            return self._run(duals, lambda x: tangents(x).clone())

    def _repeat(self) -> None:
        """Check, once, that a forward at the same values reproduces the loss."""
        if self._repeats:
            return
        again = self._run(self.parameters, Tensor.detach)
        coarsest = max(torch.finfo(x.dtype).eps for x in (self.loss, *(v for layer in self.features for v in layer)))
        error = float((again.loss.double() - self.loss.double()).abs())
        tolerance = min(max(256 * coarsest, 1e-9), 0.05)  # atomic additions and kernel selection cause small changes
        if not error <= tolerance * max(abs(float(self.loss)), 1e-3):
            raise RuntimeError(
                f"loss_fn: the loss was {self.loss.item():.8g}, and {again.loss.item():.8g} the second time with the "
                "same parameters, batch and global random numbers: it depends on something else (a generator of its "
                "own, a counter, the next batch of a loader)"
            )
        self._repeats = True

    def function(self, layer: int) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return the features of a layer as a pure function of the parameter values.

        The function supports ``torch.func``: vjp, jvp, and vmap with ``randomness="same"``. The forward ends at the
        layer.

        Args:
            layer: index of the layer.

        Returns:
            A function of P tensors.

        Raises:
            ValueError: the layer does not run exactly once.
        """
        self._once(layer)
        self._repeat()

        def features(values: Sequence[Tensor]) -> Tensor:
            return self._until(layer, self._placed(values), {})

        return features

    def from_layer(self, start: int, layer: int) -> Callable[[Tensor], Tensor]:
        """Return the features of a layer as a pure function of a change added to the features of an earlier layer.

        Args:
            start: index of the earlier layer.
            layer: index of the layer.

        Returns:
            A function of a tensor of the shape of the earlier features.

        Raises:
            ValueError: one of the layers does not run exactly once.
        """
        self._once(start)
        self._once(layer)
        self._repeat()

        def features(change: Tensor) -> Tensor:
            return self._until(layer, self._values, {start: change})

        return features

    def _until(self, layer: int, values: Sequence[Tensor], added: dict[int, Tensor]) -> Tensor:
        self._unchanged()
        found: list[Tensor] = []

        def keep(seen: Layer, output: Tensor) -> None:
            if seen.index == layer:
                found.append(output)
                raise _StopForward

        with ExitStack() as stack:
            stack.enter_context(self._seen(keep, added))
            stack.enter_context(self._applied())
            stack.enter_context(differentiable(self._inner))
            try:
                self._perturbed.within(values, self._loss)
            except _StopForward:
                return found[0]
        raise RuntimeError(f"layer {self.layers[layer].name!r} did not run this time")

    def _run(self, values: Sequence[Tensor], take: Callable[[Tensor], Tensor]) -> Evaluation:
        self._unchanged()
        self._check(values, "values")
        features: list[list[Tensor]] = [[] for _ in self.layers]
        with self._seen(lambda layer, x: features[layer.index].append(take(x))), self._applied():
            loss = take(self._perturbed.within(self._placed(values), self._loss)).detach()
        for layer, now, first in zip(self.layers, features, self.features, strict=True):
            if [x.shape for x in now] != [x.shape for x in first]:
                raise RuntimeError(
                    f"layer {layer.name!r} gave shapes {[tuple(x.shape) for x in first]} and then "
                    f"{[tuple(x.shape) for x in now]}: the forward depends on something besides parameters, buffers, "
                    "batch and global random numbers"
                )
        return Evaluation([tuple(x.detach() for x in visits) for visits in features], loss)

    @contextmanager
    def _applied(self) -> Iterator[None]:
        """Apply the saved state of the model for one forward. Gradients are on, since a loss may take its own."""
        with self._state.applied(self._journal, grad=True):
            yield

    @contextmanager
    def _seen(self, keep: Callable[[Layer, Tensor], None], added: dict[int, Tensor] | None = None) -> Iterator[None]:
        """Register hooks on the layers for one forward."""

        def hook(layer: Layer, output: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:  # the recomputation of a checkpoint
                return None
            features = first_floating(output)
            if features is None:
                raise TypeError(
                    f"layer {layer.name!r}: expected a floating-point tensor in its output, got "
                    f"{type(output).__name__} of {', '.join(kinds(output)) or 'nothing'}"
                )
            change = None if added is None else added.get(layer.index)
            if change is not None:
                features, old = features + change, features
                output = with_features(output, old, features)
            keep(layer, features)
            return None if change is None else output

        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.module.register_forward_hook(lambda _m, _a, output, layer=layer: hook(layer, output))
                stack.callback(handle.remove)
            yield

    def _loss(self, model: nn.Module) -> Tensor:
        batch = copy_arguments(self._batch, Tensor.clone)  # the loss function may work in place
        loss = self._loss_fn(model, batch)
        if not isinstance(loss, Tensor) or (loss.dim() > 0 and loss.numel() != 1):
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn: expected a scalar tensor, got {what}")
        return loss.reshape(())

    def _placed(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the values of all parameters, with ``values`` for those that move."""
        result = list(self._values)
        for place, value in zip(self._places, values, strict=True):
            result[place] = value
        return result

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if self.dtype is not None and x.is_floating_point() else x

    def _check(self, tensors: Sequence[Tensor], what: str) -> None:
        if len(tensors) != len(self.parameters):
            raise ValueError(f"{what}: expected {len(self.parameters)} tensors, one per parameter, got {len(tensors)}")
        for name, tensor, parameter in zip(self.names, tensors, self.parameters, strict=True):
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise ValueError(
                    f"{what} of {name}: expected {tuple(parameter.shape)} in {parameter.dtype}, got "
                    f"{tuple(tensor.shape)} in {tensor.dtype}"
                )

    def _once(self, layer: int) -> None:
        if len(self.features[layer]) != 1:
            times = len(self.features[layer])
            raise ValueError(
                f"layer {self.layers[layer].name!r}: expected a layer that runs once, it runs {times} times"
            )

    def _unchanged(self) -> None:
        for parameter, version in zip(self._all, self._versions, strict=True):
            if parameter._version != version:
                raise RuntimeError("the parameters of the model have changed; linearize it again")


def _moving(model: nn.Module, expression: str | None) -> dict[str, Tensor]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    named = parameter_names(model, trainable)
    if not named:
        raise ValueError(f"model: {type(model).__name__} has no parameter that requires a gradient")
    if expression is None:
        return named
    try:
        pattern = re.compile(expression)
    except (TypeError, re.error) as error:
        raise ValueError(f"parameters: {expression!r} is not a regular expression: {error}") from None
    found = {name: p for name, p in named.items() if pattern.search(name)}
    if not found:
        raise ValueError(f"parameters: {expression!r} finds none of {', '.join(named)}")
    return found
