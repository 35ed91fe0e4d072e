"""What the model is called with: copied in full or left out; and copies that fail do not end the training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import ResNet
from tests.helpers.monitor_cases import measured_into, rows, sgd, train, watched

# Inputs that cannot be copied, and copies that fail


class Taking(nn.Module):
    """A model that gets its rows out of whatever it is given."""

    def __init__(self, take: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.take = take

    def forward(self, given: Any) -> Tensor:
        x = self.take(given)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x[:, :3]


class Holder:
    def __init__(self, x: Any) -> None:
        self.x = x


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    more: list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Fields


def losses(give: Any, take: Any, steps: int = 3, attach: bool = True) -> tuple[Any, ...]:
    """Loss of every step, and the rows of the record."""
    torch.manual_seed(0)
    model = Taking(take)
    optimizer = sgd(model)
    seen: list[Any] = []
    monitor = (
        fastfs.Monitor(model, optimizer, layers=r"blocks\.\d", every=1, sinks=[measured_into(seen)]) if attach else None
    )
    result = []
    for step in range(steps):
        x, y = rows(step)
        optimizer.zero_grad()
        given = give(x)
        loss = F.cross_entropy(model(given), y)
        loss.backward()
        if isinstance(given, Fields) and isinstance(
            given.more[0], torch.Tensor
        ):  # changed after the forward: the second one must not see it
            given.more[0].zero_()
            given.x = given.x * 0
        optimizer.step()
        result.append(loss.item())
    if monitor is not None:
        monitor.close()
    return result, seen


def two_batches(generator: Any) -> Any:
    return next(generator) + 2 * next(generator)


def endless(x: Any) -> Iterator[Any]:
    while True:
        yield x
        x = x + 1


@pytest.mark.parametrize(
    ("give", "take", "name"),
    [
        (endless, two_batches, "generator"),
        (lambda x: [iter([x, x, x, x])], lambda given: two_batches(given[0]), "list_iterator"),
        (Holder, lambda given: given.x, r"test_inputs\.Holder"),
        (lambda x: {"x": x, "g": torch.Generator()}, lambda given: given["x"], r"torch\._C\.Generator"),
        (lambda x: Fields(x, [iter([x])]), lambda given: next(given.more[0]) + given.x, "list_iterator"),  # type: ignore[list-item]
        (lambda x: x.numpy().astype(object), lambda given: torch.tensor(given.astype("float32")), r"numpy\.ndarray"),
    ],
)
def test_a_forward_with_inputs_that_cannot_be_copied_is_left_out(give: Any, take: Any, name: str) -> None:
    plain, _ = losses(give, take, attach=False, steps=1)
    with pytest.warns(RuntimeWarning, match=rf"an argument of type {name}, .*_pytree: this forward is left") as caught:
        same, seen = losses(give, take, steps=1)
    assert len(caught) == 1
    assert same == plain
    assert seen == []


def test_inputs_that_cannot_be_copied_are_said_once_and_stay_unconsumed() -> None:
    source = endless(torch.ones(16, 8))
    model, optimizer, seen, monitor = watched(model=Taking(next))

    def steps() -> None:
        for step in range(3):
            F.cross_entropy(model(source), rows(step)[1]).backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match="generator") as caught:
        steps()
    assert len(caught) == 1
    assert next(source)[0, 0] == 4  # three forwards took three
    monitor.close()
    assert seen == []


def test_an_evaluation_with_other_inputs_does_not_cost_the_step() -> None:
    model, optimizer, seen, monitor = watched(
        model=Taking(lambda given: given.x if isinstance(given, Holder) else given)
    )
    with pytest.warns(RuntimeWarning, match=r"Holder"):
        model(Holder(rows(9)[0]))
    train(model, optimizer, 1)
    monitor.close()
    assert [row["micro_batches"] for row in seen] == [1, 1]


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (lambda x: Fields(x, [x.clone()]), lambda given: given.x + given.more[0]),
        (lambda x: Frozen(Fields(x, [x])), lambda given: given.inner.x + given.inner.more[0]),
        (
            lambda x: (x, None, 2, 0.5, "mean", b"", slice(0, 8), range(3), x.dtype, x.shape),
            lambda g: g[0][:, g[6]] * 2,
        ),
        (lambda x: x.numpy().copy(), torch.tensor),
        (
            lambda x: nn.utils.rnn.pack_padded_sequence(x[None], torch.tensor([16]), batch_first=True),
            lambda packed: packed.data,
        ),
    ],
)
def test_inputs_that_can_be_copied_are_measured_at_their_values(give: Callable[..., Any], take: Any) -> None:
    expected = losses(lambda x: take(give(x)), lambda x: x)
    result = losses(give, take)
    assert result[0] == expected[0]
    for a, b in zip(result[1], expected[1], strict=True):
        assert (a["angle"], a["update_rms"], a["valid"]) == (b["angle"], b["update_rms"], True)


@pytest.mark.parametrize("where", ["input", "features", "backward"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_copy_that_fails_drops_the_micro_batch_and_training_goes_on(
    where: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = fastfs._monitor.capture.capture
    broken = {"on": False}

    def fail() -> None:
        if broken["on"]:
            raise MemoryError("no memory")

    class Once(fastfs._monitor.capture.forward_capture.LayerCall):
        __slots__ = ()

        def arrive(self, *arguments: Any) -> None:
            if where == "backward":
                fail()
            super().arrive(*arguments)

        def __init__(self, *arguments: Any) -> None:
            if where == "features":
                fail()
            super().__init__(*arguments)

    original = capture.copy_arguments  # type: ignore[attr-defined]

    def copy_arguments(*arguments: Any) -> Any:
        if where == "input":
            fail()
        return original(*arguments)

    def run() -> tuple[Any, ...]:
        torch.manual_seed(0)
        model, optimizer, seen, monitor = watched()
        for step in range(3):
            for part in range(micro_batches):
                broken["on"] = step == 1 and part == 0
                x, y = rows(2 * step + part)
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
        return seen, [p.detach().clone() for p in model.parameters()]

    clean, parameters = run()
    monkeypatch.setattr(fastfs._monitor.capture.step_capture, "LayerCall", Once)
    monkeypatch.setattr(capture, "copy_arguments", copy_arguments)
    with pytest.warns(
        RuntimeWarning, match=r"step 1 has a forward that could not be copied.*MemoryError: no"
    ) as caught:
        seen, same = run()
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))
    counts = {row["step"]: row["micro_batches"] for row in seen}
    assert counts == ({0: 1, 2: 1} if micro_batches == 1 else {0: 2, 1: 1, 2: 2})
    assert [row["angle"] for row in seen if row["step"] == 2] == [row["angle"] for row in clean if row["step"] == 2]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_norm_that_fails_leaves_its_prediction_out_and_training_goes_on(
    micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = fastfs._monitor.capture.sampling.RowSampler
    squares, calls = sampler.squares, []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3 * micro_batches + 2:  # step 2, its first micro-batch, the layer before the last
            raise MemoryError("no memory")
        return squares(*arguments)

    def run() -> Any:
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3)
        optimizer = sgd(model)
        with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=10, aligned_every=1, sinks=[seen.extend]):
            for step in range(4):
                optimizer.zero_grad()
                for part in range(micro_batches):
                    x, y = rows(micro_batches * step + part)
                    F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    seen: list[dict[str, Any]] = []
    parameters = run()
    clean = list(seen)
    seen.clear()
    monkeypatch.setattr(sampler, "squares", fail)
    with pytest.warns(RuntimeWarning, match=r"step 2 has no norm of the backward vector of 'blocks\.1'.*no memory"):
        same = run()
    assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))
    predicted = [[row for row in rows if row["kind"] == "predicted"] for rows in (seen, clean)]
    assert len(predicted[0]) == len(predicted[1]) == 9
    for found, expected in zip(*predicted, strict=True):
        if found["step"] != 2:
            assert found["update_rms"] == expected["update_rms"]
        elif found["name"] == "blocks.1":
            assert math.isnan(found["update_rms"])
            assert math.isnan(found["backward_rms"])
