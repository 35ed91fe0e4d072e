"""Training is bitwise the same with a monitor, and the numbers are those computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfs
from fastfs._monitor.measure import full_checks
from fastfs.models import ResNet
from tests.helpers.monitor_cases import (
    CASES,
    BatchNormNet,
    assert_same,
    measured_into,
    rows,
    sgd,
    small_transformer,
    tokens,
    train,
)
from tests.helpers.optimizer_cases import as_on_a_device

# Not perturbing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_bitwise_the_same(case: Any) -> None:
    seen: list[Any] = []

    def attach(model: Any, optimizer: torch.optim.Optimizer) -> Any:
        return fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=2, sinks=[measured_into(seen)])

    assert_same(case.run(6, None), case.run(6, attach))
    assert {row["step"] for row in seen} == {0, 2, 4}
    assert {row["micro_batches"] for row in seen} == {case.micro_batches}
    assert any(row["update_rms"] > 0 for row in seen)


def test_training_is_bitwise_the_same_with_two_monitors_and_both_see_it() -> None:
    case = CASES[0]
    first: list[Any] = []
    second: list[Any] = []
    monitors: list[Any] = []

    def attach(model: Any, optimizer: torch.optim.Optimizer) -> Any:
        monitors.append(fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[measured_into(first)]))
        return fastfs.Monitor(model, optimizer, layers=["blocks.1"], every=2, sinks=[measured_into(second)])

    assert_same(case.run(4, None), case.run(4, attach))
    monitors[0].close()
    assert len(first) == 4 * 3
    assert len(second) == 2
    for row in second:
        twin = next(r for r in first if r["step"] == row["step"] and r["name"] == "blocks.1")
        assert all(row[key] == twin[key] for key in ("angle", "update_rms", "backward_rms", "feature_rms"))


def test_no_trace_is_left_after_close() -> None:
    model = small_transformer()
    optimizer = sgd(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with fastfs.Monitor(model, optimizer, layers="blocks", every=1, sinks=[lambda rows: None]) as monitor:
        train(model, optimizer, 2, tokens)
    monitor.close()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 1, tokens)
    assert monitor.step == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": 4, "quantiles": (0.5,)},
        {"amplify": True},
        {"mode": "jvp"},
        {"mode": "probe", "probe": (rows(9)[0], lambda out: out.square().mean())},
        {"samples": 4, "rows": 6},
        {"samples": 4, "amplify": True, "quantiles": (0.5,)},
        {"samples": 4, "mode": "jvp"},
    ],
)
def test_no_item_in_the_step_path(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    seen: list[Any] = []
    monitor = fastfs.Monitor(
        model, optimizer, layers=r"blocks\.\d+$", every=2, aligned_every=1, sinks=[seen.extend], **options
    )

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("waits for the device")

    assign = torch.Tensor.__setitem__

    def assign_tensors(tensor: Any, index: Any, value: Any) -> None:
        if not isinstance(value, torch.Tensor):  # a number is copied from the host, which waits for the device
            refuse()
        assign(tensor, index, value)

    x, y = rows(0)
    train(model, optimizer, 2)  # what is learned once, on the host
    assert monitor.flush()
    seen.clear()
    loss = F.cross_entropy(model(x), y)
    as_on_a_device(monkeypatch)  # what the host may read at once is not read
    monkeypatch.setattr(full_checks.DeviceFlag, "known", lambda _: None)
    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    monkeypatch.setattr(torch.Tensor, "__setitem__", assign_tensors)
    monitor.log(loss=loss)
    loss.backward()
    optimizer.step()
    model(x).sum().backward()
    optimizer.step()
    monkeypatch.undo()
    monitor.close()
    assert [row["kind"] for row in seen if row.get("name") == "blocks.2"] == ["measured", "predicted"]


# The numbers


def by_hand(model: Any, optimizer: torch.optim.Optimizer, x: Any, y: Any, layers: Any) -> Any:
    """One training step with explicit autograd: features before, backward vectors, features after."""
    kept = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: kept.append(out)) for layer in layers]
    loss = F.cross_entropy(model(x), y)
    before = list(kept)
    backward = torch.autograd.grad(loss, before, retain_graph=True)
    before = [f.detach().clone() for f in before]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    kept.clear()
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return fastfs.reference.feature_stats(before, kept, list(backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_the_statistics_computed_by_hand(dtype: torch.dtype) -> None:
    seen: list[Any] = []
    torch.manual_seed(0)
    model = ResNet(8, 16, 4, 3).to(dtype)
    twin = ResNet(8, 16, 4, 3).to(dtype)
    twin.load_state_dict(model.state_dict())
    optimizer, other = sgd(model), sgd(twin)
    x, y = rows(0)
    expected = by_hand(twin, other, x.to(dtype), y, list(twin.blocks))
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(seen)]) as monitor:
        loss = F.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        monitor.log(loss=loss)
        optimizer.step()
    assert [row["name"] for row in seen] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert [row["layer"] for row in seen] == [0, 1, 2, 3]
    for key in ("angle", "cos_angle", "update_rms", "relative_update", "feature_rms", "backward_rms"):
        assert [row[key] for row in seen] == pytest.approx(getattr(expected, key).tolist(), rel=1e-5), key
    assert [row["count"] for row in seen] == [16 * 16] * 4
    assert all(row["valid"] and row["nonfinite"] == 0 for row in seen)
    assert {row["loss"] for row in seen} == {loss.item()}
    assert all(row["overhead_seconds"] > 0 for row in seen)


def test_the_identity_of_the_feature_speed_formula_holds() -> None:
    """<b, df> of a layer is the sum of <g, dw> over the parameters up to it, for a small step."""
    seen: list[Any] = []
    torch.manual_seed(0)
    model = ResNet(8, 32, 6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", sinks=[measured_into(seen)]):
        x, y = rows(0)
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    decrease = 1e-4 * model.stem.weight.grad.square().sum().item()
    for row, block in zip(seen, model.blocks, strict=True):
        decrease += 1e-4 * block.linear.weight.grad.square().sum().item()
        aligned = row["cos_angle"] * row["update_rms"] * row["backward_rms"] * row["count"]
        assert aligned == pytest.approx(decrease, rel=1e-3)


@pytest.mark.parametrize("make", [small_transformer, BatchNormNet])
def test_a_step_that_changes_nothing_moves_no_feature(make: Any) -> None:
    """The second forward is the first one again: same dropout masks, same batch statistics."""
    seen: list[Any] = []
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[measured_into(seen)]):
        train(model, optimizer, 2, tokens if make is small_transformer else rows)
    assert [row["update_rms"] for row in seen] == [0.0] * 6
    assert all(math.isnan(row["angle"]) and not row["valid"] and row["backward_rms"] > 0 for row in seen)


def test_inplace_relu_after_the_layer_does_not_change_what_is_seen() -> None:
    seen: dict[Any, Any] = {}
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 3))
        optimizer = sgd(model)
        seen[inplace] = []
        with fastfs.Monitor(model, optimizer, layers=["0", "2"], every=1, sinks=[measured_into(seen[inplace])]):
            train(model, optimizer, 2)
    for plain, changed in zip(seen[False], seen[True], strict=True):
        for key in ("angle", "update_rms", "feature_rms", "backward_rms"):
            assert plain[key] == changed[key]


@pytest.mark.parametrize("inplace", [False, True])
def test_an_inplace_relu_can_be_watched_itself(inplace: bool) -> None:
    seen: list[Any] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 3))
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, layers=["1"], sinks=[measured_into(seen)]):
        train(model, optimizer, 1)
    assert seen[0]["valid"]
    assert 0.1 < seen[0]["feature_rms"] < 1


def test_inputs_changed_after_the_forward_do_not_matter() -> None:
    """By the model itself, or by a loop that reuses one buffer."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 3)])

        def forward(self, batch: Any) -> Tensor:
            return self.blocks[0](batch["x"].mul_(2))

    seen: list[Any] = []
    model = Doubling()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with fastfs.Monitor(model, optimizer, layers="blocks.0", sinks=[measured_into(seen)]):
        x, y = rows(0)
        F.cross_entropy(model({"x": x}), y).backward()
        x.fill_(7.0)
        optimizer.step()
    assert seen[0]["update_rms"] == 0
    assert seen[0]["backward_rms"] > 0


def test_the_second_forward_has_the_autocast_of_the_first() -> None:
    seen: list[Any] = []
    model = small_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with fastfs.Monitor(model, optimizer, layers="blocks", every=1, sinks=[measured_into(seen)]):
        for step in range(2):
            x, y = tokens(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=step == 0):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=step == 1):
                optimizer.step()
    assert {row["update_rms"] for row in seen if row["count"]} == {0.0}


def test_a_parameter_given_as_an_input_is_seen_as_it_is_after_the_step() -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])
            self.prompt = nn.Parameter(torch.ones(8))

        def forward(self, prompt: Any, x: Tensor) -> Any:
            return self.blocks[0](x * prompt)

    seen: list[Any] = []
    model = Prompted()
    optimizer = torch.optim.SGD([model.prompt], lr=0.1)
    with fastfs.Monitor(model, optimizer, layers="blocks.0", sinks=[measured_into(seen)]):
        x, y = rows(0)
        F.cross_entropy(model(model.prompt, x), y).backward()
        optimizer.step()
    assert seen[0]["update_rms"] > 0
    assert seen[0]["valid"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """The recomputation in the backward is no forward; a reentrant one brings the backward vectors."""

    class Checkpointed(nn.Module):
        def __init__(self, active: Any) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(3))
            self.active = active

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = checkpoint(block, x, use_reentrant=reentrant) if self.active and i < 2 else block(x)
            return x[:, :3]

    seen: dict[Any, Any] = {}
    for active in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(active)
        optimizer = sgd(model)
        seen[active] = []
        with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=1, sinks=[measured_into(seen[active])]):
            train(model, optimizer, 2)
    for plain, saved in zip(seen[False], seen[True], strict=True):
        assert saved["valid"]
        assert saved["count"] == 16 * 8
        assert all(saved[key] == plain[key] for key in ("angle", "update_rms", "backward_rms", "feature_rms"))
