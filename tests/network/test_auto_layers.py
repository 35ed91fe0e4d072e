"""Layers selected by ``layers="auto"``: styles of public scripts, generated models, and trained modules."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastfs
from benchmarks.auto_layers import images, small, text
from benchmarks.auto_layers.measure import fresh
from benchmarks.auto_layers.parts import WIDTH, Block, ConvBlock, FeedForward, PreNorm, on
from benchmarks.auto_layers.styles import style_entries
from fastfs._network.layers import select_layers
from fastfs._network.wrappers import inner_module
from tests.helpers.cost import counted


def auto(model: Any, trained: Any = None) -> Any:
    return [layer.name for layer in select_layers(model, "auto", trained)]


@pytest.mark.parametrize("entry", style_entries(), ids=lambda entry: entry.name)
def test_styles_of_public_scripts(entry: Any) -> None:
    picked = fresh(entry.build)
    assert (len(picked.names), picked.names[0], picked.names[-1]) == (entry.count, entry.first, entry.last)
    assert picked.ran == entry.count
    assert picked.reached == entry.count - ("not used" in entry.verdict)


class Named(nn.Module):
    """A residual block whose weights have the given names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for part in self.children():
            branch = part(branch).relu()
        return x + branch


@pytest.mark.parametrize(
    "names",
    [("up", "down"), ("up_proj", "down_proj"), ("reduce", "merge", "embed"), ("pool_in", "patch_out"), ("down", "act")],
)
@pytest.mark.parametrize("depth", [2, 5])
def test_blocks_whose_weights_are_named_as_resampling_layers(names: tuple[str, ...], depth: int) -> None:
    stream = text.Stream([Named(*names) for _ in range(depth)])
    assert auto(stream) == [f"blocks.{i}" for i in range(depth)]
    assert auto(nn.ModuleDict({"embed": nn.Linear(4, WIDTH), "stream": stream})) == [
        f"stream.blocks.{i}" for i in range(depth)
    ]


class Small(nn.Module):
    """A block of a norm and one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln(x)).relu()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_blocks_of_a_single_weight(depth: int) -> None:
    model = text.NanoGPT()
    model.transformer["h"] = nn.ModuleList([Small() for _ in range(depth)])
    assert auto(model) == [f"transformer.h.{i}" for i in range(depth)]
    in_place = text.NanoGPT()
    del in_place.transformer["h"]
    in_place.transformer.update({f"h{i}": Small() for i in range(depth)})
    if depth > 1:
        assert auto(in_place) == [f"transformer.h{i}" for i in range(depth)]
    stream = text.Stream([Small() for _ in range(4)])
    stream.projections = nn.ModuleList([FeedForward() for _ in range(depth)])
    assert {f"blocks.{i}" for i in range(4)} <= set(auto(stream))


# Generated models: blocks of all kinds, in stages and containers of all kinds


class Stage(nn.Module):
    def __init__(self, blocks: Any, container: Any, name: str, down: Any) -> None:
        super().__init__()
        self.downsample = nn.Linear(WIDTH, WIDTH) if down else nn.Identity()
        hold(self, name, blocks, container)
        self.path = name

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in members(self, self.path):
            x = block(x)
        return x


class Chain(nn.Module):
    def __init__(self, parts: Any, container: Any, name: str, heads: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        hold(self, name, parts, container)
        self.path = name
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList([FeedForward() for _ in range(heads)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for part in members(self, self.path):
            x = part(x)
        x = self.norm(x)
        return sum(head(x) for head in self.heads) if len(self.heads) else x


def hold(module: Any, name: str, parts: Any, container: Any) -> None:
    if container == "numbered":
        for number, part in enumerate(parts, 1):
            setattr(module, f"{name}{number}", part)
    elif container == "dict in dict":
        held = nn.ModuleDict({f"{name}_{number}": part for number, part in enumerate(parts)})
        setattr(module, name, nn.ModuleDict({"positions": nn.Embedding(4, WIDTH), "inner": held}))
    elif container == "dict":
        setattr(module, name, nn.ModuleDict({f"{name}_{number}": part for number, part in enumerate(parts)}))
    else:
        setattr(module, name, nn.ModuleList(parts) if container == "list" else nn.Sequential(*parts))


def members(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        return [child for key, child in module.named_children() if key.startswith(name) and key[len(name) :].isdigit()]
    held = getattr(module, name)
    held = held["inner"] if isinstance(held, nn.ModuleDict) and "inner" in held else held
    return list(held.children())


KINDS = [
    Block,
    text.LectureBlock,
    text.MoEBlock,
    text.MinGPTBlock,
    lambda: text.AnnotatedLayer(False),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True),
    lambda: PreNorm(FeedForward(), residual=True),
    lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
    lambda: small.Coupling(WIDTH // 2),
]


def generated(rng: Any) -> tuple[Any, ...]:
    """A model and its blocks."""
    make = rng.choice(KINDS)
    blocks = []

    def some(least: Any) -> Any:
        made = [make() for _ in range(rng.randint(least, 3))]
        if rng.random() < 0.2:
            made[0] = checkpoint_wrapper(made[0])
        if rng.random() < 0.2:
            linear = next(m for m in inner_module(made[-1]).modules() if type(m) is nn.Linear)
            nn.utils.parametrizations.weight_norm(linear)
        blocks.extend(made)
        return made

    def container(parts: Any) -> Any:
        return rng.choice(["list", "sequence", "dict", "dict in dict"] + ["numbered"] * (parts > 1))

    names = ["blocks", "layers", "layer", "stages"]
    if rng.random() < 0.5:
        parts = some(1)
        name = rng.choice([*names, "h", "body"] if len(parts) > 1 else names)
    else:
        held = [rng.choice(["list", "sequence", "dict"])] * 3
        inner = rng.choice(["blocks", "layers", "layer"])
        parts = [Stage(some(1), held[i], inner, i > 0) for i in range(rng.randint(2, 3))]
        name = rng.choice([*names, "encoder_stages", "levels"])
    model = Chain(parts, container(len(parts)), name, rng.choice([0, 0, 2]))
    if rng.random() < 0.3:
        model = small.Module(model, ema=rng.random() < 0.5)
    return model, blocks


@pytest.mark.parametrize("seed", range(60))
def test_generated_models_give_their_blocks(seed: Any) -> None:
    torch.manual_seed(seed)
    model, blocks = generated(random.Random(seed))
    layers = select_layers(model, "auto")
    assert {id(layer.module) for layer in layers} == {id(block) for block in blocks}, [layer.name for layer in layers]
    ran = []
    for layer in layers:
        layer.module.register_forward_hook(lambda *_, layer=layer: ran.append(layer.index))
    with torch.no_grad():
        model(torch.randn(2, 4, WIDTH))
    assert ran == list(range(len(blocks)))


# Trained modules


def test_a_copy_that_the_optimizer_does_not_train_is_left_out() -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder_k, self.encoder_q = text.Tower(2), text.Tower(2)  # requires_grad stays on

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder_q(x)

    model = Momentum()
    assert len(auto(model)) == 4
    own = ["encoder_q.resblocks.0", "encoder_q.resblocks.1"]
    assert auto(model, list(model.encoder_q.parameters())) == own
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.1)
    with fastfs.Monitor(model, optimizer, sinks=[lambda rows: None], verbose=False) as monitor:
        assert list(monitor.layers) == own


def test_frozen_parameters_of_the_optimizer_do_not_count_as_trained() -> None:
    model = small.Probe(trained_blocks=1)
    assert auto(model, list(model.parameters())) == ["backbone.0"]
    model.requires_grad_(False)
    assert auto(model) == auto(model, list(model.parameters())) == [f"backbone.{i}" for i in range(3)]
    assert auto(model, [torch.ones(1)]) == auto(model)  # no parameter of this model


def test_adapters_count_for_their_blocks() -> None:
    class Adapter(nn.Module):
        """Like the adapters of PEFT."""

        adapter_layer_names = ("lora_A", "lora_B")

        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    model = text.Stream([Block() for _ in range(3)]).requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    assert auto(model) == [f"blocks.{i}" for i in range(3)]
    mlp = nn.Sequential(Adapter(nn.Linear(8, 8)), nn.ReLU(), Adapter(nn.Linear(8, 8)))
    assert auto(mlp) == ["0", "2"]
    assert auto(nn.ModuleDict({"a": Adapter(nn.Linear(8, 8)), "b": nn.LayerNorm(8)}).requires_grad_(True)) == ["a", "b"]


# Modules without a forward


def test_parts_of_operations_are_no_layers() -> None:
    assert auto(nn.TransformerEncoderLayer(8, 2, 16)) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    assert auto(nn.Sequential(nn.MultiheadAttention(8, 2))) == ["0"]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8, bias=False)), nn.LayerNorm(8))
    assert auto(normed) == ["0", "1"]
    assert auto(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))) == ["ParametrizedLinear"]


def test_modules_without_a_forward_are_looked_through_wherever_they_are() -> None:
    class Holder(nn.Module):
        """Has no forward: other modules call its children."""

        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = PreNorm(text.Attention()), PreNorm(FeedForward())  # type: ignore[attr-defined]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Holder() for _ in range(2)])
            self.scales = nn.ParameterList([torch.ones(WIDTH) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer, scale in zip(self.layers, self.scales, strict=True):
                x = x + layer.attn(x)
                x = x + scale * layer.mlp(x)
            return x

    model = Net()
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    assert auto(model) == names
    for layers in (r"layers\.\d+", nn.Module, lambda name, module: True):
        chosen = [layer.name for layer in select_layers(model, layers)]
        assert set(names) < set(chosen)
        assert not {"layers", "layers.0", "layers.1", "scales"} & set(chosen)
    with pytest.raises(ValueError, match=r"'layers\.1' is a Holder, which has no forward.*Candidates: layers\.1\.attn"):
        select_layers(model, ["layers.0.attn", "layers.1"])
    with pytest.raises(ValueError, match=r"'scales' is a ParameterList, .*Candidates: layers\.0\.attn"):
        select_layers(model, ["scales"])


def test_a_forward_of_an_instance_is_a_forward() -> None:
    block = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    block.forward = lambda x: block[1](block[0](x))
    model = nn.Sequential(block, nn.Linear(8, 3))
    assert [layer.name for layer in select_layers(model, ["0"])] == ["0"]


# Sizes


@pytest.mark.slow
def test_ten_thousand_layers_are_picked_in_proportion() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x))

    def of(side: Any) -> Any:
        with torch.device("meta"):
            return nn.Sequential(nn.ModuleList([nn.ModuleList([Unit() for _ in range(side)]) for _ in range(side)]))

    def picked(model: Any) -> tuple[Any, ...]:
        names = auto(model)
        return len(names), len(select_layers(model, names)), len(select_layers(model, r"\d+\.\d+\.\d+$"))

    assert picked(of(100)) == (10_000,) * 3
    calls = []
    for side in (10, 30):
        model = of(side)
        with counted() as cost:
            picked(model)
        calls.append(cost.calls)
    assert calls[1] < 12 * calls[0]  # 9 times the layers


def test_deep_nesting_is_no_problem() -> None:
    model = nn.Linear(4, 4)
    for _ in range(150):
        model = small.Module(model)
    assert auto(model) == [".".join(["model"] * 150)]


def test_shared_modules_are_picked_once() -> None:
    shared = ConvBlock(8, 8)
    assert auto(nn.Sequential(*[shared] * 4)) == ["0"]
    stack = images.StagedResNet((2, 2))
    stack.encoder.stages[1] = stack.encoder.stages[0]
    assert auto(stack) == ["encoder.stages.0.layers.0", "encoder.stages.0.layers.1"]
    twin = nn.ModuleDict({"a": text.Tower(2), "b": text.Tower(2)})
    twin["c"] = twin["a"]
    assert auto(twin) == [f"{name}.resblocks.{i}" for name in "ab" for i in range(2)]


def test_copies_of_a_model_have_the_same_layers() -> None:
    model = images.DiffusionUNet()
    assert auto(copy.deepcopy(model)) == auto(model)
    assert fresh(lambda: (images.ResNet((1, 1)), on((4, 3, 16, 16)))).names == ("layer1.0", "layer2.0")
