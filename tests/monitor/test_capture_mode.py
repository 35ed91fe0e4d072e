"""The interface of capture modes is complete: a mode of the test's own, from the monitor's argument to the record."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastfs
from fastfs._monitor.capture.sampling import RowChoice
from fastfs._monitor.measure.capture_mode import CaptureMode, StepInputs, UpdateEvidence
from fastfs._monitor.measure.learned_structure import LearnedStructure
from fastfs._monitor.measure.modes import MODES
from fastfs._monitor.measure.observation import FeatureObservation
from fastfs._monitor.measure.row_sums import LayerSums, Triple, from_direction
from fastfs._network.structure import Structure
from fastfs._stats import FeatureStats
from fastfs.models import ResNet
from tests.helpers.monitor_cases import rows, sgd

WIDTH, ROWS = 6, 4
CALLS = ["prepare", "refusal", "graphs", "check", "structure", "reference", "observe", "graphs", "refusal", "clear"]


class KnownMode(CaptureMode):
    """Reports features that are known in advance: f = 3 u, df = 2 u cos(a) + 2 v sin(a), b = -5 u, with |u| = |v| = 1.

    ``a`` is 0.1 times the number of the layer, plus 0.5.
    """

    method = "known"
    captures_training = False
    needs_previous = False
    calls: ClassVar[list[str]] = []  # of the only instance; the fixture resets it
    broken: ClassVar[str] = ""

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            KnownMode.calls.append(name)
            if name == KnownMode.broken:
                raise ZeroDivisionError(name)
        return super().__getattribute__(name)

    def _sums(self, moved: float) -> LayerSums:
        u = torch.eye(WIDTH, dtype=torch.float64)[0].expand(ROWS, WIDTH)
        v = torch.eye(WIDTH, dtype=torch.float64)[1].expand(ROWS, WIDTH)
        layers = []
        for layer in self._resources.layers:
            angle = 0.5 + 0.1 * layer.index
            update = 2.0 * moved * (math.cos(angle) * u + math.sin(angle) * v)
            layers.append([Triple(3.0 * u, update, -5.0 * u, RowChoice(2 * ROWS, ROWS))])
        return self._resources.totals([from_direction(layers)])

    def check(self, step: StepInputs) -> FeatureStats:
        return self._sums(moved=0.0).stats

    def structure(self, step: StepInputs, learned: LearnedStructure) -> Structure | None:
        return None

    def observe(self, step: StepInputs, evidence: UpdateEvidence) -> FeatureObservation:
        sums = self._sums(moved=1.0)
        eps = self._resources.on_device([2.0**-52] * len(self._resources.layers))
        verdict = self._resources.assessor.assess_tangent(sums, eps, evidence.decrease)
        return FeatureObservation(verdict, sums, eps, [0] * len(self._resources.layers))

    def clear(self) -> None:
        pass


@pytest.fixture(autouse=True)
def known_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODES, "known", KnownMode)
    monkeypatch.setattr(KnownMode, "calls", [])


def train(mode: Any, seen: list[dict[str, Any]]) -> list[Tensor]:
    torch.manual_seed(0)
    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    monitor = None
    if mode is not None:
        options: dict[str, Any] = {
            "layers": r"blocks\.\d+$",
            "mode": mode,
            "every": 1,
            "sinks": [seen.extend],
            "quantiles": (0.5,),
        }
        monitor = fastfs.Monitor(model, optimizer, verbose=False, **options)
    for step in range(2):
        KnownMode.calls.clear()
        x, y = rows(step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return [p.detach().clone() for p in model.parameters()]


def test_what_a_mode_observes_is_what_is_recorded() -> None:
    seen: list[dict[str, Any]] = []
    train("known", seen)
    measured = [row for row in seen if row["kind"] == "measured"]
    assert [(row["step"], row["name"]) for row in measured] == [(s, f"blocks.{i}") for s in range(2) for i in range(3)]
    for row in measured:
        angle = 0.5 + 0.1 * row["layer"]
        assert row["valid"], row["why"]
        assert row["method"] == "known"
        assert (row["rows"], row["count"], row["micro_batches"]) == (ROWS, 2 * ROWS * WIDTH, 1)
        # Section 2: b is the gradient, so the angle is the one between df and -b.
        assert row["cos_angle"] == pytest.approx(math.cos(angle), rel=1e-12)
        assert row["cos_angle_q50"] == pytest.approx(math.cos(angle), rel=1e-12)
        for column, norm in (("feature_rms", 3.0), ("update_rms", 2.0), ("backward_rms", 5.0)):
            assert row[column] == pytest.approx(norm / math.sqrt(WIDTH), rel=1e-12), column
        assert row["residual"] is None or math.isnan(row["residual"])


def test_the_calls_come_in_the_documented_order() -> None:
    train("known", [])
    calls = [name for number, name in enumerate(KnownMode.calls) if KnownMode.calls[number - 1 : number] != [name]]
    assert calls[: len(CALLS)] == CALLS


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"clear"}))
def test_a_call_that_fails_leaves_training_as_it_is(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(None, [])
    monkeypatch.setattr(KnownMode, "broken", call)
    seen: list[dict[str, Any]] = []
    with pytest.warns(RuntimeWarning, match=rf"measurement failed and is left out \(ZeroDivisionError: {call}\)"):
        parameters = train("known", seen)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert {row["kind"] for row in seen} == {"skipped"}
