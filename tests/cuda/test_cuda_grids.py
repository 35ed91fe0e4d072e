"""The driver of the tuning sweep has the bits of the op, on a real GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tuning import build, sass
from benchmarks.tuning.catalogue import BASELINE, variant
from benchmarks.tuning.library import NAMES, Library
from benchmarks.tuning.measure import check_layers
from fastfs import feature_stats
from tests.helpers.compare import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(sass.find_tool("nvcc") is None, reason="no nvcc"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    major, minor = torch.cuda.get_device_capability()
    folder = tmp_path_factory.mktemp("kernels") / "baseline"
    return Library(build.compile_library(variant(BASELINE), f"{major}{minor}", folder))


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_bits_of_the_driver_are_those_of_the_op(dtype: torch.dtype, library: Library) -> None:
    for inputs, per_row in check_layers(dtype, torch.device("cuda")):
        found = feature_stats(*inputs, per_row=per_row)
        expected = torch.cat([x.sums for x in found]) if isinstance(found, list) else found.sums
        call = library.prepare(inputs, per_row)
        shapes = [tuple(x.shape) for x in inputs[0]]
        assert_same(call.sums(), expected, f"{shapes}, per row {per_row}")
