"""What trackers get of a record."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfs._record.columns import BY_NAME, QUANTITIES
from fastfs._record.detail_columns import DETAIL_COLUMNS
from fastfs._record.record import Record
from fastfs._record.sinks.metrics import STATISTICS, VALID_SHARE, Metric, Metrics, shown_values, unique_keys
from tests.helpers.record_cases import alert, head, measured, predicted

NAMES = st.text(max_size=6) | st.sampled_from([*STATISTICS, "median_", "a/b", "..", "", "_"])
NUMBERS = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-10, 10)
    | st.just(10**400)
    | st.sampled_from(["x", math.nan, math.inf, 1.7e308])
)


@st.composite
def headers(draw: Any) -> Any:
    layers = draw(st.lists(NAMES, max_size=5, unique=True))
    groups = draw(st.lists(NAMES, max_size=70, unique=True))
    return head(layers=layers, groups=dict.fromkeys(groups, layers))


@st.composite
def records(draw: Any, header: Any) -> Any:
    length = max(0, len(header["layers"]) + len(header["groups"]) + draw(st.integers(-2, 2)))
    names = draw(st.lists(st.sampled_from([*BY_NAME, "cos_angle_q10", "unknown"]), unique=True))
    columns = {name: draw(st.lists(NUMBERS, min_size=length, max_size=length)) for name in names}
    if draw(st.booleans()):
        columns["valid"] = draw(st.lists(st.sampled_from([True, False, None]), min_size=length, max_size=length))
    scalars = draw(st.dictionaries(st.sampled_from(["loss", "gradient_scale", "kappa", "other"]), NUMBERS))
    return Record(draw(st.sampled_from(["measured", "predicted"])), 3, 1.0, scalars, columns)


@given(st.data(), headers(), st.integers(1, 200))
def test_keys_are_few_and_stable_and_values_finite_and_valid(data: Any, header: Any, most: int) -> None:
    metrics, again = Metrics(header, most), Metrics(dict(header), most)
    assert metrics.metrics == again.metrics
    assert 1 <= len(metrics.metrics) <= most
    assert len(set(metrics.metrics)) == len(metrics.metrics)
    assert not set(metrics.metrics) & set(metrics.left_out)
    keys = {metric.key("fastfs") for metric in metrics.metrics}
    assert len(keys) == len(metrics.metrics)
    for _ in range(2):
        record = data.draw(records(header))
        values = metrics.of(record)
        assert set(values) <= set(metrics.metrics)
        assert not values or record.kind == "measured"
        assert values == again.of(record)
        for metric, value in values.items():
            assert type(value) is float or metric.quantity == VALID_SHARE
            assert math.isfinite(value)
            if metric.label:
                assert value_is_of(metric, value, record, header)


def value_is_of(metric: Metric, value: float, record: Record, header: Any) -> bool:
    """Whether valid rows, of the right layers or group, lie at or around a value."""
    display = BY_NAME[metric.quantity].display
    flags = record.columns.get("valid", [])
    rows = []
    for at, number in enumerate(record.columns[metric.quantity]):
        usable = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 10**309
        allowed = not (display and display.guarded) or (at < len(flags) and flags[at] is True)
        if (
            usable
            and math.isfinite(number)
            and allowed
            and (at < len(header["layers"])) == (metric.label in STATISTICS)
        ):
            rows.append(float(number))
    return min(rows) <= value <= max(rows)


def test_values_of_layers_and_groups() -> None:
    flags = [True, False, True, True]
    record = measured(0, angle=[1.0, 9.0, 2.0, 1.5], valid=flags, feature_rms=[1.0, 2.0, 6.0, 3.0])
    values = {metric.key("f"): value for metric, value in Metrics(head()).of(record).items()}
    assert values["f/valid_share"] == 2 / 3
    assert [values[f"f/angle/{label}"] for label in ("min", "median", "max", "all")] == [1.0, 1.5, 2.0, 1.5]
    assert values["f/feature_rms/median"] == 2.0  # means something where a row is not valid, too
    assert values["f/loss"] == 0.5
    assert not [key for key in values if "loss_scale" in key or "micro_batches" in key]


def test_a_group_may_have_the_name_of_a_statistic() -> None:
    header = head(groups={"median": ["blocks.0"], "median_": ["blocks.1"], "": ["blocks.2"]})
    values = Metrics(header).of(measured(0, groups=3, angle=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    labels = ["median", "median_", "median__", "_"]
    assert [values[Metric("angle", label)] for label in labels] == [2.0, 4.0, 5.0, 6.0]


def test_what_does_not_fit_is_left_out_in_order() -> None:
    quantities = [column.name for column in QUANTITIES if column.option is None]
    medians = [Metric(name, "median") for name in quantities]
    assert Metrics(head(), 1).metrics == [Metric(VALID_SHARE)]
    assert Metrics(head(), 4).metrics == [Metric(VALID_SHARE), *medians[:3]]
    many = Metrics(head(groups={f"g{i}": [] for i in range(20)}))
    grouped = dict.fromkeys(metric.quantity for metric in many.metrics if metric.label.startswith("g"))
    assert list(grouped) == quantities[:1]
    assert all(metric in many.metrics for metric in medians)
    assert len(many.metrics) + len(many.left_out) == 1 + len(medians) * 23 + 7
    everything = Metrics(head(groups={}))
    assert not everything.left_out


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"details": True}, [column.name for column in DETAIL_COLUMNS]),
        ({"casts": ["mxfp8", "bfloat16"]}, ["cast_loss_bfloat16", "cast_loss_mxfp8"]),
        ({"nonlinear": True}, ["nonlinear_update"]),
        ({"details": False, "casts": [], "nonlinear": None}, []),
    ],
)
def test_quantities_of_an_option_take_keys_in_runs_that_have_it_only(options: Any, more: list[str]) -> None:
    ordinary = [column.name for column in QUANTITIES if column.option is None]
    plain, found = Metrics(head(), 300), Metrics({**head(), **options}, 300)
    medians = [[m.quantity for m in each.metrics if m.label == "median"] for each in (plain, found)]
    assert medians[0] == ordinary
    assert sorted(medians[1]) == sorted([*ordinary, *more])
    assert [name for name in medians[1] if name in ordinary] == ordinary


@pytest.mark.parametrize("record", [predicted(0), alert(0), Record("skipped", 0, 0.0, {"reason": "x"})])
def test_only_measured_steps_have_metrics(record: Record) -> None:
    assert Metrics(head()).of(record) == {}


def test_rows_without_a_flag_are_not_valid() -> None:
    record = measured(0)
    del record.columns["valid"]
    values = Metrics(head()).of(record)
    assert Metric(VALID_SHARE) not in values
    assert not [metric for metric in values if metric.quantity == "angle"]
    assert shown_values(record, "angle") == [None] * 4


def test_keys_that_become_equal_are_told_apart() -> None:
    metrics = [Metric("angle", label) for label in ("a", "b", "a_")]
    assert list(unique_keys(metrics, lambda metric: "a").values()) == ["a", "a_", "a__"]


@pytest.mark.parametrize("most", [0, -1, True, 3.0, None])
def test_the_number_of_keys_is_checked(most: Any) -> None:
    with pytest.raises(ValueError, match="max_keys: expected an integer >= 1, got"):
        Metrics(head(), most)
