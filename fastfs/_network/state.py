"""Everything besides parameters and inputs that a forward depends on: taken at one forward, given back for a second.

The second forward must see the same random numbers, the same autocast and the same buffers, attributes and modes as the
first, and leave no trace: all of them are put back, and buffers are swapped for copies and never written.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from fastfs._network.global_state import Surroundings
from fastfs._network.guard import storages
from fastfs._network.inventory import Inventories
from fastfs._network.journal import Journal
from fastfs._network.module_contents import Belongings, Earlier

__all__ = ["ForwardState", "RandomState", "own_forward_runs"]

_OWN: ContextVar[bool] = ContextVar("fastfs_own_forward", default=False)


def own_forward_runs() -> bool:
    """Whether a forward that is running is one of fastfs's own, in :meth:`ForwardState.applied`: no training."""
    return _OWN.get()


@dataclass(frozen=True)
class RandomState:
    """States of the global generators: torch on CPU and devices, Python's ``random``, and NumPy's if it is loaded."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def take(cls, devices: Iterable[torch.device]) -> RandomState:
        numpy = sys.modules.get("numpy")
        return cls(
            cpu=torch.get_rng_state(),
            devices={device: torch.get_device_module(device).get_rng_state(device) for device in devices},
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
        )

    def moved(self) -> bool:
        """Whether torch's generators have given numbers since; asked on the host."""
        return not torch.equal(self.cpu, torch.get_rng_state()) or not all(
            torch.equal(state, torch.get_device_module(device).get_rng_state(device))
            for device, state in self.devices.items()
        )

    def give(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@dataclass(frozen=True)
class ForwardState:
    """State around one forward of a model; see :meth:`applied`."""

    randomness: RandomState
    autocast: dict[str, tuple[bool, torch.dtype]]
    modules: list[nn.Module]
    earlier: Earlier
    inventories: Inventories = field(default_factory=Inventories)

    @classmethod
    def take(
        cls, model: nn.Module, parameters: Iterable[Tensor] = (), inventories: Inventories | None = None
    ) -> ForwardState:
        """The state now. Buffers and tensors in attributes are copied.

        Args:
            model: the model.
            parameters: trained tensors besides the model's own parameters; never copied.
            inventories: of the model, from earlier states: it is quicker with them.
        """
        modules = list(model.modules())
        devices = _accelerators(modules)
        kinds = dict.fromkeys(["cpu", *(device.type for device in devices)])
        inventories = Inventories() if inventories is None else inventories

        def owned() -> set[int]:
            own = (p for module in modules for p in module._parameters.values() if p is not None)
            return {storage for p in (*own, *parameters) for storage in storages(p)}

        return cls(
            randomness=RandomState.take(devices),
            autocast={kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
            modules=modules,
            earlier=Earlier(modules, owned, inventories),
            inventories=inventories,
        )

    def without_autocast(self, cast: Callable[[Tensor], Tensor]) -> ForwardState:
        """The same with autocast off and the buffers cast."""
        return replace(
            self,
            autocast={kind: (False, dtype) for kind, (_, dtype) in self.autocast.items()},
            earlier=self.earlier.cast(cast),
        )

    def applied(
        self,
        journal: Journal,
        *,
        grad: bool = False,
        parameters: Iterable[Tensor] = (),
        others: Iterable[Any] = (),
    ) -> AppliedState:
        """Give this state back for the duration of a ``with`` block, as often as wanted.

        Outside nothing has changed afterwards, also if the block raises; after an interrupt, once the journal has been
        restored. Inside, caches of casted weights (autocast's) and of parametrisations are off, since they may hold old
        weights, and fused inference paths of ``nn.MultiheadAttention`` too: the arithmetic is that of training.

        Args:
            journal: of the caller, who restores it after an interrupt.
            grad: record gradients inside.
            parameters: trained tensors besides the model's own, whose gradients and flags are put back, too.
            others: containers besides those of the model whose content is put back.

        Returns:
            A context manager; it gives the copies of buffers and attributes that the forward may write to.
        """
        return AppliedState(self, journal, grad, parameters, others)


class AppliedState:
    """See :meth:`ForwardState.applied`."""

    def __init__(
        self,
        state: ForwardState,
        journal: Journal,
        grad: bool,
        parameters: Iterable[Tensor],
        others: Iterable[Any],
    ) -> None:
        self._state = state
        self._journal = journal
        self._grad = grad
        self._parameters = parameters
        self._others = others

    def __enter__(self) -> list[Tensor]:
        state, journal = self._state, self._journal
        journal.restore()  # what an interrupt has left
        own = _OWN.get()
        journal.note(lambda: _OWN.set(own))
        journal.note(RandomState.take(state.randomness.devices).give)
        journal.note(Belongings(state.modules, self._parameters, self._others, state.inventories).restore)
        journal.note(Surroundings(state.autocast).restore)  # the first to run: modes see nothing of the others
        _OWN.set(True)
        state.randomness.give()
        copies = state.earlier.give()
        parametrize._cache_enabled, parametrize._cache = 0, {}
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        for kind, (enabled, dtype) in state.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch._C._set_grad_enabled(self._grad)
        return copies

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._journal.restore()


def _accelerators(modules: Sequence[nn.Module]) -> list[torch.device]:
    """The devices besides the CPU that hold parameters or buffers."""
    found = {
        tensor.device: None
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    }
    return [device for device in found if device.type not in ("cpu", "meta")]
