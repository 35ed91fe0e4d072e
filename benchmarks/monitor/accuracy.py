"""Measure the error of angle and norm in 16 bits, and whether it is detected, against float64.

    python -m benchmarks.monitor.accuracy [--json FILE] [--quick] [--seed N]

Real data and real optimizer steps, scaled so that the features move by |df|/|f| = 1e-1 ... 1e-5 (geometric mean over
layers). The reference is the same function of the same parameters before and after the step in float64; with parameters
in bf16, the update is that which remains after rounding. A result is wrong if angle or norm are off by more than 2%.
All numbers are deterministic up to the machine's matrix products and independent of timing. The exit status is 1 if a
result that is reported as valid is wrong.

The assessment uses the same inputs as the monitor: :class:`fastfs._network.guard.Guard` detects the precision of each
layer, whether the caller, the model or a setting of torch chose it. The study includes models that enable autocast in
their own forward, cast by hand or multiply in float8, and on a GPU TF32 products.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import environment, print_table
from benchmarks.monitor.accuracy_networks import ON_GPU, SETTINGS, Case, Network, Parameters, Setting, loss
from fastfs import feature_stats
from fastfs._monitor.measure.kappa import choose_kappa, first_kappa, largest_kappa, target_for
from fastfs._monitor.measure.trust import AssessedUpdate, assess
from fastfs._monitor.measure.update_estimates import CentralProbe
from fastfs._network.precision import SINGLE
from fastfs._record.row_reasons import REASONS
from fastfs._reproduce.data import digits, stdlib_text, windows
from fastfs._stats import FeatureStats
from fastfs.models import MLP, ResNet, Transformer

RATIOS = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5)
TOLERANCE = 0.02
PROBES = 3  # from a cold start; the last one counts as the steady state
# "cold": the first probe of a run. "no checks": the last one without aligned decreases and norms in float32, to show
# the effect of these. The jvp is the first-order update and makes no statement on the step itself.
METHODS = ("plain", "cold", "amplified", "no checks", "float32", "jvp")
CLAIMED = ("plain", "cold", "amplified", "float32")


def cases(quick: bool, seed: int) -> Iterator[Case]:
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:96]
    text = stdlib_text(1_000_000)
    for name in ("MLP 4x64", "Transformer 2x64") if quick else NAMES:
        kind, size = name.split()
        depth, width = map(int, size.split("x"))
        generator = torch.Generator().manual_seed(seed + 1)
        if kind == "Transformer":
            model: nn.Module = Transformer(width=width, depth=depth, context=32, generator=generator)
            yield Case(name, model, *next(windows(text, 4, 32, seed)))
        elif kind == "MLP":
            yield Case(name, MLP(64, width, depth, 10, generator=generator), images[order], labels[order])
        else:
            scale = 1.0 / depth if kind == "BiasedResNet" else None  # in bf16 sqrt(1 - scale^2) f is often f
            model = ResNet(64, width, depth, 10, branch_scale=scale, generator=generator)
            yield Case(name, model, images[order], labels[order])


OF_ALL = ("autocast bf16", "bf16", "casts to bf16", "fp8 products", "TF32 products")  # settings of all networks
OF_OTHERS = ("MLP 12x128", "Transformer 8x64")  # networks of the other settings

NAMES = (
    "MLP 4x64", "MLP 6x512", "MLP 12x128", "MLP 40x128", "ResNet 6x128", "ResNet 32x128", "BiasedResNet 16x128",
    "Transformer 2x64", "Transformer 8x64", "Transformer 6x128", "Transformer 16x64",
)  # fmt: skip


def real_step(case: Case, optimizer: str) -> tuple[Parameters, Parameters]:
    """Return the parameters and their change in the tenth step of training, in float32."""
    model = copy.deepcopy(case.model)
    made: torch.optim.Optimizer
    if optimizer == "Adam":
        made = torch.optim.Adam(model.parameters(), lr=1e-3)
    else:
        made = torch.optim.SGD(model.parameters(), lr=1e-1)
    for _ in range(10):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made.zero_grad()
        loss(model(case.inputs), case.labels).backward()
        made.step()
    return before, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def moved(parameters: Parameters, step: Parameters, scale: float, dtype: torch.dtype) -> Parameters:
    return {n: (p.double() + scale * step[n].double()).to(dtype) for n, p in parameters.items()}


def scaled_steps(exact: Network, start: Parameters, direction: Parameters, ratios: tuple[float, ...]) -> list[float]:
    """Return the factors of the direction for which the features move by the ratios, in the geometric mean."""
    before = exact.features(start)
    scales: list[float] = []
    for ratio in ratios:
        scale = scales[-1] if scales else 1.0
        for _ in range(3):
            after = exact.features(moved(start, direction, scale, torch.float64))
            moves = torch.stack([(a - b).norm() / b.norm() for a, b in zip(after, before, strict=True)])
            scale *= ratio / float(moves.log().mean().exp())
        scales.append(scale)
    return scales


def measure(case: Case, setting: Setting, optimizer: str, ratios: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Yield one cell per ratio and method."""
    start, direction = real_step(case, optimizer)
    start = {n: p.to(setting.parameters) for n, p in start.items()}
    exact, single, run = Network(case, Setting(torch.float64)), Network(case, Setting()), Network(case, setting)
    afters = [
        moved(start, direction, scale, setting.parameters) for scale in scaled_steps(exact, start, direction, ratios)
    ]
    steps = [{n: after[n].double() - start[n].double() for n in start} for after in afters]
    vectors, decreases = run.backward(start, steps)
    single_vectors, _ = single.backward(start, [])
    exact_vectors, _ = exact.backward(start, [])
    before, single_before, exact_before = run.features(start), single.features(start), exact.features(start)
    eps = torch.tensor(run.coarsest(start), dtype=torch.float64)
    coarsest = float(eps.max())
    target, largest = target_for(coarsest), largest_kappa(torch.finfo(setting.parameters).eps)
    squares = torch.stack([f.double().square().sum() for f in single_before])
    shapes = torch.tensor([(f[..., 0].numel(), f.shape[-1]) for f in before], dtype=torch.float64)
    rows, width = shapes.unbind(dim=1)
    exact_sq = squares if coarsest > SINGLE else None

    for ratio, after, step, decrease in zip(ratios, afters, steps, decreases, strict=True):
        truth = feature_stats(exact_before, exact.features(after), exact_vectors)
        plain = feature_stats(before, run.features(after), vectors)
        single_plain = feature_stats(single_before, single.features(after), single_vectors)
        judged = {
            "plain": assess(plain, eps=eps, rows=rows, width=width),
            "float32": assess(single_plain, eps=torch.full_like(eps, SINGLE), rows=rows, width=width),
        }
        norms = torch.stack([torch.stack([step[n].norm(), start[n].double().norm()]) for n in start]).T
        kappa = first_kappa(norms[0], norms[1], target).clamp_max(largest)
        for attempt in range(PROBES):
            probe = central_probe(run, start, step, before, vectors, kappa)
            found = assess(
                plain, probe, eps=eps, rows=rows, width=width, aligned_decrease=decrease, exact_before_sq=exact_sq
            )
            judged["amplified" if attempt else "cold"] = found
            judged["no checks"] = assess(plain, probe, eps=eps, rows=rows, width=width)
            if attempt < PROBES - 1:
                kappa = choose_kappa(kappa, found.stats.relative_update, target, largest)
        derivative = single.jvp(start, step)
        zeros = [torch.zeros_like(d) for d in derivative]
        first_order = feature_stats(zeros, derivative, single_vectors)
        for method in METHODS:
            valid = judged[method].valid if method in judged else None
            stats = judged[method].stats if method in judged else first_order
            yield {
                "model": case.name, "optimizer": optimizer, "ratio": ratio, "method": method, "kappa": float(kappa),
                **compare(truth, stats, valid, judged.get(method)),
            }  # fmt: skip


def central_probe(
    run: Network, start: Parameters, step: Parameters, before: list[Tensor], vectors: list[Tensor], kappa: Tensor
) -> CentralProbe:
    minus, plus = (run.features(moved(start, step, sign * float(kappa), run.dtype)) for sign in (-1, 1))
    return CentralProbe(
        feature_stats(before, minus, vectors),
        feature_stats(before, plus, vectors),
        feature_stats(minus, plus, vectors),
        kappa,
    )


def compare(
    truth: FeatureStats, stats: FeatureStats, valid: Tensor | None, judged: AssessedUpdate | None
) -> dict[str, Any]:
    """Return the errors of a method over the layers that move, with details of the first, middle and last of them."""
    moves = truth.update_sq > 0
    norm = (stats.update_norm / truth.update_norm - 1).abs().nan_to_num(nan=torch.inf)
    radians = (stats.angle - truth.angle).abs().nan_to_num(nan=torch.inf)
    angle = radians / truth.angle
    wrong = torch.maximum(norm, angle) > TOLERANCE
    valid = torch.ones_like(moves) if valid is None else valid
    trusted = moves & valid
    layers = moves.nonzero().flatten()
    shown = sorted({int(layers[i]) for i in (0, len(layers) // 2, -1)}) if len(layers) else []
    worst = torch.where(trusted, torch.maximum(norm, angle), 0.0).max()
    reasons = [] if judged is None else sorted({REASONS[int(code)] or "" for code in judged.reason[moves]} - {""})
    return {
        "layers": int(moves.sum()),
        "valid": int(trusted.sum()),
        "wrong": int((trusted & wrong).sum()),
        "needless": int((moves & ~valid & ~wrong).sum()),
        "worst_valid": round(float(worst), 5),
        "reasons": reasons,
        "shown": [
            {
                "layer": i,
                "true_ratio": digits_of(truth.relative_update[i]),
                "true_angle": round(float(truth.angle[i]), 4),
                "norm_error": digits_of(norm[i]),
                "angle_error": digits_of(angle[i]),
                "angle_error_radians": digits_of(radians[i]),
                "valid": bool(valid[i]),
            }
            for i in shown
        ],
    }


def digits_of(value: Tensor) -> float | None:
    """Return three digits, or None for values that JSON cannot represent because no update was left to measure."""
    number = float(value)
    return float(f"{number:.3g}") if math.isfinite(number) else None


def available() -> dict[str, Setting]:
    """Return the settings that this machine can run."""
    return SETTINGS | (ON_GPU if torch.cuda.is_available() else {})


def study(quick: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Return all cells."""
    cells = []
    for case in cases(quick, seed):
        for name, setting in available().items():
            if name not in OF_ALL and case.name not in OF_OTHERS:
                continue
            for optimizer in ("Adam", "SGD"):
                cells += [{"setting": name, **cell} for cell in measure(case, setting, optimizer, RATIOS)]
    return cells


def report(cells: list[dict[str, Any]]) -> None:
    """Print the valid layers per setting, model and ratio for each assessing method, followed by the totals."""
    totals = []
    for method in METHODS:
        rows = []
        mine = [cell for cell in cells if cell["method"] == method]
        for setting in available():
            for model in dict.fromkeys(cell["model"] for cell in mine if cell["setting"] == setting):
                row = [f"{setting}, {model}"]
                for ratio in RATIOS:
                    found = [c for c in mine if c["setting"] == setting and c["model"] == model and c["ratio"] == ratio]
                    valid, layers = sum(c["valid"] for c in found), sum(c["layers"] for c in found)
                    worst = max((c["worst_valid"] for c in found), default=0.0)
                    row.append(f"{valid}/{layers} {worst:.4f}" if valid else f"0/{layers}")
                rows.append(row)
        print_table(f"{method}: valid/layers, worst error among the valid", ["", *(f"{r:g}" for r in RATIOS)], rows)
        layers, valid, wrong, needless = (sum(c[k] for c in mine) for k in ("layers", "valid", "wrong", "needless"))
        worst = max(c["worst_valid"] for c in mine)
        totals.append([method, *map(str, (layers, valid, wrong, needless)), f"{worst:.4f}"])
    print_table("all", ["method", "layers", "valid", "wrong though valid", "right, flagged", "worst valid"], totals)


def write(path: Path, cells: list[dict[str, Any]]) -> None:
    """Write one line per cell: the values of ``columns``, the last a list with the values of ``shown`` per layer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = list(next(cell["shown"][0] for cell in cells if cell["shown"]))
    head = {"environment": environment(torch.device("cpu")), "columns": list(cells[0]), "shown": shown}
    values = ([*list(cell.values())[:-1], [list(layer.values()) for layer in cell["shown"]]] for cell in cells)
    lines = ",\n".join(json.dumps(line, separators=(",", ":")) for line in values)
    path.write_text(f'{json.dumps(head)[:-1]},\n"results": [\n{lines}\n]}}\n')


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two small networks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fixed order of additions in matrix products on every machine
    try:
        cells = study(options.quick, options.seed)
    finally:
        torch.set_num_threads(threads)
    report(cells)
    if options.json is not None:
        write(options.json, cells)
    wrong = [cell for cell in cells if cell["method"] in CLAIMED and cell["wrong"]]
    for cell in wrong:
        print("WRONG AND NOT FLAGGED:", {key: value for key, value in cell.items() if key != "shown"})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
