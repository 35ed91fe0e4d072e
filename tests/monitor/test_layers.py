"""Which modules are watched and under what names, what is taken from their outputs, and totals of groups."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import fastfs
from fastfs.models import MLP, ResNet
from tests.helpers.monitor_cases import rows, sgd, small_transformer, tokens, train, watched

KEYS = ("angle", "update_rms", "feature_rms", "backward_rms", "count")


def conv_net():
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

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = x + torch.tanh(block(x))
        return x[:, :3]


class Plain(nn.Module):
    """No repeated blocks, a parameter of its own, and modules without parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.encode = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.encode(x * self.scale)))))


class Encoder(nn.Module):
    """Blocks of blocks: the outermost are the residual stream."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)


class Residual(nn.Sequential):
    """A block that happens to be a container."""

    def forward(self, x):
        return x + super().forward(x)


def images(step):
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
def test_auto(model, batch, names):
    model, optimizer, seen, monitor = watched(layers="auto", model=model())
    assert list(monitor.layers) == names
    train(model, optimizer, 2, batch)
    monitor.close()
    assert [row["name"] for row in seen] == names * 2
    assert all(row["valid"] for row in seen), [(row["name"], row["why"]) for row in seen]


def test_auto_is_the_default_and_takes_lists_of_which_half_is_alike():
    for depth, names in (
        (4, ("blocks.0", "blocks.1", "blocks.2")),  # the first block is of another type than the others
        (3, ("blocks.0", "blocks.1.linear", "head")),
    ):
        model = MLP(8, 16, depth, 3)
        with fastfs.Monitor(model, sgd(model), sinks=[lambda rows: None]) as monitor:
            assert monitor.layers == names


def test_predicates_and_types():
    def names(layers, model=None):
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


def test_predicates_and_types_see_through_wrappers():
    model = Stages()
    for stage in model.stages:
        stage[0] = checkpoint_wrapper(stage[0])
        stage[1] = torch.compile(stage[1], backend="eager")
    found = []
    with watched(layers=lambda name, module: found.append((name, type(module))) or name == "stem", model=model)[3]:
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
def test_errors_list_the_candidates(layers, error, message):
    with pytest.raises(error, match=message):
        watched(layers=layers)


def test_errors_name_the_model_inside_of_wrappers():
    with pytest.raises(ValueError, match=rf"matches no module of ResNet\. {CANDIDATES}"):
        watched(layers="nothing", model=torch.compile(ResNet(8, 16, 2, 3), backend="eager"))


class Bare(nn.Module):
    """No submodules, or one that never runs."""

    def __init__(self, *held):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))
        if held:
            self.held = nn.ParameterList(held)

    def forward(self, x):
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
def test_a_model_without_submodules_is_a_layer_itself(model, name, layers):
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


def test_the_model_itself_is_watched_beside_others_if_asked_for():
    model, optimizer, seen, monitor = watched(layers=["blocks.1", "ResNet"])
    assert monitor.layers == ("ResNet", "blocks.1")
    train(model, optimizer, 1)
    monitor.close()
    assert all(row["valid"] for row in seen)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.Net = nn.Linear(8, 3)

        def forward(self, x):
            return self.Net(x)

    for layers, names in (([""], ("(Net)",)), (["Net", "(Net)"], ("(Net)", "Net")), ("auto", ("Net",))):
        with watched(layers=layers, model=Net())[3] as monitor:
            assert monitor.layers == names


# Wrappers


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resnet():
    torch.manual_seed(0)
    return ResNet(8, 16, 2, 3)


def checkpointed(implementation=CheckpointImpl.NO_REENTRANT):
    model = resnet()
    for index in range(2):
        model.blocks[index] = checkpoint_wrapper(model.blocks[index], checkpoint_impl=implementation)
    return model


def compiled_blocks():
    model = resnet()
    for index in range(2):
        model.blocks[index] = torch.compile(model.blocks[index], backend="eager")
    return model


def sharded(**options):
    model = resnet()
    policy = ModuleWrapPolicy({type(model.blocks[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


WRAPPED = {
    "compile": lambda: torch.compile(resnet(), backend="eager"),
    "blocks compiled": compiled_blocks,
    "checkpoint": checkpointed,
    "reentrant checkpoint": lambda: checkpointed(CheckpointImpl.REENTRANT),
    "ddp": lambda: nn.parallel.DistributedDataParallel(resnet()),
    "ddp of checkpoint": lambda: nn.parallel.DistributedDataParallel(checkpointed()),
    "ddp of compile": lambda: nn.parallel.DistributedDataParallel(torch.compile(resnet(), backend="eager")),
    "compile of ddp": lambda: torch.compile(nn.parallel.DistributedDataParallel(resnet()), backend="eager"),
    "fsdp": lambda: sharded(use_orig_params=True),
    "fsdp, flat parameters": lambda: sharded(use_orig_params=False),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # a reentrant second forward
@pytest.mark.parametrize(
    "wrap",
    [pytest.param(wrap, id=k, marks=[pytest.mark.graphs] * ("compile" in k.split())) for k, wrap in WRAPPED.items()],
)
def test_names_and_numbers_are_those_without_the_wrapper(wrap, alone):
    seen = {}
    for make in (resnet, wrap):
        model, optimizer, seen[make], monitor = watched(layers="auto", model=make())
        assert monitor.layers == ("blocks.0", "blocks.1")
        train(model, optimizer, 2)
        monitor.close()
    for plain, wrapped in zip(seen[resnet], seen[wrap], strict=True):
        assert wrapped["valid"], wrapped["why"]
        assert wrapped["name"] == plain["name"]
        for key in KEYS:
            assert wrapped[key] == pytest.approx(plain[key], rel=1e-5), key


# Outputs


@dataclasses.dataclass
class Output:
    ids: torch.Tensor
    hidden: torch.Tensor
    more: dict[str, torch.Tensor] | None = None


class Dressed(nn.Module):
    """A layer that puts its features into something, and a model that takes them out."""

    def __init__(self, make, take):
        super().__init__()
        self.inner = Inner(make)
        self.take = take

    def forward(self, x):
        return self.take(self.inner(x))[:, :3]


class Inner(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.make = make

    def forward(self, x):
        return self.make(self.layer(x))


def measured_of(make, take, **options):
    torch.manual_seed(0)
    model, optimizer, seen, monitor = watched(layers="inner$", model=Dressed(make, take), **options)
    train(model, optimizer, 1)
    monitor.close()
    (row,) = seen
    return row


def test_dataclasses_and_select():
    plain = measured_of(lambda x: x, lambda x: x)
    outputs = [
        (lambda x: Output(torch.ones(2, dtype=torch.long), x), lambda out: out.hidden, {}),
        (lambda x: (Output(torch.ones(2, dtype=torch.long), x),), lambda out: out[0].hidden, {}),
        (
            lambda x: Output(torch.ones(2).long(), x * 3, {"out": x}),
            lambda out: out.more["out"] + 0 * out.hidden,
            {"select": lambda out: out.more["out"]},
        ),
        (lambda x: (x * 5, x), lambda out: out[1], {"select": lambda out: out[1]}),
    ]
    for make, take, options in outputs:
        row = measured_of(make, take, **options)
        assert row["valid"]
        assert all(row[key] == plain[key] for key in KEYS)
    other = measured_of(lambda x: (x * 5, x), lambda out: out[1] + 0 * out[0])  # the first floating one
    assert other["feature_rms"] == pytest.approx(5 * plain["feature_rms"])
    assert other["backward_rms"] == 0


@pytest.mark.parametrize(("select", "kind"), [(lambda out: out["ids"], "torch.int64 tensor"), (lambda out: 3, "int")])
def test_select_must_give_features(select, kind):
    model, optimizer, seen, monitor = watched(
        layers="inner$",
        model=Dressed(lambda x: {"ids": torch.ones(2).long(), "x": x}, lambda out: out["x"]),
        select=select,
    )
    with pytest.warns(RuntimeWarning, match=rf"layer 'inner' \(Inner\): .* got dict of .*; select= gave a {kind}"):
        train(model, optimizer, 1)
    monitor.close()
    assert seen == []


# Groups


def test_group_totals_are_the_sums_of_their_layers():
    torch.manual_seed(0)
    parts = {"attention": r"\.attention$", "mlp": r"mlp_out$", "first": r"blocks\.0\."}
    model, optimizer, seen, monitor = watched(
        layers=r"\.attention$|mlp_out$", model=small_transformer().double(), groups=parts, aligned_every=1
    )
    train(model, optimizer, 2, tokens)
    monitor.close()
    members = {
        "attention": [f"blocks.{i}.attention" for i in range(3)],
        "mlp": [f"blocks.{i}.mlp_out" for i in range(3)],
        "first": ["blocks.0.attention", "blocks.0.mlp_out"],
    }
    for step in range(2):
        at = {row["name"]: row for row in seen if row["step"] == step}
        assert [name for name, row in at.items() if row["group"]] == list(parts)
        assert [row["layer"] for row in at.values()] == list(range(6 + 3))
        for group, names in members.items():
            total, each = at[group], [at[name] for name in names]
            count = sum(row["count"] for row in each)

            def squares(key, each=each):
                return sum(row["count"] * row[key] ** 2 for row in each)

            dot = sum(r["cos_angle"] * r["update_rms"] * r["backward_rms"] * r["count"] for r in each)
            assert total["count"] == count
            for key in ("update_rms", "backward_rms", "feature_rms"):
                assert total[key] == pytest.approx(math.sqrt(squares(key) / count), rel=1e-12), (group, key)
            cosine = dot / math.sqrt(squares("update_rms") * squares("backward_rms"))
            assert total["cos_angle"] == pytest.approx(cosine, rel=1e-10)
            assert total["angle"] == pytest.approx(math.acos(cosine), rel=1e-10)
            relative = math.sqrt(squares("update_rms") / squares("feature_rms"))
            assert total["relative_update"] == pytest.approx(relative, rel=1e-12)
            assert total["valid"]
            assert all(total[key] is None for key in ("rows", "aligned_decrease", "residual", "parameter_norm"))


def test_a_group_is_as_valid_as_its_worst_layer():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            self.blocks[2](x)  # leads nowhere
            return self.blocks[1](self.blocks[0](x))[:, :3]

    model, optimizer, seen, monitor = watched(model=Apart(), groups={"all": "blocks", "good": r"[01]$"})
    train(model, optimizer, 1)
    monitor.close()
    assert [(row["name"], row["valid"]) for row in seen[-3:]] == [("blocks.2", False), ("all", False), ("good", True)]
    assert seen[-2]["why"] == seen[-3]["why"] is not None


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            {"mlp": "mlp"},
            ValueError,
            r"'mlp' \('mlp'\) matches no watched layer. Watched: blocks.0, blocks.1, blocks.2",
        ),
        ({"head": "head"}, ValueError, "matches no watched layer"),  # a module, but not a watched one
        ({"a": "["}, ValueError, r"groups: '\[' is not a regular expression"),
        (["blocks"], TypeError, r"groups: expected a dictionary of name -> regular expression, got \['blocks'\]"),
        ({"a": 3}, TypeError, "groups: expected a dictionary"),
        ({3: "blocks"}, TypeError, "groups: expected a dictionary"),
    ],
)
def test_errors_of_groups(groups, error, message):
    with pytest.raises(error, match=message):
        watched(groups=groups)


def test_groups_are_in_the_record(tmp_path):
    path = tmp_path / "record.jsonl"
    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, path=path, every=1, groups={"late": "[12]$"}):
        x, y = rows(0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    table = fastfs.load(path)
    assert table.attrs["headers"][0]["groups"] == {"late": ["blocks.1", "blocks.2"]}
    assert table["name"].tolist() == ["blocks.0", "blocks.1", "blocks.2", "late"]
    assert table["group"].tolist() == [False, False, False, True]
