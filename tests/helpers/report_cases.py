"""Records of any size as a monitor writes them, for the tests of readers and of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HEADER: dict[str, Any] = {
    "kind": "header",
    "schema": 2,
    "fastfs": "0.2.0",
    "started": "2026-01-05T09:00:00+00:00",
    "mode": "batch",
    "model": "Transformer",
    "parameters": 1_234_567,
    "dtype": "bfloat16",
    "device": "cuda:0",
    "device_name": "A GPU",
    "optimizer": "AdamW",
    "torch": "2.13.0",
    "python": "3.12.1",
    "metadata": {"git": "abc123", "note": "a run of the tests"},
}
START = 1_767_603_600.0  # the time in HEADER, in seconds since 1970
STEP_SECONDS = 0.25


def header(
    names: list[str], *, run: str = "r1", every: int = 1, groups: dict[str, list[str]] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        **HEADER,
        "run": run,
        "layers": names,
        "every": every,
        "aligned_every": 1,
        "rows": 64,
        "memory_bytes": 1 << 20,
        "groups": groups or {},
        **more,
    }


def structure(names: list[str], run: str = "r1") -> dict[str, Any]:
    cut = [i % 5 != 3 for i in range(len(names))]
    return {
        "kind": "structure",
        "run": run,
        "step": 0,
        "time": START,
        "layers": {
            "cut": cut,
            "reason": [None if c else "inside the branch of a residual block" for c in cut],
            "parameters": [1000 + i for i in range(len(names))],
        },
    }


def measured(names: list[str], step: int, *, run: str = "r1", invalid: float = 0.02, seed: int = 0) -> dict[str, Any]:
    """Builds a measured step; ``invalid`` is the fraction of the cells that are not valid."""
    noise = random.Random(1000 * seed + step)
    depth = [(i + 1) / len(names) for i in range(len(names))]
    decay = 1 / (1 + step / 400)
    angle = [0.6 + 0.9 * d * (1 - 0.3 * decay) + noise.gauss(0, 0.015) for d in depth]
    speed = [10 ** (-2 - 1.5 * d) * decay * math.exp(noise.gauss(0, 0.1)) for d in depth]
    valid = [noise.random() >= invalid for _ in names]
    size = 64 * 128
    residual = [noise.gauss(0.02, 0.02) for _ in names]
    backward = [1e-4 * (0.5 + d) for d in depth]
    return {
        "kind": "measured",
        "run": run,
        "step": step,
        "time": START + step * STEP_SECONDS,
        "loss": 2.0 + 3.0 * decay + noise.gauss(0, 0.03),
        "micro_batches": 1,
        "overhead_seconds": 0.02,
        "loss_scale": None,
        "gradient_scale": 1.0 - residual[0],
        "layers": {
            "angle": angle,
            "cos_angle": [math.cos(a) for a in angle],
            "update_rms": speed,
            "relative_update": [s / 0.8 for s in speed],
            "feature_rms": [0.8 for _ in names],
            "backward_rms": backward,
            "radial_update": [0.1 * s for s in speed],
            "tangential_update": [0.9 * s for s in speed],
            "noise_floor": [2e-5 for _ in names],
            "valid": valid,
            "why": [None if v else "update below 5x the noise floor of bfloat16" for v in valid],
            "linear": [abs(r) <= 0.1 for r in residual],
            "method": ["plain" for _ in names],
            "nonfinite": [0 for _ in names],
            "count": [size for _ in names],
            "rows": [64 for _ in names],
            "angle_se": [0.02 for _ in names],
            "update_rms_se": [0.1 * s for s in speed],
            "aligned_decrease": [
                (1 - r) * s * b * size * math.cos(a)
                for r, s, b, a in zip(residual, speed, backward, angle, strict=True)
            ],
            "residual": residual,
            "parameter_norm": [3.0 for _ in names],
            "parameter_update_norm": [1e-3 for _ in names],
            "gradient_norm": [0.1 * (0.5 + d) for d in depth],
        },
    }


def predicted(names: list[str], step: int, *, run: str = "r1") -> dict[str, Any]:
    row = measured(names, step, run=run, seed=7)
    columns = row["layers"]
    keep = ("aligned_decrease", "backward_rms", "parameter_norm", "parameter_update_norm", "gradient_norm")
    speed = [v if i % 5 != 3 else None for i, v in enumerate(columns["update_rms"])]
    return {
        "kind": "predicted",
        **{key: row[key] for key in ("run", "step", "time", "loss", "loss_scale")},
        "overhead_seconds": 0.001,
        "layers": {**{key: columns[key] for key in keep}, "update_rms": speed},
    }


def alert(
    step: int, *, rule: str = "angle_collapse", layer: str | None = "blocks.1", run: str = "r1"
) -> dict[str, Any]:
    message = f"{layer or 'the loss'}: {rule.replace('_', ' ')} at step {step}"
    common = {"kind": "alert", "run": run, "step": step, "time": START + step * STEP_SECONDS}
    return {**common, "rule": rule, "layer": layer, "value": 1.56, "message": message}


def names_of(layers: int) -> list[str]:
    return [f"blocks.{i}" for i in range(layers)]


def run_lines(
    layers: int = 4,
    steps: int = 20,
    every: int = 1,
    *,
    invalid: float = 0.02,
    alerts: tuple[int, ...] = (),
    kinds: tuple[str, ...] = ("measured", "predicted"),
    groups: bool = False,
    names: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Builds all lines of a run: measured every ``every`` steps, predicted in between."""
    names = names or names_of(layers)
    group = {"first half": names[: len(names) // 2], "second half": names[len(names) // 2 :]} if groups else {}
    lines = [header(names, every=every, groups=group), structure(names)]
    rows = [*names, *group]
    for step in range(steps):
        due = step % every == 0
        if due and "measured" in kinds:
            lines.append(measured(rows, step, invalid=invalid))
        elif "predicted" in kinds and not (due and "measured" in kinds):
            lines.append(predicted(rows, step))
        lines += [alert(step) for at in alerts if at == step]
    return lines


def with_ranks(
    lines: list[dict[str, Any]],
    ranks: int,
    *,
    missing_from: int | None = None,
    apart: tuple[int, int, int] | None = None,
) -> list[dict[str, Any]]:
    """Makes a run of several ranks of it: one is missing from a step on, or is apart (rank, layer, from a step)."""
    for line in lines:
        if line["kind"] == "header":
            line["ranks"] = ranks
        if line["kind"] in ("measured", "predicted"):
            line["ranks"] = ranks - (missing_from is not None and line["step"] >= missing_from)
        if line["kind"] == "measured":
            count = len(line["layers"]["angle"])
            line["layers"]["rank_angle_sd"] = [0.01 * (i + 1) for i in range(count)]
            found: list[int | None] = [None] * count
            if apart is not None and line["step"] >= apart[2]:
                found[apart[1]] = apart[0]
            line["layers"]["rank_apart"] = found
    return lines


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) and abs(value) < 1e6 else value

    with path.open("w") as file:
        for line in lines:
            if isinstance(line.get("layers"), dict):
                line = {**line, "layers": {key: [short(v) for v in column] for key, column in line["layers"].items()}}
            file.write(json.dumps(line) + "\n")
    return path


def append(path: Path, *records: dict[str, Any], end: bytes = b"\n") -> None:
    """Appends lines to a file, with another end than a newline if asked for."""
    with path.open("ab") as file:
        file.write(b"\n".join(json.dumps(record).encode() for record in records) + end)
