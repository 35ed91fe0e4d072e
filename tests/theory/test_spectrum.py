"""The kernel as an operator, against the matrix from explicit Jacobians."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh, svds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfs._network.linearization import Linearization
from fastfs.models import MLP
from fastfs.spectrum import BFK
from tests.helpers.compare import assert_matrix
from tests.helpers.spectrum_cases import CASES, Case, convolution, jacobians, kernel, mlp, rows, squared, transformer


def bfk(case: Case, **options: Any) -> BFK:
    return BFK(case.model, case.loss_fn, case.batch, case.layer, **{"dtype": torch.float64, **options})


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_products_are_those_of_the_explicit_matrix(case: Case) -> None:
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    random = torch.get_rng_state()
    operator, exact = bfk(case, lr=0.7), 0.7 * kernel(case)
    assert operator.shape == exact.shape == (operator.features.numel(),) * 2
    dense = operator.dense()
    assert_matrix(dense, exact, 1e-10)
    assert_matrix(dense, dense.T, 1e-12, "symmetry")
    assert torch.linalg.eigvalsh(dense).min() >= -1e-12 * dense.trace()
    x = np.random.default_rng(0).standard_normal((operator.shape[0], 3))
    assert_matrix(torch.from_numpy(operator.matmat(x)), exact @ torch.from_numpy(x), 1e-10)
    assert_matrix(torch.from_numpy(operator @ x[:, 0]), exact @ torch.from_numpy(x[:, 0]), 1e-10)
    assert_matrix(torch.from_numpy(operator.rmatvec(x[:, 0])), exact @ torch.from_numpy(x[:, 0]), 1e-10)
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in case.model.parameters())


def test_kernel_times_backward_is_minus_the_first_order_update_of_gradient_descent(case: Case) -> None:
    operator, lin = bfk(case, lr=0.3), case.linearization()
    moved = operator.apply(operator.backward)
    expected = lin.jvp([-0.3 * g for g in lin.gradients]).features[0][0]
    assert lin.structure.cut[0]
    assert_matrix(moved, -expected, 1e-10)
    upstream = zip(lin.gradients, lin.structure.upstream[0], strict=True)
    decrease = torch.stack([0.3 * g.square().sum() for g, below in upstream if below]).sum()
    assert_matrix((moved * operator.backward).sum()[None], decrease[None], 1e-10)


def test_linear_and_batched_the_same(case: Case) -> None:
    operator = bfk(case, chunk=2)
    whole = bfk(case, chunk=64)
    v = torch.randn(5, *operator.features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    products = operator.apply(v)
    assert products.shape == v.shape
    assert_matrix(products, whole.apply(v), 1e-13, "chunks")
    assert_matrix(products, torch.stack([operator.apply(x) for x in v]), 1e-13, "one by one")
    assert_matrix(operator.apply(2 * v[0] - 3 * v[1]), 2 * products[0] - 3 * products[1], 1e-12, "linearity")
    assert operator.apply(v[:0]).shape == v[:0].shape


def test_against_a_finite_step_with_the_same_dropout_masks() -> None:
    case = transformer(dropout=0.2)
    operator, lin = bfk(case), case.linearization()
    step = 1e-5
    up = lin.forward([p - step * g for p, g in zip(lin.parameters, lin.gradients, strict=True)]).features[0][0]
    down = lin.forward([p + step * g for p, g in zip(lin.parameters, lin.gradients, strict=True)]).features[0][0]
    assert_matrix(operator.apply(operator.backward), (down - up) / (2 * step), 1e-6)
    clean = transformer()
    assert not torch.allclose(operator.dense(), kernel(clean), rtol=1e-2)


def test_rates_by_name_and_by_entry_and_subsets() -> None:
    case = mlp()
    explicit = jacobians(case)
    names = list(explicit)
    entries = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    rates = {r"^blocks\.0": entries, r"^blocks\.[12]": 0.2, "head": 3.0}
    by_name: dict[str, Tensor | float] = {n: 3.0 if n == "head.weight" else 0.2 for n in names}
    by_name["blocks.0.weight"] = entries.double()
    assert_matrix(bfk(case, lr=rates).dense(), kernel(case, by_name), 1e-10)
    subset = bfk(case, lr=2.0, parameters=r"blocks\.1")
    assert subset.names == ["blocks.1.linear.weight"]
    assert_matrix(subset.dense(), 2.0 * explicit[subset.names[0]] @ explicit[subset.names[0]].T, 1e-10)
    # Rates of parameters that the layer does not depend on have no effect.
    assert "head.weight" not in bfk(case).names
    zero = bfk(case, lr={"blocks": 0.0, "head": 1.0})
    assert zero.rank_bound == 0
    assert not zero.dense().any()


def test_nothing_is_recorded_for_autograd() -> None:
    """This also holds if parameters outside of the sum require a gradient: a graph would keep every product alive."""
    case = mlp()
    operator = BFK(case.model, case.loss_fn, case.batch, case.layer, parameters=r"blocks\.2")
    v = torch.ones_like(operator.features).requires_grad_()
    lin = Linearization(case.model, case.loss_fn, case.batch, parameters=r"blocks\.2")
    with torch.enable_grad():
        assert not operator.apply(v).requires_grad
        assert not operator.dense().requires_grad
        assert not operator.features.requires_grad
        assert not operator.backward.requires_grad
        assert not lin.function(0)(lin.parameters).requires_grad


def test_precision_is_that_of_the_model_or_as_asked_for() -> None:
    case = mlp()
    single = BFK(case.model, case.loss_fn, case.batch, case.layer)
    assert single.dtype == np.float32
    assert single.apply(single.features).dtype == torch.float32
    assert single.dense().dtype == torch.float64
    assert_matrix(single.dense(), kernel(case), 1e-5)
    assert next(case.model.parameters()).dtype == torch.float32
    half = Case(case.model.bfloat16(), squared, tuple(x.bfloat16() for x in case.batch), case.layer)
    with pytest.raises(TypeError, match=r"bfloat16.*dtype=torch\.float64"):
        BFK(half.model, half.loss_fn, half.batch, half.layer)
    assert bfk(half).dtype == np.float64


@pytest.mark.slow
def test_scipy_runs_on_it(case: Case) -> None:
    operator = bfk(case)
    assert isinstance(operator, LinearOperator)
    values = torch.linalg.eigvalsh(kernel(case))
    start = np.random.default_rng(0).standard_normal(len(values))
    largest = eigsh(operator, k=3, which="LA", v0=start, return_eigenvectors=False)
    assert_matrix(torch.from_numpy(np.sort(largest)), values[-3:], 1e-10)
    singular = svds(operator, k=2, v0=start, return_singular_vectors=False)
    assert_matrix(torch.from_numpy(np.sort(singular)), values[-2:], 1e-8)
    assert operator.H is operator
    assert operator.T is operator
    both = 2.0 * operator + aslinearoperator(np.eye(len(values)))
    assert_matrix(
        torch.from_numpy(both @ start), (2 * kernel(case)) @ torch.from_numpy(start) + torch.from_numpy(start), 1e-9
    )


def test_memory_is_bounded_by_the_chunk() -> None:
    """Peak memory of a product with many vectors grows with the chunk, not with their number."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.numel())
            return result

    case = Case(MLP(16, 16, 4), squared, rows(2, 16, 1), "blocks.2")
    found = {}
    for chunk in (2, 8):
        operator = bfk(case, chunk=chunk)
        for count in (8, 24):
            vectors = torch.randn(count, *operator.features.shape, dtype=torch.float64)
            with Largest() as seen:
                operator.apply(vectors)
            found[chunk, count] = seen.numel
    # A gradient has 256 entries, features 32.
    assert found[2, 8] <= 2 * 256 + 24 * 32
    assert found[8, 24] >= 8 * 256
    assert found[2, 24] <= max(2 * 256, 24 * 32)
    assert found[8, 24] == found[8, 8]


def test_dense_refuses_what_is_too_large() -> None:
    operator = bfk(mlp())
    with pytest.raises(ValueError, match=r"24 x 24 in float64 needs 4608 bytes, more than max_bytes=4607"):
        operator.dense(max_bytes=4607)
    assert operator.dense(max_bytes=4608).shape == (24, 24)


def test_batchnorm_in_training_couples_the_rows() -> None:
    """The statistics are part of the function, so the kernel differs from that with fixed statistics."""
    still, training = kernel(convolution()), bfk(convolution(training=True)).dense()
    assert not torch.allclose(still, training, rtol=1e-2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.tokens = nn.Identity()
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.tokens(torch.zeros(2, dtype=torch.int64))
        return self.head(self.inner(self.inner(self.frozen(x))))


def test_bad_arguments() -> None:
    case = mlp()
    batch = rows(2, 3, 1)
    twice = Twice()
    with pytest.raises(ValueError, match=r"unknown names \['blocks.9'\].*Candidates: blocks.0"):
        BFK(case.model, squared, case.batch, "blocks.9")
    with pytest.raises(TypeError, match="layer: expected the name of a module, got 3"):
        BFK(case.model, squared, case.batch, 3)
    with pytest.raises(ValueError, match="'inner': expected a layer that runs once, it runs 2 times"):
        BFK(twice, squared, batch, "inner")
    with pytest.raises(ValueError, match="'unused': expected a layer that runs once, it runs 0 times"):
        BFK(twice, squared, batch, "unused")
    with pytest.raises(ValueError, match="'frozen' depends on none of the parameters"):
        BFK(twice, squared, batch, "frozen")
    with pytest.raises(TypeError, match="expected a floating-point tensor in its output"):
        BFK(twice, squared, batch, "tokens")
    with pytest.raises(TypeError, match="expected a scalar tensor, got a tensor of shape"):
        BFK(case.model, lambda m, b: m(b[0]), case.batch, case.layer)
    with pytest.raises(ValueError, match="expected a finite loss, got nan"):
        BFK(case.model, squared, (case.batch[0] * float("nan"), case.batch[1]), case.layer)
    with pytest.raises(ValueError, match=r"\['typo'\]"):
        BFK(case.model, squared, case.batch, case.layer, lr={"blocks|head": 1.0, "typo": 1.0})
    with pytest.raises(ValueError, match="got -1"):
        BFK(case.model, squared, case.batch, case.layer, lr=-1.0)
    with pytest.raises(ValueError, match="parameters: 'typo' finds none"):
        BFK(case.model, squared, case.batch, case.layer, parameters="typo")
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="chunk: expected a number of vectors >= 1"):
            BFK(case.model, squared, case.batch, case.layer, chunk=chunk)


def test_bad_vectors() -> None:
    operator = bfk(mlp())
    good = torch.zeros(3, 8, dtype=torch.float64)
    for wrong in (good[:2], good.reshape(-1), good[None, None]):
        with pytest.raises(ValueError, match=r"expected the shape \(3, 8\) or \(n, 3, 8\), got"):
            operator.apply(wrong)
    with pytest.raises(TypeError, match=r"expected a tensor of torch.float64 on cpu, got torch.float32"):
        operator.apply(good.float())
    with pytest.raises(TypeError, match="got ndarray"):
        operator.apply(np.zeros((3, 8)))
    with pytest.raises(TypeError, match="expected real vectors, got complex128"):
        operator @ np.zeros(24, dtype=np.complex128)
    with pytest.raises(ValueError, match="dimension mismatch"):
        operator @ np.zeros(23)


def test_a_model_that_has_changed_is_refused() -> None:
    case = mlp()
    operator = BFK(case.model, case.loss_fn, case.batch, case.layer)
    with torch.no_grad():
        next(case.model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="parameters of the model have changed"):
        operator.apply(operator.features)


def test_checkpoints_are_refused_with_what_to_do() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    with pytest.raises(RuntimeError, match=r"activation checkpointing .* turn them off"):
        BFK(Checkpointed(), squared, rows(2, 3, 1), "block")


def test_compiled_models_and_autocast() -> None:
    case = mlp()
    compiled = Case(torch.compile(case.model, backend="eager"), case.loss_fn, case.batch, case.layer)
    assert_matrix(bfk(compiled).dense(), kernel(case), 1e-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_matrix(bfk(case).dense(), kernel(case), 1e-10)
        with pytest.raises(TypeError, match=r"got torch\.bfloat16"):
            BFK(case.model, case.loss_fn, case.batch, case.layer)
    with torch.no_grad():
        assert_matrix(bfk(case).dense(), kernel(case), 1e-10)


def test_kernels_of_several_layers_share_a_linearization() -> None:
    case = mlp()
    lin = Linearization(case.model, case.loss_fn, case.batch, dtype=torch.float64)
    for layer in lin.layers:
        operator = BFK.of(lin, layer.index, [1.0] * len(lin.names))
        alone = Case(case.model, case.loss_fn, case.batch, layer.name)
        assert_matrix(operator.dense(), kernel(alone), 1e-10)
        own = BFK.of(lin, layer.index, [1.0] * len(lin.names), among=lin.structure.own[layer.index].tolist())
        assert len(own.names) == 1


def test_without_scipy_the_error_says_what_to_install() -> None:
    code = """
        import sys
        sys.modules["scipy"] = None
        from fastfs import *
        assert "angles" in dir(spectrum) and not hasattr(spectrum, "nothing")
        try:
            spectrum.angles
        except ImportError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert 'fastfs.spectrum needs scipy: pip install "fastfs[spectrum]"' in result.stdout


def test_importing_fastfs_does_not_import_scipy() -> None:
    code = "import fastfs, sys; print('fastfs.spectrum' in sys.modules, 'scipy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
