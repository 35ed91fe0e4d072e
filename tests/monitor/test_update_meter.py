"""UpdateMeter against the real update, for every optimizer, its options and its implementations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from fastfs import ParameterStats
from fastfs._monitor.capture import fingerprints
from fastfs._monitor.measure import closed_forms, update_verification
from fastfs._monitor.measure.update_meter import OF_UPDATE, UpdateMeter
from tests.helpers.compare import assert_same, assert_step

FLOATS = (torch.float32, torch.float64)
LOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}

SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
]
ADAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True},
    {"eps": 0.0, "betas": (0.5, 0.8)},
]
CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    *((SGD, options | how) for options, how in itertools.product(SGD_OPTIONS, (LOOP, FOREACH, FUSED))),
    *((Adam, options | how) for options, how in itertools.product(ADAM_OPTIONS, (LOOP, FOREACH, FUSED))),
    *((AdamW, options | how) for options, how in itertools.product(ADAM_OPTIONS, (LOOP, FOREACH, FUSED))),
    (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (Adam, {"differentiable": True, "amsgrad": True}),
    (AdamW, {"differentiable": True}),
    *((Adamax, o | h) for o, h in itertools.product(({}, {"weight_decay": 0.1, "maximize": True}), (LOOP, FOREACH))),
    (Adamax, {"differentiable": True}),
    *(
        (RMSprop, options | how)
        for options, how in itertools.product(
            (
                {},
                {"maximize": True},
                {"centered": True},
                {"momentum": 0.9, "weight_decay": 0.1},
                {"momentum": 0.9, "centered": True},
            ),
            (LOOP, FOREACH),
        )
    ),
]


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "plain"
    return getattr(value, "__name__", str(value))


def make_parameters(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Of several layouts, one empty, the fourth never with a gradient."""
    shapes = [(7, 5), (33,), (2, 3, 4, 5), (8,), (), (0, 3), (40, 300)]
    parameters = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]
    parameters[2] = parameters[2].contiguous(memory_format=torch.channels_last)
    parameters[0] = parameters[0].t().contiguous().t()
    return parameters


def give_gradients(parameters: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Sets and returns the gradients, their zeros for parameters without."""
    for i, p in enumerate(parameters):
        p.grad = None if i == 3 else torch.randn_like(p).mul_(scale)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def truth(gradients: list[Tensor], before: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The sums of the real step, from copies, as in `ParameterStats.names`: (P, names)."""
    rows = []
    for g, old, new in zip(gradients, before, parameters, strict=True):
        g, old, new = (x.detach().double().flatten() for x in (g, old, new))
        vectors = {"gradient": g, "update": new - old, "parameter": new}
        products = [vectors[a] @ vectors[b] for a, b in ParameterStats.factors.values()]
        rows.append(torch.stack([*products, 0 * (g @ g), torch.tensor(float(g.numel()))]))
    return torch.stack(rows)


def check_step(meter: UpdateMeter, dtype: torch.dtype, what: str = "", scale: float = 1.0) -> ParameterStats:
    """One step, measured and compared."""
    parameters = meter.parameters
    gradients = give_gradients(parameters, scale)
    before = [p.detach().clone() for p in parameters]
    meter.before()
    meter.optimizer.step()
    after = [p.detach().clone() for p in parameters]
    stats = meter.after().stats
    assert isinstance(stats, ParameterStats)
    assert stats.shape == (len(parameters),)
    expected = truth(gradients, before, parameters)
    for i, p in enumerate(parameters):
        assert torch.equal(p, after[i]), "measuring changed a parameter"
        if p.grad is None:
            assert not stats.sums[i].any(), f"{what}: parameter {i} had no gradient"
        else:
            buffer = meter.optimizer.state[p].get("momentum_buffer")
            assert_step(stats.sums[i], expected[i], dtype, f"{what} parameter {i}", buffer)
    return stats


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=name_of)
def test_closed_forms(kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype) -> None:
    optimizer = kind(make_parameters(dtype), lr=0.01, **options)  # type: ignore[call-arg]
    meter = UpdateMeter(optimizer)
    assert meter.snapshot_bytes == 0
    # torch computes these bias corrections in the float32 of the step counter.
    compared = torch.float32 if options.get("differentiable") else dtype
    for step in range(4):
        check_step(meter, compared, f"step {step}")
        optimizer.param_groups[0]["lr"] *= 1.3
    assert meter.snapshot_bytes == 0
    assert meter.exact == f"7 parameters by the closed form of {kind.__name__}, up to {name_of_dtype(dtype)} rounding."


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Doubled(SGD):
    """A subclass, whose step may do anything."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        super().step()


OTHERS: list[tuple[Callable[[list[Tensor]], Optimizer], torch.dtype]] = [
    (lambda p: torch.optim.NAdam(p), torch.float32),
    (lambda p: torch.optim.RAdam(p), torch.float64),
    (lambda p: torch.optim.Adagrad(p), torch.float32),
    (lambda p: torch.optim.Rprop(p), torch.float32),
    (lambda p: torch.optim.Muon([x for x in p if x.dim() == 2 and x.numel()]), torch.float32),
    (lambda p: Doubled(p, lr=0.1, momentum=0.9), torch.float32),
    (lambda p: RMSprop(p, weight_decay=0.1), torch.float32),
    (lambda p: RMSprop(p, weight_decay=0.1, centered=True), torch.float64),
    (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), torch.bfloat16),
    (lambda p: AdamW(p, eps=1e-4), torch.float16),
]


@pytest.mark.parametrize(("make", "dtype"), OTHERS)
def test_snapshots(make: Callable[[list[Tensor]], Optimizer], dtype: torch.dtype) -> None:
    compared = torch.float64 if dtype == torch.float64 else torch.float32  # a copy is exact in 16 bits too
    meter = UpdateMeter(make(make_parameters(dtype)))
    needed = sum(p.numel() * p.element_size() for p in meter.parameters)
    for step in range(3):
        check_step(meter, compared, f"step {step}")
        assert meter.snapshot_bytes == needed
    assert meter.exact == f"{len(meter.parameters)} parameters from a copy made before the step, exactly."
    buffers = [b.data_ptr() for b in meter._buffers.values()]
    check_step(meter, compared)
    assert [b.data_ptr() for b in meter._buffers.values()] == buffers


@pytest.mark.parametrize("nesterov", [False, True])
def test_snapshot_of_everything(nesterov: bool) -> None:
    meter = UpdateMeter(
        SGD(make_parameters(torch.float32), lr=0.1, momentum=0.9, nesterov=nesterov, foreach=True), snapshot=True
    )
    with pytest.raises(RuntimeError, match=r"expected a call of before\(\) right before the last step"):
        _ = meter.previous
    for _ in range(3):
        old = [p.clone() for p in meter.parameters]
        check_step(meter, torch.float32)
        assert len(meter.previous) == len(old)
        for a, b in zip(meter.previous, old, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"expected UpdateMeter\(optimizer, snapshot=True\)"):
        _ = UpdateMeter(meter.optimizer).previous


def test_groups_of_all_kinds() -> None:
    """Options, dtypes and learning rates by group; frozen parameters; a group that is added later."""
    a, b, c = make_parameters(torch.float32), make_parameters(torch.float64), make_parameters(torch.float32)
    groups = [
        {"params": a, "momentum": 0.9, "nesterov": True, "foreach": True},
        {"params": b, "lr": 0.5, "weight_decay": 0.1},
        {"params": c, "momentum": 0.5, "maximize": True},
    ]
    meter = UpdateMeter(SGD(groups, lr=0.1))
    for _ in range(2):
        check_mixed(meter)
    meter.optimizer.add_param_group({"params": [torch.randn(5, 6, dtype=torch.bfloat16)], "lr": 0.3})
    for _ in range(2):
        stats = check_mixed(meter)
    assert stats.shape == (22,)
    assert meter.snapshot_bytes == 60
    assert meter.exact == (
        "14 parameters by the closed form of SGD, up to float32 rounding; 7 parameters by the closed form of SGD, "
        "up to float64 rounding; 1 parameter from a copy made before the step, exactly."
    )


def check_mixed(meter: UpdateMeter) -> ParameterStats:
    return check_step(meter, torch.float32)


def test_gradients_come_and_go() -> None:
    parameters = [torch.randn(n, dtype=torch.float64) for n in (3, 5, 7)]
    meter = UpdateMeter(AdamW(parameters, lr=0.1))
    for present in ((0, 1, 2), (1,), (), (0, 2), (2,)):
        before = [p.clone() for p in parameters]
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) if i in present else None
        meter.before()
        meter.optimizer.step()
        stats = meter.after().stats
        for i, p in enumerate(parameters):
            if i in present:
                expected = truth([p.grad], [before[i]], [p])[0]  # type: ignore[list-item]
                assert_step(stats.sums[i], expected, torch.float64, f"{present}")
            else:
                assert not stats.sums[i].any()


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adamax, RMSprop])
def test_hyper_parameters_as_tensors(kind: type[Optimizer]) -> None:
    lr = torch.tensor(0.01, dtype=torch.float64)
    meter = UpdateMeter(kind(make_parameters(torch.float64), lr=lr, foreach=False))  # type: ignore[call-arg]
    for _ in range(3):
        check_step(meter, torch.float64)
        lr.mul_(1.5)


def test_betas_as_tensors() -> None:
    betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
    meter = UpdateMeter(Adam(make_parameters(torch.float64), lr=torch.tensor(0.01), betas=betas, foreach=False))
    for _ in range(3):
        check_step(meter, torch.float32)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_are_made_dense(kind: type[Optimizer]) -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    meter = UpdateMeter(kind(embedding.parameters(), lr=0.1))  # type: ignore[call-arg]
    for _ in range(2):
        meter.optimizer.zero_grad()
        before = embedding.weight.detach().clone()
        embedding(torch.tensor([1, 3, 3])).square().sum().backward()
        meter.before()
        meter.optimizer.step()
        gradient = embedding.weight.grad
        assert gradient is not None
        expected = truth([gradient.to_dense()], [before], [embedding.weight])
        assert_step(meter.after().stats.sums[0], expected[0], torch.float32)
    assert meter.snapshot_bytes == 160


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_steps_that_a_scaler_skips(kind: type[Optimizer]) -> None:
    """GradScaler leaves it to a fused optimizer to skip a step, on the device."""
    parameters = [torch.nn.Parameter(torch.randn(20)), torch.nn.Parameter(torch.randn(4, 5))]
    optimizer = kind(parameters, lr=0.1, fused=True)  # type: ignore[call-arg]
    meter = UpdateMeter(optimizer)
    found: list[ParameterStats] = []
    optimizer.register_step_pre_hook(lambda *_: meter.before())
    optimizer.register_step_post_hook(lambda *_: found.append(meter.after().stats))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in parameters]
        x = torch.randn(20)
        scaler.scale((parameters[0] * x).sum() + (parameters[1] * x.view(4, 5)).sum()).backward()
        if step in (0, 2):
            parameters[1].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        stats = found[-1]
        assert len(found) == step + 1
        if step in (0, 2):
            assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
            assert not stats.sums[:, OF_UPDATE].any()
            assert stats.nonfinite.tolist() == [0, 1]
        else:
            expected = truth([x, x.view(4, 5)], before, parameters)
            for i in range(2):
                assert_step(stats.sums[i], expected[i], torch.float32, f"step {step} parameter {i}")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are treated like those on a device, of which nothing can be known without waiting."""
    for module in (closed_forms, fingerprints):
        monkeypatch.setattr(module, "known_equal", lambda a, b: False)
    for module in (fingerprints, update_verification):
        monkeypatch.setattr(module, "on_host", lambda tensor: tensor)


class NoItems(TorchDispatchMode):
    """Refuses whatever waits for a value."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"nesterov": True, "momentum": 0.9, "foreach": True}),
        (Adam, {"amsgrad": True}),
        (AdamW, {"differentiable": True}),
        (AdamW, {"lr": torch.tensor(0.1)}),
        (Adamax, {}),
        (RMSprop, {"centered": True}),
        (torch.optim.NAdam, {}),
    ],
    ids=name_of,
)
def test_nothing_is_read_on_the_host(
    kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, elsewhere: None
) -> None:
    meter = UpdateMeter(kind(make_parameters(dtype), **options))
    for _ in range(2):
        give_gradients(meter.parameters)
        with NoItems():
            meter.before()
        meter.optimizer.step()
        with NoItems():
            meter.after()


def test_extreme_gradients() -> None:
    """A second moment that overflows: the update is zero, and is said to be."""
    p = torch.randn(10)
    meter = UpdateMeter(Adam([p], lr=0.1))
    p.grad = torch.full_like(p, 1e25)
    meter.before()
    meter.optimizer.step()
    assert not meter.after().stats.sums[0, OF_UPDATE].any()
    for scale in (1e-15, 1e15):
        for kind in (SGD, Adam, Adamax, RMSprop):
            meter = UpdateMeter(kind(make_parameters(torch.float32), lr=0.01))
            for _ in range(2):
                check_step(meter, torch.float32, f"{kind} {scale}", scale)


def test_same_sums_as_a_snapshot_of_linear_16_bit() -> None:
    parameters = make_parameters(torch.bfloat16)
    twins = [p.clone() for p in parameters]
    meters = UpdateMeter(SGD(parameters, lr=0.1)), UpdateMeter(SGD(twins, lr=0.1), snapshot=True)
    give_gradients(parameters)
    for p, q in zip(parameters, twins, strict=True):
        q.grad = p.grad
    results = []
    for meter in meters:
        meter.before()
        meter.optimizer.step()
        results.append(meter.after().stats.sums)
    assert_same(*results)


def test_wrong_use() -> None:
    p = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"^UpdateMeter: expected an optimizer with one update per step, got LBFGS$"):
        UpdateMeter(torch.optim.LBFGS([p]))
    meter = UpdateMeter(Adam([p]))
    with pytest.raises(RuntimeError, match=r"expected a call of before\(\) right before this step"):
        meter.after()
    p.grad = torch.ones(3)
    meter.before()
    with pytest.raises(RuntimeError, match="the optimizer's state has no 'step'; call it right after step"):
        meter.after()
    with pytest.raises(RuntimeError, match=r"expected a call of before\(\) right before this step"):
        meter.after()
    eighth = torch.randn(3).to(torch.float8_e4m3fn)
    eighth.grad = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^parameter 1 has dtype torch.float8_e4m3fn, expected one of torch.float16"):
        UpdateMeter(SGD([p, eighth], lr=0.1)).before()


def test_no_parameters_with_gradients() -> None:
    meter = UpdateMeter(SGD([torch.randn(3), torch.randn(2)], lr=0.1))
    meter.before()
    stats = meter.after().stats
    assert stats.shape == (2,)
    assert not stats.sums.any()


def test_derived_quantities() -> None:
    p = torch.tensor([3.0, 4.0], dtype=torch.float64)
    p.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    meter = UpdateMeter(SGD([p], lr=0.5))
    meter.before()
    meter.optimizer.step()
    stats = meter.after().stats
    assert stats.to_dict()["parameter_norm"] == pytest.approx([(2.5**2 + 16) ** 0.5])
    assert stats.relative_update.item() == pytest.approx(0.5 / (2.5**2 + 16) ** 0.5)
    assert stats.aligned_decrease.tolist() == [0.5]
    assert stats.cos_angle.tolist() == [1.0]
    assert (stats.update_norm.item(), stats.gradient_norm.item(), stats.count.item()) == (0.5, 1.0, 2)
    assert "relative_update" in repr(stats)
    assert (stats + stats).parameter_sq.item() == pytest.approx(2 * (2.5**2 + 16))
