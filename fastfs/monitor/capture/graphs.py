"""Graphs that torch.compile has cached, and that know of no hooks.

Dynamo keeps graphs by code object, so models of one class share them, and by default it does not check whether modules
without hooks still have none. A graph that was made without a monitor would run in a watched model, past its taps.
So while a monitor is attached Dynamo is told to guard on hooks, and graphs that were made before without such
guards are dropped: of the code objects whose graphs a watched module is part of, and of no others.

Graphs with taps need nothing of the kind. Their guards fail once the taps are gone.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["DynamoSettings", "drop_unguarded"]

_GRAPHS = 3
"""Graphs of a watched model where there would be one: on, off, and of models of its class that nobody watches."""

_TAPS = str(Path(__file__).parent)  # a hook that is compiled by itself is given the module and does not call it
_MODULE = re.compile(r"^___check_(?:type|obj)_id\((.*), (\d+)\)")


class DynamoSettings:
    """Settings of Dynamo as long as monitors are attached.

    Args:
        others: of the other monitors: the last one that releases them puts back what the first one found.
    """

    def __init__(self, others: Iterable[DynamoSettings]) -> None:
        config = _dynamo().config
        first = next(iter(others), None)
        if first is None:
            self._before: Mapping[str, Any] = {
                "skip_nnmodule_hook_guards": config.skip_nnmodule_hook_guards,
                "recompile_limit": config.recompile_limit,
            }
        else:
            self._before = first._before
        limit = self._before["recompile_limit"]
        self._ours = {"skip_nnmodule_hook_guards": False, "recompile_limit": _GRAPHS * limit}
        for name, ours in self._ours.items():
            if getattr(config, name) == self._before[name]:
                setattr(config, name, ours)

    def release(self) -> None:
        """Put the settings back, but those that somebody else has changed meanwhile."""
        config = _dynamo().config
        for name, before in self._before.items():
            if getattr(config, name) == self._ours[name]:
                setattr(config, name, before)


def drop_unguarded(model: nn.Module, watched: Sequence[nn.Module]) -> int:
    """Drop graphs in which a watched module may run whatever hooks it has. They are made again when they are needed.

    Args:
        model: that the loop calls.
        watched: the modules with hooks.

    Returns:
        Of how many code objects.
    """
    dynamo = _dynamo()
    classes = {type(module) for module in watched}
    forwards = {code for cls in classes if (code := getattr(cls.forward, "__code__", None)) is not None}
    # Layers of torch are in many models: of theirs a graph has a class, too, that is not torch's.
    own = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    hooked = {*map(id, classes), *map(id, watched)}
    holders = {*map(id, own or classes), *map(id, watched)}
    dropped = 0
    with dynamo.convert_frame.compile_lock:
        for reference in list(dynamo.convert_frame.input_codes.seen):
            code = reference()
            if code is None or code.co_filename.startswith(_TAPS):
                continue
            if _has_unguarded(code, hooked, holders, code in forwards):
                dynamo.eval_frame.reset_code(code)
                dropped += 1
    return dropped


def _has_unguarded(code: types.CodeType, hooked: set[int], holders: set[int], is_forward: bool) -> bool:
    entries = _dynamo().eval_frame._debug_get_cache_entry_list(code)
    return any(_is_unguarded(entry.guard_manager.code_parts, hooked, holders, is_forward) for entry in entries)


def _is_unguarded(guards: Sequence[str], hooked: set[int], holders: set[int], is_forward: bool) -> bool:
    """Whether a graph has a hooked module in it and no guard on its hooks."""
    found = {match[1]: int(match[2]) for guard in guards if (match := _MODULE.match(guard))}
    if holders.isdisjoint(found.values()):
        return False
    for source, number in found.items():
        # The hooks of the module whose forward it is are called outside of the graph.
        if number in hooked and not (is_forward and source == "L['self']"):
            hooks = f"{source}._forward_hooks"
            if not any(hooks in guard for guard in guards):
                return True
    return False


def _dynamo() -> Any:
    import torch._dynamo.convert_frame  # loaded with the first optimizer; not with torch

    return torch._dynamo
