"""Training is bitwise the same with the monitor on and off, in every combination; and the records are right."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfs
from tests.helpers import monitor_loops as loops
from tests.helpers.monitor_by_hand import by_hand
from tests.helpers.monitor_cases import rows
from tests.helpers.monitor_loops import Loop, Net

STEPS = 50
LAYERS = [f"blocks.{i}" for i in range(3)]
pytestmark = pytest.mark.filterwarnings(loops.DYNAMO)


def probe(device: str = "cpu") -> fastfs.monitor.Probe:
    x, y = (part.to(device) for part in rows(999))
    return fastfs.monitor.Probe(x, lambda output: F.cross_entropy(output.float(), y))


MODES: dict[str, dict[str, Any]] = {
    "batch": {"every": 5, "rows": None},
    "rows": {"every": 4, "aligned_every": 1, "rows": 5, "quantiles": (0.1, 0.9), "groups": {"late": r"[12]$"}},
    "amplify": {"every": 6, "aligned_every": 1, "amplify": True},
    "jvp": {"every": 6, "aligned_every": 2, "mode": "jvp"},
    "probe": {"every": 6, "aligned_every": 1, "mode": "probe"},
}


def groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    first, *others = model.blocks.children()
    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    named = [{"params": list(first.parameters()), "lr": 0.02, "momentum": 0.0}]
    named += [{"params": list(b.parameters()), "weight_decay": 0.1} for b in others]
    return [torch.optim.SGD([*named, {"params": rest, "nesterov": True}], lr=0.05, momentum=0.9)]


def adamw(**options: Any) -> Any:
    return lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2, **options)]


def foreach_nesterov(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, foreach=True)]


def frozen(model: nn.Module) -> nn.Module:
    model.stem.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="aot_eager", fullgraph=True)
    return model


def blocks_compiled_in_place(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def some(step: int) -> list[int]:
    return [0, 1, 2] if step % 3 else [0, 2]


PLAIN = Loop("plain")
LOOPS = [
    PLAIN,
    Loop("accumulation", micro_batches=3),
    Loop("clipping", clip=0.05),
    Loop("autocast", autocast=torch.bfloat16),
    Loop("scaler-float16", autocast=torch.float16, scaler=True, step=loops.infinite_step, skipped=(4, 12, 13, 36)),
    Loop("scaler-clip", autocast=torch.bfloat16, scaler=True, clip=0.1, step=loops.infinite_step, skipped=(7,)),
    Loop("scaler-accumulation", scaler=True, clip=0.1, micro_batches=2),
    Loop("scaler-fused", Net, adamw(fused=True), scaler=True, step=loops.infinite_step, skipped=(5, 6)),
    Loop("dropout", lambda: Net(drop=0.3)),
    Loop("dropout-accumulation-clipping", lambda: Net(drop=0.3), micro_batches=2, clip=0.05),
    Loop("batchnorm", lambda: Net(norm=True, drop=0.1)),
    Loop("checkpoint", lambda: Net(reentrant=False, drop=0.2)),
    Loop("compiled", prepare=lambda m: cast("nn.Module", torch.compile(m, backend="aot_eager", fullgraph=True))),
    Loop("compiled-blocks", prepare=compiled_blocks),
    Loop("compiled-blocks-in-place", prepare=blocks_compiled_in_place),
    Loop("groups", optimizers=groups),
    Loop("frozen", prepare=frozen),
    Loop("unused-layer", lambda: Net(use=some)),
    Loop("optimizer-in-backward", optimizers=loops.in_backward, step=loops.backward_step),
    Loop("muon-adamw", optimizers=loops.muon),
    Loop("two-models", models=2),
    Loop("deepcopy", step=loops.copying_step),
    Loop("exceptions", step=loops.failing_step),
    Loop("evaluations", lambda: Net(drop=0.2, norm=True), step=loops.evaluating_step),
    Loop("closure", step=loops.closure_step),
    Loop("closure-clipping", step=loops.closure_step, clip=0.05),
    Loop("adamw-foreach", optimizers=adamw(foreach=True)),
    Loop("adamw-fused", optimizers=adamw(fused=True)),
    Loop("sgd-nesterov-foreach", optimizers=foreach_nesterov),
    Loop("float64", lambda: Net().double(), batch=lambda i: (rows(i)[0].double(), rows(i)[1])),
]


IN_GRAPHS = dict.fromkeys(["compiled", "compiled-blocks-in-place"], pytest.mark.graphs)


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The models are tiny, and other threads would only spin."""
    threads(1)


def on(device: str, name: str) -> Loop:
    return dataclasses.replace(next(loop for loop in LOOPS if loop.name == name), device=device)


@functools.cache
def without(device: str, name: str) -> dict[str, Any]:
    torch._dynamo.reset()
    return on(device, name).train(STEPS, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [pytest.param(x.name, marks=IN_GRAPHS.get(x.name, ())) for x in LOOPS])
def test_training_is_the_same_with_the_monitor_on_and_off(name: Any, mode: Any, device: str) -> None:
    loop = on(device, name)
    options = dict(MODES[mode])
    if mode == "probe":
        options["probe"] = probe(device)
    off = without(device, name)
    torch._dynamo.reset()
    watched, records = loop.train(STEPS, options)
    loops.assert_bitwise(off, watched)
    for index, seen in enumerate(records):
        check_records(loop, mode, options, seen, first=index == 0)


@pytest.mark.parametrize(
    ("mode", "message"), [("batch", None), ("amplify", None), ("probe", "incompatible with .grad")]
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's, of the second forward
def test_reentrant_checkpoints_change_nothing_either(mode: str, message: str | None) -> None:
    """What is hidden from the graph is said to be no cut, and a probe cannot be taken of it."""
    loop = Loop("reentrant", lambda: Net(reentrant=True, drop=0.2), strict=False)
    options = MODES[mode] | ({"probe": probe()} if mode == "probe" else {})
    off, _ = loop.train(STEPS, None)
    if message is None:
        watched, (seen,) = loop.train(STEPS, options)
        structure = next(row for row in seen if row["kind"] == "structure")["layers"]
        assert structure["cut"] == [True, False, False]
        measured = [row for row in seen if row["kind"] == "measured"]
        hand = truth("cpu", "checkpoint", (0,))[0]
        assert all(row["valid"] for row in measured)
        for row in measured[:3]:
            for key in ("cos_angle", "update_rms", "feature_rms", "backward_rms"):
                most = 1e-5 if mode == "batch" else 0.02
                assert row[key] == pytest.approx(hand[key][row["layer"]], rel=most)
            assert row["layer"] == 0 or not math.isfinite(row["residual"])
    else:
        with pytest.warns(RuntimeWarning, match=message):
            watched, (seen,) = loop.train(STEPS, options)
        assert not [row for row in seen if row["kind"] == "measured"]
    loops.assert_bitwise(off, watched)


@functools.cache
def truth(device: str, name: str, steps: tuple[int, ...]) -> dict[int, dict[str, list[float]]]:
    """By hand, of the loop or of one that computes the same in plain sight."""
    loop = on(device, name)
    if name.startswith("compiled"):
        loop = dataclasses.replace(loop, prepare=None)
    if name.startswith("checkpoint"):
        loop = dataclasses.replace(loop, model=lambda: Net(drop=0.2))
    return by_hand(loop, steps, LAYERS)


def check_records(loop: Loop, mode: str, options: dict[str, Any], seen: list[dict[str, Any]], first: bool) -> None:
    """Checks that all records are there, and those of two steps against a computation by hand.

    A skipped step has no number of its own, unless the optimizer itself skips it.
    """
    counted = [step for step in range(STEPS) if step not in loop.skipped or loop.name == "scaler-fused"]
    lost = set(loop.skipped) if loop.name == "scaler-fused" else set()
    steps = {
        kind: {row["step"] for row in seen if row["kind"] == kind} for kind in ("measured", "predicted", "skipped")
    }
    due = set(range(len(counted))) - lost
    assert steps["measured"] == {s for s in due if s % options["every"] == 0}
    aligned = {s for s in due - steps["measured"] if "aligned_every" in options and s % options["aligned_every"] == 0}
    assert steps["predicted"] == aligned
    if loop.scaler and not lost:
        assert len([row for row in seen if row["kind"] == "skipped"]) == len(loop.skipped)
    rows = [row for row in seen if row["kind"] in ("measured", "predicted") and not row["group"]]
    for row in rows:
        if row["kind"] == "measured":
            sixteen = loop.autocast is not None and mode != "probe"
            curved = mode == "amplify" and loop.name in ("batchnorm", "evaluations")  # flagged, though right
            assert row["valid"] or sixteen or curved or row["count"] == 0, (row["step"], row["name"], row["why"])
            assert row["count"] == 0 or math.isfinite(row["angle"])
            if mode == "jvp" and row["valid"] and not sixteen:
                assert abs(row["residual"]) < 1e-3
    if first and mode != "probe":
        wanted = (0, 10) if mode == "batch" else (0, 5)
        taken = {n: counted[n] for n in wanted}
        hand = truth(loop.device, loop.name, tuple(taken.values()))
        for row in rows:
            if row["step"] in taken:
                compare(loop, mode, row, {key: v[row["layer"]] for key, v in hand[taken[row["step"]]].items()})


def compare(loop: Loop, mode: str, row: dict[str, Any], hand: dict[str, float]) -> None:
    if hand["count"] == 0:
        assert not row.get("valid")
        return
    tolerance = dict.fromkeys(hand, 1e-5) | {"aligned_decrease": 1e-3}
    if mode == "rows":  # samples; errors are another test's matter
        tolerance = {"aligned_decrease": 1e-3}
    elif row["kind"] == "predicted":
        tolerance = {"backward_rms": 1e-5, "aligned_decrease": 1e-3}
    elif mode in ("amplify", "jvp"):
        tolerance["cos_angle"] = tolerance["update_rms"] = 0.02 if mode == "amplify" else 0.1
        if loop.autocast is not None:  # by hand it drowns in rounding
            del tolerance["cos_angle"], tolerance["update_rms"]
    if loop.name == "unused-layer" and mode == "amplify" and row["kind"] == "predicted":
        # No measured step has seen the second block, so what is upstream of what is not known where it runs.
        assert math.isnan(row["aligned_decrease"])
        assert math.isnan(row["update_rms"])
        del tolerance["aligned_decrease"]
    for key, most in tolerance.items():
        assert row[key] == pytest.approx(hand[key], rel=most), (row["kind"], row["step"], row["name"], key)
