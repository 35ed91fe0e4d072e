"""``fastfs watch``: what it shows of a record, also on a real terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastfs._record.reading.latest import LatestRun
from fastfs._record.reading.locate import find_record
from fastfs._record.schema import Checker
from fastfs._report.watch import screen, watch
from tests.helpers import report_cases as cases
from tests.helpers.report_cases import append

NOW = cases.START + 1000


def checked(lines: Any) -> Any:
    """Checks lines as a follower does, and drops those that do not conform."""
    checker, found = Checker(), []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(checker.check(line))
    return found


def text_of(
    lines: Any, width: int = 120, height: Any = None, order: str = "worst", search: str = "", now: Any = NOW
) -> Any:
    state = LatestRun()
    state.update(checked(lines))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen(state, now=now, width=width, height=height, order=order, search=search))
    return console.export_text()


NAMES = cases.names_of(2)


def test_several_ranks_are_one_run_and_say_what_differs() -> None:
    assert "ranks" not in text_of(cases.run_lines(4, 41, every=10))
    text = text_of(cases.with_ranks(cases.run_lines(4, 41, every=10), 8))
    assert "8 ranks\n" in re.sub(" +\n", "\n", text)
    assert "apart" not in text
    text = text_of(cases.with_ranks(cases.run_lines(4, 41, every=10), 8, missing_from=17, apart=(5, 2, 20)))
    assert "7 of 8 ranks since step 17" in text
    assert "rank 5 stands apart at blocks.2 (last 3 measured steps)" in text
    text = text_of(cases.with_ranks(cases.run_lines(4, 41, every=10), 8, apart=(5, 2, 30)))  # in two steps only
    assert "apart" not in text
    lines = cases.with_ranks(cases.run_lines(4, 31), 8, missing_from=17)
    assert "7 of" not in text_of([*lines, *cases.with_ranks(cases.run_lines(4, 33), 8)[-2:]])  # it has come back


def test_the_table_has_the_last_numbers() -> None:
    lines = cases.run_lines(4, 41, every=10, alerts=(17,), groups=True)
    lines[-1]["loss"] = 1.2345
    lines[-1]["gradient_scale"] = 2.0
    text = text_of(lines)
    assert "step 40" in text
    assert "loss 1.2345" in text
    assert "4 steps/s" in text
    assert "last row 16 min 30 s ago" in text
    assert "measured at step 40, predicted at step 39" in text
    assert "gradient scale 2.000" in text
    assert "alerts: angle_collapse (1)" in text
    row = next(line for line in text.splitlines() if re.match(r" *2 +blocks\.2", line))
    values = lines[-1]["layers"]
    before = next(line for line in reversed(lines) if line["kind"] == "predicted")["layers"]
    assert f"{values['angle'][2]:.3f}" in row
    assert f"{values['update_rms'][2]:.2e}" in row
    assert f"{values['relative_update'][2]:.2e}" in row
    assert f"{before['update_rms'][2]:.2e}" in row
    assert "no cut" in next(line for line in text.splitlines() if "blocks.3" in line)
    assert "first half" in text


def test_invalid_cells_say_why() -> None:
    text = text_of(cases.run_lines(2, 3, invalid=1.0))
    assert text.count("no: update below 5x the noise floor") == 2


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 12), (200, 50)])
def test_a_hundred_layers_fit_and_the_worst_are_shown(width: int, height: int) -> None:
    lines = cases.run_lines(100, 3, invalid=0.0, alerts=(1,))
    lines[-1]["layers"]["valid"][42] = False
    lines[-1]["layers"]["why"][42] = "too small"
    text = text_of(lines, width, height)
    shown = text.rstrip("\n").splitlines()
    assert len(shown) <= height
    assert max(map(len, shown)) <= width
    layers = re.findall(r"blocks\.\d+(?= )", "\n".join(shown[5:]))
    assert layers[:2] == ["blocks.1", "blocks.42"]  # first the alert, then the row that is not valid
    assert "worst of 100" in text
    ordered = text_of(lines, width, height, order="layer")
    assert "blocks.0 " in ordered
    assert "the first" in ordered
    found = text_of(lines, width, height, search="blocks.77")
    assert "blocks.77" in found
    assert "blocks.1 " not in found.split("valid")[1]


def test_another_run_starts_afresh_and_a_resumed_run_continues() -> None:
    lines = cases.run_lines(3, 5, alerts=(2,))
    resumed = [cases.header(cases.names_of(3), resumed_at=3), cases.measured(cases.names_of(3), 3)]
    text = text_of([*lines, *resumed])
    assert "step 3 " in text
    assert "alerts: angle_collapse (1)" in text
    text = text_of([*lines, {**cases.header(["other"]), "run": "r2"}])
    assert "no step yet" in text
    assert "alerts" not in text


def test_control_characters_do_not_reach_the_terminal() -> None:
    name = "bad\x1b[2Jname\x07 [red]markup[/red]"
    lines = cases.run_lines(1, 2, names=[name])
    lines.append({**cases.alert(1, layer=name), "message": name})
    text = text_of(lines)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]markup[/red]" in text


def test_lines_without_values() -> None:
    empty = {"kind": "measured", "run": "r1", "step": 1, "time": None, "loss": None, "layers": {"angle": [None]}}
    text = text_of(
        [cases.header(cases.names_of(2)), empty, {"kind": "predicted", "run": "r1"}, {"kind": "new", "run": "r1"}]
    )
    assert "blocks.1" in text
    assert "no step yet" in text
    text = text_of([cases.header(NAMES), {**empty, "time": 1.0, "layers": {"angle": [None, None]}}])
    assert "step 1  loss -  - steps/s" in text
    assert re.search(r"blocks\.1 +-( +-)* *$", text, re.M)
    assert "no step yet" in text_of([cases.header([])])
    assert "waiting for a run" in text_of([])


def cli(*arguments: Any, **more: Any) -> Any:
    command = [sys.executable, "-m", "fastfs._cli.app", "watch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)


def test_once_prints_one_table_and_ends(tmp_path: Path) -> None:
    cases.write(tmp_path / "record.jsonl", cases.run_lines(100, 3))
    done = cli(tmp_path, "--once", env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0
    assert done.stdout.count("blocks.") >= 100
    assert "\x1b" not in done.stdout


def test_which_record_a_folder_stands_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no record in this folder"):
        find_record(tmp_path)
    parts = tmp_path / "numbers.parquet"
    parts.mkdir()
    (parts / "part-r1-0.parquet").touch()
    assert find_record(tmp_path) == find_record(parts) == parts
    with pytest.raises(ValueError, match="only JSONL records can be followed"):
        watch(tmp_path, once=True)
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(ValueError, match="several records in this folder, name one of them: numbers"):
        find_record(tmp_path)
    (tmp_path / "record.jsonl").touch()
    assert find_record(tmp_path) == tmp_path / "record.jsonl"
    assert find_record(tmp_path / "other.jsonl") == tmp_path / "other.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.jsonl", None, ["--once"], "no such file"),
        ("a.jsonl", "hello\n", ["--once"], "not a record of fastfs.Monitor"),
        ("a.jsonl", "", ["--once"], "holds no run of fastfs.Monitor yet"),
        ("a.parquet", "PAR1", ["--once"], "only JSONL records can be followed"),
        ("a.jsonl", json.dumps(cases.header(NAMES)) + "\n", [], "not a terminal: use --once"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, name: str, content: Any, arguments: list[Any], message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = cli(tmp_path / name, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def reset_interrupts() -> None:
    """Resets SIGINT: background processes of a shell without job control, and their children, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A process on a pseudo-terminal of 24 lines."""

    def __init__(self, *command: Any) -> None:
        main, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "LINES": "24", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, preexec_fn=reset_interrupts
        )
        os.close(other)
        self.main, self.seen = main, ""

    def wait_for(self, pattern: Any, seconds: int = 60) -> Any:
        """Reads new output until it matches the pattern."""
        self.seen, end = "", time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, f"{pattern!r} did not show in {self.seen[-3000:]!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.main, 1 << 16).decode())
                self.seen = re.sub(r"\s+", " ", self.seen + text)
        return self.seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.main)


def test_a_growing_record_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "run" / "record.jsonl"
    terminal = Terminal(sys.executable, "-m", "fastfs._cli.app", "watch", str(path), "--interval", "0.05")
    try:
        terminal.wait_for("waiting: .*no such file or folder")
        path.parent.mkdir()
        append(path, cases.header(cases.names_of(100)))
        terminal.wait_for("no step yet")
        append(path, cases.measured(cases.names_of(100), 0))
        assert "worst of 100" in terminal.wait_for(r"worst of \d+")
        for step in (1, 2, 3):
            append(path, cases.measured(cases.names_of(100), step))
            terminal.wait_for(f"step {step} ")
        append(path, cases.alert(3, layer="blocks.7"))
        terminal.wait_for(r"alerts: angle_collapse \(1\)")
        path.unlink()
        terminal.wait_for("no such file")
        append(path, cases.header(["again"], run="r2"), cases.measured(["again"], 50, run="r2"))
        assert "again" in terminal.wait_for("step 50 .*again")
        terminal.process.send_signal(signal.SIGINT)
        terminal.process.wait(20)
        assert terminal.process.returncode == 0
        assert "Traceback" not in terminal.wait_for("again")
    finally:
        terminal.close()


def test_watch_ends_with_an_interrupt_and_leaves_the_table(tmp_path: Path) -> None:
    path = cases.write(tmp_path / "record.jsonl", cases.run_lines(2, 3))
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    watch(Path(path), console=console, sleep=interrupt, clock=lambda: NOW)
    assert "blocks.1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_predicted_speeds_have_their_factor_or_are_withheld() -> None:
    few = text_of(cases.run_lines(4, 7, every=2))  # 3 comparisons
    assert few.count("withheld") == 3 + 1  # the caption; the other layer is not a cut
    assert "x/÷1" not in few
    text = text_of(cases.run_lines(4, 41, every=2, invalid=0.0))
    rows = [line for line in text.splitlines() if "blocks." in line]
    assert [bool(re.search(r"\de-\d\d x/÷1\.\d\d ", row)) for row in rows] == [True, True, True, False]
    assert "no cut" in rows[3]
    assert "80 % of speeds are within the factor x/÷; withheld where it is above 3 or not known yet" in text


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (100, "# layer angle speed relative predicted valid"),
        (66, "layer angle speed relative predicted valid"),
        (65, "layer angle speed relative valid"),
        (40, "layer angle speed valid"),
        (26, "layer angle valid"),
    ],
)
def test_numbers_are_left_out_rather_than_cut(width: int, columns: str) -> None:
    lines = cases.run_lines(2, 60, every=2, invalid=0.0)
    whole, text = text_of(lines, 200), text_of(lines, width)
    header = next(line for line in text.splitlines() if "layer" in line and "angle" in line)
    assert header.split() == columns.split()
    rows = [line.split() for line in text.splitlines() if line.strip("# 01").startswith("blocks.")]
    assert len(rows) == 2
    known = set(whole.split())
    assert all(word in known and (word != "…") for row in rows for word in row)
    assert all(row[-1] == "yes" for row in rows)
    assert ("80 % of speeds" in text) is ("predicted" in columns)  # explained where it is shown
