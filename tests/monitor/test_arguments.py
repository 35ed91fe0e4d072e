"""Wrong arguments, and which modules and outputs are watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastfs
from fastfs._network.layers import clean_name
from fastfs.models import MLP, ResNet
from tests.helpers.monitor_cases import rows, sgd, train, watched

# Arguments


def test_no_match_lists_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"layers.*d' matches no module of ResNet. Candidates: stem, blocks.0"):
        watched(layers=r"layers\.\d")


def test_an_unknown_name_lists_the_candidates() -> None:
    with pytest.raises(ValueError, match=r"unknown names \['blocks.7'\].*Candidates: stem"):
        watched(layers=["blocks.0", "blocks.7"])
    with pytest.raises(ValueError, match="an empty list"):
        watched(layers=[])


def test_many_candidates_are_cut() -> None:
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
        ({"every": np.float64(2)}, ValueError, "every.*got"),
        ({"every": np.bool_(True)}, ValueError, "every.*got"),
        ({"every": fastfs.monitor.Every}, ValueError, "every.*got <class"),
        ({"metadata": [1]}, TypeError, "metadata: expected a dictionary, got list"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        watched(**options)


def test_wrong_model_optimizer_and_sink() -> None:
    model = MLP(8, 8, 3)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        fastfs.Monitor(3, sgd(model), layers="blocks")
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, .* or a list of them, got str"):
        fastfs.Monitor(model, "sgd", layers="blocks")
    with pytest.raises(ValueError, match="SGD updates no parameter of MLP"):
        fastfs.Monitor(model, sgd(MLP(8, 8, 3)), layers="blocks")
    with pytest.raises(ValueError, match="LBFGS"):
        fastfs.Monitor(model, torch.optim.LBFGS(model.parameters()), layers="blocks")
    with pytest.raises(TypeError, match="sink: expected a path, a function"):
        fastfs.Monitor(model, sgd(model), layers="blocks", sinks=[3])


@pytest.mark.parametrize("sinks", ["abc", b"abc", print, 3, {"a.jsonl"}])
def test_sinks_must_be_a_list(sinks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = MLP(8, 8, 3)
    with pytest.raises(TypeError, match=r"sinks: expected a list of paths, .* one file can be given as path="):
        fastfs.Monitor(model, sgd(model), layers="blocks", sinks=sinks)
    assert list(tmp_path.iterdir()) == []


def test_a_class_is_no_sink() -> None:
    model = MLP(8, 8, 3)
    with pytest.raises(TypeError, match=r"expected an object, got the class JsonlSink: make one, JsonlSink\(...\)"):
        fastfs.Monitor(model, sgd(model), layers="blocks", sinks=[fastfs.monitor.JsonlSink])


@pytest.mark.parametrize("value", [object(), torch.zeros(2), {1, 2}, {(1, 2): 3}])
def test_metadata_that_json_cannot_hold(value: Any, tmp_path: Path) -> None:
    model = MLP(8, 8, 3)
    loop: dict[Any, Any] = {}
    loop["again"] = loop
    for bad in (value, loop):
        with pytest.raises(TypeError, match="metadata: expected a dictionary that JSON can hold"):
            fastfs.Monitor(
                model, sgd(model), layers="blocks", path=tmp_path / "new" / "record.jsonl", metadata={"it": bad}
            )
    assert list(tmp_path.iterdir()) == []


def test_integers_of_numpy_are_integers() -> None:
    model, optimizer, seen, monitor = watched(every=np.int64(2))
    train(model, optimizer, 3)
    monitor.close()
    assert sorted({row["step"] for row in seen}) == [0, 2]
    assert type(fastfs.monitor.Every(np.int64(2)).steps) is int


def test_a_schedule_of_ones_own() -> None:
    class Doubling:
        def due(self, step: int) -> bool:
            return step & (step - 1) == 0

    model, optimizer, seen, monitor = watched(every=Doubling())
    train(model, optimizer, 9)
    monitor.close()
    assert sorted({row["step"] for row in seen}) == [0, 1, 2, 4, 8]


def test_repr_and_properties() -> None:
    model, optimizer, _, monitor = watched(every=2)
    assert monitor.layers == ("blocks.0", "blocks.1", "blocks.2")
    assert (monitor.step, monitor.due) == (0, True)
    train(model, optimizer, 1)
    assert (monitor.step, monitor.due) == (1, False)
    assert "3 layers" in repr(monitor)
    assert "step 1" in repr(monitor)
    monitor.close()
    assert "closed" in repr(monitor)


def test_log_takes_scalars_only_and_adds_up() -> None:
    model, optimizer, seen, monitor = watched()
    with pytest.raises(ValueError, match=r"scalar loss, got a tensor of shape \(2,\)"):
        monitor.log(loss=torch.zeros(2))
    monitor.log(loss=1.5)
    monitor.log(loss=torch.tensor(2.0))
    train(model, optimizer, 2)
    monitor.flush()
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
def test_names_lose_the_prefixes_of_wrappers(raw: str, wrapped: bool, clean: str) -> None:
    assert clean_name(raw, wrapped) == clean


def test_a_data_parallel_wrapper_is_seen_through() -> None:
    class Parallel(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    model, optimizer, seen, monitor = watched(layers=r"^blocks\.\d+$", model=Parallel(ResNet(8, 16, 2, 3)))
    train(model, optimizer, 1)
    monitor.close()
    assert [row["name"] for row in seen] == ["blocks.0", "blocks.1"]
    assert all(row["valid"] for row in seen)


class Outputs(nn.Module):
    """A layer that returns what it is told to."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self.layer(x))


class Model(nn.Module):
    def __init__(self, make: Any, take: Any) -> None:
        super().__init__()
        self.inner = Outputs(make)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.inner(x))[:, :3]


@pytest.mark.parametrize(
    ("make", "take"),
    [
        (lambda x: (torch.zeros(2, dtype=torch.long), x, x * 2), lambda out: out[1]),
        (lambda x: {"ids": [1], "hidden": x}, lambda out: out["hidden"]),
        (lambda x: [None, (x,)], lambda out: out[1][0]),
    ],
)
def test_the_first_floating_tensor_of_an_output_is_watched(make: Callable[..., Any], take: Callable[..., Any]) -> None:
    model, optimizer, seen, monitor = watched(layers="inner$", model=Model(make, take))
    train(model, optimizer, 1)
    monitor.close()
    assert seen[0]["count"] == 16 * 8
    assert seen[0]["valid"]


@pytest.mark.parametrize("make", [lambda x: (x.argmax(dim=1),), lambda x: "text", lambda x: ()])
def test_an_output_without_a_floating_tensor_is_a_warning(make: Callable[..., Any]) -> None:
    other = torch.zeros(16, 8, requires_grad=True)
    model, optimizer, seen, monitor = watched(layers="inner$", model=Model(make, lambda _: other))
    message = r"TypeError: layer 'inner' \(Outputs\): expected an output that is or holds a floating-point"
    with pytest.warns(RuntimeWarning, match=message):
        train(model, optimizer, 1)
    monitor.close()
    assert seen == []


def test_layers_that_are_unused_frozen_or_without_gradient() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(8, 8)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.used = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)
            self.apart = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.backbone(x)
            x = self.used(self.frozen(x))
            self.apart(x)
            return x[:, :3]

    model, optimizer, seen, monitor = watched(layers="backbone|frozen|used|unused|apart", model=Sometimes())
    with pytest.warns(RuntimeWarning, match="has no forward of 'unused'"):
        train(model, optimizer, 3)
    monitor.close()
    assert len(seen) == 3 * 5
    assert {row["name"]: row["why"] for row in seen} == {
        "backbone": "the layer is outside the autograd graph",
        "frozen": "the layer is outside the autograd graph",
        "used": None,
        "unused": "the layer did not run",
        "apart": "no backward vector",
    }
    rows_of = {name: [row for row in seen if row["name"] == name] for name in monitor.layers}
    assert all(row["valid"] for row in rows_of["used"])
    for name in ("backbone", "frozen", "unused"):
        assert all(row["count"] == 0 and not row["valid"] and math.isnan(row["angle"]) for row in rows_of[name])
    # Ran, and moved, but the loss does not depend on it: the backward vector is zero.
    assert all(row["backward_rms"] == 0 and row["update_rms"] > 0 and not row["valid"] for row in rows_of["apart"])


def test_layers_that_run_in_some_steps_only() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[int(x[0, 0] > 0)](x)[:, :3]

    def batch(step: int) -> tuple[Any, ...]:
        x, y = rows(step)
        x[0, 0] = (-1.0) ** step
        return x, y

    model, optimizer, seen, monitor = watched(model=Alternating())
    with pytest.warns(RuntimeWarning, match="has no forward of 'blocks.0'"):
        train(model, optimizer, 4, batch)
    monitor.close()
    assert [row["count"] > 0 for row in seen] == [False, True, True, False] * 2


def test_the_description_says_what_an_aligned_step_does() -> None:
    from fastfs._monitor import settings

    tiny = settings.aligned_work([torch.zeros(32, 32), torch.zeros(32)], 3)
    assert "2 parameters, 4.1 KiB each" in tiny
    assert "norm of 3 backward vectors" in tiny
    assert "so small a model" in tiny
    large = settings.aligned_work([torch.zeros(1024, 1024)], 3)
    assert "4.0 MiB each" in large
    assert "so small a model" not in large
