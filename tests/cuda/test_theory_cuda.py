"""The theory on a real GPU: the formula, the backward-feature kernel and published angles, as on the CPU."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastfs import formula, spectrum
from fastfs.spectrum import BFK
from tests.helpers import formula_cases
from tests.helpers.compare import assert_matrix
from tests.helpers.spectrum_cases import CASES
from tests.reproduce.test_paper import output_angle
from tests.theory.test_formula import CASES as MODELS

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")


def there(parts: Any, device: str) -> Any:
    """Tensors of a batch on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, parts)


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_formula(name: str, optimizer: bool) -> None:
    found = []
    for device in DEVICES:
        model, loss_fn, batch = formula_cases.case(name)
        model = model.to(device).eval()  # the masks of dropout are others on a GPU
        how: dict[str, Any] = (
            {"optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)} if optimizer else {"lr": 0.1}
        )
        before = formula_cases.leave(model)
        found.append(
            formula.measure(model, loss_fn, there(batch, device), first_order=True, dtype=torch.float64, **how)
        )
        formula_cases.assert_left(model, before)
    cpu, gpu = found
    size = gpu.stats.abs_update_dot_backward
    assert ((gpu.stats.update_dot_backward + gpu.aligned_decrease).abs() <= 1e-10 * size).all()
    for key in ("angle", "update_rms", "backward_rms", "feature_rms"):
        torch.testing.assert_close(getattr(gpu.stats, key).cpu(), getattr(cpu.stats, key), rtol=1e-7, atol=0)
    for key in ("aligned_decrease", "contribution", "sensitivity", "predicted_update_rms"):
        torch.testing.assert_close(getattr(gpu, key).cpu(), getattr(cpu, key), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if "dropout" not in name])
def test_kernel(name: str) -> None:
    dense, predicted = [], []
    for device in DEVICES:
        case = CASES[name]()
        model, batch = case.model.to(device), there(case.batch, device)
        operator = BFK(model, case.loss_fn, batch, case.layer, lr=0.7, dtype=torch.float64)
        moved = operator.apply(operator.backward)
        assert moved.device.type == operator.dense().device.type == device
        dense.append(operator.dense().cpu())
        found = spectrum.moments(operator, max_probes=16)  # the same vectors on both
        predicted.append(found.predicted_cos_angle.cpu())
    assert_matrix(dense[1], dense[0], 1e-10)
    torch.testing.assert_close(predicted[1], predicted[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize(("scale", "low", "high"), [(0.1, 0.07, 0.08), (1.0, 0.65, 0.70), (2.0, 1.04, 1.05)])
def test_published_output_angles(scale: float, low: float, high: float) -> None:
    angles = [output_angle(30, scale / math.sqrt(30), seed, device="cuda") for seed in range(5)]
    assert low - 0.03 <= statistics.mean(angles) <= high + 0.03
    assert angles[0] == pytest.approx(output_angle(30, scale / math.sqrt(30), 0), rel=1e-9)
