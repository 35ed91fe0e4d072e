"""Spectral prediction of the backward-feature angle in wide random ReLU networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["predicted_cos_angle"]


def predicted_cos_angle(
    depth: int, *, branch_scale: float = 1.0, contributions: Sequence[float] | None = None
) -> float:
    r"""Return cos(theta) after ``depth`` ReLU blocks of large width at random initialization.

    ``depth`` counts the blocks V after the first matrix U, which is trained too. Every matrix adds c_k J_k J_k^T to
    the kernel, with J_k the Jacobian from f_k to the last features. For wide random blocks, the normalized trace of
    J_k J_k^T is 1 and that of its square is 1 + 2 beta^2 (l - k): each block adds 2 beta^2. (For ``V D`` with half of
    the diagonal of D active, the trace of the square is 3; skip connection and branch combine to the same sum.) The
    product of the kernels of two matrices has the trace of the square of the later one. Therefore

        M_1 = sum_k c_k,   M_2 = sum_k c_k (c_k + 2 sum_{j<k} c_j) (1 + 2 beta^2 (l - k)),   cos(theta) = M_1/sqrt(M_2).

    With equal contributions this is about sqrt(3/(2 l)) for deep MLPs (beta = 1; l = L - 2 for f_{L-1}), and
    1/sqrt(1 + 2 c^2/3) for beta = c/sqrt(l).

    Args:
        depth: number l of ReLU blocks, at least 0.
        branch_scale: beta in [0, 1]; 1 is the MLP.
        contributions: c_k = lr_k |g_k|^2 of the l + 1 matrices, up to a common factor; None means equal ones.

    Returns:
        The cosine, in (0, 1].

    Raises:
        ValueError: depth, scale or the number of contributions is out of range, or a contribution is not positive.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), spectral moments of the backward-to-feature kernel.
    """
    if depth < 0 or not 0.0 <= branch_scale <= 1.0:
        raise ValueError(f"expected depth >= 0 and a branch scale in [0, 1], got {depth} and {branch_scale}")
    shares = [1.0] * (depth + 1) if contributions is None else list(contributions)
    if len(shares) != depth + 1 or not all(math.isfinite(c) and c > 0 for c in shares):
        raise ValueError(f"contributions: expected {depth + 1} positive numbers, got {shares}")
    first = second = 0.0
    for k, c in enumerate(shares):
        second += c * (c + 2 * first) * (1 + 2 * branch_scale**2 * (depth - k))
        first += c
    return first / math.sqrt(second)
