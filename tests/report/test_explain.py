"""``fastfs explain`` and the guide: every number has a paragraph, and each sign is found in records that have it."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from fastfs._cli.app import app
from fastfs._record.columns import BY_NAME, QUANTITIES
from fastfs._record.row_reasons import REASONS
from fastfs._record.writing.alert_rules import default_alerts
from fastfs._report.explain import explain
from fastfs._report.guide import Guide
from fastfs._report.signs import CHANGE, WRONG
from scripts.guide import PAGE, written
from tests.helpers import report_cases as cases

pytest.importorskip("pandas")

ROOT = Path(__file__).resolve().parents[2]
CASES = (
    "learning-rate-too-high",
    "learning-rate-too-low",
    "dead-layer",
    "residual-scale",
    "gradient-scale",
    "frozen-by-mistake",
    "sixteen-bits",
)
STEPS = range(0, 40, 4)


def test_everything_has_a_paragraph() -> None:
    guide = Guide.read()
    assert [c.name for c in QUANTITIES if guide.about("columns", c.name) is None] == []
    assert [r.name for r in default_alerts() if guide.about("alerts", r.name) is None] == []
    assert [r for r in REASONS if r and guide.about("reasons", r) is None] == []
    about = [(kind, name) for one in guide.paragraphs for kind, names in one.about.items() for name in names]
    assert len(about) == len(set(about))
    assert {kind for kind, _ in about} <= {"columns", "alerts", "reasons", "signs", "about"}
    assert {name for kind, name in about if kind == "columns"} <= BY_NAME.keys()
    assert {name for kind, name in about if kind == "alerts"} == {rule.name for rule in default_alerts()}
    assert len({one.anchor for one in guide.paragraphs}) == len(guide.paragraphs)
    code = (ROOT / "fastfs/_report/signs.py").read_text()
    named = set(re.findall(r'guide.about\("signs", "(\w+)"\)', code))
    named |= {"logits", "experts", "off", "growth", "vanishing"}
    assert {name for kind, name in about if kind == "signs"} == named


def test_the_page_of_the_documentation_has_the_paragraphs() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m scripts.guide"
    for name in CASES:
        assert f"diagnosis.py {name}\n" in page


def test_rules_are_found_by_their_name_and_reasons_by_their_beginning() -> None:
    guide = Guide.read()
    for kind, name, anchor in (
        ("alerts", "large update 2", "speed-and-relative-update"),
        ("reasons", "rounding noise in a layer below", "noise-floor"),
        ("reasons", "a reason of a later version", "rows-that-are-not-valid"),
    ):
        found = guide.about(kind, name)
        assert found is not None
        assert found.anchor == anchor
    assert guide.about("alerts", "a rule of the user") is None
    assert guide.about("columns", "a column of the user") is None


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_trainings_of_the_guide(case: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    examples = runpy.run_path(str(ROOT / "examples/diagnosis.py"))
    assert set(examples["CASES"]) == {*CASES, "missing-mup"}
    losses = examples["run"](case, tmp_path)
    assert (tmp_path / f"{case}.png").stat().st_size > 10_000
    before, after = (explain(tmp_path / case / f"{which}.jsonl")[1] for which in ("before", "after"))
    assert before[0].severity >= CHANGE
    assert before[0].paragraph is not None
    assert before[0].paragraph.anchor == examples["CASES"][case].paragraph
    assert [sign.text for sign in after if sign.severity >= CHANGE] == []
    assert len(before) == len(after) == 3
    if case in ("learning-rate-too-high", "learning-rate-too-low", "residual-scale", "gradient-scale"):
        assert losses["after"] < 0.7 * losses["before"]


Change = Callable[[dict[str, Any]], None]


def layer_values(column: str, function: Callable[[int, Any, int], Any]) -> Change:
    def change(line: dict[str, Any]) -> None:
        values = line["layers"][column]
        line["layers"][column] = [function(i, v, line["step"]) for i, v in enumerate(values)]

    return change


def all_of(*changes: Change) -> Change:
    def change_all(line: dict[str, Any]) -> None:
        for change in changes:
            change(line)

    return change_all


def chain(line: dict[str, Any]) -> None:
    """Makes aligned decreases that grow from layer to layer."""
    line["layers"]["aligned_decrease"] = [0.01 * (i + 1) for i in range(len(line["layers"]["angle"]))]


def record(tmp_path: Path, change: Change, *events: dict[str, Any], layers: int = 6, **header: Any) -> Path:
    names = cases.names_of(layers)
    cuts = cases.structure(names)
    cuts["layers"]["cut"] = [True] * layers
    lines = [cases.measured(names, step, invalid=0.0) for step in STEPS]
    for line in lines:
        chain(line)
        change(line)
    return cases.write(tmp_path / "record.jsonl", [cases.header(names, **header), cuts, *lines, *events])


def nothing(line: dict[str, Any]) -> None:
    """Leaves a step as it is."""


SIGNS: dict[str, tuple[Change, str]] = {
    "large updates": (layer_values("relative_update", lambda i, v, step: 0.8), "speed-and-relative-update"),
    "large residuals": (layer_values("residual", lambda i, v, step: -2.0), "speed-and-relative-update"),
    "small decreases": (
        all_of(
            layer_values("aligned_decrease", lambda i, v, step: 1e-4 * v), layer_values("residual", lambda *_: 1e-4)
        ),
        "speed-and-relative-update",
    ),
    "uphill": (layer_values("aligned_decrease", lambda i, v, step: -v if step % 8 else v), "aligned-decrease"),
    "growth": (layer_values("feature_rms", lambda i, v, step: 3.0**i), "feature-size"),
    "shrinking": (layer_values("feature_rms", lambda i, v, step: 3.0**-i), "feature-size"),
    "a dead block": (
        all_of(
            layer_values("aligned_decrease", lambda i, v, step: 0.01 * (i + 1 - (i >= 2))),
            layer_values("gradient_norm", lambda i, v, step: 1e-4 if i == 2 else 0.1),
        ),
        "backward-size",
    ),
    "a block that does not move": (
        layer_values("parameter_update_norm", lambda i, v, step: 0.0 if i == 1 else v),
        "parameter-norms",
    ),
    "no angle": (layer_values("cos_angle", lambda i, v, step: 1e-3), "angle"),
    "vanishing gradients": (layer_values("backward_rms", lambda i, v, step: 10.0 ** (i - 9)), "backward-size"),
    "layers without a gradient": (
        layer_values("gradient_norm", lambda i, v, step: 0.0 if i < 3 and step else v),
        "backward-size",
    ),
    "nothing moves": (layer_values("parameter_update_norm", lambda *_: 0.0), "parameter-norms"),
    "too much weight decay": (
        layer_values("parameter_norm", lambda i, v, step: 0.7**step if i else 1.0),
        "parameter-norms",
    ),
    "a loss that rises": (lambda line: line.update(loss=2.3 if line["step"] < 16 else 9.0), "loss"),
    "overshoot": (lambda line: line.update(overshoot=1.7), "curvature-along-the-step"),
    "large logits": (lambda line: line["layers"].update(attention_logit_max=[3.0, 80.0, 5.0] * 2), "attention-logits"),
    "one expert": (lambda line: line["layers"].update(expert_load_max=[1.0, 1.2, 3.8] * 2), "load-of-experts"),
    "dead units": (lambda line: line["layers"].update(dead_share=[0.0, 0.1, 0.9] * 2), "dead-and-saturated-features"),
    "another scale": (lambda line: line.update(gradient_scale=4.0), "gradient-scale"),
    "not valid": (
        all_of(layer_values("valid", lambda *_: False), layer_values("why", lambda *_: "rounding noise")),
        "noise-floor",
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_in_records(name: str, tmp_path: Path) -> None:
    change, anchor = SIGNS[name]
    found = explain(record(tmp_path, change))[1]
    assert found[0].severity >= CHANGE, [sign.text for sign in found]
    assert found[0].paragraph is not None
    assert found[0].paragraph.anchor == anchor
    assert "nan" not in found[0].text


def test_nothing_stands_out_in_a_healthy_record(tmp_path: Path) -> None:
    for layers in (1, 2, 3, 40):
        found = explain(record(tmp_path, nothing, layers=layers))[1]
        assert [sign.severity < CHANGE for sign in found] == [True] * 3, [sign.text for sign in found]


@pytest.mark.parametrize("name", ["uphill", "no angle"])
def test_the_update_need_not_follow_a_probe(name: str, tmp_path: Path) -> None:
    assert explain(record(tmp_path, SIGNS[name][0], mode="probe"))[1][0].severity < CHANGE


def test_events_are_signs(tmp_path: Path) -> None:
    wrong = {**cases.alert(8, layer="blocks.2"), "rule": "nonfinite"}
    mine = [{**cases.alert(step, layer=None), "rule": "my rule", "message": "too slow"} for step in (4, 8)]
    skipped = [{"kind": "skipped", "run": "r1", "step": 100 + i, "time": 0.0, "reason": "infinite"} for i in range(5)]
    path = record(tmp_path, nothing, wrong, *mine, *skipped, untrained=["blocks.1.weight"])
    found = explain(path)[1]
    assert found[0].text == "Numbers that are not finite: 1 alert at step 8 in blocks.2."
    assert found[1].text == "blocks.1.weight require a gradient, and no optimizer has them: they do not train."
    assert found[2].text == "5 steps were skipped; the last one because infinite."
    assert found[0].severity >= WRONG
    path = record(tmp_path, nothing, *mine)
    assert explain(path)[1][0].text == "Alert my rule: 2 times, the first at step 4: too slow."
    assert explain(path)[1][0].paragraph is None


def test_a_cause_is_said_once(tmp_path: Path) -> None:
    broken = all_of(
        layer_values("valid", lambda i, v, step: step < 8),
        layer_values("why", lambda i, v, step: None if step < 8 else "values that are not finite"),
    )
    alerts = [{**cases.alert(step, layer="blocks.2"), "rule": "nonfinite"} for step in (8, 12)]
    found = [sign.text for sign in explain(record(tmp_path, broken, *alerts))[1] if sign.severity >= CHANGE]
    assert found == ["Numbers that are not finite: 2 alerts, the first at step 8 in blocks.2."]
    found = [sign.text for sign in explain(record(tmp_path, broken))[1] if sign.severity >= CHANGE]
    assert len(found) == 1
    assert "80 % of the rows are not valid; most often (48): values that are not finite." in found[0]


def test_residuals_of_small_decreases_and_single_large_steps_are_no_sign(tmp_path: Path) -> None:
    small = all_of(
        layer_values("residual", lambda i, v, step: -1.5 if step >= 20 else 0.01),
        layer_values("cos_angle", lambda i, v, step: 0.03 if step >= 20 else 0.2),
    )
    single = layer_values("residual", lambda i, v, step: -2.0 if step in (24, 36) else 0.01)
    for change in (small, single):
        texts = [sign.text for sign in explain(record(tmp_path, change))[1] if sign.severity >= CHANGE]
        assert [text for text in texts if "first order" in text] == []


def test_frozen_layers_are_no_sign(tmp_path: Path) -> None:
    norms = ("gradient_norm", "parameter_norm", "parameter_update_norm")
    frozen = all_of(*(layer_values(norm, lambda i, v, step: 0.0 if i < 3 else v) for norm in norms))
    assert [sign.text for sign in explain(record(tmp_path, frozen))[1] if sign.severity >= CHANGE] == []


def test_the_first_step_of_a_warm_up_is_no_sign(tmp_path: Path) -> None:
    still = layer_values("parameter_update_norm", lambda *_: 0.0)
    path = record(tmp_path, still)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")  # of which one is a measured step
    assert [sign.text for sign in explain(path)[1] if sign.severity >= CHANGE] == []


def run(*arguments: Any) -> Any:
    return typer.testing.CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    path = record(tmp_path, SIGNS["growth"][0])
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "Features grow by a factor 3 from block to block, 243 from" in " ".join(result.output.split())
    assert "1/sqrt(depth)" in result.output
    found = json.loads(run(path, "--json", "-").stdout)
    assert found["run"] == "r1"
    first, *_ = found["findings"]
    assert first["anchor"] == "feature-size"
    assert first["numbers"]["total"] == pytest.approx(243)
    assert first["paragraph"] in PAGE.read_text()
    assert len(found["findings"]) == 3
    folder = run(tmp_path, "--json", tmp_path / "found.json")
    assert folder.exit_code == 0
    assert json.loads((tmp_path / "found.json").read_text())["findings"] == found["findings"]


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (None, (), "no such file or folder"),
        ([cases.header(["a"])], (), "run r1: no measured step yet, so there is nothing to explain"),
        ([cases.header(["a"])], ("--run", "r2"), "no run 'r2' in the record; it has: r1"),
        ([{"kind": "other"}], (), "expected the header of a record"),
        (cases.run_lines(2, 4), ("--json", "{folder}"), "expected"),
    ],
)
def test_what_cannot_be_explained(tmp_path: Path, lines: Any, arguments: Any, message: str) -> None:
    path = tmp_path / "record.jsonl"
    if lines is not None:
        cases.write(path, lines)
    result = run(path, *(a.format(folder=tmp_path) for a in arguments))
    assert result.exit_code == 1
    assert message in result.output


def test_a_record_of_a_few_nulls(tmp_path: Path) -> None:
    columns = [c for c in cases.measured(["a"], 0)["layers"] if c not in ("valid", "why", "method")]
    change = all_of(*(layer_values(c, lambda *_: None) for c in columns))
    found = explain(record(tmp_path, change, layers=3))[1]
    assert [sign for sign in found if sign.severity >= CHANGE] == []
