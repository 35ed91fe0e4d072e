"""Every measurement of the table: the native core against the reference and its own declaration, opcheck, fakes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfs
from fastfs import reference
from fastfs._core import ops
from fastfs._core.checks import DTYPES
from fastfs._core.measurements import MEASUREMENTS, MeasurementSpec
from fastfs._core.self_check import compare, examples
from fastfs._stats import FeatureStats, ParameterStats, span

KERNELS = [kernel.name for measurement in MEASUREMENTS for kernel in measurement.kernels]
EVERY = pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda m: m.name)
needs_core = pytest.mark.skipif(not ops.native_available(), reason="no native core")

# torch's own, when its compiler is imported
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


def op_names(measurement: MeasurementSpec) -> list[str]:
    return [measurement.name, *([f"{measurement.name}_per_row"] if measurement.per_row else [])]


def mapped(arguments: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    """The arguments with every tensor changed."""
    return tuple(
        [change(x) for x in a] if isinstance(a, list) else change(a) if isinstance(a, Tensor) else a for a in arguments
    )


@needs_core
def test_the_core_declares_the_same() -> None:
    core = ops._C
    assert list(core.measurements()) == KERNELS  # the order by which tests/cuda/on_cpu numbers them
    assert ops.differences(core) == []


def test_a_core_of_other_sources_is_refused() -> None:
    class Other:
        @staticmethod
        def measurements() -> dict[str, tuple[int, int, int, bool]]:
            return {"feature_stats": (3, 8, 0, True), "new_stats": (1, 1, 0, True)}

    found = ops.differences(Other)
    fields = r"(inputs, sums, coefficients, 16-bit dtypes)"
    assert found[0] == f"feature_stats: {fields} are (3, 8, 0, True) in C++ and (3, 7, 0, True) in Python"
    assert found[-1] == f"new_stats: {fields} are (1, 1, 0, True) in C++ and None in Python"
    assert len(ops.differences(object())) == len(KERNELS)


@EVERY
def test_there_is_a_public_function_and_a_reference(measurement: MeasurementSpec) -> None:
    assert measurement.name in fastfs.__all__
    assert measurement.result.__name__ in fastfs.__all__
    assert callable(getattr(reference, measurement.name))


@needs_core
@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_core_agrees_with_the_reference(
    measurement: MeasurementSpec, dtype: torch.dtype, seed: int, device: str
) -> None:
    shapes = ((3, 8193), (300,), (), (0, 3), (70, 131))
    for example in examples(measurement, dtype, torch.device(device), shapes=shapes, seed=seed):
        assert compare(example) == []
        if measurement.per_row:
            assert compare(example, per_row=True) == []


@pytest.mark.slow
@needs_core
@EVERY
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(measurement: MeasurementSpec, requires_grad: bool, device: str) -> None:
    pytest.importorskip("expecttest")
    for name, dtype in itertools.product(op_names(measurement), (torch.bfloat16, torch.float32)):
        op = getattr(torch.ops.fastfs, name).default
        shapes = ((5, 3), (7,), (), (4, 2))
        for example in examples(measurement, dtype, torch.device(device), shapes=shapes, finite=True):
            arguments = mapped(example.arguments, lambda x: x.detach().requires_grad_(requires_grad))
            torch.library.opcheck(op, arguments)


@needs_core
@EVERY
def test_fakes(measurement: MeasurementSpec, device: str) -> None:
    for name in op_names(measurement):
        op = getattr(torch.ops.fastfs, name)
        for example in examples(measurement, torch.float32, torch.device(device)):
            real = op(*example.arguments)
            with FakeTensorMode() as mode:
                fake = op(*mapped(example.arguments, mode.from_tensor))
            for field in ("shape", "dtype", "device"):
                assert getattr(fake, field) == getattr(real, field)
            assert real.shape[-1] == measurement.columns


@EVERY
def test_sums_of_products_name_their_vectors(measurement: MeasurementSpec) -> None:
    names, factors = measurement.result.names, measurement.result.factors
    assert names[-2:] == ("nonfinite", "count")
    assert set(factors) <= set(names)
    for a, b in factors.values():
        assert {f"{a}_sq", f"{b}_sq"} <= set(factors)
    assert all((a == b) == (name == f"{a}_sq") for name, (a, b) in factors.items())


def test_spans() -> None:
    assert {"dot", "update_sq"} <= set(ParameterStats.names[span(ParameterStats, "update")])
    assert "parameter_sq" not in ParameterStats.names[span(ParameterStats, "update", "gradient")]
    with pytest.raises(ValueError, match=r"expected the sums of nothing side by side, got \[\]"):
        span(FeatureStats, "nothing")
    with pytest.raises(ValueError, match=r"FeatureStats: expected the sums of backward side by side, got \[0, 2\]"):
        span(FeatureStats, "backward")
