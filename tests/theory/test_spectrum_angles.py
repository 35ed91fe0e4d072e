"""Predicted, exact and measured angles; Jacobians between layers; the bound from their conditioning."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from fastfs._network.linearization import Linearization
from fastfs.models import MLP, ResNet
from fastfs.spectrum import BFK, LayerJacobian, angles, conditioning, kantorovich, singular_values
from tests.helpers.compare import assert_estimate, assert_matrix
from tests.helpers.spectrum_cases import (
    CASES,
    Case,
    convolution,
    jacobians,
    mlp,
    resnet,
    rows,
    spectrum_of,
    squared,
    transformer,
)

PAIRS = {
    "mlp": (mlp, "blocks.0", "blocks.2"),
    "resnet": (resnet, "stem", "blocks.2"),
    "convolution": (convolution, "stem", "blocks.1"),
    "convolution in training": (lambda: convolution(training=True, dropout=0.3), "blocks.0", "blocks.1"),
    "transformer": (lambda: transformer(dropout=0.2), "blocks.0", "blocks.1"),
    "to the head": (mlp, "blocks.1", "head"),
}


def cosine(change: Tensor, backward: Tensor) -> Tensor:
    return -(change * backward).sum() / (change.norm() * backward.norm())


# Angles


@pytest.mark.parametrize("name", list(CASES))
def test_gradient_descent_side_by_side(name: str) -> None:
    case = CASES[name]()
    step = 1e-6
    found = angles(case.model, case.loss_fn, case.batch, lr=step, dtype=torch.float64, rtol=0.0, max_probes=64)
    lin = Linearization(case.model, case.loss_fn, case.batch, dtype=torch.float64)
    assert found.layers == [layer.name for layer in lin.layers]
    assert found.cut == [True] * len(found.layers)
    for layer in lin.layers:
        k = BFK.of(lin, layer.index, [step] * len(lin.names)).dense()
        b = lin.backward[layer.index][0].flatten()
        exact = (b @ k @ b) / (b.norm() * (k @ b).norm())
        assert_matrix(found.exact[layer.index][None], exact[None], 1e-10)
        truth = (k.trace() / len(b)) / (k.square().sum() / len(b)).sqrt()
        at = found.predicted[layer.index], found.predicted_error[layer.index]
        if at[1] > 1e-12:
            assert_estimate(at[0][None], at[1][None], truth[None], sigmas=4.0)
        else:
            assert_matrix(at[0][None], truth[None], 1e-10)
    assert_matrix(found.descent, found.exact, 1e-10, "cuts")
    assert_matrix(found.first_order, found.descent, 1e-15)
    assert_matrix(found.measured, found.exact, 1e-4, "the finite step")
    assert found.preconditioned is None
    assert not found.misalignment.any()


@pytest.mark.parametrize("kind", ["adam", "momentum", "sgd", "decay"])
def test_optimizers_add_a_misalignment(kind: str) -> None:
    case = resnet()
    model = case.model.double()
    batch = tuple(x.double() for x in case.batch)
    make = {
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=1e-6),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-6),
        "decay": lambda: torch.optim.SGD(model.parameters(), lr=1e-6, weight_decay=0.1),
    }
    optimizer = make[kind]()
    if kind == "momentum":  # creates momentum in another direction
        squared(model, (batch[0].flip(0) + 1, batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    state = str(optimizer.state_dict())
    found = angles(model, squared, batch, optimizer=optimizer, rtol=0.0, max_probes=64)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert str(optimizer.state_dict()) == state
    # Reference computation of the step.
    lin = Linearization(model, squared, batch)
    squared(model, batch).backward()
    optimizer.step()
    updates = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    with torch.no_grad():
        for p, q in zip(model.parameters(), before, strict=True):
            p.copy_(q)
    lin = Linearization(model, squared, batch)
    moved = lin.forward([p + dw for p, dw in zip(lin.parameters, updates, strict=True)]).features
    pushed = lin.jvp(updates).features
    plain = lin.jvp([-g for g in lin.gradients]).features
    for i in range(len(found.layers)):
        (b,), (f,) = lin.backward[i], lin.features[i]
        assert_matrix(found.measured[i][None], cosine(moved[i][0] - f, b)[None], 1e-6)
        assert_matrix(found.first_order[i][None], cosine(pushed[i][0], b)[None], 1e-6)
        assert_matrix(found.descent[i][None], cosine(plain[i][0], b)[None], 1e-10)
    expected = found.first_order.acos() - found.descent.acos()
    assert torch.equal(found.misalignment, expected)
    assert found.excluded is not None
    assert found.undetermined is not None
    if kind == "sgd":
        assert bool((found.misalignment.abs() < 1e-6).all())
        assert bool((found.excluded < 1e-6).all())
    else:
        assert float(found.misalignment.abs().max()) > 0.02
        assert bool((found.excluded > 0.01).any()) == (kind in ("momentum", "decay"))


def test_the_preconditioned_kernel_is_that_of_the_update() -> None:
    """If -dw/g is a rate everywhere, its kernel times b is minus the update; its moments are reported."""
    case = mlp()
    model, batch = case.model.double(), tuple(x.double() for x in case.batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = angles(model, squared, batch, optimizer=optimizer, layers=[case.layer], rtol=0.0, max_probes=200)
    assert found.preconditioned is not None
    assert found.preconditioned_error is not None
    lin = Linearization(model, squared, batch, layers=[case.layer])
    # Adam's first step is -lr g/(|g| + eps).
    rates = [torch.where(g != 0, 1e-3 / (g.abs() + 1e-8), 0.0) for g in lin.gradients]
    k = BFK.of(lin, 0, rates).dense()
    truth = k.trace() / len(k) / (k.square().sum() / len(k)).sqrt()
    assert_estimate(found.preconditioned, found.preconditioned_error, truth[None], sigmas=4.0)
    b = lin.backward[0][0].flatten()
    exact = (b @ k @ b) / (b.norm() * (k @ b).norm())
    assert_matrix(found.first_order, exact[None], 1e-9)
    upstream = [g for g, below in zip(lin.gradients, lin.structure.upstream[0], strict=True) if below]
    zero = sum(int((g == 0).sum()) for g in upstream) / sum(g.numel() for g in upstream)
    assert found.undetermined is not None
    assert float(found.undetermined[0]) == pytest.approx(zero)
    assert bool((found.excluded == 0).all())


def test_prediction_follows_the_angle_of_random_deep_mlps() -> None:
    """Mean over twelve networks of width 64: predicted and exact cosine within 0.06, both fall like 1/sqrt(l)."""
    predicted, exact = [], []
    layers = ["blocks.2", "blocks.6", "blocks.14"]
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        model = MLP(10, 64, 17, generator=generator).double()
        batch = (torch.randn(1, 10, generator=generator).double(), torch.zeros(1, 1).double())
        found = angles(model, squared, batch, layers=layers, lr=1e-9, rtol=0.0, max_probes=32, chunk=32)
        predicted.append(found.predicted)
        exact.append(found.exact)
    by_spectrum, by_kernel = torch.stack(predicted).mean(dim=0), torch.stack(exact).mean(dim=0)
    assert bool(((by_spectrum - by_kernel).abs() < 0.06).all()), (by_spectrum, by_kernel)
    for cos in (by_spectrum, by_kernel):
        assert bool((cos.diff() < -0.1).all()), cos
        # From layer 7 to layer 15: sqrt(7/15) = 0.68.
        assert 0.55 < float(cos[2] / cos[1]) < 0.8, cos


def test_layers_that_are_no_cuts_are_told_apart() -> None:
    case = transformer()
    layers = ["blocks.0.attention", "blocks.0"]
    found = angles(case.model, case.loss_fn, case.batch, layers=layers, lr=1e-6, dtype=torch.float64, max_probes=16)
    inside = found.layers.index("blocks.0.attention")
    assert found.cut[inside] is False
    assert "residual branch" in str(found.reason[inside])
    assert abs(float(found.exact[inside] - found.descent[inside])) > 1e-3
    assert_matrix(found.exact[1 - inside][None], found.descent[1 - inside][None], 1e-10)


def test_measured_angles_that_are_rounding_are_marked() -> None:
    """A step too small for float32 gives noise; flag and floor are those of the two forwards."""
    generator = torch.Generator().manual_seed(0)
    model = MLP(16, 64, 4, 2, generator=generator)
    batch = rows(32, 16, 2)
    far, lost = (angles(model, squared, batch, lr=lr, max_probes=2, rtol=0.0) for lr in (1e-2, 3e-7))
    assert far.valid.all()
    assert far.valid.dtype == torch.bool
    assert_matrix(far.measured, far.exact, 0.05, "above the noise")
    assert not lost.valid.any()
    assert float((lost.measured - lost.exact).abs().max()) > 0.1
    # Reference: the outputs of the layers before and after the step, and their spacing.
    lin = Linearization(model, squared, batch)
    moved = lin.forward([p - 3e-7 * g for p, g in zip(lin.parameters, lin.gradients, strict=True)]).features
    for i, ((before,), (after,)) in enumerate(zip(lin.features, moved, strict=True)):
        spacing = [
            torch.nextafter(x.abs(), x.new_tensor(torch.inf)).double() - x.abs().double() for x in (before, after)
        ]
        floor = (sum(s.square().sum() for s in spacing) / 12).sqrt() / before.double().norm()
        assert_matrix(lost.noise_floor[i][None], floor[None], 0.01, "floor")
    frame = lost.to_frame()
    assert frame["valid"].tolist() == [False] * len(lost.layers)
    assert frame["noise_floor"].tolist() == lost.noise_floor.tolist()
    assert "noise_floor" in str(lost)
    double = angles(model, squared, batch, lr=3e-7, max_probes=2, rtol=0.0, dtype=torch.float64)
    assert double.valid.all()
    assert_matrix(double.measured, double.exact, 1e-3, "in double precision")


def test_table_and_bad_arguments() -> None:
    case = mlp()
    optimizer = torch.optim.Adam(case.model.parameters())
    found = angles(case.model, squared, case.batch, optimizer=optimizer, lr={"blocks": 1.0, "head": 0.1}, max_probes=16)
    frame = found.to_frame()
    assert frame["layer"].tolist() == found.layers
    assert {"predicted", "exact", "measured", "misalignment", "preconditioned", "excluded"} <= set(frame.columns)
    assert np.allclose(np.cos(frame["angle"]), found.measured)
    assert "blocks.2" in str(found)
    assert "misalignment" not in angles(case.model, squared, case.batch, lr=1e-3, max_probes=16).to_frame().columns
    with pytest.raises(TypeError, match="expected lr, optimizer or both"):
        angles(case.model, squared, case.batch)
    with pytest.raises(ValueError, match="matches no module"):
        angles(case.model, squared, case.batch, layers="typo", lr=1.0)
    with pytest.raises(ValueError, match="max_probes"):
        angles(case.model, squared, case.batch, lr=1.0, max_probes=0)


# Jacobians


def explicit_jacobian(case: Case, start: str, end: str) -> Tensor:
    lin = Linearization(case.model, case.loss_fn, case.batch, layers=[start, end], dtype=torch.float64)
    places = {layer.name: layer.index for layer in lin.layers}
    zero = torch.zeros_like(lin.features[places[start]][0])
    full = torch.func.jacrev(lin.from_layer(places[start], places[end]))(zero)
    return full.reshape(lin.features[places[end]][0].numel(), zero.numel())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PAIRS))
def test_jacobian_against_the_explicit_one(name: str) -> None:
    make, start, end = PAIRS[name]
    case = make()
    exact = explicit_jacobian(case, start, end)
    operator = LayerJacobian(case.model, case.loss_fn, case.batch, start, end, dtype=torch.float64, chunk=5)
    assert operator.shape == tuple(exact.shape)
    assert_matrix(operator.dense(), exact, 1e-10)
    random = torch.randn(exact.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_matrix(torch.from_numpy(operator.H @ random.numpy()), exact.T @ random, 1e-10)
    assert_matrix(torch.from_numpy(operator.rmatvec(random[:, 0].numpy())), exact.T @ random[:, 0], 1e-10)
    u = random[:, 0].reshape(operator.row_shape)
    assert_matrix(operator.apply_transpose(u).flatten(), exact.T @ random[:, 0], 1e-10)
    values = torch.linalg.svdvals(exact)
    start_vector = np.random.default_rng(0).standard_normal(min(exact.shape))
    largest = svds(operator, k=1, v0=start_vector, return_singular_vectors=False)
    assert_matrix(torch.from_numpy(largest.copy()), values[:1], 1e-9)
    for dense_below in (0, 1024):
        found = singular_values(operator, dense_below=dense_below)
        assert found.method == ("dense" if dense_below else "lanczos")
        assert found.largest == pytest.approx(float(values[0]), rel=1e-9)
        if values[-1] > 1e-6 * values[0]:
            assert found.smallest == pytest.approx(float(values[-1]), rel=1e-4)
            assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-4)
        else:
            assert (found.smallest, found.condition) == (0.0, math.inf)
            assert found.reason is not None
        assert (found.values is None) == (dense_below == 0)


def test_jacobian_by_finite_differences() -> None:
    """Compare with a change of a linear stem, which moves its features in a known direction."""
    case = resnet()
    operator = LayerJacobian(case.model, case.loss_fn, case.batch, "stem", "blocks.2", dtype=torch.float64)
    lin = Linearization(case.model, case.loss_fn, case.batch, layers=["stem", "blocks.2"], dtype=torch.float64)
    places = {layer.name: layer.index for layer in lin.layers}
    direction = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step, i = 1e-6, lin.names.index("stem.weight")
    moved = []
    for sign in (1, -1):
        values = list(lin.parameters)
        values[i] = values[i] + sign * step * direction
        moved.append(lin.forward(values).features[places["blocks.2"]][0])
    change = case.batch[0].double() @ direction.T
    assert_matrix(operator.apply(change), (moved[0] - moved[1]) / (2 * step), 1e-7)


def test_bad_jacobians() -> None:
    case = mlp()
    subset = Linearization(case.model, squared, case.batch, parameters="head")
    with pytest.raises(ValueError, match=r"'blocks\.0' does not depend on layer 'blocks\.2'"):
        LayerJacobian.of(subset, 2, 0)
    with pytest.raises(ValueError, match=r"'blocks\.0' does not depend on layer 'blocks\.2'"):
        LayerJacobian(case.model, squared, case.batch, "blocks.2", "blocks.0")
    with pytest.raises(ValueError, match="unknown names"):
        LayerJacobian(case.model, squared, case.batch, "blocks.0", "typo")
    with pytest.raises(TypeError, match="start: expected the name of a module"):
        LayerJacobian(case.model, squared, case.batch, 0, "blocks.1")
    with pytest.raises(TypeError, match="expected a LayerJacobian, got ndarray"):
        singular_values(np.eye(3))
    same = LayerJacobian(case.model, squared, case.batch, "blocks.1", "blocks.1", dtype=torch.float64)
    assert torch.equal(same.dense(), torch.eye(24, dtype=torch.float64))


# The bound


@pytest.mark.parametrize("condition", [1.0, 1.5, 10.0, 1e4])
def test_kantorovich_holds_and_is_reached(condition: float) -> None:
    values = torch.tensor([1.0, condition, (1 + condition) / 2], dtype=torch.float64)
    matrix = spectrum_of(values, seed=1)
    bound = kantorovich(condition)
    b = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos = ((b @ matrix) * b).sum(dim=1) / (b.norm(dim=1) * (b @ matrix).norm(dim=1))
    assert float(cos.min()) >= bound - 1e-12
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    worst = eigenvalues[-1].sqrt() * vectors[:, 0] + eigenvalues[0].sqrt() * vectors[:, -1]
    reached = (worst @ matrix @ worst) / (worst.norm() * (matrix @ worst).norm())
    assert float(reached) == pytest.approx(bound, rel=1e-10)
    assert kantorovich(math.inf) == 0.0
    with pytest.raises(ValueError, match="expected a condition number >= 1"):
        kantorovich(0.5)


@pytest.mark.parametrize("branch_scale", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("count", [1, 3])
def test_the_bound_holds_in_resnets_and_says_something(branch_scale: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = ResNet(24, 12, 5, branch_scale=branch_scale, generator=generator).double()
    batch = tuple(x.double() for x in rows(count, 24, 1))
    lr = {"stem": 0.5, "blocks": 2.0, "head": 1.0}
    found = conditioning(model, squared, batch, layers=r"stem|blocks\.\d$", lr=lr)
    assert found.layers == ["stem", *(f"blocks.{i}" for i in range(5))]
    slack = 1 + 1e-9
    assert bool((found.largest <= slack * found.largest_bound).all())
    assert bool((slack * found.smallest >= found.smallest_bound).all())
    assert bool((found.condition <= slack * found.condition_bound).all())
    assert bool((found.cos_bound <= slack * found.cos_kernel_bound).all())
    assert bool((found.cos_kernel_bound <= slack * found.cos_exact).all())
    assert bool((found.cos_bound > 0.09).all())
    if branch_scale == 0.02:
        assert bool((found.cos_bound > 0.7).all())
    # Bounds for any b, not only for the one of this loss.
    lin = Linearization(model, squared, batch, layers=r"stem|blocks\.\d$")
    rates = [0.5 if "stem" in n else 2.0 if "blocks" in n else 1.0 for n in lin.names]
    k = BFK.of(lin, 5, rates).dense()
    b = torch.randn(500, len(k), dtype=torch.float64, generator=generator)
    cos = ((b @ k) * b).sum(dim=1) / (b.norm(dim=1) * (b @ k).norm(dim=1))
    assert float(cos.min()) >= float(found.cos_kernel_bound[5]) - 1e-9
    assert "condition_bound" in found.to_frame().columns
    assert "stem" in str(found)


def test_the_kernel_is_the_sum_over_the_chain() -> None:
    """Check the basis of the bound: K_l = sum of J_kl O_k J_kl^T."""
    case = resnet()
    lin = Linearization(case.model, case.loss_fn, case.batch, layers=r"stem|blocks\.\d$", dtype=torch.float64)
    total: Tensor | float = 0.0
    last = len(lin.layers) - 1
    for k in range(last + 1):
        own = BFK.of(lin, k, [1.0] * len(lin.names), among=lin.structure.own[k].tolist()).dense()
        j = LayerJacobian.of(lin, k, last).dense()
        total = total + j @ own @ j.T
    assert isinstance(total, Tensor)
    whole = Case(case.model, case.loss_fn, case.batch, lin.layers[last].name)
    explicit = sum((j @ j.T for j in jacobians(whole).values()), torch.zeros(()))
    assert_matrix(total, explicit, 1e-10)


def test_where_the_bound_says_nothing_it_is_zero() -> None:
    case = mlp()
    found = conditioning(case.model, case.loss_fn, case.batch, dtype=torch.float64)
    assert bool((found.cos_bound <= found.cos_kernel_bound + 1e-12).all())
    assert bool((found.cos_kernel_bound <= found.cos_exact + 1e-12).all())
    narrow = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 8), nn.Linear(8, 1))
    found = conditioning(narrow, squared, rows(9, 5, 1), layers=["0", "1"], dtype=torch.float64)
    assert float(found.jacobian_smallest[1, 0]) == 0.0  # rank three in eight dimensions
    assert float(found.cos_bound[1]) == 0.0
    assert float(found.cos_exact[1]) > 0.0
    assert found.reason[1] is not None


def test_the_layers_have_to_be_a_chain_of_cuts() -> None:
    case = transformer()
    expected = r"chain of cuts, but layer 'blocks\.0\.attention' is not a cut: inside a residual"
    with pytest.raises(ValueError, match=expected):
        conditioning(case.model, case.loss_fn, case.batch, layers=["blocks.0.attention", "blocks.0"])
