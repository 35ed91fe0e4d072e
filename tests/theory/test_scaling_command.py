"""The check over widths and depths: wrong factories and arguments, and the command."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastfs import scaling
from fastfs._cli.app import app
from fastfs.models import MLP
from tests.helpers.scaling_cases import IN, factory, row, squared

SMALL = {"widths": (8, 16, 24), "depths": (3, 4, 5), "seeds": 2}


def nan_loss(model: Any, batch: Any) -> Any:
    return model(batch[0]).sum() * float("nan")


def fourth(model: Any, batch: Any) -> Any:
    return squared(model, batch) ** 4


def zero_head(width: int, depth: int) -> tuple[Any, ...]:
    model = MLP(IN, width, depth)
    nn.init.zeros_(model.head.weight)
    return model, squared, row(), torch.optim.SGD(model.head.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda w, d: 1 / 0, r"factory\(width=8, depth=4\) failed: ZeroDivisionError"),
        (lambda w, d: MLP(IN, w, d), r"expected \(model, loss_fn, batch, optimizer\), got MLP"),
        (lambda w, d: (1, 2, 3), "got a tuple of 3"),
        (lambda w, d: (3, squared, row(), None), "first item should be a torch.nn.Module, got int"),
        (lambda w, d: (MLP(IN, w, d), 3, row(), None), "second item should be loss_fn"),
        (lambda w, d: (MLP(IN, w, d), squared, row(), torch.optim.SGD), "fourth item should be an optimizer"),
        (lambda w, d: (MLP(IN, w, d), squared, row(), None), "no learning rate for some parameters: pass lr"),
        (lambda w, d: (MLP(IN, w, d), nan_loss, row(), []), "expected a finite loss, got nan|optimizer got an empty"),
        (lambda w, d: (m := MLP(IN, w, d), nan_loss, row(), torch.optim.SGD(m.parameters())), "width 8.*finite loss"),
        (
            lambda w, d: (m := MLP(IN, w, d), fourth, row(), torch.optim.SGD(m.parameters(), lr=1e35)),
            "width 8, depth 4, seed 0: .* is not finite; is the learning rate too large",
        ),
        (
            lambda w, d: (m := MLP(IN, w, d), squared, row(), torch.optim.SGD(m.parameters(), lr=0.0)),
            "do not move in the step",
        ),
        (lambda w, d: (m := MLP(IN, w, d), lambda m, b: m.odd, row(), torch.optim.SGD(m.parameters())), "no attribute"),
        (zero_head, "do not move in the step; an output initialized to zero"),
    ],
)
def test_factories_that_are_wrong(build: Any, message: str) -> None:
    with pytest.raises(scaling.FactoryError, match=message):
        scaling.check(build, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (8, 16)}, "widths: .* at least 3 different widths, got"),
        ({"depths": (4, 4, 8)}, "depths: .* at least 3 different depths"),
        ({"widths": (8, 16, 0)}, "integers of at least 1"),
        ({"seeds": 1}, "seeds"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.check(factory("mup"), **{**SMALL, **arguments})


# The command

FILE = """
    import torch
    from fastfs import scaling
    from fastfs.models import MLP

    def loss(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum()

    def build(scheme, width, depth):
        model = MLP(4, width, depth)
        groups = scaling.apply(model, scaling.mlp(depth, width, 4, scheme=scheme, input="sparse").scaled(lr=1e-4))
        return model, loss, (torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[3.0]])), groups

    def ntk(width, depth):
        return build("ntk", width, depth)

    def fsc(width, depth):
        return build("fsc", width, depth)

    def wrong(width, depth):
        raise RuntimeError("[no] data")

    number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Any:
    path = tmp_path / "factories.py"
    path.write_text(textwrap.dedent(FILE))
    return path


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["scaling-check", *map(str, arguments)])


def test_command_fails_with_the_table_and_the_files(file: Any, tmp_path: Path) -> None:
    sizes = ("--widths", "32,64,128,256", "--depths", "4,6,8", "--at-depth", 4, "--seeds", 8)
    result = command(f"{file}:ntk", *sizes, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    verdict, what, first, written = result.stdout.splitlines()
    assert verdict.startswith("FAIL: SP ")
    assert verdict.endswith("(SGD, widths 32 to 256 at depth 4, depths 4 to 8 at width 256, 8 seeds)")
    assert what.startswith("Not 0 within 0.15, exponents of FL ")
    assert "FL feature speed over width (-0" in what
    assert "FL sensitivity over width (-0" in what
    assert first.startswith("Do first, then check again: FL over depth: sensitivity grows like depth^+")
    assert "multiply the output's std by depth^+" in first
    assert written.startswith("Written to ")
    exponents = pandas.read_csv(tmp_path / "out" / "scaling-check.csv")
    speed = exponents[(exponents["quantity"] == "feature speed") & (exponents["axis"] == "width")].iloc[0]
    assert speed["status"] == "FAIL"
    assert speed["low"] < speed["exponent"] < speed["high"]
    points = pandas.read_csv(tmp_path / "out" / "scaling-check-points.csv")
    assert len(points) == 8 * (4 + 3)
    assert {"contribution:blocks.0", "contribution:output", "cos_angle", "decrease"} <= set(points.columns)
    assert (tmp_path / "out" / "scaling-check.png").read_bytes()[:4] == b"\x89PNG"


def test_command_says_more_if_it_is_asked(file: Any, tmp_path: Path) -> None:
    sizes = ("--widths", "32,64,128,256", "--depths", "4,6,8", "--at-depth", 4, "--seeds", 8)
    result = command(f"{file}:ntk", *sizes, "--verbose", "--json", tmp_path / "result.json")
    lines = result.stdout.splitlines()
    found = json.loads((tmp_path / "result.json").read_text())
    assert lines[:3] == found["verdict"]
    assert lines[3].startswith("Exponents over width (at depth 4) and depth (at width 256)")
    assert any(line.startswith("FL over width: feature speed falls like width^-0") for line in lines[4:])
    assert any(line.startswith("FL over width: sensitivity falls like width^-0") for line in lines[4:])
    assert found["status"] == "FAIL"
    assert set(found["desiderata"]) == {"SP", "FL", "LD", "BC"}
    speed = next(row for row in found["exponents"] if (row["quantity"], row["axis"]) == ("feature speed", "width"))
    assert speed["status"] == "FAIL"
    assert speed["low"] < speed["exponent"] < speed["high"] < -0.15
    assert len(found["points"]) == 8 * (4 + 3)


def test_command_tells_unclear_from_pass(file: Any) -> None:
    result = command(f"{file}:fsc", "--widths", "48,64,80", "--depths", "4,5,6", "--seeds", 2)
    assert result.exit_code == 3, result.output
    verdict, what, first = result.stdout.splitlines()
    assert verdict.startswith("UNCLEAR: SP ")
    assert what.startswith("Unclear whether 0 within 0.15, exponents of ")
    assert re.match(
        r"To decide (SP|FL|LD|BC) .* over (width|depth): (about \d+|this would take more than 1000) seeds", first
    )


def test_command_passes(file: Any) -> None:
    sizes = ("--widths", "64,128,256", "--depths", "8,12,16,24", "--at-depth", 4, "--at-width", 256)
    result = command(f"{file}:fsc", *sizes, "--seeds", 8, "--tolerance", 0.9)
    assert result.exit_code == 0, result.output
    verdict, what, first = result.stdout.splitlines()
    assert verdict.startswith("PASS: SP PASS, FL PASS, LD PASS, BC PASS (")
    assert what == "All exponents of size, speed, loss decrease and balance are 0 within 0.9."
    assert first == "Nothing has to change."


def test_command_finds_modules(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    result = command("factories:fsc", "--widths", "8,16,24", "--depths", "3,4,5", "--seeds", 2)
    assert result.exit_code in (1, 3), result.output


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("{}:nothing", (), "has no attribute 'nothing'. It has: MLP, loss, build, ntk, fsc, wrong"),
        ("{}:number", (), "expected a function of width and depth, got int"),
        ("{}", (), "expected module:attribute or path/to/file.py:attribute"),
        ("missing.py:f", (), "missing.py: no such file"),
        ("no_such_module_here:f", (), "importing no_such_module_here failed: ModuleNotFoundError"),
        ("{}:wrong", (), "failed: RuntimeError: [no] data"),
        ("{}:fsc", ("--widths", "8,16"), "at least 3 different widths, got [8, 16]"),
        ("{}:fsc", ("--widths", "8;16"), "--widths: expected integers such as 64,128,256, got '8;16'"),
        ("{}:fsc", ("--layers", "xyz"), "'xyz' matches no module"),
    ],
)
def test_command_errors(file: Any, target: str, arguments: tuple[Any, ...], message: str) -> None:
    given = {"--widths": "8,16,24", "--depths": "3,4,5", "--seeds": "2"}
    given.update(zip(arguments[::2], arguments[1::2], strict=True))
    result = command(target.format(file), *[x for pair in given.items() for x in pair])
    assert result.exit_code == 2, result.output
    assert f"fastfs scaling-check: {''}" in result.output
    assert message in result.output.replace("\n", "")


def test_a_script_that_ends_itself_measures_nothing(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\nsys.exit(0)\n")
    done = CliRunner().invoke(app, ["scaling-check", f"{path}:make", "--widths", "4,8,16", "--depths", "2,4,6"])
    assert done.exit_code == 2
    assert "SystemExit" in done.output
    path.write_text("x = 1\n")
    done = CliRunner().invoke(app, ["scaling-check", f"{path}:x", "--widths", "4,8,16", "--depths", "2,4,6"])
    assert f"{path}:x: expected a function" in done.output.replace("\n", "")


def test_options_that_would_be_ignored_are_refused() -> None:
    def with_optimizer(width: int, depth: int) -> tuple[Any, ...]:
        *parts, groups = factory("mup")(width, depth)
        return *parts, torch.optim.SGD(groups)

    with pytest.raises(ValueError, match="returns an optimizer, which has its own learning rates"):
        scaling.check(with_optimizer, widths=(32, 48, 64), depths=(4, 6, 8), seeds=2, lr=0.1)
    with pytest.raises(ValueError, match="returns parameter groups with their own learning rates"):
        scaling.check(factory("mup"), widths=(32, 48, 64), depths=(4, 6, 8), seeds=2, lr=0.1)
    with pytest.raises(ValueError, match="returns an optimizer, SGD: do not pass 'adam'"):
        scaling.check(with_optimizer, widths=(32, 48, 64), depths=(4, 6, 8), seeds=2, optimizer="adam")
    for build in (factory("mup"), with_optimizer):
        with pytest.raises(ValueError, match="expected one of sgd, adam, adamw, got 'lion'"):
            scaling.check(build, widths=(32, 48, 64), depths=(4, 6, 8), seeds=2, optimizer="lion")


def test_command_refuses_options_that_would_be_ignored(file: Any) -> None:
    sizes = ("--widths", "8,16,24", "--depths", "3,4,5", "--seeds", 2)
    for option, value, message in (
        ("--lr", 0.1, "returns parameter groups with their own learning rates: do not pass lr"),
        ("--optimizer", "lion", "expected one of sgd, adam, adamw, got 'lion'"),
    ):
        done = command(f"{file}:fsc", *sizes, option, value)
        assert done.exit_code == 2, done.output
        assert message in done.output.replace("\n", "")
