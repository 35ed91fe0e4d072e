"""What second forwards show of the inside of layers, with ``Monitor(details=True)``.

A function mode, the guard of second forwards, hands calls of torch functions to an observer: products with trained
matrices, attention, activation functions, top-k. Training's own forwards are not observed. The forward before the step
gives inputs x and all that is said of features before the step, the one after it gives x'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.capture.row_keeper import RowKeeper
from fastfs._monitor.capture.sampling import RowChoice, RowSampler
from fastfs._monitor.measure.layer_calls import ACTIVATIONS, ROUTING, SOFTMAX, CallPlace, ForwardCalls, LayerCalls
from fastfs._monitor.measure.weight_motion import ForwardProducts, KeptProduct, WeightMotion
from fastfs._network.guard import FunctionGuard, Guard
from fastfs._network.layers import Layer, parameter_names, unwrapped
from fastfs._network.running_modules import running_modules
from fastfs._network.weight_products import (
    ATTENTION,
    PRODUCTS,
    UNREADABLE,
    Product,
    TrainedMatrices,
    UnreadCallError,
    is_plain,
    opened,
    product_of,
)
from fastfs._network.wrappers import clean_name, prefixes

__all__ = ["Details", "StepDetails", "matrix_bytes"]

_ROWS = 256  # kept of an input at most, unless all rows are: every matrix multiplies them four times
_SHARDED = "it is sharded, or no ordinary tensor, of which products are not read"
_WRAPPED = "its input is no ordinary tensor: in a torch.func transform, or sharded"
_FEW = "memory= leaves no room for two rows of its input"
_OTHER = "it was not called in the same way again after the step"


@dataclass(frozen=True)
class StepDetails:
    """What a step contributes to the record besides its rows.

    Attributes:
        fields: Tensors for the payload.
        facts: What the host knows of them.
    """

    fields: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Details:
    """Observes the second forwards of a step.

    Args:
        model: The module that the loop calls.
        layers: The watched layers.
        keeper: Has the choice of rows, and the budget that bounds the bytes that they take.
        device: Of the sums.
        warn: Called with a kind and a message if looking fails.

    Attributes:
        functions: The functions whose calls are looked at.
    """

    functions = frozenset((*PRODUCTS, *UNREADABLE, ATTENTION, *SOFTMAX, *ACTIVATIONS, *ROUTING))

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        keeper: RowKeeper,
        device: torch.device,
        warn: Callable[[str, str], None],
    ) -> None:
        self._model = model
        self._warn = warn
        rows = keeper.sampler.rows
        self._sampler = RowSampler(None if rows is None else min(rows, _ROWS))
        self._budget = keeper.budget
        self._device = device
        self._layers = {id(layer.module): layer.index for layer in layers}
        wrapped, whole = prefixes(model), type(unwrapped(model)).__name__
        self._modules = {id(module): clean_name(name, wrapped) or whole for name, module in model.named_modules()}
        self._inside = LayerCalls(self._sampler, device)
        self._opened = opened(ATTENTION)
        self._attends = False  # a call of `ATTENTION` is running, ...
        self._heads: int | None = None  # ... with so many heads
        self._set_parameters([])
        self.clear()

    def clear(self) -> None:
        """Forgets the step."""
        self._forwards: dict[ForwardCapture, ForwardProducts] = {}
        self._found: dict[ForwardCapture, ForwardCalls] = {}
        self._motion.clear()
        self._products = ForwardProducts()
        self._captured: ForwardCapture | None = None
        self._waiting = 0  # forwards of the step that have not begun
        self._after = False
        self._failure: str | None = None
        self._why: dict[int, str] = {}  # why there is nothing to say of a parameter
        self._where: dict[int, set[int | None]] = {}  # layers in which a parameter is used

    def _set_parameters(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._names = list(parameter_names(self._model, parameters))
        self._matrices = TrainedMatrices(parameters)
        self._motion = WeightMotion(parameters, self._sampler, self._device)

    # Around the forwards of a step

    def before(self, forwards: Sequence[ForwardCapture], parameters: Sequence[Tensor]) -> None:
        """Called before the second forwards that precede the optimizer step."""
        self.clear()
        if list(map(id, parameters)) != list(map(id, self._parameters)):
            self._set_parameters(parameters)
        self._waiting = len(forwards)

    def after(self) -> None:
        """Called before the second forwards that follow it."""
        self._after = True

    def begin(self, captured: ForwardCapture) -> None:
        """Called when a second forward begins, perhaps for another time."""
        known = self._forwards.get(captured)
        if self._after:
            self._products = known or ForwardProducts()
            self._products.restart()
        else:
            captured.bytes -= 0 if known is None else known.bytes
            self._waiting -= known is None
            self._products = self._forwards[captured] = ForwardProducts()
            self._found[captured] = ForwardCalls()
        self._captured, self._attends, self._heads = captured, False, None
        self._calls = 0  # of matrices
        self._mark = 0  # number of choices of rows before the last watched layer ended
        self._rows: int | None = None  # how many rows all watched layers so far had, 0 if not equally many

    def leave(self, layer: Layer, features: Tensor, guard: Guard) -> None:
        """Called when a watched layer has returned."""
        rows = math.prod(features.shape[:-1])
        if not self._after:
            assert self._captured is not None
            self._unseen(self._inside.leave, self._found[self._captured], layer.index, rows)
        self._rows = rows if self._rows in (None, rows) else 0
        self._mark = len(guard.orders or ())

    def finish(self) -> StepDetails:
        """Returns what the second forwards of the step have shown. Like looking at a call, it raises no exception."""
        found = StepDetails()
        if self._failure is None:
            try:
                found = self._shown()
            except Exception as error:
                self._fail(error)
        return found if self._failure is None else StepDetails({}, {"why": self._failure})

    def _fail(self, error: Exception) -> None:
        self._failure = f"looking into the second forward failed ({type(error).__name__}: {error})"
        self._warn("details", f"has no details: {self._failure}")

    def _shown(self) -> StepDetails:
        totals = self._motion.total(self._forwards.values())
        entries, found = [], []
        for number, p in enumerate(self._parameters):
            if p.dim() < 2:
                continue
            total = totals.get(number)
            why = self._why.get(number)
            layers = self._where.get(number, set())
            layer = layers.pop() if len(layers) == 1 else None
            if total is None or why not in (None, UNREADABLE[F.embedding]):  # the matrix of the head may be tied
                why = why or (None if is_plain(p) else _SHARDED)
                entries.append([self._names[number], 0, layer, 0, False, why, None])
            else:
                found.append(total)
                motions = _OTHER if total.unpaired else None
                entries.append([self._names[number], 1, layer, total.fan_in, total.sampled, None, motions])
        fields: dict[str, Tensor] = {}
        for name in ("sums", "covariances", "changed") if found else ():
            fields[f"weight_{name}"] = torch.stack([getattr(x, name) for x in found])
        inside = ForwardCalls()
        for each in self._found.values():
            inside.add(each)
        more, facts = inside.result()
        return StepDetails(fields | more, {"weights": entries, **facts})

    # In a forward

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], guard: FunctionGuard) -> Any:
        """Part of :class:`fastfs._network.guard.CallObserver`."""
        if func is ATTENTION and not self._attends and _unobserved() and _ordinary((args, kwargs)):
            self._attends, self._heads = True, kwargs.get("num_heads", args[4] if len(args) > 4 else None)
            try:
                with guard:
                    return self._opened(*args, **kwargs)
            finally:
                self._attends, self._heads = False, None
        output = func(*args, **kwargs) if func in ROUTING else None  # others may write to their arguments
        self._unseen(self._look, func, args, kwargs, guard.guard, output)
        return func(*args, **kwargs) if output is None else output

    def _unseen(self, look: Callable[..., None], *args: Any) -> None:
        """Calls a function outside of the forward; if it fails, this costs the details alone."""
        past_dispatch: Any = torch._C._DisableTorchDispatch()
        past_autocast: Any = torch._C._DisableAutocast()
        with past_dispatch, past_autocast, torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                if self._failure is None:
                    look(*args)
            except Exception as error:
                self._fail(error)

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], guard: Guard, output: Any) -> None:
        if func in UNREADABLE:
            for x in tree_leaves((args, kwargs)):
                if (view := self._matrices.find(x)) is not None:
                    known = self._why.get(view.parameter, UNREADABLE[func])
                    self._why[view.parameter] = known if func is F.embedding else UNREADABLE[func]
        elif func in PRODUCTS:
            self._product(func, args, kwargs, guard)
        elif not self._after and func is not ATTENTION:
            assert self._captured is not None
            found, place = self._found[self._captured], self._place()
            if func in SOFTMAX:
                self._inside.attention(found, place, func, args, kwargs, self._heads)
            elif func in ROUTING:
                self._inside.choice(found, place, args, kwargs, output.indices)
            elif self._matrices.find(args[0] if args else kwargs["input"]) is None:
                self._inside.activation(found, place, func, args, kwargs)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], guard: Guard) -> None:
        operands = [view for x in (*args, *kwargs.values()) if (view := self._matrices.find(x)) is not None]
        if not operands:
            return
        try:
            product = product_of(func, args, kwargs, self._matrices)
        except UnreadCallError as error:
            self._why.update(dict.fromkeys((view.parameter for view in operands), str(error)))
            return
        view = None if product is None else self._matrices.find(product.weight)
        if product is None or view is None or not product.rows.numel():
            return
        if not is_plain(product.rows):
            self._why[view.parameter] = _WRAPPED
            return
        self._where.setdefault(view.parameter, set()).add(self._place().layer)
        self._calls += 1
        orders = [] if guard.orders is None else guard.orders
        chosen = (self._mark if self._rows == product.rows.shape[0] else 0, len(orders))
        if self._after:
            self._motion.repeat(self._products, product, view, orders, chosen)
        elif (choice := self._choose(product)) is None:
            self._why[view.parameter] = _FEW
        else:
            self._products.orders = orders
            rows = self._motion.rows(product, choice)
            noise = guard.coarsest**2 * self._calls / 6.0  # two roundings per operation, each uniform
            bare = product._replace(weight=rows[:0], rows=rows[:0])
            kept = KeptProduct(bare, view, rows, product.rows.shape, choice, noise, chosen)
            self._motion.keep(self._products, kept)

    def _place(self) -> CallPlace:
        """Returns the innermost module of the model that is running, and the innermost watched layer."""
        innermost, layer, classes = None, None, []
        for module in running_modules():
            innermost = module if innermost is None and id(module) in self._modules else innermost
            classes.append(type(module).__name__)
            if (layer := self._layers.get(id(module))) is not None:
                break
        name = self._modules.get(id(innermost), "")
        return CallPlace(name, layer, " ".join([name.rpartition(".")[2], *classes]), innermost)

    def _choose(self, product: Product) -> RowChoice | None:
        """Returns which rows of an input to keep, and charges their bytes; None if there is no room for two."""
        rows = product.rows
        size = 2 * rows[0].numel() * rows.element_size()  # before and after the step
        assert self._captured is not None
        share = self._budget.left(self._captured) // (len(self._matrices) * (self._waiting + 1))
        choice = self._sampler.choose(rows.shape[0], share // size)
        if choice.kept < min(choice.total, 2):
            return None
        self._budget.take(self._captured, choice.kept * size, "inputs of weight matrices")
        self._products.bytes += choice.kept * size
        return choice


def _unobserved() -> bool:
    """Returns whether no function mode of the training loop is to be given calls as wholes."""
    return all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())


def _ordinary(arguments: Any) -> bool:
    """Returns whether no argument is a tensor of a class that may have functions of its own."""
    return all(type(x) in (Tensor, nn.Parameter) for x in tree_leaves(arguments) if isinstance(x, Tensor))


def matrix_bytes(parameters: Sequence[Tensor]) -> int:
    """Returns the bytes of the copies of all matrices, which are held for the time of an optimizer step."""
    return sum(p.nbytes for p in parameters if p.dim() > 1 and is_plain(p))
