"""samples=: second forwards on a few samples of each batch. Numbers by hand, estimates, other ways to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fastfs
from fastfs._monitor.capture.sampling import RowSampler, SampleSubset
from tests.helpers import monitor_loops as loops
from tests.helpers.monitor_cases import measured_into
from tests.helpers.sample_cases import (
    BATCH,
    TOKENS,
    WIDTH,
    Flat,
    Images,
    Mixer,
    advance,
    images,
    setting,
    vectors,
)

CPU = torch.device("cpu")


def by_hand(model: nn.Module, optimizer: Any, parts: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Features, backward vectors and updates of all rows, per layer: one tensor for each micro-batch."""
    found: list[dict[str, Any]] = [{"f": [], "b": [], "after": []} for _ in model.blocks]
    key = "f"

    def hook(layer: int, out: Tensor) -> None:
        found[layer][key].append(out.detach().clone())
        if out.requires_grad:
            place = len(found[layer]["b"])
            found[layer]["b"].append(torch.zeros_like(out))
            out.register_hook(lambda g: found[layer]["b"].__setitem__(place, g.clone()))

    handles = [
        block.register_forward_hook(lambda _m, _a, out, i=i: hook(i, out)) for i, block in enumerate(model.blocks)
    ]
    advance(model, optimizer, parts)
    key = "after"
    with torch.no_grad():
        for x, _ in parts:
            model(x)
    for handle in handles:
        handle.remove()
    return found


def chosen_rows(samples: int, batch: int, of_sample: int, rows: int | None) -> Tensor:
    """The numbers of the rows that are kept, from the public sizes alone."""
    subset = SampleSubset(samples, batch)
    sampler = RowSampler(rows)
    numbers = sampler.samples_of(subset, CPU)
    assert len(set(numbers.tolist())) == samples
    choice = sampler.choose(batch * of_sample, 10**9, subset)
    found = sampler.rows_of(choice, CPU)
    assert set((found // of_sample).tolist()) == set(numbers.tolist())
    inner = sampler.rows_of(choice, CPU, within=True)
    assert torch.equal(found % of_sample, inner % of_sample)
    assert torch.equal(numbers[inner // of_sample], found // of_sample)
    return found


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, Tensor]], int]] = {
    "tokens": (Mixer, vectors, TOKENS),
    "images": (Images, images, 1),
    "flat": (Flat, vectors, TOKENS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("samples", [2, 4])
def test_numbers_are_those_of_the_chosen_samples(kind: str, rows: int | None, samples: int) -> None:
    make, batch, of_sample = KINDS[kind]
    model, optimizer, seen, monitor = setting(make, samples=samples, rows=rows)
    twin = make().double()
    twin.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for step in range(3):
        parts = [batch(2 * step), batch(2 * step + 1, BATCH - 2)]  # micro-batches of different sizes
        advance(model, optimizer, parts)
        hand = by_hand(twin, other, parts)
        monitor.flush()
        for row, layer in zip(seen[-len(hand) :], hand, strict=True):
            sums = np.zeros(4)
            for f, b, after in zip(layer["f"], layer["b"], layer["after"], strict=True):
                kept = chosen_rows(samples, f.shape[0] // (of_sample if kind == "flat" else 1), of_sample, rows)
                dims = 2 if kind == "tokens" else 1
                f, b, df = (t.flatten(0, dims - 1).flatten(1)[kept] for t in (f, b, after - f))
                total = layer["f"][0][0].numel() and math.prod(after.shape[:dims])
                sums += (
                    total / len(kept) * np.array([(x * y).sum().item() for x, y in ((f, f), (b, b), (df, df), (df, b))])
                )
            count = sum(f.numel() for f in layer["f"])
            assert row["valid"], row["why"]
            assert row["count"] == count
            assert row["feature_rms"] == pytest.approx(math.sqrt(sums[0] / count), rel=1e-10)
            assert row["backward_rms"] == pytest.approx(math.sqrt(sums[1] / count), rel=1e-10)
            assert row["update_rms"] == pytest.approx(math.sqrt(sums[2] / count), rel=1e-8)
            assert row["cos_angle"] == pytest.approx(-sums[3] / math.sqrt(sums[1] * sums[2]), rel=1e-8, abs=1e-10)
            assert row["angle_se"] > 0
    monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"amplify": True}, {"mode": "jvp"}], ids=["batch", "amplify", "jvp"])
def test_second_forwards_run_on_the_samples_alone_and_training_is_the_same(options: dict[str, Any]) -> None:
    sizes: list[int] = []
    trained = []
    for watched in (False, True):
        model, optimizer, seen, monitor = setting(Mixer, samples=3, aligned_every=1, **options)
        if not watched:
            monitor.close()

        def count(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor, own: Any = monitor) -> None:
            if own.replaying:
                sizes.append(len(args[0]))

        model.head.register_forward_hook(count)
        for step in range(4):
            advance(model, optimizer, [vectors(step), vectors(9 + step)])
        monitor.close()
        trained.append([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
        assert len(seen) == 12 * watched
        assert all(row["valid"] for row in seen)
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    assert set(sizes) == {3}
    if not options:
        assert len(sizes) == 2 * 2 * 4  # a forward before and one after the step, for each micro-batch


@pytest.mark.parametrize("options", [{}, {"amplify": True}, {"mode": "jvp"}], ids=["batch", "amplify", "jvp"])
def test_a_batch_of_no_more_samples_is_measured_as_a_whole(options: dict[str, Any]) -> None:
    found = []
    for samples in (None, BATCH, BATCH + 3):
        model, optimizer, seen, monitor = setting(Mixer, samples=samples, rows=None, **options)
        for step in range(2):
            advance(model, optimizer, [vectors(step)])
        monitor.close()
        found.append(seen)
    for others in found[1:]:
        for row, other in zip(found[0], others, strict=True):
            assert row["angle_se"] is other["angle_se"] is None
            for key in ("angle", "update_rms", "residual", "valid"):
                assert row[key] == pytest.approx(other[key], rel=1e-8, abs=1e-10), key


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 12, 4], ids=["all rows", "three of five rows", "one row"])
def test_estimates_agree_with_all_samples_within_their_standard_errors(rows: int | None, threads: Any) -> None:
    """Rows of a sample are alike here, so that errors that took rows for independent would be far too small.

    Student's t with 19 degrees of freedom: 94 % are within two standard errors. Of 150 that is 141 +- 3. The mean
    square is 1.1, and 1.3 with the linearised error of 20 unequal samples; rows taken for independent would make it 5.
    The errors of single rows are too large, by at most the root of 1 / (1 - 20 / 60).
    """
    threads(1)
    torch.manual_seed(0)
    model = Mixer(depth=1).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: dict[int | None, list[dict[str, Any]]] = {20: [], None: []}
    monitors = [
        fastfs.Monitor(
            model,
            optimizer,
            layers=["blocks.0"],
            every=1,
            samples=samples,
            rows=None if rows is None or samples is None else rows * 5,
            sinks=[measured_into(into)],
            alerts=(),
            verbose=False,
        )
        for samples, into in seen.items()
    ]
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(60, 1, WIDTH, generator=generator) + 0.5 * torch.randn(60, TOKENS, WIDTH, generator=generator)
        y = torch.randint(3, (60, 1), generator=generator).expand(60, TOKENS)
        advance(model, optimizer, [(x.double(), y)])
    for monitor in monitors:
        monitor.close()
    pairs = list(zip(seen[20], seen[None], strict=True))
    assert len(pairs) == 150
    for key, error in (("angle", "angle_se"), ("update_rms", "update_rms_se"), ("residual", "residual_se")):
        z = np.array([(some[key] - every[key]) / some[error] for some, every in pairs])
        if key == "residual":
            z *= [(1 - some[key]) / (1 - every[key]) for some, every in pairs]
        assert (np.abs(z) < 2).sum() >= 129, key  # 4 sigma
        assert (0.3 if rows == 4 else 0.55) < np.mean(z**2) < 2.2, key
        assert abs(z.mean()) < 0.5, key


# Other ways to run


def test_recomputed_forwards(threads: Any) -> None:
    class Checkpointed(Mixer):
        reentrant: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.reentrant is None:
                return super().forward(x)
            out: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
            return out

    threads(1)
    found = []
    for reentrant in (None, False, True):
        model, optimizer, seen, monitor = setting(Checkpointed, samples=4)
        model.reentrant = reentrant
        for step in range(2):
            x, y = vectors(step)
            advance(model, optimizer, [(x.requires_grad_(), y)])
        monitor.close()
        assert all(row["valid"] for row in seen)
        found.append([(row["angle"], row["update_rms"]) for row in seen])
    assert found[0] == found[1] == found[2]


def test_bfloat16_autocast_is_amplified_on_the_samples() -> None:
    found = []
    for samples in (None, 8):
        torch.manual_seed(0)
        model = Mixer(depth=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        seen: list[dict[str, Any]] = []
        keywords: dict[str, Any] = {"layers": r"blocks\.\d+$", "every": 1, "samples": samples, "verbose": False}
        with fastfs.Monitor(model, optimizer, amplify=True, rows=None, sinks=[measured_into(seen)], **keywords):
            for step in range(6):
                x, y = vectors(step, 48)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    out = model(x.float())
                F.cross_entropy(out.flatten(0, -2).float(), y.flatten()).backward()
                optimizer.step()
        found.append(seen)
    pairs = [(every, some) for every, some in zip(*found, strict=True) if every["valid"] and some["valid"]]
    assert len(pairs) >= 8
    for every, some in pairs:
        assert some["angle"] == pytest.approx(every["angle"], abs=4 * some["angle_se"])
        assert some["update_rms"] == pytest.approx(every["update_rms"], abs=4 * some["update_rms_se"])


@pytest.mark.graphs
@pytest.mark.filterwarnings(loops.DYNAMO)
@pytest.mark.parametrize("options", [{}, {"amplify": True}, {"mode": "jvp"}], ids=["batch", "amplify", "jvp"])
def test_compiled_models_run_eagerly_on_the_samples_and_compile_nothing_for_them(
    options: dict[str, Any], threads: Any
) -> None:
    threads(1)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = Flat().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        seen: list[dict[str, Any]] = []
        keywords: dict[str, Any] = {"layers": r"blocks\.\d+$", "every": 2, "samples": 9, "verbose": False}
        with fastfs.Monitor(run, optimizer, sinks=[measured_into(seen)], **keywords, **options):
            for step in range(5):
                advance(run, optimizer, [vectors(step)])
        if compiled:
            assert counters["stats"]["unique_graphs"] == 2  # with the hooks and without
        found.append(seen)
    torch._dynamo.reset()
    assert len(found[0]) == len(found[1]) == 6
    for eager, graph in zip(*found, strict=True):
        assert eager["valid"], eager["why"]
        assert graph["valid"], graph["why"]
        for key in ("angle", "update_rms", "residual"):
            assert graph[key] == pytest.approx(eager[key], rel=1e-7, abs=1e-9, nan_ok=True), key
