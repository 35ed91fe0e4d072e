"""temporary"""

from dataclasses import dataclass
from torch import Tensor
import torch


@dataclass
class Verdict:
    sums: Tensor
    code: Tensor
    noise_floor: Tensor
    valid: Tensor


def reasons(codes, stats):
    return [None if c == 0 else "x" for c in codes.tolist()]


def methods(codes, method):
    return [method for _ in codes.tolist()]
