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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["DynamoSettings", "drop_unguarded"]

_GRAPHS = 4
"""Graphs where there would be one: without taps, with them, the same without gradient, and of models without hooks."""

_TAPS = str(Path(__file__).parent)  # a hook that is compiled by itself is given the module and does not call it
_MODULE = re.compile(r"^___check_(?:type|obj)_id\((.*), (\d+)\)")


class DynamoSettings:
    """Settings of Dynamo that a monitor needs.

    Guards on hooks stay when it is closed: graphs of unwatched models that were made without them would have to be
    made again for the next monitor, in every run of a sweep. They change no graph.

    Args:
        others: of the other monitors: the last one that releases them puts back the limit that the first one found.
    """

    def __init__(self, others: Iterable[DynamoSettings]) -> None:
        config = _dynamo().config
        config.skip_nnmodule_hook_guards = False
        first = next(iter(others), None)
        self._before: int = config.recompile_limit if first is None else first._before
        self._ours = _GRAPHS * self._before
        if config.recompile_limit == self._before:
            config.recompile_limit = self._ours

    def release(self) -> None:
        """Put the limit back, unless somebody else has changed it meanwhile."""
        config = _dynamo().config
        if config.recompile_limit == self._ours:
            config.recompile_limit = self._before


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
