"""The state besides parameters and inputs that a forward depends on, captured at one forward and applied to a second.

The second forward has to see the same random numbers, autocast settings, buffers, attributes and modes as the first and
must leave no trace: all of them are restored, and buffers are replaced by copies and never written to.
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

from fastfs._network.fully_sharded import GatheredState
from fastfs._network.global_state import GlobalState
from fastfs._network.guard import storages
from fastfs._network.inventory import Inventories
from fastfs._network.journal import Journal
from fastfs._network.module_contents import ContentsCopy, ModuleContents

__all__ = ["ForwardState", "RandomState", "own_forward_runs"]

_OWN: ContextVar[bool] = ContextVar("fastfs_own_forward", default=False)


def own_forward_runs() -> bool:
    """Whether an extra forward is running (:meth:`ForwardState.applied`), as opposed to a forward of training."""
    return _OWN.get()


@dataclass(frozen=True)
class RandomState:
    """States of the global generators: torch on CPU and accelerators, Python's ``random``, and NumPy's if loaded."""

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
        """Whether torch's generators have been used since; synchronizes with the device."""
        return not torch.equal(self.cpu, torch.get_rng_state()) or not all(
            torch.equal(state, torch.get_device_module(device).get_rng_state(device))
            for device, state in self.devices.items()
        )

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@dataclass(frozen=True)
class ForwardState:
    """The state around one forward of a model; see :meth:`applied`."""

    randomness: RandomState
    autocast: dict[str, tuple[bool, torch.dtype]]
    modules: list[nn.Module]
    contents: ContentsCopy
    inventories: Inventories = field(default_factory=Inventories)

    @classmethod
    def take(
        cls, model: nn.Module, parameters: Iterable[Tensor] = (), inventories: Inventories | None = None
    ) -> ForwardState:
        """Capture the current state, with copies of buffers and of tensors in attributes.

        Args:
            model: the model.
            parameters: trained tensors besides the model's own parameters; never copied.
            inventories: inventories of the model from earlier states, which make this faster.

        Returns:
            The state.
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
            contents=ContentsCopy(modules, owned, inventories),
            inventories=inventories,
        )

    def without_autocast(self, cast: Callable[[Tensor], Tensor]) -> ForwardState:
        """Return the state with autocast off and the buffers cast."""
        return replace(
            self,
            autocast={kind: (False, dtype) for kind, (_, dtype) in self.autocast.items()},
            contents=self.contents.cast(cast),
        )

    def applied(
        self,
        journal: Journal,
        *,
        grad: bool = False,
        parameters: Iterable[Tensor] = (),
        others: Iterable[Any] = (),
    ) -> AppliedState:
        """Apply this state for the duration of a ``with`` block; may be called any number of times.

        Nothing outside is changed afterwards, even if the block raises; after an interrupt, once the journal has been
        restored. Inside, caches of cast weights (autocast) and of parametrizations are off because they may hold old
        weights, and so are fused inference paths of ``nn.MultiheadAttention``, so that the arithmetic is that of
        training.

        Args:
            journal: journal of the caller, who restores it after an interrupt.
            grad: whether to record gradients.
            parameters: trained tensors besides the model's own whose gradients and flags are restored too.
            others: containers besides those of the model whose content is restored.

        Returns:
            A context manager. It yields the copies of buffers and attributes that the forward may write to.
        """
        return AppliedState(self, journal, grad, parameters, others)


class AppliedState:
    """The context manager of :meth:`ForwardState.applied`."""

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
        journal.restore()  # changes left by an interrupt
        own = _OWN.get()
        journal.note(lambda: _OWN.set(own))
        journal.note(RandomState.take(state.randomness.devices).restore)
        journal.note(ModuleContents(state.modules, self._parameters, self._others, state.inventories).restore)
        journal.note(GatheredState(state.modules).restore)  # before the modules, which it gives other parameters
        journal.note(GlobalState(state.autocast).restore)  # restored first, so that modes do not see the others
        _OWN.set(True)
        state.randomness.restore()
        copies = state.contents.load()
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
    """Return the devices other than the CPU that hold parameters or buffers."""
    found = {
        tensor.device: None
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    }
    return [device for device in found if device.type not in ("cpu", "meta")]
