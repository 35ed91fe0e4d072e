# %% [markdown]
# # What do I do with this number?
#
# Eight trainings that have something wrong with them, each beside the same training after the change that helps. They
# are the cases of `docs/guide.md`, which says how to read them; the pictures there are those that this script draws.
#
#     pip install ".[demo]"
#     python examples/diagnosis.py                   # lists the cases
#     python examples/diagnosis.py dead-layer        # trains one twice, in less than a minute, and draws it
#     fastfs explain runs/diagnosis/dead-layer/before.jsonl
#
# All of them train a small residual network on the digits that scikit-learn ships.

# %%
from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastfs

digits, labels = load_digits(return_X_y=True)
inputs = torch.tensor(digits, dtype=torch.float32)
inputs = (inputs - inputs.mean()) / inputs.std()
targets = torch.tensor(labels)


class Block(nn.Module):
    """`x + scale * down(relu(up(norm(x))))`; without a norm, initialized so that the branch is as large as x."""

    def __init__(self, width: int, scale: float = 1.0, *, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = scale
        if not norm:
            nn.init.kaiming_normal_(self.up.weight)
            nn.init.xavier_normal_(self.down.weight, gain=math.sqrt(1.5))

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.down(F.relu(self.up(self.norm(x))))
        return x + self.scale * branch


class Net(nn.Module):
    """A residual network: `width` features of 64 pixels, `depth` blocks, 10 classes."""

    def __init__(self, width: int = 64, depth: int = 8, scale: float = 1.0, *, norm: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width, scale, norm=norm) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


# %% [markdown]
# A variant is one training. What is not given is healthy.


# %%
def adamw(model: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@dataclass(frozen=True)
class Variant:
    """A model, its optimizer, and how it is trained and measured."""

    model: Callable[[], Any] = Net
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw
    micro_batches: int = 1
    divide: int = 1  # divisor of the gradients between backward and step
    autocast: bool = False  # to bfloat16
    steps: int = 200
    options: dict[str, Any] = field(default_factory=dict)  # of fastfs.Monitor


def train(variant: Variant, record: Path, seed: int = 0) -> float:
    """Train one variant with the monitor attached, and return the mean loss of the last 20 steps."""
    torch.manual_seed(seed)
    model = variant.model()
    optimizer = variant.optimizer(model)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    record.unlink(missing_ok=True)
    with (
        warnings.catch_warnings(action="ignore"),  # alerts are warnings, too; here they are read from the record
        fastfs.Monitor(model, optimizer, every=5, path=record, verbose=False, **variant.options) as monitor,
    ):
        for _ in range(variant.steps):
            optimizer.zero_grad()
            losses.append(0.0)
            for _ in range(variant.micro_batches):
                rows = torch.randint(0, len(inputs), (64,), generator=generator)
                with torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast):
                    logits = model(inputs[rows])
                loss = F.cross_entropy(logits.float(), targets[rows]) / variant.micro_batches
                loss.backward()
                monitor.log(loss=loss)
                losses[-1] += loss.item()
            if variant.divide > 1:
                torch._foreach_div_([p.grad for p in model.parameters()], variant.divide)
            optimizer.step()
    return sum(losses[-20:]) / 20


# %% [markdown]
# The cases: what is wrong, the quantity that shows it, and the change.


# %%
def dead(model: Any) -> Any:
    """Shift the units of one block so far down that none of them is ever active."""
    with torch.no_grad():
        model.blocks[3].up.bias.fill_(-20.0)
    return model


def forgotten(model: Any) -> torch.optim.Optimizer:
    """Make an optimizer, and replace a block after that: its parameters are not in the optimizer."""
    optimizer = adamw(model)
    model.blocks[5] = Block(64)
    return optimizer


def mup(model: Any) -> torch.optim.Optimizer:
    """Adam in muP: rates of matrices with `width` inputs in proportion to 1/width, and a readout of 1/width."""
    nn.init.normal_(model.head.weight, std=1 / model.head.in_features)
    wide = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "embed.weight"]
    rest = [p for name, p in model.named_parameters() if p.dim() == 1 or name == "embed.weight"]
    return torch.optim.AdamW([{"params": wide, "lr": 1e-3 * 64 / model.head.in_features}, {"params": rest, "lr": 1e-3}])


def deep(scale: float) -> Variant:
    """24 blocks without a norm, with this factor on the branches."""
    return Variant(lambda: Net(depth=24, scale=scale, norm=False), lambda model: adamw(model, 3e-4))


def widths(optimizer: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Variant]:
    """The same network at three widths."""
    return {
        f"width {width}": Variant(
            functools.partial(Net, width, 4), optimizer, steps=60, options={"metadata": {"width": width, "depth": 4}}
        )
        for width in (64, 256, 1024)
    }


@dataclass(frozen=True)
class Case:
    """A training that has something wrong with it, and the same one after the change.

    Several trainings on each side are drawn by their last blocks, a single one by all of its blocks.
    """

    shows: str  # the quantity to look at
    paragraph: str  # of docs/guide.md
    before: Variant | dict[str, Variant]
    after: Variant | dict[str, Variant] = Variant()


every_block = {"layers": r"^blocks\.\d+$"}
fixed_batch = {"mode": "probe", "probe": (inputs[:256], lambda logits: F.cross_entropy(logits, targets[:256]))}
CASES = {
    "learning-rate-too-high": Case(
        "relative_update", "speed-and-relative-update", Variant(optimizer=lambda model: adamw(model, 0.03))
    ),
    "learning-rate-too-low": Case(
        "relative_update", "speed-and-relative-update", Variant(optimizer=lambda model: adamw(model, 1e-6))
    ),
    "dead-layer": Case("gradient_norm", "backward-size", Variant(lambda: dead(Net()))),
    "residual-scale": Case("feature_rms", "feature-size", deep(1.0), deep(24**-0.5)),
    "missing-mup": Case("relative_update", "speed-and-relative-update", widths(adamw), widths(mup)),
    "gradient-scale": Case(
        "gradient_scale",
        "gradient-scale",
        Variant(optimizer=sgd, micro_batches=4, divide=4),
        Variant(optimizer=sgd, micro_batches=4),
    ),
    "frozen-by-mistake": Case(
        "parameter_update_norm",
        "parameter-norms",
        Variant(optimizer=forgotten, options=every_block),
        Variant(options=every_block),
    ),
    "sixteen-bits": Case("angle", "noise-floor", Variant(autocast=True), Variant(autocast=True, options=fixed_batch)),
}


# %% [markdown]
# A picture shows the quantity over steps, before and after the change.


# %%
def lines(records: dict[str, Path]) -> dict[str, Any]:
    """The rows of each line: those of all blocks of one record, or of the last blocks of several."""
    tables = {name: fastfs.load(record) for name, record in records.items()}
    blocks = {
        name: [rows for _, rows in table[table["kind"] == "measured"].groupby("layer")]
        for name, table in tables.items()
    }
    if len(blocks) > 1:
        return {name: each[-1] for name, each in blocks.items()}
    return {rows["name"].iloc[0]: rows for rows in next(iter(blocks.values()))}


def draw(case: Case, records: dict[str, dict[str, Path]], losses: dict[str, float], out: Path) -> None:
    """Draw the quantity of a case; crosses are rows that are not valid."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, constrained_layout=True)
    for axis, (which, each) in zip(axes, records.items(), strict=True):
        found = lines(each)
        for number, (name, rows) in enumerate(found.items()):
            color = plt.get_cmap("viridis")(number / max(len(found) - 1, 1))
            values = rows[case.shows].where(rows[case.shows] > 0)
            axis.plot(rows["step"], values, color=color, lw=1, label=name)
            bad = ~rows["valid"].fillna(value=False).to_numpy(bool)
            axis.plot(rows["step"][bad], values[bad], "x", color=color, ms=4)
        axis.set(title=which + (f": loss {losses[which]:.2g}" if len(each) == 1 else ""), xlabel="step")
        if case.shows != "angle":
            axis.set_yscale("log")
    axes[0].set_ylabel(case.shows)
    axes[1].legend(fontsize=6, ncols=1 + len(found) // 12, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=100)
    plt.close(figure)


def run(name: str, folder: Path = Path("runs/diagnosis"), seed: int = 0) -> dict[str, float]:
    """Train both sides of a case, draw them, and return the losses at the end."""
    records: dict[str, dict[str, Path]] = {}
    losses = {}
    for which in ("before", "after"):
        side = getattr(CASES[name], which)
        variants = side if isinstance(side, dict) else {"": side}
        files = {
            label: Path(folder, name, f"{which} {label}".strip().replace(" ", "-") + ".jsonl") for label in variants
        }
        found = [train(variant, files[label], seed) for label, variant in variants.items()]
        records[which], losses[which] = files, found[-1]
    draw(CASES[name], records, losses, Path(folder, f"{name}.png"))
    return losses


if __name__ == "__main__":
    names = sys.argv[1:]
    unknown = [name for name in names if name not in CASES]
    if unknown or not names:
        print(*(f"no case {name!r}" for name in unknown), f"cases: {', '.join(CASES)}", sep="\n")
        raise SystemExit(bool(unknown))
    for name in names:
        print(name, {which: round(loss, 3) for which, loss in run(name).items()})
