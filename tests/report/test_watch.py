"""The live table: reading a record that grows, tears, goes and comes; what is shown of it, on a real terminal too."""

from __future__ import annotations

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

import pytest
from rich.console import Console

from fastfs._report import follow
from fastfs._report.follow import Follower
from fastfs._report.locate import find_record
from fastfs._report.watch import RunState, screen, watch
from tests.helpers import report_cases as cases

NOW = cases.START + 1000


def text_of(lines, width=120, height=None, order="worst", search="", now=NOW):
    state = RunState()
    state.update(lines)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen(state, now=now, width=width, height=height, order=order, search=search))
    return console.export_text()


def append(path, *records, end=b"\n"):
    with path.open("ab") as file:
        file.write(b"\n".join(json.dumps(record).encode() for record in records) + end)


NAMES = cases.names_of(2)


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.jsonl"
    append(path, cases.header(NAMES))
    return path


def steps(news):
    return [line["step"] for line in news.records if line["kind"] in ("measured", "predicted")]


def test_only_what_is_new_is_read(record):
    follower = Follower(record)
    assert [line["kind"] for line in follower.poll().records] == ["header"]
    assert follower.poll().records == []
    append(record, cases.measured(NAMES, 0), cases.predicted(NAMES, 1), cases.alert(1), cases.predicted(NAMES, 2))
    news = follower.poll()
    assert [line["kind"] for line in news.records] == ["measured", "predicted", "alert", "predicted"]
    assert not news.restarted
    # What was read before may change and nobody looks: it is not read again.
    start = follow._START
    content = record.read_bytes()
    with record.open("r+b") as file:
        file.seek(start)
        file.write(b" " * (len(content) - start - 1))
    append(record, cases.measured(NAMES, 3))
    news = follower.poll()
    assert steps(news) == [3]
    assert news.unreadable == 0


def test_torn_lines_are_waited_for(record):
    follower = Follower(record)
    follower.poll()
    line = json.dumps(cases.measured(NAMES, 0)).encode()
    for cut in (1, len(line) // 2):
        append(record, end=line[:cut])
        line = line[cut:]
        assert follower.poll().records == []
    append(record, end=line + b"\n")
    assert steps(follower.poll()) == [0]


def test_lines_that_cannot_be_read_are_counted(record):
    follower = Follower(record)
    append(record, end=b'{"kind": "measured", "run": "r1", "ste\n')
    append(record, cases.measured(NAMES, 1), end=b"\n\n[]\n")
    news = follower.poll()
    assert steps(news) == [1]
    assert news.unreadable == 2


def test_a_file_that_goes_and_comes(record):
    follower = Follower(record)
    append(record, cases.measured(NAMES, 0))
    follower.poll()
    record.unlink()
    news = follower.poll()
    assert (news.exists, news.records) == (False, [])
    assert not follower.poll().exists
    append(record, cases.header(NAMES, run="r2"), cases.measured(NAMES, 7, run="r2"))
    assert steps(follower.poll()) == [7]


@pytest.mark.parametrize("grown", [False, True])
def test_a_file_that_is_cut_short_or_written_anew(record, grown):
    follower = Follower(record)
    append(record, cases.measured(NAMES, 0), cases.measured(NAMES, 1))
    follower.poll()
    record.write_bytes(b"")
    append(
        record, cases.header(NAMES, run="r2"), *(cases.measured(NAMES, s, run="r2") for s in range(9 if grown else 1))
    )
    news = follower.poll()
    assert news.restarted
    assert steps(news) == list(range(9 if grown else 1))
    append(record, cases.measured(NAMES, 20, run="r2"))
    news = follower.poll()
    assert not news.restarted
    assert steps(news) == [20]


def test_a_file_that_is_replaced(record, tmp_path):
    follower = Follower(record)
    append(record, cases.measured(NAMES, 0))
    follower.poll()
    other = tmp_path / "other"
    append(other, *cases.run_lines(2, 9))
    other.replace(record)
    news = follower.poll()
    assert news.restarted
    assert steps(news) == list(range(9))


def test_of_a_long_record_the_last_rows_and_all_else_are_parsed(record, monkeypatch):
    monkeypatch.setattr(follow, "_CHUNK", 1000)  # lines across chunks
    lines = [line for s in range(300) for line in (cases.measured(NAMES, 2 * s), cases.predicted(NAMES, 2 * s + 1))]
    lines[10:10] = [cases.alert(5), cases.structure(NAMES)]
    append(record, *lines)
    news = Follower(record).poll()
    assert [line["kind"] for line in news.records[:3]] == ["header", "alert", "structure"]
    assert steps(news) == list(range(600 - 128, 600))


@pytest.mark.parametrize("content", [b"PAR1 and then some", b'{"kind": "measured"}\n', b"[]\n", b"{nothing\n"])
def test_what_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a record"):
        Follower(path).poll()


def test_the_table_has_the_last_numbers():
    lines = cases.run_lines(4, 41, every=10, alerts=(17,), groups=True)
    lines[-1]["loss"] = 1.2345
    text = text_of(lines)
    assert "step 40" in text
    assert "loss 1.2345" in text
    assert "4 steps/s" in text
    assert "last row 16 min 30 s ago" in text
    assert "measured at step 40, predicted at step 39" in text
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


def test_invalid_cells_say_why():
    text = text_of(cases.run_lines(2, 3, invalid=1.0))
    assert text.count("no: update below 5x the noise floor") == 2


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 12), (200, 50)])
def test_a_hundred_layers_fit_and_the_worst_are_shown(width, height):
    lines = cases.run_lines(100, 3, invalid=0.0, alerts=(1,))
    lines[-1]["layers"]["valid"][42] = False
    lines[-1]["layers"]["why"][42] = "too small"
    text = text_of(lines, width, height)
    shown = text.rstrip("\n").splitlines()
    assert len(shown) <= height
    assert max(map(len, shown)) <= width
    layers = re.findall(r"blocks\.\d+(?= )", "\n".join(shown[5:]))
    assert layers[:2] == ["blocks.1", "blocks.42"]  # the alert, then what is not valid
    assert "worst of 100" in text
    ordered = text_of(lines, width, height, order="layer")
    assert "blocks.0 " in ordered
    assert "the first" in ordered
    found = text_of(lines, width, height, search="blocks.77")
    assert "blocks.77" in found
    assert "blocks.1 " not in found.split("valid")[1]


def test_another_run_in_the_same_file_starts_afresh_and_a_resumed_one_goes_on():
    lines = cases.run_lines(3, 5, alerts=(2,))
    resumed = [cases.header(cases.names_of(3), resumed_at=3), cases.measured(cases.names_of(3), 3)]
    text = text_of([*lines, *resumed])
    assert "step 3 " in text
    assert "alerts: angle_collapse (1)" in text
    text = text_of([*lines, {**cases.header(["other"]), "run": "r2"}])
    assert "no step yet" in text
    assert "alerts" not in text


def test_control_characters_do_not_reach_the_terminal():
    name = "bad\x1b[2Jname\x07 [red]markup[/red]"
    lines = cases.run_lines(1, 2, names=[name])
    lines.append({**cases.alert(1, layer=name), "message": name})
    text = text_of(lines)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]markup[/red]" in text


def test_lines_with_little_or_nothing_in_them():
    empty = {"kind": "measured", "run": "r1", "step": 1, "time": None, "loss": None, "layers": {"angle": [None]}}
    text = text_of(
        [cases.header(cases.names_of(2)), empty, {"kind": "predicted", "run": "r1"}, {"kind": "new", "run": "r1"}]
    )
    assert "blocks.1" in text
    assert "no step yet" in text_of([cases.header([])])
    assert "waiting for a run" in text_of([])


def cli(*arguments, **more):
    command = [sys.executable, "-m", "fastfs._cli.app", "watch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **more)


def test_once_prints_one_table_and_ends(tmp_path):
    cases.write(tmp_path / "record.jsonl", cases.run_lines(100, 3))
    done = cli(tmp_path, "--once", env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0
    assert done.stdout.count("blocks.") >= 100
    assert "\x1b" not in done.stdout


def test_which_record_a_folder_means(tmp_path):
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
def test_errors_are_one_line(tmp_path, name, content, arguments, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    done = cli(tmp_path / name, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def heed_interrupts():
    """What runs in the background of a shell without job control ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A process on a pseudo-terminal of 24 lines."""

    def __init__(self, *command):
        main, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "LINES": "24", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, preexec_fn=heed_interrupts
        )
        os.close(other)
        self.main, self.seen = main, ""

    def wait_for(self, pattern, seconds=60):
        """Read until the pattern shows in what is written from now on."""
        self.seen, end = "", time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, f"{pattern!r} did not show in {self.seen[-3000:]!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.main, 1 << 16).decode())
                self.seen = re.sub(r"\s+", " ", self.seen + text)
        return self.seen

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.main)


def test_a_growing_record_on_a_terminal(tmp_path):
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


def test_watch_ends_with_an_interrupt_and_leaves_the_table(tmp_path):
    path = cases.write(tmp_path / "record.jsonl", cases.run_lines(2, 3))
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)

    def interrupt(_):
        raise KeyboardInterrupt

    watch(Path(path), console=console, sleep=interrupt, clock=lambda: NOW)
    assert "blocks.1" in console.file.getvalue()
