"""The precision of float32 products under torch's settings, which can be read without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastfs._network.precision import SINGLE, product_coarseness

TF32 = 2.0**-10


def test_matrix_products_are_exact_by_default_and_convolutions_are_not() -> None:
    """The default of matrix products is "none": neither it nor what it inherits from is set."""
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    assert product_coarseness("matmul", "cuda") == SINGLE
    assert product_coarseness("conv", "cuda") == product_coarseness("rnn", "cuda") == TF32
    assert product_coarseness("matmul", "cpu") == SINGLE


@pytest.fixture
def settings() -> Iterator[Any]:
    """The settings of matrix products and convolutions on a GPU, set back after the test."""
    cudnn: Any = torch.backends.cudnn
    both = torch.backends.cuda.matmul, cudnn.conv
    before = [each.fp32_precision for each in both]
    yield both
    for each, value in zip(both, before, strict=True):
        each.fp32_precision = value


@pytest.mark.parametrize(("setting", "expected"), [("tf32", TF32), ("ieee", SINGLE)])
def test_what_is_set_counts(setting: str, expected: float, settings: Any) -> None:
    for each in settings:
        each.fp32_precision = setting
    assert product_coarseness("matmul", "cuda") == product_coarseness("conv", "cuda") == expected
