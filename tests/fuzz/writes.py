"""Ways in which a forward writes to what training owns, and modules that are generated from them."""

from __future__ import annotations

import dataclasses
import itertools
import random
import types
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CONDITIONS", "IN_PLACE", "MODULE_WRITES", "TARGETS", "Write", "Writing", "random_writes"]

WIDTH = 6


def _foreach(name: str, *values: Any) -> Callable[[Tensor, Tensor], Any]:
    def act(t: Tensor, v: Tensor) -> Any:
        arguments = [[v.expand_as(t).contiguous().to(t.dtype)] if a == "v" else a for a in values]
        return getattr(torch, name)([t], *arguments)

    return act


def _assign(t: Tensor, v: Tensor) -> None:
    t.data = 0.9 * t.data + 0.1 * v


def _setitem(t: Tensor, v: Tensor) -> None:
    t[0] = v.mean()
    t[..., 1:3] *= 0.9


def _numpy(t: Tensor, _v: Tensor) -> None:
    t.detach().numpy()[...] *= 0.9


def _dlpack(t: Tensor, _v: Tensor) -> None:
    torch.utils.dlpack.from_dlpack(t.detach()).mul_(0.9)


def _storage(t: Tensor, _v: Tensor) -> None:
    """Freed and filled again, as sharding does."""
    storage, old = t.untyped_storage(), 0.9 * t.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    t.data.copy_(old)


def _vector(t: Tensor, _v: Tensor) -> None:
    parameters = [t]
    nn.utils.vector_to_parameters(0.9 * nn.utils.parameters_to_vector(parameters), parameters)


def _spread(t: Tensor, v: Tensor) -> Tensor:
    return v.expand_as(t).to(t.dtype)


IN_PLACE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mul_": lambda t, v: t.mul_(0.9),
    "add_": lambda t, v: t.add_(v, alpha=0.01),
    "operator -=": lambda t, v: t.__isub__(0.01 * _spread(t, v)),
    "copy_": lambda t, v: t.copy_(0.9 * t + 0.1 * _spread(t, v)),
    "lerp_": lambda t, v: t.lerp_(_spread(t, v), 0.1),
    "index_put_": lambda t, v: t.index_put_((torch.tensor([1, 2]),), _spread(t, v)[:2]),
    "index_add_": lambda t, v: t.index_add_(0, torch.tensor([0, 3]), 0.1 * _spread(t, v)[:2]),
    "index_copy_": lambda t, v: t.index_copy_(0, torch.tensor([4]), _spread(t, v)[:1].clone()),
    "index_fill_": lambda t, v: t.index_fill_(0, torch.tensor([5]), 0.5),
    "scatter_": lambda t, v: t.scatter_(0, torch.zeros_like(t, dtype=torch.long), 0.3),
    "zero_": lambda t, v: t.zero_(),
    "fill_": lambda t, v: t.fill_(v.mean()),
    "clamp_": lambda t, v: t.clamp_(-0.2, 0.2),
    "masked_fill_": lambda t, v: t.masked_fill_(t > 0.1, 0.1),
    "addcmul_": lambda t, v: t.addcmul_(_spread(t, v), _spread(t, v), value=0.01),
    "addcdiv_": lambda t, v: t.addcdiv_(_spread(t, v), torch.ones_like(t), value=0.01),
    "normal_": lambda t, v: t.normal_(),
    "init": lambda t, v: nn.init.uniform_(t, -0.1, 0.1),
    "setitem": _setitem,
    "out= add": lambda t, v: torch.add(t, _spread(t, v), alpha=0.01, out=t),
    "out= mul": lambda t, v: torch.mul(t, torch.tensor(0.9), out=t),
    "_foreach_mul_": _foreach("_foreach_mul_", 0.9),
    "_foreach_add_": _foreach("_foreach_add_", "v"),
    "_foreach_lerp_": _foreach("_foreach_lerp_", "v", 0.1),
    "_foreach_copy_": _foreach("_foreach_copy_", "v"),
    "_foreach_zero_": _foreach("_foreach_zero_"),
    "data =": _assign,
    "data.mul_": lambda t, v: t.data.mul_(0.9),
    "data[...] =": lambda t, v: t.data.__setitem__(..., 0.9 * t.data),
    "detach().mul_": lambda t, v: t.detach().mul_(0.9),
    "detach_view": lambda t, v: t.detach().view(-1)[::2].add_(0.01),
    "view": lambda t, v: t.view(-1)[1:4].mul_(0.5),
    "transposed view": lambda t, v: t.movedim(0, -1).mul_(0.9),
    "unbind": lambda t, v: t.unbind(0)[2].fill_(0.1),
    "as_strided": lambda t, v: t.as_strided((2,), (1,), 0).mul_(0.9),
    "set_": lambda t, v: t.set_(0.9 * t.detach()),
    "numpy": _numpy,
    "dlpack": _dlpack,
    "storage": _storage,
    "vector_to_parameters": _vector,
}


@dataclasses.dataclass
class Held:
    """An object that keeps a tensor."""

    value: Tensor
    count: int = 0


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


TARGETS: dict[str, tuple[Callable[[Writing], Any], bool]] = {
    # name: (the tensor, whether it may be written to after its use in the forward)
    "gain": (lambda m: m.gain, False),
    "weight": (lambda m: m.blocks[0].weight, False),
    "bias": (lambda m: m.blocks[-1].bias, True),
    "shift": (lambda m: m.shift, True),
    "frozen": (lambda m: m.frozen, True),
    "buffer": (lambda m: m.running, True),
    "hidden buffer": (lambda m: m.hidden, True),
    "attribute": (lambda m: m.plain, True),
    "list": (lambda m: m.listed[0], True),
    "dict": (lambda m: m.table["t"], True),
    "deque": (lambda m: m.queue[0], True),
    "dataclass": (lambda m: m.held.value, True),
    "namespace": (lambda m: m.space.value, True),
    "slots": (lambda m: m.slots.value, True),
    "nested": (lambda m: m.nest["a"][0].value, True),
    "foreign": (lambda m: m.foreign(), True),
    "closure": (lambda m: m.closed(), True),
}


def _new_parameter(m: Writing, v: Tensor) -> None:
    m.frozen = nn.Parameter(0.9 * m.frozen.detach() + 0.1 * v, requires_grad=False)


def _state_dict(m: Writing, v: Tensor) -> None:
    m.load_state_dict({"frozen": 0.9 * m.frozen, "running": m.running + 0.1 * v}, strict=False)


def _nested_backward(m: Writing, v: Tensor) -> None:
    with torch.enable_grad():
        m.inner(v[None]).square().mean().backward()


def _inner_step(m: Writing, v: Tensor) -> None:
    _nested_backward(m, v)
    m.inner_optimizer.step()
    m.inner_optimizer.zero_grad()


def _grad_in_place(m: Writing, _v: Tensor) -> None:
    if m.shift.grad is not None:
        m.shift.grad.mul_(0.5)


def _late(m: Writing, _v: Tensor) -> None:
    if not hasattr(m, "late"):
        m.late = nn.Linear(WIDTH, WIDTH)


def _momentum_state(m: Writing, _v: Tensor) -> None:
    for state in m.optimizers[0].state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                value.mul_(0.99)


def _learning_rate(m: Writing, _v: Tensor) -> None:
    m.optimizers[0].param_groups[0]["lr"] *= 0.99


def _tick(m: Writing, _v: Tensor) -> None:
    m.ticks += 1


def _swap(m: Writing, v: Tensor) -> None:
    torch.utils.swap_tensors(m.frozen, nn.Parameter(0.9 * m.frozen.detach() + 0.1 * v, requires_grad=False))


def _pointer(m: Writing, v: Tensor) -> None:
    """A queue of keys, as contrastive learning has it."""
    m.bank[int(m.pointer)] = v
    m.pointer.copy_((m.pointer + 1) % len(m.bank))


MODULE_WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "new Parameter": _new_parameter,
    "setattr buffer": lambda m, v: setattr(m, "running", 0.9 * m.running + 0.1 * v),
    "register_buffer": lambda m, v: m.register_buffer("running", 0.9 * m.running + 0.1 * v),
    "_buffers": lambda m, v: m._buffers.__setitem__("running", 0.9 * m.running + 0.1 * v),
    "load_state_dict": _state_dict,
    "swap_tensors": _swap,
    "view_as_real": lambda m, v: torch.view_as_real(m.phase).mul_(0.9),
    "grad = None": lambda m, v: setattr(m.shift, "grad", None),
    "grad = tensor": lambda m, v: setattr(m.shift, "grad", 0.01 * v.float()),
    "grad in place": _grad_in_place,
    "nested backward": _nested_backward,
    "inner step": _inner_step,
    "optimizer state": _momentum_state,
    "learning rate": _learning_rate,
    "attribute =": lambda m, v: setattr(m, "plain", 0.9 * m.plain + 0.1 * v),
    "object.__setattr__": lambda m, v: object.__setattr__(m, "plain", 0.9 * m.plain + 0.1 * v),
    "list append": lambda m, v: m.listed.append(v.clone()),
    "list setitem": lambda m, v: m.listed.__setitem__(0, 0.9 * m.listed[0] + 0.1 * v),
    "dict update": lambda m, v: m.table.update(t=0.9 * m.table["t"] + 0.1 * v),
    "deque append": lambda m, v: m.queue.append(v.clone()),
    "deque appendleft": lambda m, v: m.queue.appendleft(v.clone()),
    "dataclass =": lambda m, v: setattr(m.held, "value", 0.9 * m.held.value + 0.1 * v),
    "dataclass count": lambda m, v: setattr(m.held, "count", m.held.count + 1),
    "namespace =": lambda m, v: setattr(m.space, "value", 0.9 * m.space.value + 0.1 * v),
    "slots =": lambda m, v: setattr(m.slots, "value", 0.9 * m.slots.value + 0.1 * v),
    "counter": _tick,
    "Counter": lambda m, v: m.counts.update(["calls"]),
    "set": lambda m, v: m.seen.add(m.calls),
    "history": lambda m, v: m.history.append(float(v.mean())),
    "child attribute": lambda m, v: setattr(m.head, "last", v.clone()),
    "tensor attribute": lambda m, v: setattr(m.shift, "note", v.clone()),
    "queue and pointer": _pointer,
    "requires_grad_": lambda m, v: m.shift.requires_grad_(not m.shift.requires_grad),
    "requires_grad_ frozen": lambda m, v: m.frozen.requires_grad_(not m.frozen.requires_grad),
    "train()": lambda m, v: m.drop.train(not m.drop.training),
    "eval() once": lambda m, v: m.norm.eval(),
    "late module": _late,
    "forward hook": lambda m, v: m.head.register_forward_hook(lambda *_: None),
    "counting hook": lambda m, v: m.hooked or m.hooked.append(m.head.register_forward_hook(m.count_head)),
    "torch.Generator": lambda m, v: m.noise.copy_(torch.rand(WIDTH, generator=m.generator)),
    "numpy Generator": lambda m, v: m.noise.fill_(float(m.numpy_generator.random())),
    "random.Random": lambda m, v: m.noise.fill_(m.python_generator.random()),
    "global generator": lambda m, v: m.noise.copy_(torch.rand(WIDTH)),
    "itertools.count": lambda m, v: m.noise.fill_(next(m.numbers) / 100),
    "python generator": lambda m, v: m.noise.fill_(next(m.stream)),
    "iterator of a list": lambda m, v: m.noise.fill_(next(m.iterator)),
    "global list": lambda m, v: m.elsewhere.append(v.clone()),
}

CONDITIONS: dict[str, Callable[[Any, Tensor], bool]] = {
    "always": lambda m, v: True,
    "first": lambda m, v: m.calls == 1,
    "first by buffer": lambda m, v: int(m.count) == 1,
    "third call": lambda m, v: m.calls == 3,
    "every second": lambda m, v: m.calls % 2 == 0,
    "every third by buffer": lambda m, v: int(m.count) % 3 == 0,
    "training": lambda m, v: m.training,
    "data": lambda m, v: bool(v.mean() > 0),
    "with gradient": lambda m, v: torch.is_grad_enabled(),
}

COUNTED = ("first", "third call", "every second")


@dataclasses.dataclass(frozen=True)
class Write:
    """One write: what is done to which target, when, and at which place of the forward."""

    how: str
    target: str | None  # None: a write of the module's
    when: str
    place: str  # start, middle, end, hook

    def __call__(self, m: Writing, x: Tensor) -> None:
        v = x.detach().float().reshape(-1, WIDTH).mean(0).tanh()
        if not CONDITIONS[self.when](m, v):
            return
        with torch.no_grad():
            if self.target is None:
                MODULE_WRITES[self.how](m, v)
            else:
                IN_PLACE[self.how](TARGETS[self.target][0](m), v)


def random_writes(rng: random.Random) -> tuple[Write, ...]:
    """One to three writes."""
    found = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        when = rng.choice(list(CONDITIONS)) if rng.random() < 0.5 else "always"
        if rng.random() < 0.5:
            how = rng.choice(list(MODULE_WRITES))
            # An inner step after the inner layer's use would break the backward.
            place = "start" if how == "inner step" else rng.choice(("start", "middle", "end", "hook"))
            write = Write(how, None, when, place)
        else:
            target = rng.choice(list(TARGETS))
            places = ("start", "middle", "end", "hook") if TARGETS[target][1] else ("start",)
            write = Write(rng.choice(list(IN_PLACE)), target, when, rng.choice(places))
        found.append(write)
    return tuple(found)


class Writing(nn.Module):
    """A small network that owns something of every kind and writes to it within its forward.

    Args:
        writes: what is written.
        again: a checkpoint around the blocks: ``use_reentrant``, or None for none.
        elsewhere: a list that outlives the module.
    """

    def __init__(self, writes: tuple[Write, ...], *, again: bool | None = None, elsewhere: list[Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 3)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.phase = nn.Parameter(torch.randn(WIDTH, dtype=torch.cfloat), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.inner_optimizer = torch.optim.SGD(self.inner.parameters(), lr=0.1)
        self.register_buffer("running", torch.zeros(WIDTH))
        self.register_buffer("hidden", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("noise", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("bank", torch.zeros(4, WIDTH))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.plain = torch.zeros(WIDTH)
        self.listed = [torch.zeros(WIDTH)]
        self.table = {"t": torch.zeros(WIDTH)}
        self.queue = deque([torch.zeros(WIDTH)], maxlen=5)
        self.held = Held(torch.zeros(WIDTH))
        self.space = types.SimpleNamespace(value=torch.zeros(WIDTH))
        self.slots = Slots(torch.zeros(WIDTH))
        self.nest = {"a": [Held(torch.zeros(WIDTH))]}
        self.counts: Counter[str] = Counter()
        self.seen: set[int] = set()
        self.history: list[float] = []
        self.hooked: list[Any] = []
        self.calls = self.ticks = self.heads = 0
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.python_generator = random.Random(3)
        self.numbers = itertools.count()
        self.iterator = iter([n / 100 for n in range(1000)])
        if any(write.how == "python generator" for write in writes):  # of which no copy can be made
            self.stream = (n / 100 for n in range(1000))
        self.elsewhere = elsewhere
        self.optimizers: list[Any] = []
        outside, closed = nn.Parameter(torch.zeros(WIDTH)), torch.zeros(WIDTH)
        elsewhere.append(outside)
        self.foreign = lambda: outside
        elsewhere.append(closed)
        self.closed = lambda: closed
        self._writes = writes
        self._again = again
        # A counter is a write of its own.
        self._counts = any(write.when in COUNTED or write.how == "set" for write in writes)
        if any(write.place == "hook" for write in writes):
            self.blocks[1].register_forward_pre_hook(self._in_hook)

    def _in_hook(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._write("hook", args[0])

    def count_head(self, *_: Any) -> None:
        self.heads += 1

    def _write(self, place: str, x: Tensor) -> None:
        for write in self._writes:
            if write.place == place:
                write(self, x)

    def _body(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.blocks[0](x)) + x
        self._write("middle", x)
        x = torch.tanh(self.norm(self.blocks[1](x))) + x
        return self.drop(torch.tanh(self.blocks[2](x))) + x

    def forward(self, x: Tensor) -> Tensor:
        if self._counts:
            self.calls += 1
        with torch.no_grad():
            self.count.add_(1)
        self._write("start", x)
        x = x * self.gain + self.frozen + self.phase.real + self.noise
        x = x + self.running + self.plain + self.listed[0] + self.table["t"] + self.queue[0] + self.held.value
        x = x + self.space.value + self.slots.value + self.nest["a"][0].value + self.hidden + self.bank.mean(0)
        x = x + self.foreign() + self.closed() + self.inner(x)
        x = self._body(x) if self._again is None else checkpoint(self._body, x, use_reentrant=self._again)
        x = x + self.shift
        self._write("end", x)
        return self.head(F.relu(x))
