"""Wrong arguments, wrappers, copies, compilation, exceptions: a clear error or no trace."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from monitor_cases import adamw, rows, sgd, small_transformer, tokens, train
from torch import nn

import fastfs
from fastfs.models import MLP, ResNet
from fastfs.monitor.layers import clean_name


def watched(layers=r"blocks\.\d+$", every=1, model=None, **options):
    model = ResNet(8, 16, 3, 3) if model is None else model
    optimizer = sgd(model)
    seen = []
    return (
        model,
        optimizer,
        seen,
        fastfs.Monitor(model, optimizer, layers=layers, every=every, sinks=[seen.extend], **options),
    )


# Arguments


def test_no_match_lists_the_candidates():
    with pytest.raises(ValueError, match=r"layers.*d' matches no module of ResNet. Candidates: stem, blocks, blocks.0"):
        watched(layers=r"layers\.\d")


def test_an_unknown_name_lists_the_candidates():
    with pytest.raises(ValueError, match=r"unknown names \['blocks.7'\].*Candidates: stem"):
        watched(layers=["blocks.0", "blocks.7"])
    with pytest.raises(ValueError, match="an empty list"):
        watched(layers=[])


def test_many_candidates_are_cut():
    with pytest.raises(ValueError, match=r"\.\.\. \(4\d\d in all\)$"):
        watched(layers="nothing", model=ResNet(8, 4, 200, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "["}, ValueError, "not a regular expression"),
        ({"layers": 3}, TypeError, "got 3"),
        ({"layers": [3]}, TypeError, r"got \[3\]"),
        ({"every": 0}, ValueError, "every.*got 0"),
        ({"every": 2.5}, ValueError, "every.*got 2.5"),
        ({"every": True}, ValueError, "every.*got True"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        watched(**options)


def test_wrong_model_optimizer_and_sink():
    model = MLP(8, 8, 3)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        fastfs.Monitor(3, sgd(model), layers="blocks")
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got str"):
        fastfs.Monitor(model, "sgd", layers="blocks")
    with pytest.raises(ValueError, match="SGD updates no parameter of MLP"):
        fastfs.Monitor(model, sgd(MLP(8, 8, 3)), layers="blocks")
    with pytest.raises(ValueError, match="LBFGS"):
        fastfs.Monitor(model, torch.optim.LBFGS(model.parameters()), layers="blocks")
    with pytest.raises(TypeError, match="sink: expected a path, a function"):
        fastfs.Monitor(model, sgd(model), layers="blocks", sinks=[3])


def test_a_schedule_of_ones_own():
    class Doubling:
        def due(self, step):
            return step & (step - 1) == 0

    model, optimizer, seen, monitor = watched(every=Doubling())
    train(model, optimizer, 9)
    monitor.close()
    assert sorted({row["step"] for row in seen}) == [0, 1, 2, 4, 8]


def test_repr_and_properties():
    model, optimizer, _, monitor = watched(every=2)
    assert monitor.layers == ("blocks.0", "blocks.1", "blocks.2")
    assert (monitor.step, monitor.due) == (0, True)
    train(model, optimizer, 1)
    assert (monitor.step, monitor.due) == (1, False)
    assert "3 layers" in repr(monitor)
    assert "step 1" in repr(monitor)
    monitor.close()
    assert "closed" in repr(monitor)


def test_log_takes_scalars_only_and_adds_up():
    model, optimizer, seen, monitor = watched()
    with pytest.raises(ValueError, match=r"scalar loss, got a tensor of shape \(2,\)"):
        monitor.log(loss=torch.zeros(2))
    monitor.log(loss=1.5)
    monitor.log(loss=torch.tensor(2.0))
    train(model, optimizer, 2)
    assert [row["loss"] for row in seen] == [3.5] * 3 + [None] * 3
    monitor.close()
    monitor.log(loss=1.0)


# Layers


@pytest.mark.parametrize(
    ("raw", "wrapped", "clean"),
    [
        ("blocks.0", False, "blocks.0"),
        ("_orig_mod.blocks.0", False, "blocks.0"),
        ("module.blocks.0", True, "blocks.0"),
        ("_orig_mod.module.blocks.0._orig_mod.attn", True, "blocks.0.attn"),
        ("module.blocks.0", False, "module.blocks.0"),
        ("encoder.module.0", True, "encoder.module.0"),
        ("blocks.0._checkpoint_wrapped_module.attn", False, "blocks.0.attn"),
        ("_fsdp_wrapped_module.blocks.0", False, "blocks.0"),
    ],
)
def test_names_lose_the_prefixes_of_wrappers(raw, wrapped, clean):
    assert clean_name(raw, wrapped) == clean


def test_a_data_parallel_wrapper_is_seen_through():
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    model, optimizer, seen, monitor = watched(layers=r"^blocks\.\d+$", model=Parallel(ResNet(8, 16, 2, 3)))
    train(model, optimizer, 1)
    monitor.close()
    assert [row["name"] for row in seen] == ["blocks.0", "blocks.1"]
    assert all(row["valid"] for row in seen)


class Outputs(nn.Module):
    """A layer that returns what it is told to."""

    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.make = make

    def forward(self, x):
        return self.make(self.layer(x))


class Model(nn.Module):
    def __init__(self, make, take):
        super().__init__()
        self.inner = Outputs(make)
        self.take = take

    def forward(self, x):
        return self.take(self.inner(x))[:, :3]


@pytest.mark.parametrize(
    ("make", "take"),
    [
        (lambda x: (torch.zeros(2, dtype=torch.long), x, x * 2), lambda out: out[1]),
        (lambda x: {"ids": [1], "hidden": x}, lambda out: out["hidden"]),
        (lambda x: [None, (x,)], lambda out: out[1][0]),
    ],
)
def test_the_first_floating_tensor_of_an_output_is_watched(make, take):
    model, optimizer, seen, monitor = watched(layers="inner$", model=Model(make, take))
    train(model, optimizer, 1)
    monitor.close()
    assert seen[0]["count"] == 16 * 8
    assert seen[0]["valid"]


@pytest.mark.parametrize("make", [lambda x: (x.argmax(dim=1),), lambda x: "text", lambda x: ()])
def test_an_output_without_a_floating_tensor_is_an_error(make):
    model, optimizer, _, monitor = watched(layers="inner$", model=Model(make, lambda out: out))
    with pytest.raises(
        TypeError, match=r"layer 'inner' \(Outputs\): expected an output that is or holds a floating-point"
    ):
        train(model, optimizer, 1)
    monitor.close()


def test_layers_that_are_unused_frozen_or_without_gradient():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(8, 8)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.used = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)
            self.apart = nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            x = self.used(self.frozen(x))
            self.apart(x)
            return x[:, :3]

    model, optimizer, seen, monitor = watched(layers="backbone|frozen|used|unused|apart", model=Sometimes())
    train(model, optimizer, 3)
    monitor.close()
    assert len(seen) == 3 * 5
    rows_of = {name: [row for row in seen if row["name"] == name] for name in monitor.layers}
    assert all(row["valid"] for row in rows_of["used"])
    for name in ("backbone", "frozen", "unused"):
        assert all(row["count"] == 0 and not row["valid"] and math.isnan(row["angle"]) for row in rows_of[name])
    # Ran, and moved, but the loss does not depend on it: the backward vector is zero.
    assert all(row["backward_rms"] == 0 and row["update_rms"] > 0 and not row["valid"] for row in rows_of["apart"])


def test_layers_that_run_in_some_steps_only():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.calls = 0

        def forward(self, x):
            return self.blocks[int(x[0, 0] > 0)](x)[:, :3]

    def batch(step):
        x, y = rows(step)
        x[0, 0] = (-1.0) ** step
        return x, y

    model, optimizer, seen, monitor = watched(model=Alternating())
    train(model, optimizer, 4, batch)
    monitor.close()
    assert [row["count"] > 0 for row in seen] == [False, True, True, False] * 2


# Things that happen in loops


def test_evaluation_between_steps_is_not_measured():
    def loop(model, optimizer):
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


def test_a_backward_after_its_step_does_not_count_for_the_next():
    model, optimizer, seen, monitor = watched()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        late = F.cross_entropy(model(rows(9)[0]), rows(9)[1])
        train(model, optimizer, 1)
        F.cross_entropy(model(rows(1)[0]), rows(1)[1]).backward()
        late.backward()
        optimizer.step()
    monitor.close()
    assert [row["micro_batches"] for row in seen] == [1] * 6


def test_forwards_without_a_backward_hold_no_memory():
    model, _, _, monitor = watched()
    references = []
    original = fastfs.monitor.capture.Visit.__init__

    def spy(self, features):
        original(self, features)
        references.append(weakref.ref(self.before))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastfs.monitor.capture.Visit, "__init__", spy)
        for step in range(5):
            out = model(rows(step)[0])
            del out
    gc.collect()
    assert len(references) == 15
    assert all(reference() is None for reference in references)
    monitor.close()


def test_a_measured_step_leaves_no_tensor_behind():
    model, optimizer, _, monitor = watched()
    train(model, optimizer, 1)
    gc.collect()
    count = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    train(model, optimizer, 20)
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= count
    monitor.close()


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "step"])
def test_exceptions_in_a_step_leave_nothing_behind(where):
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.fail = False

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                if self.fail and i == 2:
                    raise RuntimeError("forward")
                x = x + torch.tanh(block(x))
            return x[:, :3]

    def run(fail):
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
            optimizer._optimizer_step_pre_hooks.clear()
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


def test_a_second_forward_that_fails_is_one_warning_and_everything_is_put_back():
    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])
            self.drop = nn.Dropout(0.5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
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


def test_a_forward_that_depends_on_its_own_counter_is_reported():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            x = self.blocks[0](x)
            return (self.blocks[1](x) if self.calls % 2 else x)[:, :3]

    model, optimizer, seen, monitor = watched(model=Counting())
    with pytest.warns(RuntimeWarning, match="'blocks.1' ran 1 times in the forward and 0 times in the second"):
        train(model, optimizer, 1)
    monitor.close()
    assert seen[0]["valid"]
    assert seen[1]["count"] == 0


def test_a_step_without_a_forward_of_the_model_warns_once():
    model, optimizer, seen, monitor = watched()

    def steps(number):
        for _ in range(number):
            model.blocks[0](torch.ones(2, 16)).sum().backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match=r"no forward and backward of the model was seen") as caught:
        steps(3)
    assert len(caught) == 1
    monitor.close()
    assert seen == []


def test_modes_changed_between_forward_and_step_are_those_of_the_forward():
    torch.manual_seed(0)
    model = small_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[seen.extend]):
        x, y = tokens(0)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        model.eval()
        model.blocks[0].training = True
        optimizer.step()
        assert [m.training for m in model.modules()].count(True) == 1
    assert [row["update_rms"] for row in seen] == [0.0] * 3


def test_hooks_of_the_user_can_tell_the_second_forward():
    calls = {False: 0, True: 0}
    model, optimizer, _, monitor = watched()
    model.blocks[1].register_forward_hook(lambda *_: calls.__setitem__(monitor.replaying, calls[monitor.replaying] + 1))
    train(model, optimizer, 2)
    monitor.close()
    assert calls == {False: 2, True: 2}


def test_a_failing_sink_warns_once_and_spares_the_others():
    def fail(rows):
        raise OSError("disk full")

    model = ResNet(8, 16, 2, 3)
    optimizer = sgd(model)
    seen = []
    with (
        pytest.warns(RuntimeWarning, match="CallableSink failed at step 0 .OSError: disk full") as caught,
        fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[fail, seen.extend]),
    ):
        train(model, optimizer, 3)
    assert len(caught) == 1
    assert len(seen) == 6


# Copies


def test_copies_of_the_model_are_not_watched():
    model, optimizer, seen, monitor = watched()
    train(model, optimizer, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(other(rows(0)[0]), rows(0)[1]).backward()
        train(other, adamw(other), 1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert len(seen) == 3
    train(model, optimizer, 1)
    monitor.close()
    assert len(seen) == 6
    assert {row["micro_batches"] for row in seen} == {1}


def test_a_copy_can_have_a_monitor_of_its_own():
    model, optimizer, seen, monitor = watched()
    other = copy.deepcopy(model)
    _, other_optimizer, other_seen, other_monitor = watched(model=other)
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    monitor.close()
    other_monitor.close()
    assert [row["angle"] for row in seen] == [row["angle"] for row in other_seen]


# torch.compile


def test_a_compiled_model_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"'blocks.0' is inside a part of the model that torch.compile has compiled"):
        watched(model=torch.compile(ResNet(8, 16, 2, 3), backend="eager"))
    model = ResNet(8, 16, 2, 3)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="Compile the watched blocks one by one"):
        watched(model=model)


def test_a_model_compiled_after_attaching_is_one_warning():
    model, optimizer, seen, monitor = watched()
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(RuntimeWarning, match=r"no forward and backward of the model was seen.*torch.compile") as caught:
        train(compiled, optimizer, 2)
    assert [w.category for w in caught] == [RuntimeWarning]
    monitor.close()
    assert seen == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_blocks_compiled_one_by_one_are_watched():
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
