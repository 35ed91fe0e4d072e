"""samples=: what is refused, with which reason, and the arguments of model and monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_cases import measured_into
from tests.helpers.sample_cases import (
    BATCH,
    TOKENS,
    WIDTH,
    Mixer,
    advance,
    setting,
    vectors,
)

ALONE = "the chosen samples alone have other features than in the batch"


# What is refused


class Router(nn.Module):
    """Two experts, the first of which takes the first tokens of the batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        flat = x.flatten(0, 1)
        taken = torch.arange(len(flat))[:, None] < len(flat) // 4
        flat = torch.where(taken, self.experts[0](flat), self.experts[1](flat))
        out: Tensor = self.head(self.blocks[1](flat.reshape(x.shape)))
        return out


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.norm = nn.BatchNorm1d(TOKENS)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks[1](self.norm(self.blocks[0](x))))
        return out


class Dropped(Normalised):
    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Dropout(0.3)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": Normalised,
    "dropout": Dropped,
    "capacity": Router,
    "mean": lambda: Mixer(lambda x: x - x.mean(dim=0, keepdim=True), depth=2),
    "neighbour": lambda: Mixer(lambda x: x + 0.1 * x.roll(1, dims=0), depth=2),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("options", [{}, {"amplify": True}, {"mode": "jvp"}], ids=["batch", "amplify", "jvp"])
def test_samples_that_act_on_one_another_are_refused_with_the_reason(kind: str, options: dict[str, Any]) -> None:
    """The layer before the first interaction is right, and the one after it is never called valid.

    In jvp mode the residual of the later layer, which is wrong, refuses both.
    """
    model, optimizer, seen, monitor = setting(REFUSED[kind], samples=4, **options)
    states = []
    for step in range(3):
        advance(model, optimizer, [vectors(step)])
        states.append([p.detach().clone() for p in model.state_dict().values()])
    monitor.close()
    assert not any(row["valid"] for row in seen[1::2])
    assert all(row["valid"] for row in seen[::2]) or "mode" in options
    assert all(row["why"].startswith(ALONE) for row in seen[1::2])
    again, other, _, unwatched = setting(REFUSED[kind])
    unwatched.close()
    for step in range(3):
        advance(again, other, [vectors(step)])
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), states[step], strict=True))


def test_an_interaction_that_begins_later_is_found_in_the_step_where_it_begins() -> None:
    begun = False
    model, optimizer, seen, monitor = setting(lambda: Mixer(lambda x: x + begun * x.mean(dim=0), depth=2), samples=4)
    for step in range(12):
        begun = step in (5, 6, 10)
        advance(model, optimizer, [vectors(step)])
    monitor.close()
    assert [row["step"] for row in seen if not row["valid"]] == [5, 6, 10]


def test_an_evaluation_mode_makes_batch_norm_and_dropout_admissible() -> None:
    for make in (Normalised, Dropped):
        model, optimizer, seen, monitor = setting(make, samples=4)
        model.eval()
        for step in range(2):
            advance(model, optimizer, [vectors(step)])
        monitor.close()
        assert all(row["valid"] for row in seen)
        assert len(seen) == 4


def test_features_whose_first_dimension_is_another_one() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return x.transpose(0, 1)

    shape = r"layer 'blocks\.0' has features of shape \(5, 12, 8\), whose first dimension does not count the 12 samples"
    everything: list[dict[str, Any]] = []
    for layers in (r"blocks\.\d+$", ["", "blocks.0"]):  # the model itself returns samples
        model, optimizer, seen, monitor = setting(Transposed, samples=4, layers=layers, sinks=[everything.extend])
        with pytest.warns(RuntimeWarning, match=shape):
            advance(model, optimizer, [vectors(0)])
        monitor.close()
        if layers == r"blocks\.\d+$":
            assert [row["reason"] for row in everything] == ["no rows of any watched layer could be kept"]
        else:
            why = {row["name"]: row["why"] for row in seen}
            assert len(why) == 2
            assert why.pop("Transposed") is None
            assert all(reason.startswith("the first dimension of the features does not") for reason in why.values())


def test_a_step_that_cannot_be_checked_is_not_valid() -> None:
    torch.manual_seed(0)
    model = Mixer(depth=2).double()
    own = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step_now(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    seen: list[dict[str, Any]] = []
    keywords: dict[str, Any] = {"layers": r"blocks\.\d+$", "every": 1, "samples": 4, "verbose": False}
    with fastfs.Monitor(model, list(own.values()), sinks=[measured_into(seen)], **keywords):
        for step in range(2):
            x, y = vectors(step)
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    assert seen
    assert {row["why"] for row in seen} == {"the chosen samples were not run alone before the step, as samples= needs"}


# Arguments of the model


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mixer(depth=2)
        self.position = nn.Embedding(TOKENS, WIDTH)

    def forward(self, *, inputs: dict[str, Tensor], scale: float, position: Tensor, weight: Tensor) -> Tensor:
        x = inputs["x"] * inputs["mask"][..., None] * scale + self.position(position)
        return self.inner(x) * weight


def test_arguments_of_every_sample_are_cut_and_others_are_not() -> None:
    model, optimizer, seen, monitor = setting(Called, samples=4, layers=r"inner\.blocks\.\d+$")
    sizes: set[Any] = set()

    def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if monitor.replaying:
            sizes.add((len(kwargs["inputs"]["x"]), len(kwargs["inputs"]["mask"]), len(kwargs["position"])))

    model.register_forward_pre_hook(look, with_kwargs=True)
    for step in range(2):
        x, y = vectors(step)
        mask = (torch.rand(BATCH, TOKENS) > 0.3).double()
        optimizer.zero_grad()
        weight = torch.ones(())
        out = model(inputs={"x": x, "mask": mask}, scale=0.5, position=torch.arange(TOKENS), weight=weight)
        F.cross_entropy(out.flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    monitor.close()
    assert sizes == {(4, 4, TOKENS)}
    assert len(seen) == 4
    assert all(row["valid"] for row in seen)


def test_a_forward_without_a_batch_is_left_out_with_a_warning() -> None:
    class Constant(Mixer):
        def forward(self, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(scale * torch.ones(BATCH, TOKENS, WIDTH, dtype=torch.float64))

    model, optimizer, seen, monitor = setting(Constant, samples=4)
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="no tensor whose first dimension counts the samples of the batch"):
        model(1.0).sum().backward()
    optimizer.step()
    monitor.close()
    assert seen == []


@pytest.mark.parametrize("value", [0, 1, -3, 2.5, True, "all"])
def test_samples_must_be_a_number_of_samples(value: Any) -> None:
    with pytest.raises(ValueError, match=r"samples: expected an integer >= 2 \(samples of a batch"):
        setting(Mixer, samples=value)


def test_what_excludes_samples() -> None:
    probe = (torch.zeros(2, TOKENS, WIDTH), Tensor.sum)
    with pytest.raises(ValueError, match='samples: is for mode="batch" and mode="jvp"'):
        setting(Mixer, samples=2, mode="probe", probe=probe)
    with pytest.raises(ValueError, match="samples: expected at most rows=4"):
        setting(Mixer, samples=5, rows=4)


def test_rows_that_do_not_fit_are_equally_many_of_each_sample() -> None:
    model, optimizer, seen, monitor = setting(Mixer, samples=4, memory=60000)
    for step in range(2):
        advance(model, optimizer, [vectors(step)])
    monitor.close()
    kept = {row["rows"] for row in seen}
    assert min(kept) < 4 * TOKENS
    assert all(count % 4 == 0 for count in kept), kept
    assert all(row["valid"] for row in seen)
