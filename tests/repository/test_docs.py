"""The documentation is executed and checked: Python blocks run, links resolve, and tables agree with the code.

The blocks of a page run in order in one namespace, which :func:`preamble` fills with the names that they use.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs._core import ops
from fastfs.models import Transformer

ROOT = Path(__file__).resolve().parents[2]
MONITOR_PAGES = ("monitor.md", "validity.md", "loops_and_models.md", "record.md")
"""The pages on the monitor below docs/, in the order in which their blocks run."""
FIRST_PAGES = ("index.md", "start.md", "faq.md")

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="no native core")


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """Returns line number and text of every block marked as Python."""
    text = path.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x).relu()
        return result


class Net(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(x))
        return result


def preamble() -> dict[str, Any]:
    """Returns what the blocks take for granted: a model, an optimizer, data and a loss."""
    torch.manual_seed(0)
    model = Net()
    data = [(torch.randn(8, 16), torch.randint(0, 3, (8,))) for _ in range(3)]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "data": data,
        "micro_batches": [(data[0], data[1]), (data[1], data[2])],
        "loss_function": F.cross_entropy,
        "train": train,
        "device": "cpu",
        "backend": "aot_eager",  # takes the path of inductor without a C++ compiler
        "probe_inputs": data[0][0],
        "probe_targets": data[0][1],
        "before": torch.randn(4, 8),
        "after": torch.randn(4, 8),
        "backward": torch.randn(4, 8),
        "other_micro_batch": fastfs.feature_stats(*torch.randn(3, 4, 8)),
        "gradients": [torch.randn(4)],
        "updates": [torch.randn(4)],
    }


def run_blocks(path: Path, names: dict[str, Any]) -> None:
    blocks = python_blocks(path)
    assert blocks, f"{path.name} has no Python"
    for block in blocks:
        run_block(path, block, names)


def run_block(path: Path, block: tuple[int, str], names: dict[str, Any]) -> None:
    line, source = block
    code = compile("\n" * (line - 1) + source, str(path), "exec")  # errors show the line of the page
    exec(code, names)


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of size one, for all_reduce."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = preamble()
    names["model"] = model = Transformer(vocabulary=11, width=8, depth=2, heads=2, context=6)
    names["optimizer"] = torch.optim.AdamW(model.parameters())
    names["data"] = [torch.randint(0, 11, (2, 6)) for _ in range(3)]
    run_blocks(ROOT / "README.md", names)
    assert fastfs.load("run/record.jsonl").attrs["headers"][0]["layers"] == ["blocks.0", "blocks.1"]


@pytest.mark.graphs
def test_the_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    names = preamble()
    for page in MONITOR_PAGES:
        if python_blocks(ROOT / "docs" / page):
            run_blocks(ROOT / "docs" / page, names)
    records = sorted(path.stem for path in Path("run").glob("*.jsonl"))
    tables = {name: fastfs.load(f"run/{name}.jsonl") for name in records}
    wanted = "accumulated alerts all backward casts compiled details groups jvp nonlinear probe record samples scaled"
    wanted += " several"
    assert records == wanted.split()
    for name, table in tables.items():
        measured = table[table["kind"] == "measured"]
        assert len(measured), name
        assert measured["angle"].notna().all(), name
        assert not table.attrs["skipped"], name
    assert set(tables["accumulated"]["micro_batches"]) == {2}
    assert set(tables["scaled"]["loss_scale"]) == {1024.0}
    assert set(tables["jvp"]["kind"]) == {"measured", "predicted"}
    assert tables["casts"]["cast_loss_mxfp8"].between(0.0, 1.0).all()
    assert "nonlinear_update" in tables["nonlinear"]
    assert tables["groups"]["group"].any()
    assert "cos_angle_q10" in tables["groups"]
    assert names["inside"]["value"].notna().any()
    assert tables["details"]["own_motion"].notna().all()
    assert len([row for row in names["rows"] if row["kind"] == "measured"]) == 2  # one step, two layers
    assert sorted(set(tables["all"]["step"])) == [0]
    assert [h.get("resumed_at") for h in tables["all"].attrs["headers"]] == [None, 3]


def test_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    for page in FIRST_PAGES:
        run_blocks(ROOT / "docs" / page, preamble())
    said = capsys.readouterr().out
    table = fastfs.load("run/record.jsonl")
    started = table[table["run"] == table["run"].iloc[-1]]
    assert started["valid"].all()
    angles = started.groupby("name")["angle"].median()
    assert angles.to_list() == pytest.approx([1.34, 1.33, 1.32, 1.32], abs=0.02)  # as the page says
    assert "blocks.3" in said
    assert "('blocks.0.branch', 'blocks.1.branch')" in said


def test_the_trackers(tmp_path: Path, local_trackers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(ROOT / "docs" / "trackers.md", preamble())
    assert Path("run/tracked.jsonl").exists()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(local_trackers.glob("*/*/metrics/fastfs/angle/median"))
    said = capsys.readouterr().out
    assert 'fastfs_angle{group="",statistic="median"}' in said
    assert "fastfs_step 2.0" in said


def test_the_keys_of_trackers_are_explained_in_their_order() -> None:
    from fastfs._record.columns import QUANTITIES
    from fastfs._record.sinks.metrics import VALID_SHARE
    from fastfs._record.step_columns import STEP_COLUMNS

    text = (ROOT / "docs" / "trackers.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.count("|") == 5]
    table = [row for row in rows if re.fullmatch(r"`\w+`", row[0])]
    assert table == [
        [f"`{one.name}`", one.display.label, one.unit or "1", "valid ones" if one.display.guarded else "all"]
        for one in QUANTITIES
    ]
    assert f"1. `fastfs/{VALID_SHARE}`:" in text
    named = re.search(r"^3\. values per step: (.*), as", text, re.MULTILINE)
    assert re.findall(r"`(\w+)`", named[1]) == [one.name for one in STEP_COLUMNS if one.tensorboard]


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec", "ignore:.*does not have many workers", "ignore:You defined a .validation_step"
)
def test_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    import lightning.pytorch as lightning
    from accelerate import Accelerator
    from transformers import Trainer

    from tests.helpers import huggingface_cases, lightning_cases
    from tests.helpers.processes import reset_accelerate

    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "trainers.md"
    first, second, third = python_blocks(page)
    done = huggingface_cases.trainer(huggingface_cases.make("llama"), tmp_path / "one", [])
    names = {"Trainer": Trainer, "fastfs": fastfs, "model": done.model, "arguments": done.args}
    run_block(page, first, names | {"dataset": done.train_dataset})
    settings = {"default_root_dir": "two", "max_steps": 3, "accelerator": "cpu", "logger": False}
    names = {"lightning": lightning, "fastfs": fastfs, "settings": settings, "folder": "two"}
    run_block(page, second, names | {"task": lightning_cases.make("Task"), "loader": lightning_cases.loader()})
    names = preamble() | {"Accelerator": Accelerator, "fastfs": fastfs}
    loader: Any = torch.utils.data.DataLoader(names["data"], batch_size=None)
    reset_accelerate()
    run_block(page, third, names | {"loader": loader})
    reset_accelerate()
    for record in ("one", "two", "run"):
        table = fastfs.load(record)
        assert set(table["kind"]) >= {"measured"}, record
        assert table["loss"].notna().all()
        assert not table.attrs["skipped"]


@pytest.mark.slow
def test_several_ranks(tmp_path: Path) -> None:
    ((_, source),) = python_blocks(ROOT / "docs" / "parallel.md")
    (tmp_path / "run.py").write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = fastfs.load(tmp_path / "run/record.jsonl")
    assert table[["step", "ranks"]].drop_duplicates().to_numpy().tolist() == [[0, 2], [2, 2]]
    assert table["valid"].all()


def test_no_page_has_blocks_that_nothing_runs() -> None:
    run = {*MONITOR_PAGES, *FIRST_PAGES, "compare.md", "theory.md", "trackers.md", "trainers.md", "parallel.md"}
    assert {path.name for path in (ROOT / "docs").glob("*.md") if python_blocks(path)} <= run


def test_runs_beside_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "docs" / "compare.md", {})
    said = capsys.readouterr().out
    assert re.search(r"^blocks\.2 0 1\.[01]", said, re.MULTILINE)  # as the page says
    assert re.search(r"^Parameter update.* of blocks\.3: x", said, re.MULTILINE)
    assert said.count("\nFAIL: 9 runs") == 1


def test_the_theory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("scipy")
    names: dict[str, Any] = {}
    run_blocks(ROOT / "docs" / "theory.md", names)
    said = capsys.readouterr().out
    assert "inside a residual branch" in said
    assert "token.weight: acts before and after" in said
    assert names["calibration"].trials
    assert names["first"].converged


def test_links_of_the_documentation_resolve() -> None:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            file = path.parent / target if target else path
            assert file.exists(), f"{path.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in slugs, f"{path.name}: {target}#{anchor}"


def monitor_text() -> str:
    return "\n".join((ROOT / "docs" / page).read_text() for page in MONITOR_PAGES)


def section_text(title: str) -> str:
    """Returns the text below a heading on the monitor's pages, up to the next heading of the same or a higher level."""
    text = monitor_text()
    heading = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert heading, title
    following = re.compile(rf"^#{{1,{len(heading[1])}}} ", re.MULTILINE).search(text, heading.end())
    return text[heading.end() : following.start() if following else len(text)]


def first_column(title: str, table: int = 0) -> list[str]:
    """Returns the texts in backticks in the first column of a table in a section."""
    tables = re.findall(r"(?:^\|.*\n)+", section_text(title), re.MULTILINE)
    rows = [row.split("|")[1] for row in tables[table].splitlines()[2:]]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_every_reason_is_explained_and_no_other() -> None:
    from fastfs._record import decrease_reasons, row_reasons

    for section, sentences in (
        ("Why a row is not valid", row_reasons.REASONS),
        ("Why a decrease is null", decrease_reasons.REASONS),
    ):
        assert sorted(first_column(section)) == sorted(sentence for sentence in sentences if sentence)


def test_every_kind_of_record_is_explained_and_no_other() -> None:
    from fastfs._record.columns import KINDS

    assert tuple(first_column("What is recorded")) == KINDS


def test_the_tables_of_columns_are_up_to_date() -> None:
    """`python -m scripts.record_columns` writes them."""
    from scripts.record_columns import updated

    pages = {path: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
    new = {path: updated(text) for path, text in pages.items()}
    assert {path: text for path, (text, _) in new.items()} == pages
    assert sum(tables for _, tables in new.values()) == 2


def test_reasons_in_the_tables_of_kinds_are_sentences_of_the_code() -> None:
    from fastfs._record import decrease_reasons, row_reasons

    tables = section_text("Supported models and training loops")
    quoted = [quote for quote in re.findall(r"`([^`]+)`", tables) if quote.count(" ") >= 4]
    sentences = [sentence for sentence in (*row_reasons.REASONS, *decrease_reasons.REASONS) if sentence]
    assert quoted
    for quote in quoted:
        assert any(sentence.startswith(quote.removesuffix("...").rstrip()) for sentence in sentences), quote
