"""The structure of a forward: the parameters below each watched feature, and whether it is a cut for them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastfs._network.structure import Structure, analyse, edge_of
from fastfs.models import MLP, ResNet, Transformer
from tests.helpers.cost import counted
from tests.helpers.structure_cases import UNUSED


def structure_of(
    model: nn.Module,
    layers: list[str],
    *args: Any,
    parameters: list[str] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Structure:
    """Analyse one forward with hooks on the named layers."""
    features: list[list[Any]] = [[] for _ in layers]

    def tap(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output["y"] if isinstance(output, dict) else output
            features[index].append(edge_of(first))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(tap(i)) for i, name in enumerate(layers)]
    output = (forward or model)(*args)
    for handle in handles:
        handle.remove()
    outputs = [output] if isinstance(output, Tensor) else list(output)
    named = {name: p for name, p in model.named_parameters() if parameters is None or name in parameters}
    return analyse(features, outputs, list(named.values()), list(named))


def names_of(model: nn.Module, row: Tensor) -> list[str]:
    return [name for (name, _), here in zip(model.named_parameters(), row.tolist(), strict=True) if here]


def test_mlp_every_block_is_a_cut() -> None:
    model = MLP(4, 8, 5, 3)
    found = structure_of(model, [f"blocks.{i}" for i in range(4)], torch.randn(2, 4))
    assert found.cut == [True] * 4
    assert found.reason == [None] * 4
    assert found.unreached == []
    assert not found.opaque
    assert names_of(model, found.upstream[1]) == ["blocks.0.weight", "blocks.1.linear.weight"]
    assert names_of(model, found.own[1]) == ["blocks.1.linear.weight"]
    assert found.own.sum(dim=0).tolist() == [1, 1, 1, 1, 0]  # no layer depends on the head


def test_resnet_branches_are_no_cuts() -> None:
    model = ResNet(4, 8, 3)
    layers = ["stem", "blocks.0", "blocks.1.linear", "blocks.1", "blocks.2"]
    found = structure_of(model, layers, torch.randn(2, 4))
    assert found.cut == [True, True, False, True, True]
    assert found.reason[2] == "inside a residual branch: 2 parameters also reach the output past it"
    assert names_of(model, found.own[2]) == ["blocks.1.linear.weight"]
    assert names_of(model, found.own[3]) == []


def test_transformer() -> None:
    model = Transformer(width=16, depth=2, heads=2, context=8)
    layers = ["blocks.0.attention", "blocks.0", "blocks.1.mlp_in", "blocks.1", "norm"]
    found = structure_of(model, layers, torch.randint(256, (2, 8)))
    assert found.cut == [False, True, False, True, True]
    assert "also reach the output past it" in (found.reason[0] or "")
    # blocks.0.attention also owns the embeddings, because no watched layer precedes it
    assert names_of(model, found.own[0])[:2] == ["token.weight", "position.weight"]
    assert "blocks.0.mlp_in.weight" in names_of(model, found.own[1])
    assert "blocks.0.attention.qkv.weight" not in names_of(model, found.own[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_tied_embedding_flags_every_layer_between(autocast: bool) -> None:
    model = Transformer(width=16, depth=2, heads=2, context=8, tied=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layers = ["token", "blocks.0.mlp_out", "blocks.0", "norm"]
        found = structure_of(model, layers, torch.randint(256, (2, 8)))
    tied = "parameters used before and after it: token.weight"
    assert found.cut == [False] * 4
    assert found.reason[0] == found.reason[2] == found.reason[3] == tied
    assert found.reason[1] is not None
    assert found.reason[1].startswith("inside a residual branch")
    assert found.reason[1].endswith(tied)


def test_tied_parameter_both_uses_below() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.shared(torch.tanh(self.shared(x)))))

    found = structure_of(Net(), ["shared", "last"], torch.randn(2, 4))
    assert found.cut == [False, True]
    assert found.reason[0] == "runs several times, one run using the result of another"


def test_shared_linear_under_autocast_before_and_after() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.mid = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.mid(self.shared(x)))

    with torch.autocast("cpu", torch.bfloat16):  # both uses share one cast of the weight
        found = structure_of(Net(), ["mid"], torch.randn(2, 4))
    assert found.reason == ["parameters used before and after it: shared.weight, shared.bias"]


def test_several_visits_side_by_side_are_a_cut() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor, y: Tensor, past: bool = False) -> Tensor:
            with torch.no_grad():
                self.encoder(x)  # such as a target network
            output = self.head(self.encoder(x) - self.encoder(y))
            return output + self.encoder.weight.sum() if past else output

    model = Siamese()
    x, y = torch.randn(2, 2, 4)
    assert structure_of(model, ["encoder"], x, y).cut == [True]
    found = structure_of(model, ["encoder"], x, y, True)
    assert found.reason == ["parameters used before and after it: encoder.weight"]


def test_outputs_of_chunk_are_not_one_another() -> None:
    class Net(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.lin, self.first, self.both = nn.Linear(4, 8), nn.Identity(), both

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.lin(x).chunk(2, dim=1)
            return self.first(a) * b if self.both else self.first(a)

    assert structure_of(Net(False), ["first"], torch.randn(2, 4)).cut == [True]
    assert structure_of(Net(True), ["first"], torch.randn(2, 4)).cut == [False]


def test_conv_net_with_batch_norm_and_in_place_relu() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    found = structure_of(model, ["0", "1", "3"], torch.randn(2, 1, 8, 8))
    assert found.cut == [True] * 3
    assert found.upstream.sum(dim=1).tolist() == [2, 4, 6]


def test_view_changed_in_place() -> None:
    """Its gradient bypasses the hooked tensor, so there is no backward vector either."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 1)
    )
    found = structure_of(model, ["0", "1", "3"], torch.randn(3, 4))
    assert found.reason == [None, UNUSED, None]


def test_frozen_unused_and_detached() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.a, self.unused, self.side, self.head = (nn.Linear(4, 4) for _ in range(5))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(self.frozen(x))
            self.side(h)
            return self.head(h)

    model = Net()
    found = structure_of(model, ["frozen", "a", "unused", "side"], torch.randn(2, 4))
    outside = "outside the autograd graph"
    assert found.reason == [outside, None, "did not run", UNUSED]
    assert found.unreached == [f"{n}.{p}" for n in ("frozen", "unused", "side") for p in ("weight", "bias")]
    # a leaf as feature has nothing below it
    found = structure_of(model, ["frozen", "a"], torch.randn(2, 4, requires_grad=True), parameters=["a.weight"])
    assert found.cut == [True, True]
    assert found.upstream.tolist() == [[False], [True]]


def test_leaf_features() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.frozen(x).requires_grad_())

    model = Net()
    model.frozen.register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    assert structure_of(model, ["frozen"], torch.randn(2, 4)).cut == [True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = MLP(4, 8, 5)

    def forward(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(F.relu(x))

    x = torch.randn(2, 4, requires_grad=True)
    found = structure_of(model, ["blocks.0", "blocks.1"], x, forward=forward)
    if reentrant:
        assert found.reason == ["outside the autograd graph"] * 2
        assert found.unreached == [n for n, _ in model.named_parameters() if n.startswith("blocks")]
    else:
        assert found.cut == [True, True]


def test_hidden_parameters_of_a_reentrant_checkpoint() -> None:
    class Checkpointed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(4, 4), nn.Linear(4, 1))
    found = structure_of(model, ["0", "1"], torch.randn(2, 4))
    assert found.reason == [None, "parameters hidden from the graph (reentrant checkpoint?)"]
    assert found.unreached == ["1.weight", "1.bias"]
    assert found.counts == [2, 0]  # the second depends on more than the graph shows


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Tanh(), norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    found = structure_of(model, ["0", "2"], torch.randn(2, 4))
    assert found.cut == [True, True]
    assert names_of(model, found.own[0]) == [n for n, _ in model[0].named_parameters(prefix="0")]


def test_lstm_and_tuple_outputs() -> None:
    class Net(nn.Module):
        def __init__(self, state: bool) -> None:
            super().__init__()
            self.lstm, self.head, self.state = nn.LSTM(4, 4, 2), nn.Linear(4, 1), state

        def forward(self, x: Tensor) -> Tensor:
            y, (h, _) = self.lstm(x)
            return self.head(y + h[-1:] if self.state else y)

    assert structure_of(Net(False), ["lstm"], torch.randn(3, 2, 4)).cut == [True]
    assert structure_of(Net(True), ["lstm"], torch.randn(3, 2, 4)).cut == [False]  # the state bypasses the output


def test_dictionaries_and_several_outputs() -> None:
    class Block(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"y": super().forward(x)}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = Block(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.a(x)["y"]
            return self.b(h), self.aux(h), torch.ones(3)

    found = structure_of(Net(), ["a", "b"], torch.randn(2, 4))
    assert found.cut == [True, False]


def test_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(MLP(4, 8, 4))
        found = structure_of(model, ["module.blocks.0", "module.blocks.1"], torch.randn(2, 4))
        assert found.cut == [True, True]
        assert found.unreached == []
        del model
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_region_is_opaque() -> None:
    torch.compiler.reset()
    model = MLP(4, 8, 4)
    compiled = torch.compile(model, backend="aot_eager")
    opaque = torch.compile(lambda x: (h := model.blocks[0](x), model.head(F.relu(h))), backend="aot_eager")
    feature, output = opaque(torch.randn(2, 4))
    parameters = dict(model.named_parameters())
    found = analyse([[edge_of(feature)]], [output], list(parameters.values()), list(parameters))
    assert found.opaque
    assert found.cut == [False]
    # With a single result, the inside of the region is irrelevant.
    output = compiled(torch.randn(2, 4))
    found = analyse([[edge_of(output)]], [output], list(parameters.values()), list(parameters))
    assert not found.opaque
    assert found.cut == [True]
    torch.compiler.reset()


def test_arguments() -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="1 names for 2 parameters, 1 of them different"):
        analyse([], [p], [p, p], ["p"])
    found = analyse([[]], [], [p], ["p"])
    assert found.reason == ["did not run"]
    assert found.unreached == ["p"]


@pytest.mark.slow
def test_deep_recurrence_is_fast_and_leaves_nothing_alive() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(8000):
                x = torch.tanh(self.cell(x))
            return self.last(x)

    model = Deep()
    features: list[Any] = []
    handle = model.cell.register_forward_hook(lambda _m, _a, out: features.append(edge_of(out)))
    x = torch.randn(1, 2, requires_grad=True)
    middle = x * 1
    alive = weakref.ref(middle)
    output = model(middle)
    handle.remove()
    named = dict(model.named_parameters())
    with counted() as cost:
        found = analyse([[features[-1]], features], [output], list(named.values()), list(named))
    assert cost.calls < 200 * 8000
    assert found.cut[0]  # only the last visit: every use of the parameters is below it
    assert found.reason[1] == "runs several times, one run using the result of another"
    del output, features[:], middle, model, named
    gc.collect()
    assert alive() is None
    assert found.upstream.shape == (2, 4)


def test_a_hundred_layers_take_calls_in_proportion() -> None:
    model = Transformer(width=8, depth=100, heads=2, context=4, tied=True)
    features: list[list[Any]] = [[] for _ in model.blocks]
    for block, visits in zip(model.blocks, features, strict=True):
        block.register_forward_hook(lambda _m, _a, out, visits=visits: visits.append(edge_of(out)))
    output = model(torch.zeros(1, 4, dtype=torch.int64))
    named = dict(model.named_parameters())
    with counted() as cost:
        found = analyse(features, [output], list(named.values()), list(named))
    assert cost.calls < 2000 * 100
    assert found.reason == ["parameters used before and after it: token.weight"] * 100
