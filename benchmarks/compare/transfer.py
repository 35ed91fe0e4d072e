"""Measure how often ``fastfs.scaling.transfer`` tells from records whether training transfers over width and depth.

    python -m benchmarks.compare.transfer [--json FILE] [--seeds N]

For each seed and parametrization, nine residual MLPs of 3 widths and 3 depths are trained on digits with AdamW, and
their records are judged together. The parametrizations:

* SP: standard, with initial variance 1/fan_in and the same learning rate for all matrices and sizes.
* muP: hidden learning rates and the output like 1/width, branches times 1/sqrt(depth): stable, but not transferring
  over depth with the learning rates of AdamW.
* CompleteP (Dey et al., arXiv 2505.01618, alpha = 1): muP with branches times 1/depth, epsilon and weight decay of
  AdamW adjusted; rates of biases and norms do not depend on the size.

The exit status is 1 unless at least 95 % of the seeds give FAIL for SP, and PASS for CompleteP and for muP over width.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare.study import command_line, resumable, train
from benchmarks.harness import print_table
from fastfs._reproduce.data import digits, minibatches
from fastfs.scaling import transfer

WIDTHS, DEPTHS = (64, 128, 256), (8, 16, 32)
BASE_WIDTH, BASE_DEPTH = 64, 8
HEAD = 0.25  # times the usual std of the output layer, so that narrow networks start near 0 as wide ones do
RULES = ("SP", "muP", "CompleteP")
OUTER = 0.5  # the same for the second matrix of branches, whose random part falls like 1/depth in CompleteP
LR, WEIGHT_DECAY, EPS = 1e-3, 0.01, 1e-8
STEPS, EVERY, BATCH = 16, 3, 256


class Branch(nn.Module):
    """A pre-norm residual block: ``f + scale W2 relu(W1 norm(f))``."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.scale = scale
        nn.init.normal_(self.inner.weight, std=(2 / width) ** 0.5)
        nn.init.normal_(self.outer.weight, std=OUTER * width**-0.5)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = features + self.scale * self.outer(self.inner(self.norm(features)).relu())
        return result


class ResidualMLP(nn.Module):
    """An input layer, residual blocks, a norm and an output layer, in one of the parametrizations."""

    def __init__(self, width: int, depth: int, rule: str) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        scale = {"SP": 1.0, "muP": depth**-0.5, "CompleteP": 1 / depth}[rule]
        self.blocks = nn.ModuleList(Branch(width, scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        self.output_scale = 1.0 if rule == "SP" else BASE_WIDTH / width
        nn.init.normal_(self.stem.weight, std=64**-0.5)
        nn.init.zeros_(self.stem.bias)
        nn.init.normal_(self.head.weight, std=HEAD * (width if rule == "SP" else BASE_WIDTH) ** -0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        for block in self.blocks:
            features = block(features)
        result: Tensor = self.head(self.norm(features)) * self.output_scale
        return result


def optimizer_of(model: ResidualMLP, width: int, depth: int, rule: str) -> torch.optim.Optimizer:
    """Return AdamW with the rates, epsilons and weight decays of the parametrization."""
    matrices = [m.weight for block in model.blocks for m in (block.inner, block.outer)]
    ids = {id(p) for p in matrices}
    inside = [p for p in model.blocks.parameters() if id(p) not in ids]
    rest = [*model.stem.parameters(), *model.norm.parameters(), *model.head.parameters()]
    m = 1.0 if rule == "SP" else width / BASE_WIDTH
    d = depth / BASE_DEPTH if rule == "CompleteP" else 1.0
    groups = [
        {"params": matrices, "lr": LR / m, "weight_decay": WEIGHT_DECAY * m, "eps": EPS / (m * d)},
        {"params": inside, "weight_decay": 0.0, "eps": EPS / (m * d)},
        {"params": rest, "eps": EPS / m},
    ]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, eps=EPS)


def study(rule: str, seed: int) -> dict[str, Any]:
    """Train nine models of a parametrization and return what their records say."""
    records, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            for depth in DEPTHS:
                torch.manual_seed((seed * 1000 + depth) * 1000 + width)
                model = ResidualMLP(width, depth, rule)
                data = minibatches(*digits(), BATCH, seed)
                path = Path(folder, f"{width}-{depth}.jsonl")
                train(model, optimizer_of(model, width, depth, rule), data, STEPS, path, every=EVERY)
                records.append(path)
                sizes.append((width, depth))
        report = transfer(records, sizes=sizes)
    axes = {axis: report.of(axis).value for axis in ("width", "depth")}
    exponents = {
        f"{v.quantity} over {v.axis}": None
        if v.fit is None
        else [round(x, 4) for x in (v.fit.exponent, v.fit.low, v.fit.high)] + [v.status.value if v.status else "info"]
        for v in report.verdicts
    }
    return {"status": report.status.value, **axes, "exponents": exponents}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the verdicts of each parametrization."""
    return {
        rule: {
            what: {s: sum(r[what] == s for r in own) for s in ("PASS", "UNCLEAR", "FAIL")}
            for what in ("status", "width", "depth")
        }
        for rule in RULES
        if (own := [r for r in results if r["rule"] == rule])
    }


def main() -> int:
    arguments = command_line(__doc__)
    torch.set_num_threads(1)
    tasks = [{"rule": rule, "seed": seed} for seed in range(arguments.seeds) for rule in RULES]
    found = resumable(arguments.json, tasks, study, summary)
    rows = [
        [f"{rule}, {'overall' if what == 'status' else what}", *map(str, count.values())]
        for rule, counts in found.items()
        for what, count in counts.items()
    ]
    print_table("Does training transfer?", ["parametrization", "PASS", "UNCLEAR", "FAIL"], rows)
    wanted = (("SP", "status", "FAIL"), ("CompleteP", "status", "PASS"), ("muP", "width", "PASS"))
    return int(any(found[rule][what][status] < 0.95 * arguments.seeds for rule, what, status in wanted))


if __name__ == "__main__":
    sys.exit(main())
