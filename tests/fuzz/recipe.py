"""What a generated training loop is made of: one choice on each of several axes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

__all__ = ["AXES", "Recipe", "possible", "random_recipe", "shrink"]

AXES: dict[str, tuple[str, ...]] = {
    # The first of each is the plain one.
    "body": (
        "mlp",
        "chain",
        "transformer",
        "recurrent",
        "gru",
        "experts",
        "codes",
        "complex",
        "lora",
        "tied",
        "derivative",
        "heads",
        "host random",
        "own casts",
    ),
    "norm": ("none", "batch", "layer"),
    "drop": ("none", "global", "own generator"),
    "weights": ("none", "spectral", "weight norm", "orthogonal", "old spectral", "old weight norm", "cached"),
    "optimizer": (
        "sgd",
        "momentum",
        "nesterov foreach",
        "adam",
        "adamw",
        "amsgrad",
        "maximize",
        "rmsprop",
        "adamax",
        "adagrad",
        "muon",
        "subclass",
        "own",
        "rewriting",
        "projecting",
        "wrapped",
        "lookahead",
        "fused",
        "tensor lr",
        "groups",
        "closure",
        "moving closure",
        "in backward",
        "two",
    ),
    "call": (
        "plain",
        "wrapper",
        "keyword",
        "noisy weights",
        "fast weights",
        "own output",
        "soft prompt",
        "encoder",
        "target",
        "subclass input",
        "input with gradient",
        "input zeroed",
        "checkpoint",
        "reentrant checkpoint",
        "no gradient pass",
    ),
    "micro": ("1", "2", "3"),
    "zero": ("none", "zeros", "none after", "zeros after", "model zeros"),
    "clip": ("none", "norm", "value", "groups", "tensor hook", "accumulate hook", "step hook", "late step hook"),
    "scaler": ("none", "scaler", "overflow", "by hand"),
    "schedule": ("none", "after", "early hook", "late hook", "global hook"),
    "precision": ("float32", "float64", "bfloat16", "autocast", "autocast inside"),
    "training": ("train", "eval"),
    "sam": ("none", "copy", "data", "two steps"),
    "extra": (
        "none",
        "evaluation",
        "raise forward",
        "raise backward",
        "raise step",
        "interrupt forward",
        "interrupt backward",
        "interrupt step",
        "add group",
        "retain graph",
        "gradient beside",
        "gan",
        "frozen",
        "thrown away",
    ),
    "monitor": (
        "batch",
        "aligned",
        "amplify",
        "jvp",
        "probe",
        "two monitors",
        "every second",
        "few rows",
        "samples",
        "samples amplify",
        "samples jvp",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A training loop that is the same whenever it is run.

    Attributes:
        seed: of weights and data.
        scale: of the learning rate.
        compiled: the backend of torch.compile.
    """

    seed: int = 0
    scale: float = 1.0
    compiled: str = "none"
    body: str = "mlp"
    norm: str = "none"
    drop: str = "none"
    weights: str = "none"
    optimizer: str = "sgd"
    call: str = "plain"
    micro: str = "1"
    zero: str = "none"
    clip: str = "none"
    scaler: str = "none"
    schedule: str = "none"
    precision: str = "float32"
    training: str = "train"
    sam: str = "none"
    extra: str = "none"
    monitor: str = "batch"

    @property
    def ingredients(self) -> list[str]:
        """What is not plain."""
        return [f"{axis}: {value}" for axis in AXES if (value := getattr(self, axis)) != AXES[axis][0]]

    def __str__(self) -> str:
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Recipe(), k)}
        return f"Recipe({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


def random_recipe(seed: int) -> Recipe:
    """The recipe of that seed: few ingredients in most, many in some."""
    rng = random.Random(seed)
    share = rng.choice((0.15, 0.25, 0.4))
    chosen = {axis: rng.choice(values[1:]) for axis, values in AXES.items() if rng.random() < share}
    if rng.random() < 0.5:
        chosen.setdefault("monitor", rng.choice(AXES["monitor"]))
    if rng.random() < 0.5:
        chosen.setdefault("body", rng.choice(AXES["body"]))
    return possible(Recipe(seed=seed, scale=rng.choice((0.01, 0.1, 1.0)), **chosen))


def possible(recipe: Recipe) -> Recipe:
    """What excludes each other is made plain, the later of the two."""
    for first, values, second, others in _EXCLUDED:
        if getattr(recipe, first) in values and getattr(recipe, second) in others:
            recipe = replace(recipe, **{second: AXES[second][0]})
    return recipe


def _but(axis: str, *kept: str) -> tuple[str, ...]:
    return tuple(value for value in AXES[axis] if value not in kept)


_LOW = ("bfloat16", "autocast", "autocast inside")
_EXCLUDED: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    # first axis and values, second axis and the values that do not go with them
    ("body", ("complex", "derivative", "gru", "own casts"), "precision", _LOW),
    ("body", ("derivative",), "call", ("checkpoint", "reentrant checkpoint", "input with gradient")),
    ("body", ("transformer",), "call", ("fast weights",)),  # no second derivative
    ("body", ("derivative",), "drop", _but("drop", "none")),
    ("body", ("heads",), "call", _but("call", "plain", "keyword", "noisy weights", "soft prompt", "encoder")),
    ("body", ("heads",), "extra", ("gan",)),
    ("body", ("transformer", "gru", "complex", "lora", "tied", "own casts"), "weights", _but("weights", "none")),
    ("body", ("lora",), "norm", ("batch", "layer")),
    ("body", ("complex",), "optimizer", ("muon", "fused", "projecting")),
    ("body", ("complex",), "clip", ("value",)),
    ("body", ("complex",), "scaler", ("scaler", "overflow")),
    # Functional calls go round the old hooks, and caches of parametrisations.
    ("weights", ("old spectral", "old weight norm", "cached"), "call", ("noisy weights", "fast weights")),
    ("weights", ("spectral", "orthogonal", "old spectral"), "precision", _LOW),
    ("weights", ("cached",), "sam", ("copy", "data", "two steps")),
    ("weights", ("cached",), "optimizer", ("closure", "moving closure")),
    ("weights", ("cached",), "call", ("checkpoint", "reentrant checkpoint")),
    ("weights", ("cached",), "micro", ("2", "3")),
    ("weights", ("cached",), "extra", _but("extra", "none")),
    # The recomputation begins with the buffers that the forward left: the backward vector is of another forward.
    ("weights", ("old spectral",), "call", ("checkpoint", "reentrant checkpoint")),
    ("drop", ("own generator",), "call", ("checkpoint", "reentrant checkpoint")),
    ("body", ("host random", "experts"), "call", ("checkpoint", "reentrant checkpoint")),
    ("optimizer", ("in backward",), "micro", ("2", "3")),
    ("optimizer", ("in backward",), "zero", _but("zero", "none")),
    ("optimizer", ("in backward",), "clip", _but("clip", "none", "tensor hook")),
    ("optimizer", ("in backward", "closure", "moving closure"), "scaler", ("scaler", "overflow")),
    ("optimizer", ("in backward", "closure", "moving closure"), "sam", ("copy", "data", "two steps")),
    ("optimizer", ("in backward",), "schedule", ("early hook", "late hook", "after")),
    ("optimizer", ("in backward",), "extra", _but("extra", "none", "evaluation", "raise forward")),
    ("optimizer", ("closure", "moving closure"), "extra", ("retain graph", "gan", "thrown away")),
    ("optimizer", ("wrapped", "lookahead"), "scaler", ("scaler", "overflow")),
    ("optimizer", ("muon",), "precision", ("bfloat16",)),
    ("optimizer", ("muon",), "extra", ("add group",)),  # of a vector
    ("optimizer", ("muon", "two"), "scaler", ("overflow",)),
    ("sam", ("copy", "data", "two steps"), "scaler", ("scaler", "overflow")),
    ("sam", ("copy", "data", "two steps"), "extra", ("retain graph", "gan", "add group")),
    ("sam", ("two steps",), "optimizer", ("muon", "two", "wrapped", "lookahead")),
    ("call", ("reentrant checkpoint",), "extra", ("gradient beside", "retain graph")),
    ("call", ("fast weights", "noisy weights"), "extra", ("gan",)),
    ("call", ("fast weights",), "clip", ("tensor hook",)),  # which would change the fast weights, too
    ("precision", _LOW, "clip", ("value",)),
    ("monitor", ("probe",), "drop", _but("drop", "none")),
    ("monitor", ("probe",), "body", ("host random", "heads", "lora", "derivative")),
    ("monitor", ("probe",), "call", ("subclass input", "no gradient pass")),
)


def shrink(recipe: Recipe, fails: Callable[[Recipe], object]) -> Recipe:
    """A recipe with as few ingredients as still fails."""
    smaller = True
    while smaller:
        smaller = False
        for axis in AXES:
            plain = replace(recipe, **{axis: AXES[axis][0]})
            if plain != recipe and possible(plain) == plain and fails(plain):
                recipe, smaller = plain, True
    return recipe
