"""Everything besides parameters and inputs that a forward depends on: taken at one forward, given back for a second.

The second forward must see the same random numbers, the same autocast and the same buffers and modes as the first,
and leave no trace: random states and modes are put back, buffers are swapped for copies and never written.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
    training: list[tuple[nn.Module, bool]]
    buffers: list[tuple[nn.Module, str, Tensor]]

    @classmethod
    def take(cls, model: nn.Module) -> ForwardState:
        """The state now. Buffers are copied; a buffer that several modules share, once."""
        modules = list(model.modules())
        devices = _accelerators(modules)
        kinds = dict.fromkeys(["cpu", *(device.type for device in devices)])
        copies: dict[int, Tensor] = {}
        buffers: list[tuple[nn.Module, str, Tensor]] = []
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                    buffers.append((module, name, copies[id(buffer)]))
        return cls(
            randomness=RandomState.take(devices),
            autocast={kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
            training=[(module, module.training) for module in modules],
            buffers=buffers,
        )

    def without_autocast(self, cast: Callable[[Tensor], Tensor]) -> ForwardState:
        """The same with autocast off and the buffers cast."""
        copies = {id(buffer): cast(buffer) for _, _, buffer in self.buffers}  # shared ones stay so
        return replace(
            self,
            autocast={kind: (False, dtype) for kind, (_, dtype) in self.autocast.items()},
            buffers=[(module, name, copies[id(buffer)]) for module, name, buffer in self.buffers],
        )

    @contextmanager
    def applied(self, *, grad: bool = False) -> Iterator[None]:
        """Give this state back for the duration of a ``with`` block, as often as wanted.

        Outside nothing has changed afterwards, also if the block raises. Autocast's cache of casted weights is off
        inside, since it may hold old weights.

        Args:
            grad: record gradients inside.
        """
        now = RandomState.take(self.randomness.devices)
        modes = [(module, module.training) for module, mode in self.training if module.training != mode]
        originals = [(module, name, module._buffers.get(name)) for module, name, _ in self.buffers]
        with ExitStack() as stack:
            stack.callback(_OWN.reset, _OWN.set(True))
            stack.callback(now.give)
            for module, name, original in originals:
                stack.callback(module._buffers.__setitem__, name, original)
            for module, mode in modes:
                stack.callback(setattr, module, "training", mode)
            self.randomness.give()
            fresh: dict[int, Tensor] = {}  # the forward may write to them
            for module, name, copy in self.buffers:
                if id(copy) not in fresh:
                    fresh[id(copy)] = copy.clone()
                module._buffers[name] = fresh[id(copy)]
            for module, mode in self.training:
                if module.training != mode:
                    module.training = mode
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, (enabled, dtype) in self.autocast.items():
                # With autocast off the dtype is not used, and some defaults (float16 on CPU) would only warn.
                options: dict[str, Any] = {"dtype": dtype} if enabled else {}
                stack.enter_context(torch.autocast(kind, enabled=enabled, cache_enabled=False, **options))
            yield


def _accelerators(modules: Sequence[nn.Module]) -> list[torch.device]:
    """The devices besides the CPU that hold parameters or buffers."""
    found: dict[torch.device, None] = {}
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            found.update((t.device, None) for t in tensors.values() if t is not None)
    return [device for device in found if device.type not in ("cpu", "meta")]
