"""Snapshot of the thread-local and process-wide settings of torch and Python that a forward may change.

Context managers restore these settings themselves, unless an interrupt arrives between two of their bytecodes. A
snapshot taken before the first context manager is entered restores all settings at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.utils.parametrize as parametrize
import torch.overrides
import torch.utils._python_dispatch as python_dispatch

__all__ = ["GlobalState"]

_FLAGS = tuple(name for name in vars(python_dispatch) if name.startswith("_is_in_") and "mode" in name)
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn", "overrideable")

Setting = tuple[Callable[[Any], object], Any]
"""The function that restores a value, and the value."""


class GlobalState:
    """A snapshot of the current settings. :meth:`restore` may be called any number of times.

    Args:
        devices: device types whose autocast settings are included.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._devices = tuple(devices)
        self._settings: list[Setting] = [
            (torch._C._set_torch_function_state, torch._C._get_torch_function_state()),  # type: ignore[attr-defined]
            (torch._C._set_grad_enabled, torch.is_grad_enabled()),
            (torch.set_default_dtype, torch.get_default_dtype()),
            (torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()),
            (torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled()),
            (torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()),
            *_attention(),
        ]
        for device in self._devices:
            self._settings.append((_autocast_enabled(device), torch.is_autocast_enabled(device)))
            self._settings.append((_autocast_dtype(device), torch.get_autocast_dtype(device)))
        self._nesting = _autocast_nesting()
        self._level = forward_ad._current_level
        self._dispatch_modes = torch._C._len_torch_dispatch_stack()
        self._function_modes = torch._C._len_torch_function_stack()
        self._flags = {name: getattr(python_dispatch, name) for name in _FLAGS}
        self._cache = parametrize._cache_enabled, parametrize._cache
        self._filters, self._showwarning = warnings.filters, warnings.showwarning
        self._filter_list = list(warnings.filters)
        self._stance = _stance()

    def restore(self) -> None:
        """Restore all settings and pop modes that were pushed since."""
        self._pop_modes()
        self._leave_forward_mode()
        for put, value in self._settings:
            put(value)
        while _autocast_nesting() > self._nesting:
            torch.autocast_decrement_nesting()
        parametrize._cache_enabled, parametrize._cache = self._cache
        if warnings.filters is not self._filters or list(warnings.filters) != self._filter_list:
            warnings.filters = self._filters
            warnings.filters[:] = self._filter_list  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        warnings.showwarning = self._showwarning
        if self._stance is not None and _stance() is not self._stance:
            sys.modules["torch._dynamo.eval_frame"]._set_stance(self._stance)

    def _pop_modes(self) -> None:
        while torch._C._len_torch_function_stack() > self._function_modes:
            torch.overrides._pop_mode()
        while torch._C._len_torch_dispatch_stack() > self._dispatch_modes:
            python_dispatch._pop_mode()
        for name, value in self._flags.items():
            setattr(python_dispatch, name, value)
        tell = getattr(python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
        if tell is not None:
            tell(self._flags.get("_is_in_any_mode_without_ignore_compile_internals", False))

    def _leave_forward_mode(self) -> None:
        """Leave dual levels that were entered since the snapshot."""
        while forward_ad._current_level > self._level:
            level = forward_ad._current_level
            forward_ad._current_level = level - 1
            _exit_dual_level(level)
        if self._level == -1:  # an interrupt may arrive after torch entered the level and before Python recorded it
            _exit_dual_level(0)


def _exit_dual_level(level: int) -> None:
    try:
        torch._C._exit_dual_level(level)
    except RuntimeError as error:  # the level has not been entered
        if "not" not in str(error):
            raise


def _attention() -> list[Setting]:
    found: list[Setting] = []
    for name in _ATTENTION:
        put = getattr(torch._C, f"_set_sdp_use_{name}", None)
        get = getattr(torch._C, f"_get_{name}_sdp_enabled", None)
        if put is not None and get is not None:
            found.append((put, get()))
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    if order is not None:
        found.append((torch._C._set_sdp_priority_order, [int(backend) for backend in order()]))
    return found


def _autocast_enabled(device: str) -> Callable[[bool], None]:
    return lambda value: torch.set_autocast_enabled(device, value)


def _autocast_dtype(device: str) -> Callable[[torch.dtype], None]:
    return lambda value: torch.set_autocast_dtype(device, value)


def _autocast_nesting() -> int:
    # A single C call, so that no interrupt can arrive between the increment and the decrement.
    _, nesting = map(methodcaller("__call__"), (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return int(nesting)


def _stance() -> Any:
    """Return the current stance of torch.compile, or None if Dynamo is not loaded."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return None if eval_frame is None else eval_frame._stance
