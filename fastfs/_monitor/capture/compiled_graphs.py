"""Handles graphs that torch.compile has cached without guards on hooks.

Dynamo caches graphs by code object, so that models of one class share them, and by default it does not guard on the
absence of hooks. A graph that was compiled without a monitor would therefore run in a watched model and skip its taps.
While a monitor is attached, Dynamo is configured to guard on hooks, and earlier graphs without such guards are dropped
from those code objects whose graphs contain a watched module.

Graphs with taps need no such treatment: their guards fail once the taps are removed.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["DynamoSettings", "drop_unguarded"]

_GRAPHS = 4
"""Graphs per graph of an unwatched model: with and without taps, without gradient, and of models without hooks."""

_TAPS = str(Path(__file__).parent)  # hooks compiled by themselves; they receive the module and do not call it
_MODULE = re.compile(r"^___check_(?:type|obj)_id\((.*), (\d+)\)")


class DynamoSettings:
    """Configures Dynamo for a monitor.

    Guards on hooks stay enabled after the monitor is closed. Without them, every run of a sweep would have to
    recompile graphs of unwatched models for the next monitor. They change no graph.

    Args:
        others: The settings of the other attached monitors. The last one to be released restores the recompile limit
            that the first one found.
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
        """Restores the recompile limit, unless it was changed elsewhere in the meantime."""
        config = _dynamo().config
        if config.recompile_limit == self._ours:
            config.recompile_limit = self._before


def drop_unguarded(model: nn.Module, watched: Sequence[nn.Module]) -> int:
    """Drops graphs that contain a watched module without a guard on its hooks. Dynamo recompiles them on demand.

    Args:
        model: The module that the training loop calls.
        watched: The modules with hooks.

    Returns:
        The number of code objects whose graphs were dropped.
    """
    dynamo = _dynamo()
    classes = {type(module) for module in watched}
    forwards = {code for cls in classes if (code := getattr(cls.forward, "__code__", None)) is not None}
    # Modules of torch occur in many models; a graph of this model also contains a class from outside of torch.
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
    return any(_is_unguarded(list(_guards(entry.guard_manager.root)), hooked, holders, is_forward) for entry in entries)


def _guards(manager: Any) -> Iterator[str]:
    """Yields all guards below a manager. Its ``code_parts`` lack those of modules over which a forward iterates."""
    for guard in manager.get_leaf_guards():
        yield from (part.split("#")[0].rstrip() for part in guard.verbose_code_parts())
    pairs = manager.get_key_value_managers().values() if hasattr(manager, "get_key_value_managers") else ()
    for child in chain(manager.get_child_managers(), *pairs):
        if child is not None:
            yield from _guards(child)


def _is_unguarded(guards: Sequence[str], hooked: set[int], holders: set[int], is_forward: bool) -> bool:
    """Returns whether a graph contains a hooked module without a guard on its hooks."""
    found = {match[1]: int(match[2]) for guard in guards if (match := _MODULE.match(guard))}
    if holders.isdisjoint(found.values()):
        return False
    for source, number in found.items():
        # The hooks of the module whose forward was compiled are called outside of the graph.
        if number in hooked and not (is_forward and source == "L['self']"):
            hooks = f"{source}._forward_hooks"
            if not any(hooks in guard for guard in guards):
                return True
    return False


def _dynamo() -> Any:
    import torch._dynamo.convert_frame  # slow to import; loaded with the first optimizer, not with torch

    return torch._dynamo
