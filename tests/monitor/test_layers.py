"""Which modules are watched and under what names, what is taken from their outputs, and totals of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastfs
from fastfs.models import MLP, ResNet
from tests.helpers.monitor_cases import rows, sgd, small_transformer, tokens, train, watched

KEYS = ("angle", "update_rms", "feature_rms", "backward_rms", "count")


def conv_net() -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Stages(nn.Module):
    """Lists of blocks in a list of stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for block in stage.children():
                x = x + torch.tanh(block(x))
        return x[:, :3]


class Plain(nn.Module):
    """No repeated blocks, a parameter of its own, and modules without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.encode = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.encode(x * self.scale)))))


class Encoder(nn.Module):
    """Blocks of blocks: the outermost are the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(nn.Sequential):
    """A block that happens to be a container."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def images(step: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 1, 4, 4, generator=generator), torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize(
    ("model", "batch", "names"),
    [
        (small_transformer, tokens, ["blocks.0", "blocks.1", "blocks.2"]),
        (lambda: ResNet(8, 16, 3, 3), rows, ["blocks.0", "blocks.1", "blocks.2"]),
        (lambda: nn.Sequential(ResNet(8, 16, 2, 8), nn.Linear(8, 3)), rows, ["0.blocks.0", "0.blocks.1"]),
        (conv_net, images, ["0", "1", "5"]),
        (Stages, rows, [f"stages.{stage}.{block}" for stage in range(3) for block in range(2)]),
        (lambda: nn.Sequential(*(Residual(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))), rows, ["0", "1", "2"]),
        (Plain, rows, ["encode", "norm", "head"]),
        (Encoder, rows, ["body.0", "body.1", "body.2"]),
    ],
    ids=["transformer", "resnet", "resnet inside", "conv", "nested lists", "containers", "plain", "mixed"],
)
def test_auto(model: Any, batch: Any, names: Any) -> None:
    model, optimizer, seen, monitor = watched(layers="auto", model=model())
    assert list(monitor.layers) == names
    train(model, optimizer, 2, batch)
    monitor.close()
    assert [row["name"] for row in seen] == names * 2
    assert all(row["valid"] for row in seen), [(row["name"], row["why"]) for row in seen]


def test_auto_is_the_default_and_takes_lists_of_which_half_is_alike() -> None:
    for depth, names in (
        (4, ("blocks.0", "blocks.1", "blocks.2")),  # the first block is of another type than the others
        (3, ("blocks.0", "blocks.1.linear", "head")),
    ):
        model = MLP(8, 16, depth, 3)
        with fastfs.Monitor(model, sgd(model), sinks=[lambda rows: None]) as monitor:
            assert monitor.layers == names


def test_predicates_and_types() -> None:
    def names(layers: Any, model: Any = None) -> list[Any]:
        with watched(layers=layers, model=model or small_transformer())[3] as monitor:
            return list(monitor.layers)

    assert names(lambda name, module: name.endswith("1") or isinstance(module, nn.Embedding)) == [
        "token",
        "position",
        "blocks.1",
    ]
    assert names(nn.LayerNorm) == [f"blocks.{i}.norm_{what}" for i in range(3) for what in ("attention", "mlp")] + [
        "norm"
    ]
    assert names((nn.Embedding, nn.Dropout)) == [
        "token",
        "position",
        "dropout",
        *(f"blocks.{i}.dropout" for i in range(3)),
    ]
    assert names([f"blocks.{i}" for i in (2, 0)]) == ["blocks.0", "blocks.2"]  # in the order of the model


def test_predicates_and_types_see_through_wrappers() -> None:
    model = Stages()
    for stage in model.stages:
        stage[0] = checkpoint_wrapper(stage[0])
        stage[1] = torch.compile(stage[1], backend="eager")
    found = []
    with watched(layers=lambda name, module: found.append((name, type(module))) or name == "stem", model=model)[3]:  # type: ignore[func-returns-value]
        pass
    assert ("stages.1.0", nn.Linear) in found
    assert ("stages.1.1", nn.Linear) in found
    with watched(layers=nn.Linear, model=model)[3] as monitor:
        assert list(monitor.layers) == ["stem", *(f"stages.{i}.{j}" for i in range(3) for j in range(2))]


CANDIDATES = r"Candidates: stem, blocks\.0, blocks\.0\.linear"


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (lambda name, module: False, ValueError, rf"<lambda> matches no module of ResNet\. {CANDIDATES}"),
        (nn.Conv2d, ValueError, rf"Conv2d matches no module of ResNet\. {CANDIDATES}"),
        ((nn.Conv2d, nn.Bilinear), ValueError, rf"Conv2d or Bilinear matches no module of ResNet\. {CANDIDATES}"),
        ("attention", ValueError, rf"'attention' matches no module of ResNet\. {CANDIDATES}"),
        (
            ["blocks"],
            ValueError,
            r"'blocks' is a ModuleList, which has no forward and so no features\..*Candidates: blocks\.0, blocks\.0",
        ),
        ("^blocks$", ValueError, r"matches only modules without a forward \(blocks\) of ResNet"),
        (nn.ModuleList, ValueError, r"ModuleList matches only modules without a forward .*Candidates: blocks\.0"),
        (["block.0"], ValueError, rf"unknown names \['block\.0'\] of ResNet\. {CANDIDATES}"),
        (int, TypeError, "expected .auto., a regular expression, .* got <class 'int'>"),
        ((), ValueError, "an empty list"),
        ((nn.Linear, 3), TypeError, "got \\(<class"),
        (None, TypeError, "got None"),
    ],
)
def test_errors_list_the_candidates(layers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        watched(layers=layers)


def test_errors_name_the_model_inside_of_wrappers() -> None:
    with pytest.raises(ValueError, match=rf"matches no module of ResNet\. {CANDIDATES}"):
        watched(layers="nothing", model=torch.compile(ResNet(8, 16, 2, 3), backend="eager"))


class Bare(nn.Module):
    """No submodules, or one that never runs."""

    def __init__(self, *held: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        if held:
            self.held = nn.ParameterList(held)

    def forward(self, x: Tensor) -> Tensor:
        for p in getattr(self, "held", ()):
            x = x * p
        return (x @ self.weight)[:, :3]


@pytest.mark.parametrize(
    ("model", "name"),
    [(lambda: nn.Linear(8, 3), "Linear"), (Bare, "Bare"), (lambda: Bare(torch.ones(8)), "Bare")],
    ids=["linear", "bare", "parameter list"],
)
@pytest.mark.parametrize(
    "layers",
    ["auto", "", [""], nn.Module, lambda name, module: True],
    ids=["auto", "empty", "list", "class", "function"],
)
def test_a_model_without_submodules_is_a_layer_itself(model: Any, name: str, layers: Any) -> None:
    torch.manual_seed(0)
    model, optimizer, seen, monitor = watched(layers=layers, model=model().double(), groups={"all": name}, rows=None)
    assert monitor.layers == (name,)
    x, y = rows(0)
    for _ in range(2):
        optimizer.zero_grad()
        before = model(x.double())
        before.retain_grad()
        F.cross_entropy(before, y).backward()
        optimizer.step()
        with torch.no_grad():
            moved = model(x.double()) - before
    monitor.close()
    assert [row["name"] for row in seen] == [name, "all"] * 2
    row = seen[-2]
    assert row["valid"], row["why"]
    assert row["update_rms"] == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-9)
    cosine = -(moved * before.grad).sum() / moved.norm() / before.grad.norm()
    assert row["cos_angle"] == pytest.approx(float(cosine), rel=1e-9)


def test_the_model_itself_is_watched_beside_others_if_asked_for() -> None:
    model, optimizer, seen, monitor = watched(layers=["blocks.1", "ResNet"])
    assert monitor.layers == ("ResNet", "blocks.1")
    train(model, optimizer, 1)
    monitor.close()
    assert all(row["valid"] for row in seen)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Net = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.Net(x)

    for layers, names in (([""], ("(Net)",)), (["Net", "(Net)"], ("(Net)", "Net")), ("auto", ("Net",))):
        with watched(layers=layers, model=Net())[3] as monitor:
            assert monitor.layers == names
