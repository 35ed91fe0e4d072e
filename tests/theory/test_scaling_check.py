"""The check over widths and depths: exponents of the schemes and broken scalings."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfs import formula, scaling
from fastfs.models import MLP, ResNet
from fastfs.scaling import Status
from fastfs.scaling._predicted import Sizes, expected_exponents
from tests.helpers.scaling_cases import IN, factory, made, row, squared

WIDTHS, DEPTHS = (64, 128, 256, 512), (4, 8, 16)


@pytest.fixture(scope="module")
def reports() -> Any:
    """Return the reports of the four schemes, for a step small enough to be first order in all of them."""
    rates = {"standard": 1e-6, "ntk": 1e-4, "mup": 1e-4, "fsc": 1e-4}
    return {
        scheme: scaling.check(
            factory(scheme, lr=lr), widths=WIDTHS, depths=DEPTHS, seeds=14, at_width=512, at_depth=4, dtype=None
        )
        for scheme, lr in rates.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["standard", "ntk", "mup", "fsc"])
def test_schemes_are_told_apart(reports: Any, scheme: str) -> None:
    assert reports[scheme].classify() == scheme
    assert f"as in the table's {scheme!r} MLP" in reports[scheme].words()
    assert len(str(reports[scheme]).splitlines()) == 3


@pytest.mark.parametrize("axis", ["width", "depth"])
@pytest.mark.parametrize("scheme", ["standard", "ntk", "mup", "fsc"])
def test_exponents_are_those_of_the_theory(reports: Any, scheme: str, axis: str) -> None:
    """Exponents lie within the intervals, widened by 0.1 for finite widths."""
    expected = expected_exponents(scheme, Sizes(WIDTHS, DEPTHS, 512, 4))
    for quantity in ("feature speed", "loss decrease", "sensitivity", "cos(angle)"):
        fit = reports[scheme].exponent(quantity, axis)
        assert fit.low - 0.1 <= expected[quantity, axis] <= fit.high + 0.1, (quantity, expected[quantity, axis], fit)


def test_what_holds_by_construction_does_not_fail(reports: Any) -> None:
    for scheme in ("ntk", "mup", "fsc"):
        for desideratum in ("SP", "LD", "BC"):
            assert reports[scheme].of(desideratum) is not Status.FAIL
    assert reports["ntk"].of("FL") is Status.FAIL
    assert reports["mup"].of("FL") is Status.FAIL
    assert reports["fsc"].of("FL") is not Status.FAIL
    assert reports["standard"].of("LD") is Status.FAIL
    assert reports["standard"].of("BC") is Status.FAIL


def test_advice_names_the_scaling_that_repairs(reports: Any) -> None:
    ntk = {v.axis: v.advice for v in reports["ntk"].verdicts if v.desideratum == "FL"}
    assert "sensitivity falls like width^-0" in ntk["width"]
    assert "(muP)" in ntk["width"]
    assert "(fsc)" in ntk["depth"]
    mup = {v.axis: v for v in reports["mup"].verdicts if v.desideratum == "FL"}
    assert mup["width"].status is Status.PASS
    assert "(fsc)" in mup["depth"].advice
    decrease = [v.advice for v in reports["standard"].verdicts if v.desideratum == "LD"]
    assert all("multiply all learning rates by" in advice for advice in decrease)


def test_unclear_is_said_with_the_seeds_that_would_tell() -> None:
    report = scaling.check(factory("fsc"), widths=(32, 48, 64), depths=(4, 6, 8), seeds=2)
    assert report.status is Status.UNCLEAR
    assert not report.passed
    unclear = [v for v in report.verdicts if v.status is Status.UNCLEAR]
    assert all(v.seeds > 2 for v in unclear)
    assert "seeds instead of 2 would decide it" in report.words()
    assert "seeds" in str(report).splitlines()[2]


@pytest.mark.slow
def test_many_seeds_and_large_widths_pass() -> None:
    report = scaling.check(
        factory("mup", resnet=True), widths=(128, 256, 512), depths=(2, 4, 8), seeds=40, at_depth=2, at_width=256,
        tolerance=0.3, dtype=None,
    )  # fmt: skip
    assert report.passed, str(report)
    assert report.of("BC") is Status.PASS


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["ntk", "mup", "fsc"])
def test_desiderata_from_width_64_to_1024_and_depth_4_to_64(scheme: str) -> None:
    """Predicted exponents lie in the intervals; these are widened by 0.1 for finite widths."""
    widths, depths = (64, 128, 256, 512, 1024), (4, 8, 16, 32, 64)
    report = scaling.check(factory(scheme), widths=widths, depths=depths, seeds=8, at_width=512, at_depth=4, dtype=None)
    expected = expected_exponents(scheme, Sizes(widths, depths, 512, 4))
    for (quantity, axis), wanted in expected.items():
        fit = report.exponent(quantity, axis)
        assert fit.half_width < 0.4
        assert fit.low - 0.1 <= wanted <= fit.high + 0.1, (quantity, axis, wanted, fit)
    assert all(report.of(d) is not Status.FAIL for d in ("SP", "LD", "BC")), str(report)
    assert scheme in report.matches(0.3)


# Broken scalings


def test_one_learning_rate_that_grows_with_the_width_is_found() -> None:
    def broken(width: int, depth: int) -> tuple[Any, ...]:
        model, groups = made("fsc", width, depth, lr=1e-5)
        groups[2]["lr"] *= width / 16
        return model, squared, row(3.0), groups

    report = scaling.check(broken, widths=(64, 128, 256), depths=(4, 6, 8), seeds=10)
    assert report.of("BC") is Status.FAIL
    failed = [v for v in report.verdicts if v.desideratum == "BC" and v.axis == "width" and v.status is Status.FAIL]
    assert "blocks.2" in failed[0].quantity
    assert failed[0].fit.exponent == pytest.approx(1.0, abs=0.25)
    assert "'blocks.2' against its neighbors grows like width^+" in failed[0].advice
    assert "multiply its learning rate by width^-" in failed[0].advice


@pytest.mark.slow
def test_a_forgotten_branch_scale_is_found() -> None:
    """Branch scale 1 instead of 1/sqrt(depth), with the learning rates of muP for it: the angle degenerates."""

    def broken(width: int, depth: int) -> tuple[Any, ...]:
        model = ResNet(IN, width, depth, branch_scale=1.0)
        rule = scaling.resnet(depth, width, 1.0, in_dim=IN, scheme="mup", input="sparse")
        return model, squared, row(3.0), scaling.apply(model, rule.scaled(lr=1e-4))

    sizes: dict[str, Any] = {"widths": (48, 64, 96), "depths": (4, 8, 16), "at_width": 256, "seeds": 48, "dtype": None}
    report = scaling.check(broken, **sizes)
    depth = next(v for v in report.verdicts if v.desideratum == "FL" and v.axis == "depth")
    assert depth.status is Status.FAIL
    assert report.exponent("cos(angle)", "depth").high < -0.2
    right = scaling.check(factory("mup", resnet=True), **sizes)
    assert abs(right.exponent("cos(angle)", "depth").exponent) < 0.1
    assert next(v for v in right.verdicts if v.desideratum == "FL" and v.axis == "depth").status is not Status.FAIL


class Plain(nn.Module):
    """``f + V relu(f)`` without a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.relu())


def test_exploding_features_are_said_to_be_exponential() -> None:
    def broken(width: int, depth: int) -> tuple[Any, ...]:
        model = nn.Sequential(nn.Linear(IN, width), *[Plain(width) for _ in range(depth)], nn.Linear(width, 1))
        return model, squared, row(3.0), None

    report = scaling.check(broken, widths=(32, 64, 128), depths=(4, 8, 16), seeds=6, lr=1e-8)
    size = next(v for v in report.verdicts if v.quantity == "feature size" and v.axis == "depth")
    assert size.status is Status.FAIL
    assert "a factor of 1." in size.advice
    assert "branches by 1/sqrt(depth)" in size.advice


def test_a_group_that_is_not_trained_is_said() -> None:
    def head_alone(width: int, depth: int) -> tuple[Any, ...]:
        model, groups = made("mup", width, depth, lr=1e-4)
        return model, squared, row(3.0), torch.optim.SGD(groups[1:])

    report = scaling.check(head_alone, widths=(16, 24, 32), depths=(3, 4, 5), seeds=2)
    assert report.of("BC") is Status.FAIL
    assert "the updates of blocks.0 do not decrease the loss" in report.details()


@pytest.mark.parametrize("span", [1.02, 1.5, 3.0, 6.0, 30.0, 5000.0])
def test_axes_of_the_picture_have_few_plain_labels(span: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastfs.scaling import _plots

    values = [0.22, 0.22 * span**0.5, 0.22 * span]
    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [types.SimpleNamespace(size=size, value=value) for size, value in zip((4, 8, 16), values, strict=True)]
    _plots._draw(axes, points, lambda point: point.value)  # type: ignore[attr-defined]
    canvas.draw()
    low, high = axes.get_ylim()
    seen = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert 2 <= len(seen) <= 8
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))
    if span < 100:
        assert all(low <= float(text) <= high for text in seen)  # plain numbers


def test_a_step_beyond_first_order_is_said() -> None:
    report = scaling.check(factory("standard", lr=0.1), widths=(32, 64, 128), depths=(3, 4, 5), seeds=4)
    assert report.curvature > 1
    assert "deviates from first order" in str(report)
    assert any("loss decrease is not positive in" in v.advice for v in report.verdicts)


# Measurements


def test_a_point_is_what_the_formula_measures() -> None:
    model, groups = made("mup", 48, 5, lr=1e-3)
    optimizer = torch.optim.SGD(groups)
    before = [p.detach().clone() for p in model.parameters()]
    point = scaling.check_point(scaling.Parts(model, squared, row(), optimizer), 48, 5, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    moved = formula.measure(model, squared, row(), optimizer=optimizer, dtype=torch.float64)
    assert point.decrease == pytest.approx(-moved.loss_change.item())
    assert point.first_order_decrease == pytest.approx(moved.total_decrease.item())
    assert point.sensitivity == pytest.approx(moved.sensitivity[-1].item())
    assert point.cos_angle == pytest.approx(moved.stats.cos_angle[-1].item())
    assert point.update_rms == pytest.approx(moved.stats.update_rms[-1].item())
    assert point.feature_rms == pytest.approx(moved.stats.feature_rms[-1].item())
    assert list(point.contributions) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "output"]
    assert list(point.contributions.values()) == pytest.approx(moved.parameter_stats.aligned_decrease.tolist())


def test_random_streams_are_left_alone() -> None:
    state = torch.get_rng_state()
    first = scaling.check(factory("mup"), widths=(8, 16, 24), depths=(3, 4, 5), seeds=2)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again = scaling.check(factory("mup"), widths=(8, 16, 24), depths=(3, 4, 5), seeds=2)
    assert first.points == again.points


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_optimizers_by_name(optimizer: str) -> None:
    report = scaling.check(
        lambda w, d: (MLP(IN, w, d), squared, row(), None),
        widths=(16, 24, 32), depths=(3, 4, 5), seeds=2, optimizer=optimizer, lr=1e-4,
    )  # fmt: skip
    assert report.optimizer == {"sgd": "SGD", "adam": "Adam"}[optimizer]


def test_names_of_quantities(reports: Any) -> None:
    with pytest.raises(ValueError, match=r"no exponent of 'speed' over 'width'; there are: .*feature speed \(width\)"):
        reports["mup"].exponent("speed", "width")
    with pytest.raises(ValueError, match="one of SP, FL, LD, BC"):
        reports["mup"].of("XX")


def test_updates_lost_in_single_precision_are_said() -> None:
    with pytest.raises(scaling.FactoryError, match="lost in the rounding of the parameters"):
        scaling.check(factory("ntk", lr=1e-8), widths=(32, 48, 64), depths=(4, 6, 8), seeds=2, dtype=None)


def test_small_learning_rates_are_not_lost_in_the_rounding_of_parameters() -> None:
    found = []
    for scale in (1e-4, 1e-9):

        def small(width: int, depth: int, scale: Any = scale) -> tuple[Any, ...]:
            model, loss_fn, batch, groups = factory("ntk")(width, depth)
            return model, loss_fn, batch, [{**group, "lr": scale * group["lr"]} for group in groups]

        report = scaling.check(small, widths=(32, 48, 64), depths=(4, 6, 8), seeds=2)
        found.append([point.cos_angle for point in report.points])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_features_of_constant_size() -> None:
    def normalized(width: int, depth: int) -> tuple[Any, ...]:
        model = nn.Sequential(nn.Linear(IN, width), *(nn.RMSNorm(width) for _ in range(depth)), nn.Linear(width, 1))
        return model, squared, row(), torch.optim.SGD(model.parameters(), lr=1e-4)

    report = scaling.check(normalized, widths=(32, 48, 64), depths=(4, 6, 8), seeds=2, layers=r"^[1-9]\d*$")
    assert report.exponent("feature size", "depth").exponent == pytest.approx(0, abs=1e-3)
