"""Small tasks, data and trainers of Lightning for the tests of its callback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.helpers.trainer_cases import assert_same_state

STEPS, BATCH = 4, 4
BLOCKS = ["blocks.0", "blocks.1"]
# Of Lightning 2.6: of torch's pytree, and advice about loaders and loggers.
OF_LIGHTNING = ("isinstance.treespec", "does not have many workers", "exists and is not empty", "when using .ckpt_path")


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
        optimizers: Any = self.optimizers()
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
    assert_same_state(one, other)
