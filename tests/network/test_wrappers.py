"""Wrappers around a model: known ones are removed when it runs, user-defined ones are part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastfs._network.layers import parameter_names, select_layers
from fastfs._network.perturbed import Perturbed
from fastfs._network.wrappers import clean_name, prefixes, unwrapped
from fastfs.formula import cuts, measure
from fastfs.models import ResNet
from fastfs.monitor import Probe
from tests.helpers.monitor_cases import sgd, watched


class Scaled(nn.Module):
    """A wrapper with its own forward, and a parameter with the same name as one of its only child."""

    def __init__(self, net: Any, own: bool = True) -> None:
        super().__init__()
        self.module = net
        self.weight = nn.Parameter(torch.full((6,), 0.2)) if own else None

    def forward(self, x: Tensor) -> Tensor:
        x = x - 3.0
        return 2.0 * self.module(x / 5.0 if self.weight is None else x * self.weight)


def chain() -> Any:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Create a process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


BATCH = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 3
TARGET = torch.randn(32, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(model: Any, inner: Any) -> Any:
    """Return rms and cosine of the feature update of layers 0 and 2 in one step of SGD."""
    seen: dict[int, list[Any]] = {0: [], 2: []}
    handles = [inner[i].register_forward_hook(lambda _m, _a, y, i=i: seen[i].append(y)) for i in seen]
    optimizer = sgd(model)
    loss = F.mse_loss(model(BATCH), TARGET)
    for (features,) in seen.values():
        features.retain_grad()
    loss.backward()
    optimizer.step()
    model(BATCH)
    for handle in handles:
        handle.remove()
    result = {}
    for i, (before, after) in seen.items():
        moved = (after - before).detach()
        cosine = -(moved * before.grad).sum() / moved.norm() / before.grad.norm()
        result[str(i)] = {"update_rms": float(moved.square().mean().sqrt()), "cos_angle": float(cosine)}
    return result


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amplify": True},
        {"mode": "jvp"},
        {"mode": "probe", "probe": Probe(BATCH, lambda y: F.mse_loss(y, TARGET), dtype=None)},
    ],
    ids=["batch", "amplified", "jvp", "probe"],
)
def test_a_wrapper_of_ones_own_is_run(options: dict[str, Any], own: bool) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return Scaled(chain(), own).double()

    reference = model()
    hand = by_hand(reference, reference.module)
    net, optimizer, seen, monitor = watched(layers=["0", "2"], model=model(), rows=None, **options)
    F.mse_loss(net(BATCH), TARGET).backward()
    optimizer.step()
    monitor.close()
    assert [row["name"] for row in seen] == ["0", "2"]
    rel = 5e-2 if options.get("mode") == "jvp" else 1e-6  # jvp measures the first-order update
    for row in seen:
        assert row["valid"], row["why"]
        for key, value in hand[row["name"]].items():
            assert row[key] == pytest.approx(value, rel=rel), key


def test_the_formula_sees_the_wrapper_too() -> None:
    torch.manual_seed(0)
    model = Scaled(chain()).double()

    def loss(net: Any, batch: Any) -> Any:
        return F.mse_loss(net(batch[0]), batch[1])

    found = measure(model, loss, (BATCH, TARGET), lr=1e-3, layers=["0", "2"])
    assert float(found.loss) == pytest.approx(loss(model, (BATCH, TARGET)).item(), rel=1e-12)
    assert cuts(model, BATCH, layers=["0", "2"]).upstream[0] == ["weight", "0.weight", "0.bias"]


def test_parameters_have_names_of_their_own() -> None:
    model = Scaled(nn.Linear(6, 3))
    parameters = list(model.parameters())
    assert list(parameter_names(model, parameters)) == ["weight", "module.weight", "bias"]
    assert list(parameter_names(model, parameters).values()) == parameters
    assert [layer.name for layer in select_layers(model, "auto")] == ["module"]
    assert [layer.name for layer in select_layers(model, ["", "module"])] == ["Scaled", "module"]
    deep = Scaled(chain())
    assert list(parameter_names(deep, list(deep.parameters()))) == [
        "weight",
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    stranger = torch.ones(1)
    assert list(parameter_names(deep, [stranger, deep.weight])) == ["(parameter 0, not the model's)", "weight"]  # type: ignore[list-item]


def test_shared_parameters_have_one_name() -> None:
    model = chain()
    model[2] = nn.Linear(6, 16)
    model[2].weight = model[0].weight
    names = parameter_names(model, list(model.parameters()))
    assert list(names) == ["0.weight", "0.bias", "2.bias"]
    assert names["0.weight"] is model[2].weight


@pytest.mark.filterwarnings("ignore:torch.nn.DataParallel:FutureWarning")
def test_known_wrappers_are_looked_through_by_class(alone: None) -> None:
    net = ResNet(6, 8, 2, 3)
    own = Scaled(net)
    for wrap in (
        lambda m: torch.compile(m, backend="eager"),
        DistributedDataParallel,
        DataParallel,
        lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    ):
        for model, first in ((net, "blocks.0"), (own, "blocks.0")):
            wrapped = wrap(model)
            assert unwrapped(wrapped) is model
            layers = select_layers(wrapped, "auto")
            assert [layer.name for layer in layers] == [first, "blocks.1"]
            assert select_layers(wrapped, [""])[0].module is model
            names = list(parameter_names(wrapped, list(model.parameters())))
            assert names == list(parameter_names(model, list(model.parameters())))
    assert unwrapped(own) is own
    assert unwrapped(checkpoint_wrapper(net)) is not net  # its own forward is kept
    assert [layer.name for layer in select_layers(checkpoint_wrapper(net), "auto")] == ["blocks.0", "blocks.1"]


def test_a_subclass_of_a_known_wrapper_is_one(alone: None) -> None:
    class Parallel(DistributedDataParallel):
        pass

    net = ResNet(6, 8, 2, 3)
    assert unwrapped(Parallel(net)) is net


def test_prefixes() -> None:
    net = ResNet(6, 8, 1, 3)
    assert prefixes(net) == 0
    assert prefixes(Scaled(net)) == 1
    assert prefixes(Scaled(Scaled(net))) == 1  # the inner one is part of the model
    assert clean_name("module.module.blocks.0", 1) == "module.blocks.0"
    assert clean_name("module._orig_mod.blocks.0", 1) == "blocks.0"
    assert clean_name("blocks.module.0", 2) == "blocks.module.0"


def test_forwards_at_other_parameters_run_the_wrapper() -> None:
    torch.manual_seed(0)
    model = Scaled(chain()).double()
    parameters = list(model.parameters())
    perturbed = Perturbed(model, parameters)
    with torch.no_grad():
        assert torch.equal(perturbed(parameters, BATCH), model(BATCH))
        values = [p + 0.1 * torch.randn_like(p) for p in parameters]
        found = perturbed(values, BATCH)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        assert torch.equal(found, model(BATCH))
