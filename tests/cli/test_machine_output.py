"""What machines read: ``--json`` of every command, ``--version`` and the completion of the shell."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastfs._cli.app import app
from fastfs._core import ops
from fastfs._utils.json_output import strict_json, write_json
from fastfs._version import __version__
from tests.helpers import report_cases as cases

FACTORY = """
import torch
from fastfs.models import MLP

def loss(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().sum()

def make(width, depth):
    model = MLP(4, width, depth)
    return model, loss, (torch.ones(1, 4), torch.ones(1, 1)), torch.optim.SGD(model.parameters(), lr=1e-4)
"""
SCALING = ("--widths", "8,16,24", "--depths", "3,4,5", "--seeds", "2")


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """The arguments of every command that takes ``--json``, with small work."""
    record = cases.write(tmp_path / "record.jsonl", cases.run_lines(4, 30, every=2, alerts=(6,), groups=True))
    other = cases.write(tmp_path / "other.jsonl", [{**line, "run": "r2"} for line in cases.run_lines(4, 30, every=2)])
    sized = []
    for width in (8, 16, 32):
        lines = [{**line, "run": f"w{width}"} for line in cases.run_lines(4, 10, every=2, invalid=0)]
        lines[0]["metadata"] = {"width": width, "depth": 4}
        sized.append(cases.write(tmp_path / f"{width}.jsonl", lines))
    (tmp_path / "factory.py").write_text(FACTORY)
    return {
        "doctor": ["doctor"],
        "report": ["report", str(record), "-o", str(tmp_path / "page.html")],
        "explain": ["explain", str(record)],
        "diff": ["diff", str(record), str(other)],
        "transfer": ["transfer", *map(str, sized)],
        "watch": ["watch", "--once", str(record)],
        "demo": ["demo", "--model", "resnet", "--steps", "3", "--every", "2", "--out", str(tmp_path / "demo")],
        "scaling-check": ["scaling-check", f"{tmp_path / 'factory.py'}:make", *SCALING],
        "reproduce": ["reproduce", "--quick", "--only", "b", "--seeds", "2", "--out", str(tmp_path / "paper")],
        "bench": ["bench", "--device", "cpu", "--seconds", "1"],
    }


def strict(text: str) -> Any:
    """Parses JSON, which ends with one newline and has no NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert text.endswith("}\n")
    return json.loads(text, parse_constant=refuse)


def test_every_command_takes_json_or_says_why_not(commands: dict[str, list[str]]) -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(commands)
    for name in commands:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert "Also write the result as JSON; - is standard output, without the text." in " ".join(
            shown.replace("│", " ").split()
        )


@pytest.mark.slow
@pytest.mark.skipif(not ops.native_available(), reason="no native core")
@pytest.mark.parametrize(
    ("name", "expected", "text"),
    [
        ("doctor", {"ok", "findings"}, "Nothing is wrong"),
        ("report", {"page", "bytes", "run", "title", "cards", "findings", "alerts"}, "page.html ("),
        ("explain", {"run", "record", "findings"}, "15 measured steps"),
        ("diff", {"parted", "verdict", "layers", "steps", "partings", "notes"}, "in common"),
        ("transfer", {"status", "axes", "exponents", "runs", "settings"}, "over width (8, 16, 32)"),
        ("watch", {"run", "step", "loss", "layers", "alerts"}, "blocks.3"),
        ("demo", {"made_by", "tasks", "torch", "device", "threads"}, "What the numbers mean"),
        ("scaling-check", {"status", "verdict", "exponents", "points", "settings"}, "UNCLEAR"),
        ("reproduce", {"made_by", "figures", "checks", "passed"}, "Written to"),
        ("bench", {"environment", "results", "verdict", "conclusion"}, "GB/s"),
    ],
)
def test_json_goes_to_a_file_or_alone_to_standard_output(
    commands: dict[str, list[str]], tmp_path: Path, name: str, expected: set[str], text: str
) -> None:
    program = [sys.executable, "-m", "fastfs._cli.app", *commands[name]]
    alone = subprocess.run([*program, "--json", "-"], capture_output=True, text=True, check=False, timeout=300)
    assert alone.returncode in (0, 1, 3), alone.stderr
    assert expected <= set(strict(alone.stdout))
    assert text in alone.stderr
    path = tmp_path / "new" / "result.json"
    both = subprocess.run([*program, "--json", str(path)], capture_output=True, text=True, check=False, timeout=300)
    assert both.returncode == alone.returncode
    assert text in both.stdout
    assert set(strict(path.read_text())) == set(strict(alone.stdout))
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "name", ["doctor", "report", "explain", "diff", "transfer", "watch", "demo", "scaling-check", "reproduce", "bench"]
)
def test_a_folder_in_place_of_the_file_is_refused_before_the_work(
    commands: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, [*commands[name], "--json", str(tmp_path)])
    assert done.exit_code in (1, 2)
    assert f"fastfs {name}: {tmp_path}: is a folder, expected a regular file" in done.stderr.replace("\n", "")
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_watch_writes_json_once_only(commands: dict[str, list[str]]) -> None:
    arguments = [word for word in commands["watch"] if word != "--once"]
    done = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert done.exit_code == 2
    assert "use it with --once" in " ".join(done.stderr.replace("│", " ").split())


def test_watch_writes_what_the_table_shows(commands: dict[str, list[str]], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*commands["watch"], "--json", "-"])
    found = strict(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "measured"][-1]
    predicted = [line for line in lines if line["kind"] == "predicted"][-1]
    assert (found["step"], found["measured_step"], found["predicted_step"]) == (29, 28, 29)
    assert found["alerts"] == {"angle_collapse": 1}
    assert [row["name"] for row in found["layers"]] == [*cases.names_of(4), "first half", "second half"]
    assert [row["group"] for row in found["layers"]] == [False] * 4 + [True] * 2
    for i, row in enumerate(found["layers"][:4]):
        for column in ("angle", "update_rms", "relative_update", "valid", "why"):
            assert row[column] == measured["layers"][column][i]
        assert row["predicted_update_rms"] == predicted["layers"]["update_rms"][i]
        assert 1 <= row["predicted_factor"] <= 3
    # Without comparisons there is no factor, and no prediction.
    cases.write(tmp_path / "record.jsonl", cases.run_lines(4, 4, every=2))
    rows = strict(CliRunner().invoke(app, [*commands["watch"], "--json", "-"]).stdout)["layers"]
    assert all(row["predicted_update_rms"] is row["predicted_factor"] is None for row in rows)


def test_what_json_does_not_have_is_null_or_an_error(tmp_path: Path) -> None:
    text = strict_json({"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "NaN"}, "e": torch.__version__})
    assert strict(text) == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}, "e": torch.__version__}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_one_line() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    core = f"in use ({ops.build_info()['instruction_set']})" if ops.native_available() else "none (slow reference)"
    assert done.stdout == f"fastfs {__version__}, torch {torch.__version__}, native core {core}\n"


def test_the_version_says_that_the_core_refuses_to_work() -> None:
    if not ops.native_available():
        pytest.skip("no native core")
    program = [sys.executable, "-m", "fastfs._cli.app", "--version"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={"FASTFS_CPU": "neon"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "native core refuses to work (" in done.stdout
    assert done.stdout.count("\n") == 1


# Completion

_COMPLETE = """
import os, sys
os.environ.update({"_FASTFS_COMPLETE": "complete_bash", "COMP_WORDS": sys.argv[1], "COMP_CWORD": sys.argv[2]})
from fastfs._cli.app import app
try:
    app(prog_name="fastfs", args=[])
finally:
    heavy = [name for name in ("torch", "numpy", "pandas", "matplotlib", "plotly") if name in sys.modules]
    print("imported:", heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "index", "expected"),
    [
        (
            "fastfs ",
            1,
            {"demo", "report", "explain", "diff", "transfer", "watch", "reproduce", "doctor", "bench", "scaling-check"},
        ),
        ("fastfs re", 1, {"report", "reproduce"}),
        ("fastfs demo --model ", 3, {"transformer", "resnet", "all"}),
        ("fastfs watch --o", 2, {"--once", "--order"}),
    ],
)
def test_completion_knows_commands_and_options_without_torch(words: str, index: int, expected: set[str]) -> None:
    program = [sys.executable, "-c", _COMPLETE, words, str(index)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert set(done.stdout.split()) == expected, done.stderr
    assert "imported: []" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_the_shell_is_shown(shell: str) -> None:
    program = [sys.executable, "-c", "from fastfs._cli.app import app; app(prog_name='fastfs')", "--show-completion"]
    done = subprocess.run([*program, shell], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "_FASTFS_COMPLETE" in done.stdout


def test_the_package_imports_torch_at_first_use() -> None:
    script = (
        "import sys, fastfs; assert 'torch' not in sys.modules; assert fastfs.__version__; dir(fastfs);"
        "assert 'torch' not in sys.modules;"
        "assert all(getattr(fastfs, name) is getattr(fastfs, name) for name in fastfs.__all__);"
        "import torch; assert torch.ops.fastfs.feature_stats; print('good')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "good\n", done.stderr


def test_the_first_use_may_be_inside_a_compiled_function() -> None:
    script = (
        "import torch, fastfs\n"
        "f = torch.compile(lambda *x: fastfs.feature_stats(*x).angle, backend='aot_eager', fullgraph=True)\n"
        "x = [torch.randn(8, 16) for _ in range(3)]\n"
        "assert torch.equal(f(*x), fastfs.feature_stats(*x).angle)\n"
        "print('good')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "good\n", done.stderr
