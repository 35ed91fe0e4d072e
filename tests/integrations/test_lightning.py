"""The callback for Lightning: which module is measured, the numbers by hand, the same training bit by bit."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_by_hand import HandWatch
from tests.helpers.processes import run_ranks

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from fastfs.integrations import LightningCallback  # noqa: E402

STEPS, BATCH = 4, 4
BLOCKS = ["blocks.0", "blocks.1"]
# Of Lightning 2.6: of torch's pytree, and advice about loaders and loggers.
OF_LIGHTNING = ("isinstance.treespec", "does not have many workers", "exists and is not empty", "when using .ckpt_path")

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{each}") for each in OF_LIGHTNING]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x).tanh()
        return result


def add_layers(module: nn.Module) -> None:
    module.stem = nn.Linear(8, 16)
    module.blocks = nn.Sequential(Block(), Block())
    module.drop = nn.Dropout(0.1)
    module.head = nn.Linear(16, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        add_layers(self)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.drop(self.blocks(self.stem(x))))
        return result


class Task(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
    """Calls its network, and keeps every loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.make()

    def make(self) -> None:
        self.net = Net()

    def predict(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        loss = F.cross_entropy(self.predict(batch[0]), batch[1])
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val_loss", F.cross_entropy(self.predict(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Delegating(Task):
    """Calls itself; its forward calls the network."""

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def predict(self, x: Tensor) -> Any:
        return self(x)


class Itself(Task):
    """Is the network."""

    def make(self) -> None:
        add_layers(self)

    def forward(self, x: Tensor) -> Any:
        return Net.forward(self, x)  # type: ignore[arg-type, unused-ignore]

    def predict(self, x: Tensor) -> Any:
        return self(x)


class WithTeacher(Task):
    """Has a frozen copy of the network and a loss without parameters beside it, and gives all parameters away."""

    def make(self) -> None:
        self.net = Net()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.criterion = nn.CrossEntropyLoss()


class Manual(Task):
    """Accumulates two micro-batches by hand, with two optimizers."""

    def make(self) -> None:
        self.net = Net()
        self.automatic_optimization = False

    def training_step(self, batch: Any, _index: int) -> Tensor:
        optimizers = self.optimizers()
        loss = torch.zeros(())
        for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
            part = F.cross_entropy(self.net(x), y) / 2
            self.manual_backward(part)
            loss += part.detach()
        for each in optimizers:
            each.step()
            each.zero_grad()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        head, rest = list(self.net.head.parameters()), [p for n, p in self.net.named_parameters() if "head" not in n]
        return [torch.optim.SGD(head, lr=0.1), torch.optim.AdamW(rest, lr=1e-2)]


TASKS = {each.__name__: each for each in (Task, Delegating, Itself, WithTeacher, Manual)}


def loader() -> Any:
    draw = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, generator=draw), int(torch.randint(0, 3, (), generator=draw))) for _ in range(32)]
    return torch.utils.data.DataLoader(data, batch_size=BATCH)


def trainer(folder: Path, callbacks: list[Any], *, package: Any = lightning, **options: Any) -> Any:
    defaults = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(default_root_dir=folder, callbacks=callbacks, **defaults | options)


def make(name: str) -> Any:
    torch.manual_seed(0)
    return TASKS[name]()


def without_dropout(task: Any) -> Any:
    """Returns the task such that it computes the same in every process."""
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return task


def fit(task: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    torch.manual_seed(1)
    steps = options.pop("max_steps", STEPS) * (1 if task.automatic_optimization else 2)  # counts those of optimizers
    trainer(folder, callbacks, max_steps=steps, **options).fit(task, loader(), loader())
    return task


def assert_same(one: Any, other: Any) -> None:
    assert one.losses == other.losses
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def measured(folder: Path) -> Any:
    table = fastfs.load(folder)
    return table[table["kind"] == "measured"]


class ByHand(lightning.Callback):  # type: ignore[misc, unused-ignore]
    """Takes the numbers of one step by clones and a second forward."""

    def __init__(self, step: int, precision: Any) -> None:
        self.at, self.precision = step, precision
        self.watch: HandWatch | None = None
        self.found: dict[str, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        if trainer.global_step // len(trainer.optimizers) == self.at and self.watch is None:
            self.watch = HandWatch(task if isinstance(task, Itself) else task.net, BLOCKS)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step // len(trainer.optimizers) == self.at + 1 and not self.found:
            self.found = self.watch.finish(self.precision)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("Task", each) for each in OPTIONS), *((each, "plain") for each in TASKS if each != "Task"), ("Itself", "bf16")],
)
def test_numbers_are_those_by_hand(tmp_path: Path, name: str, options: str) -> None:
    plain = fit(make(name), tmp_path / "off", [], **OPTIONS[options])
    watched = fit(make(name), tmp_path, [LightningCallback(every=2, rows=None)], **OPTIONS[options])
    assert_same(plain, watched)
    assert "forward" not in vars(watched)
    seen = measured(tmp_path)
    assert seen["step"].tolist() == [0, 0, 2, 2]
    assert seen["name"].tolist() == BLOCKS * 2
    assert seen.attrs["headers"][0]["model"] == ("Itself" if name == "Itself" else "Net")
    parts = OPTIONS[options].get("accumulate_grad_batches", 1)
    for step in (0, 2):
        precision = torch.autocast("cpu", torch.bfloat16) if options == "bf16" else nullcontext()
        hand = ByHand(step, precision)
        fit(make(name), tmp_path / "hand", [hand], **OPTIONS[options])
        for number, (_, row) in enumerate(seen[seen["step"] == step].iterrows()):
            losses = plain.losses[step * parts : (step + 1) * parts]
            assert row["loss"] == pytest.approx(sum(losses) / parts, rel=1e-6)
            assert row["micro_batches"] == (2 if name == "Manual" else parts)
            assert options == "bf16" or row["valid"], row["why"]
            for column in ("cos_angle", "update_rms", "feature_rms", "backward_rms"):
                assert row[column] == pytest.approx(hand.found[column][number], rel=1e-5), column
            assert row["aligned_decrease"] == pytest.approx(hand.found["aligned_decrease"][number], rel=1e-3)


def test_float16_with_a_gradient_scaler(tmp_path: Path) -> None:
    """The scale is divided out of the loss, too. Steps that the scaler skips are in the record."""
    trained = []
    for callbacks in ([], [LightningCallback(every=1)]):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        trained.append(fit(make("Task"), tmp_path, callbacks, plugins=[precision], max_steps=8))
    assert_same(*trained)
    seen = measured(tmp_path)
    skipped = seen.attrs["skipped"]
    assert len(skipped) >= 1
    assert len(set(seen["step"])) == 8 - len(skipped)
    assert seen.groupby("step")["loss"].first().tolist() == pytest.approx(trained[0].losses[len(skipped) :], rel=1e-6)
    assert (seen["loss_scale"] <= 2.0**21).all()
    assert (seen["micro_batches"] == 1).all()


class Adversarial(Task):
    """Two networks with an optimizer each; the loss of one is no loss of the other."""

    def make(self) -> None:
        self.net = Net()
        self.other = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, _index: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(second)
        judged = self.other(self.net(batch[0]).detach())
        second.zero_grad()
        self.manual_backward(judged.square().mean())
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) - self.other(self.net(batch[0])).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net.parameters(), lr=1e-2), torch.optim.SGD(self.other.parameters(), lr=1e-2)]


def test_two_networks(tmp_path: Path) -> None:
    TASKS["Adversarial"] = Adversarial
    try:
        plain = fit(make("Adversarial"), tmp_path, [])
        paths = [str(tmp_path / f"{name}.jsonl") for name in ("net", "other")]
        callbacks = [
            LightningCallback("net", every=1, path=paths[0]),
            LightningCallback("other", every=1, path=paths[1], layers=r"^\d$"),
        ]
        watched = fit(make("Adversarial"), tmp_path, callbacks)
        with pytest.raises(ValueError, match=r"Adversarial has no forward, .* any of net, other: expected module=NAME"):
            fit(make("Adversarial"), tmp_path, [LightningCallback()])
    finally:
        del TASKS["Adversarial"]
    assert_same(plain, watched)
    assert callbacks[0].state_key != callbacks[1].state_key
    for path in paths:
        seen = measured(Path(path))
        assert sorted(set(seen["step"])) == list(range(STEPS))
        assert seen["loss"].isna().all()
        assert seen["valid"].all(), seen["why"].tolist()


def test_what_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module: Task has no 'model'. Candidates: net, net.stem"):
        fit(make("Task"), tmp_path, [LightningCallback("model")])
    with pytest.raises(TypeError, match=r"LightningCallback: expected arguments of fastfs.Monitor .* got 'evry'"):
        LightningCallback(evry=1)
    with pytest.raises(ValueError, match=r"the LightningModule is compiled .* self.model = torch.compile"):
        fit(torch.compile(make("Task"), backend="eager"), tmp_path, [LightningCallback()])


@pytest.mark.filterwarnings("ignore:fastfs.Monitor:RuntimeWarning")
def test_a_forward_that_the_training_step_does_not_call(tmp_path: Path) -> None:
    """The record says so."""

    class Apart(Itself):
        def predict(self, x: Tensor) -> Any:
            return Net.forward(self, x)  # type: ignore[arg-type, unused-ignore]

    TASKS["Apart"] = Apart
    try:
        fit(make("Apart"), tmp_path, [LightningCallback(every=1)])
    finally:
        del TASKS["Apart"]
    reasons = {each["reason"] for each in fastfs.load(tmp_path).attrs["skipped"]}
    assert reasons == {"no forward and backward of the model was seen before the step"}


def test_a_compiled_network(tmp_path: Path) -> None:
    def compiled() -> Any:
        task = make("Task")
        task.net = torch.compile(task.net, backend="eager")
        return task

    plain = fit(compiled(), tmp_path / "off", [])
    assert_same(plain, fit(compiled(), tmp_path, [LightningCallback(every=1)]))
    seen = measured(tmp_path)
    assert seen["name"].tolist() == BLOCKS * STEPS
    assert seen["valid"].all()


class Failing(lightning.Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, step: int) -> None:
        self.at = step

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.at:
            self.at = -1
            raise ValueError("interrupted")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["Task", "Itself"])
def test_a_training_that_raises_leaves_no_hook(tmp_path: Path, name: str) -> None:
    task, callback = make(name), LightningCallback(every=1)
    with pytest.raises(ValueError, match="interrupted"):
        fit(task, tmp_path, [callback, Failing(2)])
    assert hooks(task) == 0
    assert "forward" not in vars(task)
    assert sorted(set(measured(tmp_path)["step"])) == [0, 1]
    fit(task, tmp_path, [callback])
    table = measured(tmp_path)
    assert [sorted(set(part["step"])) for _, part in table.groupby("run", sort=False)] == [[0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["Task", "Itself"])
def test_a_resumed_training_continues_the_record(tmp_path: Path, name: str) -> None:
    watch: dict[str, Any] = {"every": 3, "aligned_every": 1}
    epochs: dict[str, Any] = {"limit_train_batches": 2}  # of two steps
    whole = fit(without_dropout(make(name)), tmp_path / "whole", [LightningCallback(**watch)], **epochs)
    path = tmp_path / "record.jsonl"
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=True)
    fit(without_dropout(make(name)), tmp_path, [LightningCallback(**watch), saving], max_steps=2, **epochs)
    resumed = without_dropout(make(name))
    again = trainer(tmp_path, [LightningCallback(**watch)], **epochs)
    again.fit(resumed, loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert fastfs.load(path)["run"].nunique() == 1
    table, expected = fastfs.load(path), fastfs.load(tmp_path / "whole")
    assert table[["step", "kind", "name"]].values.tolist() == expected[["step", "kind", "name"]].values.tolist()
    assert resumed.losses == whole.losses[2:]
    for column in ("loss", "aligned_decrease", "update_rms", "angle"):
        assert table[column].equals(expected[column]), column
    # What a later checkpoint holds is what the last training has left.
    again.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=False)["callbacks"]["LightningCallback{'module': None}"]
    assert state["run"]["step"] == STEPS
    assert state["run"]["recorder"]["run"] == table["run"].iloc[0]


def test_a_checkpoint_that_was_loaded_to_validate_is_not_continued(tmp_path: Path) -> None:
    task, callback = make("Task"), LightningCallback(every=1)
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(task, tmp_path, [callback, saving])
    again = trainer(tmp_path, [callback])
    again.validate(task, loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    again.fit(task, loader(), loader())
    assert measured(tmp_path).groupby("run")["step"].max().tolist() == [STEPS - 1] * 2


def test_both_names_of_the_package(tmp_path: Path) -> None:
    """A process that has imported the old name only does not import the other one."""
    pytest.importorskip("pytorch_lightning")
    code = (
        "import sys, pytorch_lightning as pl\n"
        "from pytorch_lightning.demos.boring_classes import BoringModel\n"
        "from fastfs.integrations import LightningCallback\n"
        "assert 'lightning.pytorch' not in sys.modules and issubclass(LightningCallback, pl.Callback)\n"
        f"pl.Trainer(max_steps=2, accelerator='cpu', logger=False, default_root_dir={str(tmp_path)!r}, "
        "enable_checkpointing=False, callbacks=[LightningCallback(every=1)]).fit(BoringModel())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert measured(tmp_path)["step"].tolist() == [0, 1]


# Two ranks


def distributed(name: str, folder: str, watch: bool) -> tuple[list[float], list[Tensor]]:
    """Trains on this rank's half of the batches; returns losses and parameters."""
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    sampler = torch.utils.data.DistributedSampler
    task = without_dropout(make(name))
    callbacks = [LightningCallback(every=1, rows=None)] if watch else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "fastfs")
        options: dict[str, Any] = {"plugins": [LightningEnvironment()], "strategy": DDPStrategy(), "devices": 2}
        own = trainer(Path(folder), callbacks, use_distributed_sampler=False, **options)
        data = loader().dataset
        rank = torch.distributed.get_rank()
        split = torch.utils.data.DataLoader(
            data, batch_size=BATCH // 2, sampler=sampler(data, 2, rank, shuffle=False)
        )
        own.fit(task, split)
    return task.losses, [p.detach().clone() for p in task.parameters()]


def on_a_rank(name: str, folder: str) -> list[float]:
    losses, parameters = distributed(name, folder, watch=False)
    watched, others = distributed(name, folder, watch=True)
    assert losses == watched
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Task", "Itself"])
def test_two_ranks(tmp_path: Path, name: str) -> None:
    """The record is that of one process, also if the LightningModule is the network, which DDP calls to train."""
    run_ranks(on_a_rank, 2, timeout=120, name=name, folder=str(tmp_path / "many"))
    fit(without_dropout(make(name)), tmp_path / "one", [LightningCallback(every=1, rows=None)])
    many, one = measured(tmp_path / "many"), measured(tmp_path / "one")
    assert (many["ranks"] == 2).all()
    assert many["valid"].all()
    for column in ("step", "name", "count", "rows"):
        assert many[column].tolist() == one[column].tolist(), column
    for column in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "loss"):
        assert many[column].tolist() == pytest.approx(one[column].tolist(), rel=1e-5), column
