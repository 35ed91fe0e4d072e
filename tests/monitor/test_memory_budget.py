"""The memory that copies of inputs and rows may take."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs._monitor.capture import capture as capture_module
from fastfs._monitor.capture.sampling import RowSampler
from fastfs.models import ResNet
from tests.helpers.monitor_cases import adamw, measured_into, rows, sgd, train, watched


def many(step: int, size: int = 192) -> tuple[Any, ...]:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 8, generator=generator) * torch.rand(size, 1, generator=generator).exp()
    return x, torch.randint(3, (size,), generator=generator)


class Held:
    """Counts the bytes of all tensors that the monitor has copied and that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        keep, copy = RowSampler.keep, capture_module.copy_arguments  # type: ignore[attr-defined]

        def counted_keep(sampler: Any, x: Any, choice: Any, **options: Any) -> Any:
            found = keep(sampler, x, choice, **options)
            self._count(found.values)
            return found

        def counted_copy(arguments: Any, copy_tensor: Any) -> Any:
            def one(x: Any) -> Any:
                found = copy_tensor(x)
                self._count(found)
                return found

            return copy(arguments, one)

        monkeypatch.setattr(RowSampler, "keep", counted_keep)
        monkeypatch.setattr(capture_module, "copy_arguments", counted_copy)

    def _count(self, tensor: Any) -> None:
        self._alive.add(tensor.untyped_storage())
        self.most = max(self.most, sum(storage.nbytes() for storage in self._alive))


@pytest.mark.parametrize(
    "options",
    [{}, {"amplify": True}, {"mode": "jvp"}, {"mode": "probe", "probe": (many(0)[0], lambda out: out.square().mean())}],
    ids=["batch", "amplified", "jvp", "probe"],
)
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("memory", [20_000, 60_000, 2**29])
def test_what_is_kept_never_exceeds_the_budget(
    options: dict[str, Any], micro_batches: int, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    seen: list[Any] = []
    model = ResNet(8, 16, 5, 3)
    optimizer = sgd(model)
    monitor = fastfs.Monitor(
        model, optimizer, every=2, aligned_every=1, memory=memory, sinks=[measured_into(seen)], alerts=(), **options
    )
    for step in range(4):
        x, y = many(step)
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (F.cross_entropy(model(part), labels) / micro_batches).backward()
        optimizer.step()
    monitor.close()
    assert 0 < held.most <= memory
    assert 0 < monitor._capture.budget.most <= memory
    # Reserved in advance, used later: nothing is held that was not reserved.
    assert held.most <= monitor._capture.budget.most
    assert {row["step"] for row in seen} == {0, 2}
    last = [row for row in seen if row["step"] == 2]
    assert all(row["rows"] >= 2 for row in last), [row["rows"] for row in last]
    if "amplify" not in options:  # of a few rows it cannot tell rounding from the error of the sample
        assert all(row["valid"] for row in last), [row["why"] for row in last]
    if memory == 2**29:
        assert all(row["rows"] == 192 for row in last)
    elif memory == 20_000:
        assert all(row["rows"] < 192 for row in last)
        assert all(row["angle_se"] > 0 for row in last if row["rows"] > micro_batches)  # one row has no error


def test_nothing_of_a_step_outlives_it_without_the_garbage_collector() -> None:
    """Also if the loop holds on to its last loss, and with it to the graph."""
    model, optimizer, _, monitor = watched()
    gc.collect()
    gc.disable()
    try:
        for step in range(3):
            x, y = rows(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(retain_graph=True)
            optimizer.step()
            assert sum(passed.bytes for passed in monitor._capture.budget.live) == 0
            assert all(passed.args == () and not passed.calls for passed in monitor._capture.budget.live)
        del loss
        assert not monitor._capture.budget.live
    finally:
        gc.enable()
    monitor.close()


def test_the_budget_holds_while_a_second_batch_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards whose backward never comes count as long as the loop holds on to their outputs."""
    held = Held(monkeypatch)
    model, optimizer, seen, monitor = watched(memory=20_000, rows=None)
    outputs = [model(many(step)[0]) for step in range(2)]
    F.cross_entropy(outputs[0], many(0)[1]).backward()
    optimizer.step()
    monitor.close()
    assert held.most <= monitor._capture.budget.most <= 20_000
    assert all(row["rows"] > 0 for row in seen)


def test_a_budget_below_one_row_is_one_warning_and_a_row_of_nulls() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4096)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))[:, :3]

    model, optimizer, seen, monitor = watched(layers=r"blocks\.\d", model=Wide(), memory=20_000)
    with pytest.warns(RuntimeWarning, match=r"no room for even one row of 16,384 bytes.* Raise memory=") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    monitor.close()
    for row in seen[1::2]:
        assert (row["rows"], row["count"], row["valid"]) == (0, 0, False)
        assert math.isnan(row["angle"])
        assert math.isnan(row["update_rms"])
        assert row["angle_se"] is row["update_rms_se"] is None
    assert all(row["valid"] and row["rows"] == 16 for row in seen[::2])


def test_inputs_above_the_budget_drop_the_pass_with_one_warning() -> None:
    def losses(**options: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = ResNet(8, 16, 3, 3)
        optimizer = sgd(model)
        seen: list[Any] = []
        if options:
            monitor = fastfs.Monitor(model, optimizer, every=1, sinks=[measured_into(seen)], **options)
            with pytest.warns(
                RuntimeWarning,
                match=r"left out \(BudgetError: a copy of the model's inputs takes 6,144 bytes, and 3,000",
            ) as caught:
                train(model, optimizer, 3, many)
            assert len(caught) == 1
            monitor.close()
        else:
            train(model, optimizer, 3, many)
        return [p.detach().clone() for p in model.parameters()], seen

    (plain, _), (same, seen) = losses(), losses(memory=3_000)
    assert seen == []
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_one_micro_batch_above_the_budget_does_not_take_the_others_along() -> None:
    model, optimizer, seen, monitor = watched(memory=6_000)

    def backward(size: Any) -> None:
        x, y = many(size, size)
        F.cross_entropy(model(x), y).backward()

    backward(16)
    with pytest.warns(RuntimeWarning, match="BudgetError"):
        backward(192)
    backward(16)
    optimizer.step()
    monitor.close()
    assert {row["micro_batches"] for row in seen} == {2}
    assert all(row["rows"] > 0 for row in seen)


@pytest.mark.parametrize("value", [0, -1, 2.0, None, "1G", True])
def test_memory_must_be_bytes(value: Any) -> None:
    with pytest.raises(ValueError, match=r"memory: expected an integer >= 1 \(bytes\), got"):
        watched(memory=value)


def test_the_budget_is_printed_when_it_is_attached(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = watched(memory=3 * 2**20, rows=77)[3]
    monitor.close()
    assert "at most 3.0 MiB for inputs and 77 rows a layer" in capsys.readouterr().err


def test_a_measurement_that_fails_before_the_step_holds_no_memory_in_it() -> None:
    """The first step of an optimizer allocates its state."""
    features: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def loss(out: Tensor) -> Tensor:
        raise MemoryError("no memory")

    torch.manual_seed(0)
    model = ResNet(8, 16, 3, 3)
    optimizer = adamw(model)
    probe = fastfs.monitor.Probe(rows(9)[0], loss)
    monitor = fastfs.Monitor(
        model, optimizer, mode="probe", probe=probe, every=1, sinks=[lambda _: None], verbose=False
    )
    keep = monitor._engine.mode._sampler.keep  # type: ignore[attr-defined]

    def watched_keep(*arguments: Any, **options: Any) -> Any:
        found = keep(*arguments, **options)
        features.append(weakref.ref(found.values))
        return found

    monitor._engine.mode._sampler.keep = watched_keep  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in features)))
    with pytest.warns(RuntimeWarning, match="no memory"):
        train(model, optimizer, 1)
    monitor.close()
    assert len(features) == 3
    assert alive == [0]
