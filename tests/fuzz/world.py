"""A picture of everything that training owns: what must be the same, bit by bit, with a monitor and without."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import sys
import types
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fastfs._network.state import own_forward_runs

__all__ = ["Picture", "differences", "global_state", "picture", "reset_switches", "switches"]

Picture = dict[str, Any]
"""Path -> what is there, in a form that compares by ``==``."""

_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_compiled_call_impl")
_OPTIMIZER = ("state", "param_groups", "defaults")


def picture(roots: Mapping[str, Any], *, hooks: bool = False) -> Picture:
    """Bits, dtypes, layouts, flags and sharing of all tensors that the roots reach, and values of everything else.

    Args:
        roots: name -> module, optimizer, scaler, generator, container, object with attributes.
        hooks: how many hooks there are counts, too; a monitor that is attached has some.
    """
    painter = _Painter(hooks)
    for name, root in roots.items():
        painter.paint(name, root)
    return painter.out


def global_state() -> Picture:
    """Generators and switches of the process and thread."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return {
        "torch generator": bits(torch.get_rng_state()),
        "random": random.getstate(),
        "numpy generator": (numpy[0], numpy[1].tobytes(), *numpy[2:]),
        **switches(),
    }


def switches() -> Picture:
    """What a forward of the monitor's own may turn, push or enter, and has to leave as it was."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    kernels = ("mkldnn", "flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp", "overrideable_sdp", "cudnn")
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": (torch.is_autocast_cache_enabled(), nesting),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "kernels": tuple(getattr(torch._C, f"_get_{kernel}_enabled")() for kernel in kernels),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "forward-mode level": torch.autograd.forward_ad._current_level,
        "torch.func level": torch._C._functorch.maybe_current_level(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "__torch_function__": torch._C._get_torch_function_state(),  # type: ignore[attr-defined]
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        "multithreading": torch._C._is_multithreading_enabled(),
        "warning filters": repr(warnings.filters),
        "parametrize cache": (parametrize._cache_enabled, len(parametrize._cache)),
        "a forward of the monitor's own": own_forward_runs(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "trace": (sys.gettrace() is None, sys.getprofile() is None),
    }


def reset_switches() -> None:
    """What :func:`switches` tells, as a process has it at its start: a fault that left one is told once, not by all."""
    torch._C._set_torch_function_state(torch._C._TorchFunctionState.ENABLED)  # type: ignore[attr-defined]
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_cache_enabled(True)
    while torch.autocast_increment_nesting() > 1:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    torch.autocast_decrement_nesting()
    while torch.autograd.forward_ad._current_level >= 0:
        torch.autograd.forward_ad.exit_dual_level()
    while torch._C._len_torch_dispatch_stack():
        torch.utils._python_dispatch._pop_mode()
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    torch.backends.mha.set_fastpath_enabled(True)
    torch._C._set_mkldnn_enabled(True)
    for kernel in ("flash", "mem_efficient", "math", "cudnn", "overrideable"):
        getattr(torch._C, f"_set_sdp_use_{kernel}")(True)
    parametrize._cache_enabled = 0
    parametrize._cache.clear()


def differences(first: Picture, second: Picture, most: int = 5) -> list[str]:
    """The first few paths at which two pictures are not the same."""
    found = []
    for path in itertools.chain(first, (path for path in second if path not in first)):
        a, b = first.get(path, "missing"), second.get(path, "missing")
        if a != b:
            found.append(f"{path}: {_short(a)} != {_short(b)}")
            if len(found) == most:
                break
    return found


def bits(tensor: Tensor) -> bytes:
    """The content, also of NaN."""
    dense = tensor.detach().resolve_conj().resolve_neg()
    dense = dense.to_dense() if dense.layout != torch.strided else dense
    # Of a copy: a storage that NumPy has seen can no longer be resized.
    return dense.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def _short(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[-1], bytes):
        dtype = value[1] if isinstance(value[1], torch.dtype) else torch.uint8
        content = torch.frombuffer(bytearray(value[-1]), dtype=dtype).tolist()[:4] if value[-1] else []
        return f"{value[:-1]} {content}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes, {zlib.crc32(value):08x}"
    return repr(value)[:200]


class _Painter:
    def __init__(self, hooks: bool) -> None:
        self.out: Picture = {}
        self._hooks = hooks
        self._seen: dict[int, str] = {}
        self._storages: dict[int, str] = {}
        self._alive: list[Any] = []  # ids must stay theirs

    def paint(self, path: str, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)):
            self.out[path] = repr(value) if isinstance(value, float) else value
            return
        if id(value) in self._seen:
            self.out[path] = f"is {self._seen[id(value)]}"
            return
        self._seen[id(value)] = path
        self._alive.append(value)
        if isinstance(value, Tensor):
            self._tensor(path, value)
        elif isinstance(value, np.ndarray):
            self.out[path] = (value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, torch.Generator):
            self.out[path] = bits(value.get_state())
        elif isinstance(value, np.random.Generator):
            self.out[path] = repr(value.bit_generator.state)
        elif isinstance(value, random.Random):
            self.out[path] = value.getstate()
        elif isinstance(value, Mapping):
            self.out[path] = (type(value).__name__, len(value))
            for number, (key, item) in enumerate(value.items()):
                plain = isinstance(key, (str, int, tuple))
                self.paint(f"{path}[{key!r}]" if plain else f"{path}[key {number}]", item)
        elif isinstance(value, (list, tuple, deque)):
            self.out[path] = (type(value).__name__, len(value))
            for number, item in enumerate(value):
                self.paint(f"{path}[{number}]", item)
        elif isinstance(value, (set, frozenset)):
            self.out[path] = (type(value).__name__, sorted(map(repr, value)))
        else:
            self._object(path, value)

    def _tensor(self, path: str, value: Tensor) -> None:
        layout = value.stride() if value.layout == torch.strided else value.layout
        flags = (type(value).__name__, value.requires_grad, value.is_leaf)
        if torch.nn.parameter.is_lazy(value):
            self.out[path] = flags
            return
        self.out[path] = (tuple(value.shape), value.dtype, layout, flags, bits(value))
        if value.layout == torch.strided and value.numel():
            storage = value.untyped_storage().data_ptr()
            self.out[f"{path} storage"] = self._storages.setdefault(storage, path)
        if value.is_leaf and value.grad is not None:
            self.paint(f"{path}.grad", value.grad)
        if self._hooks:
            kinds = (value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None))
            self.out[f"{path} hooks"] = [len(hooks or ()) for hooks in kinds]
        for name, item in vars(value).items():
            self.paint(f"{path}.{name}", item)

    def _object(self, path: str, value: Any) -> None:
        self.out[path] = type(value).__qualname__
        if isinstance(value, functools.partial):
            self.paint(f"{path} partial", [value.func, value.args, value.keywords])
        elif isinstance(value, (types.FunctionType, types.MethodType)):
            self.out[path] = value.__qualname__
        elif isinstance(value, types.GeneratorType):
            names = {} if value.gi_frame is None else value.gi_frame.f_locals
            self.out[path] = repr({name: x for name, x in names.items() if isinstance(x, (int, float))})
        elif isinstance(value, RemovableHandle):
            pass  # numbered over the whole process
        elif isinstance(value, Iterator):
            self.out[path] = repr(value) if isinstance(value, itertools.count) else type(value).__qualname__
        else:
            for name, item in self._attributes(value):
                self.paint(f"{path}.{name}", item)

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.optim.Optimizer):
            yield from ((name, getattr(value, name)) for name in _OPTIMIZER)
            if self._hooks:
                yield from ((name, len(hooks)) for name, hooks in vars(value).items() if name.endswith("_hooks"))
            return
        slots = [
            name for base in type(value).__mro__ for name in getattr(base, "__slots__", ()) if hasattr(value, name)
        ]
        names = [*getattr(value, "__dict__", {}), *(name for name in slots if not name.startswith("__"))]
        for name in names:
            item = getattr(value, name)
            if name == "step" and not self._hooks and hasattr(value, "param_groups"):
                continue  # a monitor's own, on a wrapper that torch calls no hooks of
            if isinstance(value, nn.Module) and name.endswith(_HOOKS):
                if self._hooks:
                    yield name, len(item or ())
            elif not (dataclasses.is_dataclass(value) and name.startswith("__")):
                yield name, item
