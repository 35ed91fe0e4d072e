"""When and how often alerts are raised, where they go, and that a healthy run raises none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastfs
from fastfs._record.writing.alert_rules import (
    AngleCollapse,
    LayerFrozen,
    NonFinite,
    ResidualLarge,
    UpdateAbove,
    default_alerts,
)
from fastfs._record.writing.alerts import Alerts
from fastfs._record.writing.recorder import Recorder
from fastfs.models import ResNet, Transformer
from tests.helpers.record_cases import Collecting, head, measured, predicted


def raised(rule: Any, *records: Any, header: Any = None) -> Any:
    """Returns step, layer and value of every alert."""
    alerts = Alerts([rule], header or head())
    found = []
    for record in records:
        more, failed = alerts.update(record)
        assert not failed
        found += [(alert.step, alert.scalars["layer"], alert.scalars["value"]) for alert in more]
    return found


def second(value: Any, others: Any) -> list[Any]:
    """Returns a column with a different value for blocks.1."""
    return [others, value, others, others]


def test_an_angle_collapses_after_consecutive_valid_steps() -> None:
    low, fine = second(0.001, 0.5), [0.5] * 4
    rule = AngleCollapse(cosine=0.01, steps=3)
    assert raised(rule, *(measured(s, cos_angle=low) for s in range(9))) == [(2, "blocks.1", 0.001)]
    assert raised(rule, *(measured(s, cos_angle=second(-0.4, 0.5)) for s in range(3))) == [(2, "blocks.1", -0.4)]
    assert raised(rule, *(measured(s, cos_angle=low if s % 3 else fine) for s in range(9))) == []
    invalid = [measured(s, cos_angle=low, valid=second(False, True)) for s in range(9)]
    assert raised(rule, *invalid) == []
    # Steps that are not measured or not valid do not count and do not reset the streak.
    mixed = [
        measured(0, cos_angle=low),
        invalid[1],
        predicted(2),
        measured(3, cos_angle=low),
        measured(4, cos_angle=low),
    ]
    assert raised(rule, *mixed) == [(4, "blocks.1", 0.001)]


def test_an_alert_comes_again_only_after_its_condition_has_cleared() -> None:
    records = [measured(s, cos_angle=second(0.5 if s == 5 else 0.0, 0.5)) for s in range(12)]
    assert raised(AngleCollapse(steps=2), *records) == [(1, "blocks.1", 0.0), (7, "blocks.1", 0.0)]


def test_a_layer_with_a_gradient_and_no_update_is_frozen() -> None:
    still = {"update_rms": second(0.0, 0.1)}
    assert raised(LayerFrozen(steps=2), *(measured(s, **still) for s in range(4))) == [(1, "blocks.1", 0.0)]
    no_gradient: dict[str, Any] = {**still, "backward_rms": second(0.0, 0.1)}
    assert raised(LayerFrozen(steps=2), *(measured(s, **no_gradient) for s in range(4))) == []


def test_layers_that_are_frozen_on_purpose_raise_no_alert() -> None:
    frozen = {"update_rms": [0.0, 0.0, 0.0, 0.0], "gradient_norm": [None, 0.0, 1.0, 1.0]}
    assert raised(LayerFrozen(steps=2), *(measured(s, **frozen) for s in range(4))) == [(1, "blocks.2", 0.0)]


def test_large_updates() -> None:
    big: dict[str, Any] = {"relative_update": second(1.5, 0.1)}
    assert raised(UpdateAbove(relative=1.0, steps=2), *(measured(s, **big) for s in range(4))) == [(1, "blocks.1", 1.5)]
    zero: dict[str, Any] = {"relative_update": second(math.inf, 0.1)}  # features that were zero
    assert raised(UpdateAbove(), *(measured(s, **zero) for s in range(4))) == []


def test_nonfinite_values_raise_an_alert_at_once() -> None:
    bad = measured(3, nonfinite=second(2, 0), cos_angle=second(math.nan, 0.5))
    assert raised(NonFinite(), measured(2), bad) == [(3, "blocks.1", 2.0)]
    assert raised(NonFinite(), measured(2, loss=math.nan), measured(3, loss=math.nan)) == [(2, None, None)]
    assert raised(NonFinite(), measured(2, loss=None)) == []


def test_large_residuals_of_cuts() -> None:
    large: dict[str, Any] = {"residual": second(-2.0, 0.1)}
    assert raised(ResidualLarge(steps=2), *(measured(s, **large) for s in range(4))) == [(1, "blocks.1", -2.0)]
    for other in (
        {"residual": second(None, 0.1)},  # no cut
        {**large, "valid": second(False, True)},
        {**large, "cos_angle": second(0.001, 0.5)},
    ):
        assert raised(ResidualLarge(steps=2), *(measured(s, **other) for s in range(4))) == []


def test_rules_of_the_user() -> None:
    calls = []

    def loss_above_one(record: Any, header: dict[str, Any]) -> Any:
        calls.append((record.kind, header["run"]))
        return [(None, record.scalars["loss"], "the loss is large")] if record.scalars["loss"] > 1 else []

    records = [measured(0), measured(1, loss=2.0), measured(2, loss=2.0), predicted(3), measured(4, loss=3.0)]
    assert raised(loss_above_one, *records) == [(1, None, 2.0), (4, None, 3.0)]
    assert calls[0] == ("measured", "a")
    assert calls[3] == ("predicted", "a")
    assert raised(lambda record, _: None if record.step % 2 else [("x", 1, "hm")], *map(measured, range(9))) == [
        (0, "x", 1.0)
    ]


@pytest.mark.parametrize("bad", [3, "angle", AngleCollapse])
def test_other_rules_are_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="alerts: expected a rule such as AngleCollapse"):
        Alerts([bad], head())


def test_rules_of_one_name_are_kept_apart() -> None:
    alerts = Alerts([UpdateAbove(0.01, steps=1), UpdateAbove(0.001, steps=1)], head())
    found, _ = alerts.update(measured(0))
    assert {record.scalars["rule"] for record in found} == {"large update", "large update 2"}


def test_a_restored_state_continues_the_streaks() -> None:
    rule = AngleCollapse(steps=4)
    records = [measured(s, cos_angle=second(0.0, 0.5)) for s in range(10)]
    for cut in (2, 6):
        first = Alerts([rule, NonFinite()], head())
        found = [alert.step for record in records[:cut] for alert in first.update(record)[0]]
        state = json.loads(json.dumps(first.state_dict()))
        second_half = Alerts([rule, UpdateAbove()], head())  # with other rules
        second_half.load_state_dict(state)
        found += [alert.step for record in records[cut:] for alert in second_half.update(record)[0]]
        assert found == [3]


# In a recorder


def test_alerts_reach_the_sinks_the_user_and_the_training_thread() -> None:
    sink = Collecting()
    told: list[dict[str, Any]] = []
    one = Recorder([sink], head(), on_alert=told.append)
    one.put(measured(0))
    one.put(measured(1, nonfinite=second(5, 0)))
    one.put(measured(2))
    with pytest.warns(RuntimeWarning, match=r"step 1: layer 'blocks.1': 5 entries are NaN .* \[nonfinite\]") as caught:
        assert one.flush()
    assert len(caught) == 1
    assert [record.kind for record in sink.records] == ["measured", "measured", "alert", "measured"]
    assert told == [
        {
            "kind": "alert", "run": "a", "step": 1, "time": 101.0, "rule": "nonfinite", "layer": "blocks.1",
            "value": 5.0, "message": "5 entries are NaN or infinite",
        }
    ]  # fmt: skip
    one.close()


def test_poll_gives_the_alerts() -> None:
    one = Recorder([], head(), flush_seconds=0.0)
    one.put(measured(1, loss=math.inf))
    one._writer.flush(20.0)
    with pytest.warns(RuntimeWarning, match="step 1: the loss is inf"):
        (alert,) = one.poll()
    assert (alert.kind, alert.step, alert.scalars["rule"]) == ("alert", 1, "nonfinite")
    one.close()


def test_an_error_in_a_rule_or_in_on_alert_is_a_warning() -> None:
    def broken(record: Any, header: dict[str, Any]) -> None:
        raise KeyError("no such column")

    sink = Collecting()
    one = Recorder([sink], head(), alerts=[broken], on_alert=print)
    one.put(measured(0))
    one.put(measured(1))
    with pytest.warns(RuntimeWarning, match=r"alert rule broken failed .KeyError: 'no such column'") as caught:
        one.close()
    assert len(caught) == 1
    assert sink.steps == [0, 1]

    def fail(alert: Any) -> None:
        raise ValueError("pager is off")

    one = Recorder([], head(), on_alert=fail)
    one.put(measured(0, loss=math.nan))
    with pytest.warns(RuntimeWarning, match="pager is off|the loss is nan") as caught:
        one.close()
    assert len(caught) == 2


def test_the_state_of_a_recorder_is_plain_data() -> None:
    rule = AngleCollapse(steps=3)
    first = Recorder([], head(run="x"), alerts=[rule])
    for step in range(2):
        first.put(measured(step, cos_angle=0.0))
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert state["run"] == "x"
    sink = Collecting()
    again = Recorder([sink], head(run=state["run"], resumed_at=2), alerts=[rule])
    again.load_state_dict(state)
    again.put(measured(2, cos_angle=0.0))
    with pytest.warns(RuntimeWarning, match="angle collapse"):
        again.close()
    assert len(sink.of("alert")) == 4


# Healthy runs


def tokens() -> tuple[Any, ...]:
    text = torch.randint(64, (8, 17))
    return text[:, :-1], text[:, 1:]


TASKS = {
    "transformer-adamw": (
        lambda: Transformer(vocabulary=64, width=32, depth=3, heads=2, context=16, dropout=0.1),
        lambda p: torch.optim.AdamW(p, lr=2e-3),
        tokens,
        r"blocks\.\d+$",
    ),
    "transformer-warmup": (
        lambda: Transformer(vocabulary=64, width=32, depth=3, heads=2, context=16),
        lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        tokens,
        r"blocks\.\d+$",
    ),
    "resnet-sgd": (
        lambda: ResNet(16, 32, 8, 4),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda: ((x := torch.randn(64, 16)), x[:, :4].argmax(dim=1)),
        "blocks",
    ),
    "resnet-momentum": (
        lambda: ResNet(16, 32, 4, 4),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
        lambda: ((x := torch.randn(64, 16)), x[:, :4].argmax(dim=1)),
        "blocks",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_healthy_run_is_silent(name: Any) -> None:
    make, optimize, batch, layers = TASKS[name]
    torch.manual_seed(1)
    model = make()
    optimizer = optimize(model.parameters())
    told: list[Any] = []
    with fastfs.Monitor(
        model, optimizer, layers=layers, every=1, sinks=[lambda rows: None], on_alert=told.append
    ) as monitor:
        for step in range(40):
            if "warmup" in name:
                optimizer.param_groups[0]["lr"] = 0.002 * step
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
        assert monitor.flush()
    assert told == []
    assert len(default_alerts()) == 6


def test_a_broken_run_raises_alerts(tmp_path: Path) -> None:
    """The learning rate is far too high: features change by more than their size, then the loss is not finite."""
    torch.manual_seed(1)
    model = ResNet(16, 32, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=300.0)
    told: list[Any] = []
    monitor = fastfs.Monitor(
        model, optimizer, layers="blocks", every=1, path=tmp_path / "a.jsonl", on_alert=told.append
    )

    def train() -> None:
        for _ in range(30):
            x = torch.randn(64, 16)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), x[:, :4].argmax(dim=1))
            loss.backward()
            monitor.log(loss=loss)
            optimizer.step()
        monitor.close()

    with pytest.warns(RuntimeWarning, match="fastfs.Monitor: step"):
        train()
    assert {"nonfinite"} <= {alert["rule"] for alert in told}
    assert fastfs.load(tmp_path / "a.jsonl").attrs["alerts"] == told
