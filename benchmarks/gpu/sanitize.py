"""Call every CUDA kernel on small inputs under compute-sanitizer: dtypes, tails, misaligned and strided inputs, NaN."""

import itertools
import math

import torch

from fastfs import feature_stats, update_stats
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def main() -> None:
    """Run the calls and check them roughly; the sanitizer detects memory errors."""
    torch.manual_seed(0)
    for dtype, last in itertools.product(DTYPES, DTYPES):
        for size in (1, 9, 8193, 66 * 8192 + 5):
            if size > 10_000 and dtype != last:
                continue
            f, g, b = (torch.randn(size + 3, device="cuda").to(d) for d in (dtype, dtype, last))
            check(f[3:], g[:-3], b[1:-2])
            check(f[:-3], g[:-3], b[:-3])
        f, g, b = (torch.randn(37, 130, device="cuda").to(d) for d in (dtype, dtype, last))
        check(f[:, :99], g[:, 1:100], b[:, 31:])
        check(f.t(), g.t(), b.t())
        stats = feature_stats(f, g, b, per_row=True)
        assert stats.sums.isfinite().all()
        g[0, 0] = math.nan
        assert feature_stats(f, g, b).nonfinite.item() == 1
    many = [torch.randn(1 + i, device="cuda") for i in range(200)]
    assert feature_stats(many, many, many).sums[:, 1].eq(0).all()
    for dtype, to, width in itertools.product(DTYPES, DTYPES, (5, 777, 1030, 8195)):
        x = torch.randn(6, width, device="cuda").to(dtype)
        check_rows(x, torch.tensor([5, 0, 5, 3], device="cuda"), to)
        check_rows(x.flatten()[3:].view(-1)[: 4 * width].view(4, width), torch.tensor([3, 0], device="cuda"), to)
        check_rows(x.t(), torch.tensor([width - 1, 0], device="cuda"), to)
        outside = torch.tensor([6, -1, 2**40], device="cuda")
        assert torch.ops.fastfs.gather_rows(x, outside, 1, to)[0].isnan().all()
    steps()
    torch.cuda.synchronize()
    print("all calls done")


def steps() -> None:
    """Run every rule of optimizer_stats, with its coefficients on the host and on the device."""
    for rule, dtype in itertools.product(OptimizerRule, DTYPES):
        if rule is not OptimizerRule.LINEAR and dtype.itemsize == 2:
            continue
        x = [torch.rand(size + 3, device="cuda").to(dtype) for size in (1, 9, 8193, 66 * 8192 + 5)]
        x = [x[0][3:], *x[1:], torch.rand(37, 130, device="cuda").to(dtype)[:, 1:100]]
        table = torch.full((len(x), len(rule.coefficients)), 0.5, dtype=torch.float64)
        second = x if rule.states == 2 else []
        near, far = (optimizer_stats(rule, x, x, x, second, c).sums for c in (table, table.cuda()))
        assert torch.equal(near, far)
        assert near.isfinite().all()


def check(f: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> None:
    """Compare one layer with torch in double precision."""
    expected = ((g.double() - f.double()) * b.double()).abs().sum()
    torch.testing.assert_close(feature_stats(f, g, b).sums[5], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(update_stats(f, b).sums[1], b.double().square().sum(), rtol=1e-5, atol=0)


def check_rows(x: torch.Tensor, rows: torch.Tensor, to: torch.dtype) -> None:
    """Compare the rows of a matrix with torch."""
    out, squares = torch.ops.fastfs.gather_rows(x, rows, 1, to)
    torch.testing.assert_close(out, x[rows].to(to), rtol=0, atol=0)
    torch.testing.assert_close(squares, x[rows].double().square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.ops.fastfs.row_squares(x, rows, 1), squares, rtol=0, atol=0)


if __name__ == "__main__":
    main()
