"""A scan that compares with the last one finds the same as a walk from scratch, whatever changed in between."""

from __future__ import annotations

import gc
import random
import weakref
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from torch import nn

from fastfs._network.inventory import INTERNAL, ITERATORS, Inventory, Slots, same


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Both(Slotted):  # has both a dictionary and slots
    pass


def value(rng: Any, depth: int = 0) -> Any:
    """Return a random object that a module may hold."""
    plain = [
        lambda: rng.randrange(5),
        lambda: "text",
        lambda: torch.zeros(2),
        lambda: torch.zeros(2, requires_grad=True) * 2,
        lambda: nn.Parameter(torch.zeros(2)),
        lambda: torch.Generator(),
        lambda: random.Random(1),
        lambda: iter([1, 2]),
        lambda: len,
        lambda: frozenset({1}),
    ]
    if depth > 3:
        return rng.choice(plain)()
    deeper = [
        lambda: [value(rng, depth + 1) for _ in range(rng.randrange(3))],
        lambda: {str(i): value(rng, depth + 1) for i in range(rng.randrange(3))},
        lambda: OrderedDict(a=value(rng, depth + 1)),
        lambda: deque([value(rng, depth + 1)]),
        lambda: {1, 2},
        lambda: (value(rng, depth + 1), [value(rng, depth + 1)]),
        lambda: Plain(value(rng, depth + 1)),
        lambda: Slotted(value(rng, depth + 1)),
        lambda: Both(value(rng, depth + 1)),
    ]
    return rng.choice([*plain, *deeper])()


def containers(module: Any, rng: Any) -> Any:
    """Return containers and objects below a module, found by an independent walk."""
    found, open_ = [], [module]
    while open_:
        each = open_.pop()
        found.append(each)
        if isinstance(each, dict):
            inner = list(each.values())
        elif isinstance(each, (list, tuple, deque)):
            inner = list(each)
        elif isinstance(each, Slotted):
            inner = [each.held, *getattr(each, "__dict__", {}).values()]
        else:
            inner = list(each.__dict__.values())
        open_ += [x for x in inner if isinstance(x, (dict, list, tuple, deque, Plain, Slotted))]
    rng.shuffle(found)
    return found


def change(module: Any, rng: Any) -> None:
    """Make one random change to what a module holds."""
    for each in containers(module, rng):
        if isinstance(each, nn.Module):
            choice = rng.randrange(5)
            if choice == 0:
                object.__setattr__(each, "extra", value(rng))
            elif choice == 1:
                each.register_buffer("moved", torch.zeros(rng.randrange(1, 3)))
            elif choice == 2:
                each.register_forward_hook(lambda *_: None)
            elif choice == 3:
                each.weight.note = value(rng)
            else:
                each.training = not each.training
        elif isinstance(each, Plain):
            if rng.random() < 0.3:
                each.__dict__ = {"value": value(rng), "other": 1}
            else:
                each.value = value(rng)
        elif isinstance(each, Slotted):
            each.held = value(rng)
        elif isinstance(each, dict):
            if each is module.__dict__ or any(each is module.__dict__.get(name) for name in INTERNAL):
                continue
            each["new"] = value(rng)
        elif isinstance(each, list):
            each.append(value(rng))
        elif isinstance(each, deque):
            each.appendleft(value(rng))
        else:
            continue
        return


def key_of(holder: Any) -> Any:
    """Return a stable key: every scan creates new wrappers around slots."""
    return ("slots", id(holder.value)) if isinstance(holder, Slots) else ("container", id(holder))


def found(held: Any) -> tuple[Any, ...]:
    """Return contents by container, without containers that are no longer referenced."""
    result = {}
    for holder, content in held.contents:
        result[key_of(holder)] = content
    return result, {id(holder) for holder in held.empty}


def is_copied(held: Any) -> Any:
    return isinstance(held, ITERATORS) or (isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter))


def values_of(content: Any) -> Any:
    return content.values() if isinstance(content, dict) else content


@pytest.mark.parametrize("without", [frozenset(), INTERNAL], ids=["everything", "state"])
@pytest.mark.parametrize("seed", range(40))
def test_a_later_scan_finds_what_a_first_one_finds(seed: Any, without: Any) -> None:
    rng = random.Random(seed)
    modules = [nn.Linear(2, 2) for _ in range(3)]
    for module in modules:
        module.extra = value(rng)
    shared = [value(rng)]
    modules[0].shared = modules[2].shared = shared
    others = [{"state": value(rng)}]
    known = Inventory(without)
    for _ in range(12):
        for _ in range(rng.randrange(3)):
            change(rng.choice(modules), rng)
        later, first = known.scan(modules, others), Inventory(without).scan(modules, others)
        (filled, empty), (wanted, wanted_empty) = found(later), found(first)
        assert wanted.keys() <= filled.keys()
        assert wanted_empty <= empty
        for key, content in wanted.items():
            assert same(content, filled[key])
        assert set(map(id, later.streams)) == set(map(id, first.streams))
        assert set(map(id, later.generators)) == set(map(id, first.generators))
        copied = {key_of(holder) for holder, content in first.with_tensors if any(map(is_copied, values_of(content)))}
        assert copied <= {key_of(holder) for holder, _ in later.with_tensors}


def test_what_has_not_changed_is_not_walked_again() -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(5)])
    inventory = Inventory()
    for _ in range(5):
        inventory.scan(list(model.modules()))
    assert inventory.walks == 1
    for count in range(5):
        model[2].count = count
        inventory.scan(list(model.modules()))
    assert inventory.walks <= 3  # afterwards the counter is inspected in every scan


def test_activations_are_not_kept_alive() -> None:
    layer = nn.Linear(2, 2)
    inventory = Inventory()
    layer.saved = Plain([layer(torch.ones(1, 2))])
    last = weakref.ref(layer.saved.value[0])
    inventory.scan([layer])
    del layer.saved
    gc.collect()
    assert last() is None


def test_restore() -> None:
    layer = nn.Linear(2, 2)
    layer.cache, layer.pair, layer.slotted = {}, [1, 2], Slotted(1)
    held = Inventory().scan([layer])
    layer.cache["new"], layer.added, layer.slotted.held = 1, 2, 3
    layer.pair.reverse()
    for _ in range(2):
        held.restore()
        assert (layer.cache, layer.pair, layer.slotted.held, hasattr(layer, "added")) == ({}, [1, 2], 1, False)
