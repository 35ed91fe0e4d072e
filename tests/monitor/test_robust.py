"""Evaluation, exceptions, copies, compilation: no stale state, no crash, nothing silent."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import ResNet
from tests.helpers.monitor_cases import adamw, measured_into, rows, sgd, small_transformer, tokens, train, watched

# Things that happen in loops


def test_evaluation_between_steps_is_not_measured() -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> None:
        for step in range(3):
            with torch.no_grad():
                model(rows(50 + step)[0])
            model(rows(60 + step)[0])  # with gradient, thrown away
            model.blocks[0](torch.zeros(2, 16)).sum().backward()  # a part of the model, outside its forward
            optimizer.zero_grad()
            train_batch = rows(step)
            F.cross_entropy(model(train_batch[0]), train_batch[1]).backward()
            optimizer.step()

    torch.manual_seed(0)
    model, optimizer, seen, monitor = watched()
    loop(model, optimizer)
    monitor.close()
    assert {(row["micro_batches"], row["count"]) for row in seen} == {(1, 16 * 16)}


def test_a_backward_after_its_step_does_not_count_for_the_next() -> None:
    model, optimizer, seen, monitor = watched()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        late = F.cross_entropy(model(rows(9)[0]), rows(9)[1])
        train(model, optimizer, 1)
        F.cross_entropy(model(rows(1)[0]), rows(1)[1]).backward()
        late.backward()
        optimizer.step()
    monitor.close()
    assert [row["micro_batches"] for row in seen] == [1] * 6


def test_forwards_without_a_backward_hold_no_memory() -> None:
    model, _, _, monitor = watched()
    references = []
    original = fastfs._monitor.capture.forward_capture.LayerCall.__init__

    def spy(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        references.append(weakref.ref(self.before.values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastfs._monitor.capture.forward_capture.LayerCall, "__init__", spy)
        for step in range(5):
            out = model(rows(step)[0])
            del out
    gc.collect()
    assert len(references) == 15
    assert all(reference() is None for reference in references)
    monitor.close()


@pytest.mark.slow
def test_a_measured_step_leaves_no_tensor_behind() -> None:
    model, optimizer, _, monitor = watched()
    counts = []
    for _ in range(3):
        train(model, optimizer, 20)
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert min(counts[1] - counts[0], counts[2] - counts[1]) <= 0, counts  # what is kept once is no leak
    monitor.close()


def test_a_layer_that_returns_a_parameter_is_measured_and_leaves_no_hook_behind() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 3))

        def forward(self) -> Any:
            return self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table()

    model, optimizer, seen, monitor = watched(model=Model(), layers="table")
    for step in range(3):
        train(model, optimizer, 1, lambda _, step=step: rows(step))  # type: ignore[misc]
        assert not model.table.weight._backward_hooks
    F.cross_entropy(model(rows(4)[0]), rows(4)[1]).backward()
    assert model.table.weight._backward_hooks
    monitor.close()
    assert not model.table.weight._backward_hooks
    assert [row["valid"] for row in seen] == [True] * 3
    # The backward vector of the parameter is its gradient: plain descent goes against it at first.
    assert seen[0]["angle"] < 0.1


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "step"])
def test_exceptions_in_a_step_leave_nothing_behind(where: str) -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.fail = False

        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                if self.fail and i == 2:
                    raise RuntimeError("forward")
                x = x + torch.tanh(block(x))
            return x[:, :3]

    def run(fail: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model, optimizer, seen, monitor = watched(model=Fragile())
        x, y = rows(0)
        if fail:
            with pytest.raises(RuntimeError, match=where):  # noqa: PT012  wherever it comes from
                model.fail = where == "forward"
                out = model(rows(9)[0])
                if where == "loss":
                    raise RuntimeError("loss")
                if where == "backward":
                    out.register_hook(lambda _g: (_ for _ in ()).throw(RuntimeError("backward")))
                out.sum().backward()
                optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("step")))
                optimizer.step()
            model.fail = False
            if where == "step":
                optimizer._optimizer_step_pre_hooks.popitem()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.close()
        return seen, [p.detach().clone() for p in model.parameters()]

    (clean, parameters), (hurt, same) = run(False), run(True)
    for a, b in zip(clean, hurt, strict=True):
        assert b["micro_batches"] == 1
        assert all(a[key] == b[key] for key in ("step", "angle", "update_rms", "backward_rms", "feature_rms"))
    for a, b in zip(parameters, same, strict=True):
        assert torch.equal(a, b)


def test_a_second_forward_that_fails_is_one_warning_and_everything_is_put_back() -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])
            self.drop = nn.Dropout(0.5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.blocks[0](x))
            self.count += 1
            if not torch.is_grad_enabled():
                raise RuntimeError("out of memory")
            return x[:, :3]

    model, optimizer, seen, monitor = watched(model=Second())
    buffer = model.count
    torch.manual_seed(5)
    with pytest.warns(
        RuntimeWarning, match="measurement failed and is left out .RuntimeError: out of memory"
    ) as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    assert model.count is buffer
    assert buffer.item() == 2
    assert not monitor.replaying
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for _ in range(2):
        torch.nn.functional.dropout(torch.ones(16, 8), 0.5)
    assert torch.equal(after, torch.get_rng_state())
    monitor.close()
    assert seen == []


class Counting(nn.Module):
    """Runs its second block in every other forward, by a counter that is kept in it, or in a list elsewhere."""

    def __init__(self, elsewhere: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.calls = 0
        self.elsewhere = elsewhere

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.elsewhere is not None:
            self.elsewhere()
        x = self.blocks[0](x)
        return (self.blocks[1](x) if self.calls % 2 else x)[:, :3]


def test_a_counter_of_the_model_has_the_same_value_in_the_second_forward() -> None:
    model, optimizer, seen, monitor = watched(model=Counting())
    train(model, optimizer, 3, lambda _: rows(0))
    monitor.close()
    assert model.calls == 3
    assert [row["valid"] for row in seen] == [True, True, True, False, True, True]
    assert seen[3]["why"] == "the layer did not run"


def test_a_forward_that_depends_on_a_counter_elsewhere_is_reported() -> None:
    counter = itertools.count()

    class Depends(Counting):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            return (self.blocks[1](x) if next(counter) % 2 == 0 else x)[:, :3]

    model, optimizer, seen, monitor = watched(model=Depends())
    with pytest.warns(RuntimeWarning, match="'blocks.1' ran 1 times in the forward and 0 times in the second"):
        train(model, optimizer, 1)
    monitor.close()
    assert seen[1]["why"] is not None


def test_a_step_without_a_forward_of_the_model_warns_once() -> None:
    model, optimizer, seen, monitor = watched()

    def steps(number: Any) -> None:
        for _ in range(number):
            model.blocks[0](torch.ones(2, 16)).sum().backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match=r"no forward and backward of the model was seen") as caught:
        steps(3)
    assert len(caught) == 1
    monitor.close()
    assert seen == []


def test_modes_changed_between_forward_and_step_are_those_of_the_forward() -> None:
    torch.manual_seed(0)
    model = small_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[Any] = []
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(seen)]):
        x, y = tokens(0)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        model.eval()
        model.blocks[0].training = True
        optimizer.step()
        assert [m.training for m in model.modules()].count(True) == 1
    assert [row["update_rms"] for row in seen] == [0.0] * 3


def test_hooks_of_the_user_can_tell_the_second_forward() -> None:
    calls = {False: 0, True: 0}
    model, optimizer, _, monitor = watched()
    model.blocks[1].register_forward_hook(lambda *_: calls.__setitem__(monitor.replaying, calls[monitor.replaying] + 1))
    train(model, optimizer, 2)
    monitor.close()
    assert calls == {False: 2, True: 4}  # both steps prove that the second forward repeats the first


def test_a_failing_sink_warns_once_and_spares_the_others() -> None:
    def fail(rows: Any) -> None:
        raise OSError("disk full")

    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    seen: list[Any] = []
    with (
        pytest.warns(RuntimeWarning, match="OSError: disk full") as caught,
        fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[fail, measured_into(seen)]),
    ):
        train(model, optimizer, 3)
    assert len(caught) == 2
    assert "CallableSink failed at step 0 (OSError" in str(caught[0].message)
    assert "CallableSink: 4 records could not be written (OSError: disk full)" in str(caught[1].message)
    assert len(seen) == 6


# Copies


def test_copies_of_the_model_are_not_watched() -> None:
    model, optimizer, seen, monitor = watched()
    train(model, optimizer, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(other(rows(0)[0]), rows(0)[1]).backward()
        train(other, adamw(other), 1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert monitor.flush()
    assert len(seen) == 3
    train(model, optimizer, 1)
    monitor.close()
    assert len(seen) == 6
    assert {row["micro_batches"] for row in seen} == {1}


def test_a_copy_can_have_a_monitor_of_its_own() -> None:
    model, optimizer, seen, monitor = watched()
    other = copy.deepcopy(model)
    _, other_optimizer, other_seen, other_monitor = watched(model=other)
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    monitor.close()
    other_monitor.close()
    assert [row["angle"] for row in seen] == [row["angle"] for row in other_seen]


# torch.compile


def test_a_model_compiled_in_place_is_refused_with_the_way_out() -> None:
    model = ResNet(8, 16, 2, 3)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place.*Attach to compiled = torch\.compile\(model\) instead"):
        watched(model=model)


@pytest.mark.graphs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_a_model_compiled_after_attaching_is_measured() -> None:
    seen = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, optimizer, seen[compiled], monitor = watched(every=2)
        train(torch.compile(model, backend="eager") if compiled else model, optimizer, 4)
        monitor.close()
    assert len(seen[True]) == 2 * 3
    for a, b in zip(seen[False], seen[True], strict=True):
        assert all(b[key] == a[key] for key in ("step", "angle", "update_rms", "backward_rms", "residual", "valid"))


def test_random_numbers_in_a_model_compiled_after_attaching_are_one_warning() -> None:
    torch._dynamo.reset()
    model, optimizer, seen, monitor = watched(model=small_transformer())
    with pytest.warns(RuntimeWarning, match="attach it to the compiled model instead") as caught:
        train(torch.compile(model, backend="eager"), optimizer, 2, tokens)
    assert [w.category for w in caught] == [RuntimeWarning]
    monitor.close()
    assert seen == []


def test_a_model_compiled_in_one_graph_after_attaching_is_refused_with_the_way_out() -> None:
    torch._dynamo.reset()
    model, optimizer, _, monitor = watched()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attach it to the compiled model instead"):
        train(torch.compile(model, backend="eager", fullgraph=True), optimizer, 1)
    monitor.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_blocks_compiled_one_by_one_are_watched() -> None:
    seen = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = ResNet(8, 16, 2, 3)
        if compiled:
            for i in range(2):
                model.blocks[i] = torch.compile(model.blocks[i], backend="eager")
        model, optimizer, seen[compiled], monitor = watched(model=model)
        train(model, optimizer, 2)
        monitor.close()
    assert [row["name"] for row in seen[True]] == ["blocks.0", "blocks.1"] * 2
    for a, b in zip(seen[False], seen[True], strict=True):
        assert b["angle"] == pytest.approx(a["angle"])
