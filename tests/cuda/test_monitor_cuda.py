"""The monitor on a GPU: nothing waits for the device, training stays bitwise the same, numbers agree with the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastfs
from benchmarks.ops.graphs import nothing_waits
from fastfs.models import Transformer
from tests.helpers.monitor_cases import measured_into, tokens

pytestmark = pytest.mark.gpu

MODES = [{}, {"rows": 7, "quantiles": (0.5,)}, {"amplify": True}, {"mode": "jvp"}]


def make(device: str = "cuda", dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    return Transformer(width=32, depth=3, heads=2, context=12, dropout=dropout).to(device)


def adamw(model: torch.nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def batch(step: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = tokens(step)
    return x.to(device), y.to(device)


def step(model: Any, optimizer: torch.optim.Optimizer, data: Any, scaler: Any = None, autocast: bool = False) -> Any:
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        loss = F.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten())
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.detach()


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("optimizer_options", [{}, {"fused": True}, {"capturable": True}])
def test_no_step_waits_for_the_device(options: Any, optimizer_options: dict[str, Any]) -> None:
    model = make()
    optimizer = adamw(model, **optimizer_options)
    seen: list[Any] = []
    monitor = fastfs.Monitor(
        model, optimizer, every=2, aligned_every=1, sinks=[measured_into(seen)], verbose=False, **options
    )
    data = [batch(i) for i in range(8)]
    for i in range(4):  # what is learned and allocated once
        step(model, optimizer, data[i])
    torch.cuda.synchronize()
    with nothing_waits():
        for i in range(4, 8):
            step(model, optimizer, data[i])
    monitor.close()
    assert sorted({row["step"] for row in seen}) == [0, 2, 4, 6]
    assert all(row["valid"] for row in seen)


@pytest.mark.parametrize("options", [*MODES, {"aligned_every": 1}])
@pytest.mark.parametrize("scaled", [False, True])
def test_training_is_bitwise_the_same(options: Any, scaled: bool) -> None:
    def run(watch: Any) -> list[Any]:
        model = make(dropout=0.2)
        optimizer = adamw(model)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40) if scaled else None  # the first steps are skipped
        monitor = fastfs.Monitor(
            model, optimizer, every=3, sinks=[lambda rows: None], scaler=scaler, verbose=False, **options
        ) if watch else None  # fmt: skip
        trace = [step(model, optimizer, batch(i), scaler, autocast=scaled) for i in range(50)]
        if monitor is not None:
            monitor.close()
        return [*trace, *model.parameters(), torch.cuda.get_rng_state(), torch.get_rng_state()]

    with sdpa_kernel(SDPBackend.MATH):  # deterministic backward
        first, second = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Matrix products in float32, also where the environment asks for TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("options", MODES)
def test_numbers_agree_with_the_cpu(options: Any, exact_products: None) -> None:
    rows: dict[Any, Any] = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(make("cpu")).to(device)
        optimizer = adamw(model)
        rows[device] = []
        with fastfs.Monitor(model, optimizer, every=1, sinks=[measured_into(rows[device])], verbose=False, **options):
            step(model, optimizer, batch(0, device))
    for a, b in zip(rows["cpu"], rows["cuda"], strict=True):
        for key in ("angle", "update_rms", "backward_rms", "aligned_decrease"):
            assert b[key] == pytest.approx(a[key], rel=1e-3), key
