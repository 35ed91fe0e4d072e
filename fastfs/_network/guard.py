"""Dispatch and function modes that keep an extra forward from writing to tensors that belong to training.

A dispatch mode intercepts each operation before it runs and reads from its schema which arguments it writes to. It
permits writes only to memory that the forward itself has allocated, or to tensors that were provided for this purpose
(copies of buffers). Changes that are not operations, such as assignments to attributes, ``.data`` and ``.grad``, are
undone by :mod:`fastfs._network.module_contents`.

The guard also records whether a forward in forward mode cuts off first-order changes, the precision of its operations
(whatever setting caused it), its integer choices (top-k, argmax), and the states of generators that are not known from
elsewhere.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfs._network.journal import Journal
from fastfs._network.placements import local
from fastfs._network.precision import SINGLE, coarseness, product_coarseness

__all__ = ["CallObserver", "CollectiveError", "FunctionGuard", "Guard", "Plans", "WriteError", "pop_ended", "storages"]

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
_CHOICES = frozenset({"aten::topk", "aten::argmax", "aten::argmin"})
# What may choose rows, or their order or places, by values; in place or not. A number read by Python may slice.
_READS = "sort nonzero index index_select gather masked_select take embedding repeat_interleave _local_scalar_dense"
_PLACES = "index_put _index_put_impl index_add index_copy scatter scatter_add scatter_reduce masked_scatter"
_ORDERS = _CHOICES | {f"aten::{x}" for x in f"{_READS} {_PLACES}".split()}
_ORDINARY = (Tensor, torch.nn.Parameter)
_HALVES = (torch.float16, torch.bfloat16)
# The schemas of these arguments do not declare that training mode writes to them.
_STATISTICS = frozenset({"running_mean", "running_var"})
_PRODUCTS = (
    "mm addmm bmm baddbmm addbmm mv addmv dot linear matmul _scaled_mm _grouped_mm _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
).split()
_CONVOLUTIONS = "convolution _convolution convolution_overrideable cudnn_convolution conv2d conv1d conv3d".split()
_RECURRENT = "_cudnn_rnn _thnn_fused_lstm_cell mkldnn_rnn_layer".split()
_MEMORY = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage)
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_CUTTING = (Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, _GET_DATA, F.gumbel_softmax)
_SETTERS = {getattr(Tensor, name).__set__: name for name in ("data", "grad", "requires_grad")}
_PAST_DISPATCH = frozenset((*_MEMORY, *_SETTERS, *_CUTTING))
_KINDS = {
    **dict.fromkeys((f"aten::{name}" for name in _PRODUCTS), "matmul"),
    **dict.fromkeys((f"aten::{name}" for name in _CONVOLUTIONS), "conv"),
    **dict.fromkeys((f"aten::{name}" for name in _RECURRENT), "rnn"),
}


class WriteError(RuntimeError):
    """A forward tried to write to memory that it must not change.

    Args:
        operation: name of the operation.
        inputs: whether the target is a copy of the forward's inputs, which can be renewed.
    """

    def __init__(self, operation: str, inputs: bool) -> None:
        super().__init__(f"the forward writes to a tensor that is not its own ({operation})")
        self.inputs = inputs


class CollectiveError(RuntimeError):
    """A forward was about to communicate with other ranks, which may not run it.

    Args:
        operation: name of the operation.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(f"the forward communicates with other ranks ({operation})")


class _Plan(NamedTuple):
    """Properties of an operation that decide how the guard treats it."""

    operation: Any
    writes: tuple[tuple[int, str], ...]  # positions and names of arguments that the operation writes to
    fresh: bool  # whether its outputs may be newly allocated memory
    choice: bool
    order: bool  # its integers and booleans, given or returned, say which rows are taken, and in which order
    kind: str | None  # kind of product, whose precision has a setting of its own
    harmless: bool  # returns views of its arguments and does nothing else
    collective: bool  # communicates with other ranks


Plans = dict[Any, _Plan]
"""The plans of operations seen so far, by the ``id`` of the operation, which the plan keeps alive."""


class Guard(TorchDispatchMode):
    """A dispatch mode for one forward.

    Args:
        journal: records the states of generators that the forward draws from.
        allowed: tensors that the forward may write to.
        inputs: copies of the forward's inputs.
        protected: returns the tensors that belong to training. Called once, and only for writes by code that manages
            its own memory (compiled graphs, sharding).
        plans: plans of operations from earlier guards, to be reused.
        single: whether to compute in float32 what the model would compute in 16 bits.
        collectives: whether the forward may communicate with other ranks, because they all run it.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        journal: Journal,
        allowed: Iterable[Tensor],
        inputs: Iterable[Tensor] = (),
        protected: Callable[[], Iterable[Tensor]] = tuple,
        *,
        plans: Plans | None = None,
        single: bool = False,
        collectives: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._collectives = collectives
        self.coarsest = 0.0  # largest machine epsilon so far
        self.choices: list[Tensor] = []
        self.orders: list[Tensor] | None = None  # what rows were chosen by, for an observer
        self.cut = False  # detach() has cut off a first-order change
        self.ended = False
        self._journal = journal
        self._made = {storage for tensor in allowed for storage in storages(tensor)}
        self._inputs = {storage for tensor in inputs for storage in storages(tensor)}
        self._protected = protected
        self._belonging: set[int] | None = None  # storages of the protected tensors, once they are needed
        self._single = single
        self._plans: Plans = {} if plans is None else plans
        self._generators: set[int] = set()

    def end(self) -> None:
        """Mark the forward as ended, so that this mode and its :class:`FunctionGuard` intercept nothing more."""
        self.ended = True

    def owns(self, tensor: Tensor) -> bool:
        """Whether the forward may write to the tensor."""
        return self._made.issuperset(storages(tensor))

    def keep_data(self, tensor: Tensor) -> None:
        """Restore the memory of a tensor after the forward."""
        with torch._C.DisableTorchFunction():
            data = tensor.data

        def restore() -> None:
            tensor.data = data

        self._journal.note(restore)

    def is_input(self, tensor: Tensor) -> bool:
        """Whether the tensor is a copy of one of the forward's inputs."""
        return self._inputs.issuperset(storages(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plan = self._plans.get(id(func))  # hashing an operation takes as long as running a small one
        if plan is None:
            plan = self._plans[id(func)] = _plan(func)
        if plan.harmless or self.ended:
            return func(*args, **kwargs) if kwargs else func(*args)
        with torch._C.DisableTorchFunction():  # the guard itself also calls functions of tensors
            return self._dispatch(func, plan, args, kwargs)

    def _dispatch(self, func: Any, plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        if plan.collective and not self._collectives:
            raise CollectiveError(str(func))
        for position, name in plan.writes:
            target = args[position] if position < len(args) else (kwargs or {}).get(name)
            self._check(func, target)
        if kwargs:
            self._note_generator(kwargs.get("generator"))
        if self._single and plan.fresh:  # a view has to remain a view of its base
            args, kwargs = tuple(map(_wide, args)), {name: _wide(value) for name, value in (kwargs or {}).items()}
        output = func(*args, **kwargs) if kwargs else func(*args)
        if plan.fresh:
            if type(output) is Tensor and output.layout is torch.strided:  # nearly always
                self._made.add(output.untyped_storage()._cdata)
                self._note_precision(plan, output)
            else:
                for tensor in _tensors(output):
                    self._made.update(storages(tensor))
                    self._note_precision(plan, tensor)
        if plan.choice:
            self.choices += [local(x) for x in _tensors(output) if not x.is_floating_point()]
        if plan.order and self.orders is not None:
            read = torch.tensor(output) if isinstance(output, int) else output
            self.orders += [local(x) for x in _tensors([*args[1:], read]) if not x.is_floating_point()]
        return output

    def _check(self, func: Any, target: Any) -> None:
        for tensor in _tensors(target):
            for storage in storages(tensor):
                if storage in self._made:
                    continue
                if storage in self._inputs:
                    raise WriteError(str(func), inputs=True)
                if self._is_scratch(storage):
                    self._made.add(storage)
                    continue
                raise WriteError(str(func), inputs=False)

    def _is_scratch(self, storage: int) -> bool:
        """Whether the memory is scratch space of generated code that does not belong to training."""
        if not _managed():
            return False
        if self._belonging is None:
            self._belonging = {each for tensor in self._protected() for each in storages(tensor)}
        return storage not in self._belonging

    def _note_generator(self, generator: Any) -> None:
        if isinstance(generator, torch.Generator) and id(generator) not in self._generators:
            self._generators.add(id(generator))
            state = generator.get_state()
            self._journal.note(lambda: generator.set_state(state))

    def _note_precision(self, plan: _Plan, tensor: Tensor) -> None:
        dtype = tensor.dtype
        if dtype is torch.float32:
            spacing = SINGLE if plan.kind is None else product_coarseness(plan.kind, tensor.device.type)
        else:
            spacing = coarseness(dtype)
        if spacing > self.coarsest:
            self.coarsest = spacing


class CallObserver(Protocol):
    """Looks at calls of torch functions in a guarded forward. It changes none of them."""

    @property
    def functions(self) -> Container[Any]:
        """The functions whose calls it is given."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], guard: FunctionGuard) -> Any:
        """Returns the result of one of :attr:`functions`; inside of it the guard sees calls only if it is entered."""


class FunctionGuard(TorchFunctionMode):
    """A function mode for calls that bypass the dispatcher.

    Calls that expose the memory of a tensor get a copy of it. Assignments to ``.data``, ``.grad`` and
    ``.requires_grad`` of any tensor are recorded in the journal.

    Args:
        guard: dispatch mode of the same forward.
        journal: records the assignments to be undone.
        strict: whether to raise instead of copying, for compiled forwards, in which copies cannot be substituted.
        observer: looks at calls; None for nobody.
    """

    def __init__(
        self, guard: Guard, journal: Journal, *, strict: bool = False, observer: CallObserver | None = None
    ) -> None:
        super().__init__()
        self.guard = guard
        self._observer = observer
        self._journal = journal
        self._strict = strict

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._observer is not None and func in self._observer.functions and not self.guard.ended:
            return self._observer.call(func, args, kwargs or {}, self)
        if func not in _PAST_DISPATCH or self.guard.ended:
            return func(*args, **kwargs) if kwargs else func(*args)
        if func in _SETTERS:
            if self._strict and not self._is_own(args[0]):
                raise WriteError(f"Tensor.{_SETTERS[func]} =", inputs=False)
            self._note(args[0], _SETTERS[func])
        elif func in _CUTTING:
            self.guard.cut = self.guard.cut or _carries(args[0])
        elif not self._is_own(args[0]) and not _managed():
            if self._strict:
                raise WriteError(f"Tensor.{func.__name__}, through whose result it may write", inputs=False)
            with torch._C.DisableTorchFunction():
                args = (args[0].detach().clone(), *args[1:])
        return func(*args, **(kwargs or {}))

    def _is_own(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return self.guard.owns(tensor) or self.guard.is_input(tensor)

    def _note(self, tensor: Tensor, name: str) -> None:
        with torch._C.DisableTorchFunction():
            before = getattr(tensor, name)

        def undo() -> None:
            with torch._C.DisableTorchFunction():  # the mode may still be active
                if getattr(tensor, name) is not before:
                    setattr(tensor, name, before)

        self._journal.note(undo)


def pop_ended() -> None:
    """Pop modes of ended forwards off the stack.

    While torch runs a function of a mode, a generator has popped the mode and pushes it back afterwards. An interrupt
    may leave that generator suspended. It then pushes the mode when it is freed, after everything else was restored.
    """
    while (number := torch._C._len_torch_function_stack()) and _is_ended(torch._C._get_function_stack_at(number - 1)):
        torch.overrides._pop_mode()
    while (number := torch._C._len_torch_dispatch_stack()) and _is_ended(torch._C._get_dispatch_stack_at(number - 1)):
        python_dispatch._pop_mode()


def _is_ended(mode: Any) -> bool:
    guard = mode.guard if isinstance(mode, FunctionGuard) else mode
    return isinstance(guard, Guard) and guard.ended


def _carries(tensor: Tensor) -> bool:
    """Whether a tensor carries a first-order change in forward mode."""
    if forward_ad._current_level < 0:
        return False
    with torch._C.DisableTorchFunction():
        return forward_ad.unpack_dual(tensor).tangent is not None


def storages(tensor: Tensor) -> tuple[int, ...]:
    """Return what identifies the memory of a tensor: nothing for tensors without distinguishable memory."""
    if type(tensor) not in _ORDINARY and hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = (getattr(tensor, name) for name in names)  # of a DTensor the mesh, too
        return tuple(storage for part in parts if isinstance(part, Tensor) for storage in storages(part))
    try:
        return (tensor.untyped_storage()._cdata,)
    except (RuntimeError, NotImplementedError):  # sparse tensors, for instance
        return ()


def _plan(func: Any) -> _Plan:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator: the operations in it are dispatched separately
        return _Plan(func, (), True, False, False, None, False, False)
    norm = "batch_norm" in schema.name
    writes = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or (norm and argument.name in _STATISTICS)
    )
    # A tensor created from Python numbers is returned as an alias of memory that no operation has allocated.
    fresh = schema.name == "aten::lift_fresh" or all(result.alias_info is None for result in schema.returns)
    choice = schema.name in _CHOICES
    collective = schema.name.partition("::")[0] in _COLLECTIVES
    harmless = not (writes or fresh or choice or collective)
    harmless = harmless and all(argument.name != "generator" for argument in schema.arguments)
    order = schema.name.removesuffix("_") in _ORDERS
    return _Plan(func, writes, fresh, choice, order, _KINDS.get(schema.name), harmless, collective)


def _managed() -> bool:
    """Whether generated code of torch.compile or torch.distributed called the operation."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "torchinductor" in name or "/torch/distributed/" in name or "/torch/_inductor/" in name:
            return True
        frame = frame.f_back
    return False


def _tensors(value: Any) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return ()


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALVES else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _HALVES else value
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        return type(value)(_wide(part) for part in value)
    return value
