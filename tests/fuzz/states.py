"""What a forward of a trial depends on besides parameters and inputs: taken before one, given to another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.fuzz.trial import Trial

__all__ = ["buffers_of", "clones", "copy_values", "give_random_state", "random_state", "restore", "state_of"]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def buffers_of(trial: Trial) -> list[Tensor]:
    return [buffer for module in trial.modules for buffer in module.buffers()]


def copy_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for mine, value in zip(tensors, values, strict=True):
        mine.data = value.to(mine.dtype, copy=True)  # what is in the graph of an earlier forward stays


def random_state() -> Any:
    return torch.get_rng_state(), random.getstate()


def give_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])


def state_of(trial: Trial) -> Any:
    """What a forward depends on besides parameters and inputs."""
    buffers = clones(buffers_of(trial))
    training = [m.training for module in trial.modules for m in module.modules()]
    return random_state(), trial.switch.generator.get_state(), buffers, training


def restore(shadow: Trial, state: Any) -> None:
    randomness, generator, buffers, training = state
    give_random_state(randomness)
    shadow.switch.generator.set_state(generator)
    copy_values(buffers_of(shadow), buffers)
    for each, mode in zip([m for module in shadow.modules for m in module.modules()], training, strict=True):
        each.training = mode
