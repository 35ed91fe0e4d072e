"""`fastfs bench`: files, messages, and behavior without the native core or torch.compile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastfs import reference
from fastfs._bench import baselines, ceilings, comparison, machine, quick
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._bench.expected import expected_sums
from fastfs._bench.inputs import COLD, RoundRobin, bytes_of, copies_for, make_inputs
from fastfs._cli.app import app
from fastfs._core import ops
from fastfs._utils.json_output import write_json

native = pytest.mark.skipif(not ops.native_available(), reason="no native core")
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


# The command


SMALL = """
import functools
from fastfs._bench import quick
from fastfs._cli.app import app
quick.LEAST = quick.MOST = 3 * 2**20
quick.Compiler = functools.partial(quick.Compiler, seconds=0.0)  # never skip compiling for lack of time
app()
"""


@pytest.mark.slow
@native
def test_without_a_compiler_it_measures_the_rest_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    command = [sys.executable, "-c", SMALL, "bench", "--device", "cpu", "--seconds", "15", "--json", str(path)]
    env = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert [(r["kind"], r["dtype"]) for r in result["results"]] == [
        (kind, dtype) for kind in quick.KINDS for dtype in ("float32", "bfloat16")
    ]
    for measured in result["results"]:
        rows = {row["implementation"]: row for row in measured["rows"]}
        assert all(row["GB/s"] > 0 and row["milliseconds"] > 0 for row in rows.values())
        assert rows[ceilings.READ]["of ceiling"] == 1
        assert rows[OURS]["fastfs is faster by"] == 1
        assert rows[OURS]["error"] <= 2e-6
        assert (ceilings.COPY in rows) == (NORMS in rows) == (measured["kind"] != quick.ROWS)
        assert measured["bytes"] * measured["copies"] >= COLD * result["environment"]["cache_bytes"]
        assert COMPILE in measured["left out"]
    assert "compiler" in result["results"][0]["left out"][COMPILE].lower()
    assert set(result["overhead"]) == {"1", "100"}
    assert any("torch.compile was left out" in line for line in result["troubles"])
    for line in [*result["verdict"], *result["troubles"], result["conclusion"]]:
        assert line in done.stdout
    assert result["conclusion"].endswith("torch.compile was not compared.")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use inputs of 96 KiB without copies, three rounds, and no time to compile."""
    monkeypatch.setattr(quick, "LEAST", 3 * 2**15)
    monkeypatch.setattr(quick, "MOST", 3 * 2**15)
    monkeypatch.setattr(quick, "SMALL", 2**11)
    monkeypatch.setattr(quick, "WIDTH", 128)
    monkeypatch.setattr(quick, "ROUNDS", 3)
    monkeypatch.setattr(quick, "cache_bytes", lambda device: 2**12)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 2**12)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
@native
def test_it_measures_and_gives_a_verdict(small: None, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    code, output = run("--device", "cpu", "--seconds", 2, "--json", path)
    assert code == 0, output
    result = json.loads(path.read_text())
    assert "feature_stats reads at" in output
    assert "A call costs" in output
    for measured in result["results"]:
        names = [row["implementation"] for row in measured["rows"]]
        assert [name for name in (ceilings.READ, OURS, HAND, EAGER) if name not in names] == []
        assert "more than the remaining time" in measured["left out"][COMPILE]
        assert measured["layers"] == (8 if measured["dtype"] == "bfloat16" else 4) or measured["kind"] != quick.LIST
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_without_native_core_it_measures_the_reference(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ops, "native_available", lambda: False)
    path = tmp_path / "bench.json"
    code, output = run("--device", "cpu", "--seconds", 2, "--json", path)
    assert code == 0, output
    assert "Only the slow reference was measured" in output
    assert "fastfs doctor" in output
    result = json.loads(path.read_text())
    assert result["environment"]["core"] is None
    for measured in result["results"]:
        assert {row["implementation"] for row in measured["rows"]} >= {ceilings.SUM, HAND, EAGER}
        assert all(row["fastfs is faster by"] is None for row in measured["rows"])


@native
def test_wrong_sums_cannot_be_measured(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true_sums = quick._functional.feature_stats  # type: ignore[attr-defined]

    def off_by_little(*arguments: Any, **options: Any) -> Any:
        stats = true_sums(*arguments, **options)
        if options.get("backend") == "native" and not isinstance(stats, list):
            stats.sums[..., 2] *= 1 + 1e-5
        return stats

    monkeypatch.setattr(quick._functional, "feature_stats", off_by_little)  # type: ignore[attr-defined]
    code, output = run("--device", "cpu", "--seconds", 2, "--json", tmp_path / "bench.json")
    assert code == 2
    assert "fastfs is off by 1.0e-05" in output
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
        (["--device", "meta"], "expected cpu or cuda, got 'meta'"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "cpu", "--json", "."], "is a folder"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


# Parts


def test_sizes_follow_from_time_and_memory() -> None:
    many, large = 2**40, 2**25
    assert quick.size_for(10, 1e12, many, large) == 2**28  # eight caches
    assert quick.size_for(10, 1e12, many, 2**28) == quick.MOST
    assert quick.size_for(10, 1e8, many, large) == 50_000_000  # twenty calls in ten seconds
    assert quick.size_for(10, 1e12, 2**30, large) == 2**27
    assert quick.size_for(0, 1e8, many, large) == quick.LEAST


def test_copies_together_exceed_the_cache() -> None:
    assert copies_for(COLD * 2**20, 2**20) == 1
    assert copies_for(COLD * 2**20 - 1, 2**20) == 2
    assert copies_for(12_000, 2**20) * 12_000 >= COLD * 2**20
    assert copies_for(2**30, 2**20) == 1
    copies = make_inputs([(64, 3), (5,)], (BF16, F32), CPU, 3)
    assert len(copies) == 3
    assert len({x.data_ptr() for inputs in copies for tensors in inputs for x in tensors}) == 3 * 3 * 2
    for before, after, backward in copies:
        assert [x.shape for x in before] == [x.shape for x in backward] == [(64, 3), (5,)]
        assert {x.dtype for x in before + after} == {BF16}
        assert {x.dtype for x in backward} == {F32}
        assert not torch.equal(before[0], after[0])
    assert bytes_of(copies[0]) == (64 * 3 + 5) * 8


def test_implementations_share_the_rotation() -> None:
    rotation, seen = RoundRobin(3), []
    first, second = (rotation.over([lambda n=n, i=i: seen.append(f"{n}{i}") for i in range(3)]) for n in "ab")  # type: ignore[misc]
    for _ in range(2):
        first()
        second()
        first()
    second()
    assert seen == ["a0", "b1", "a2", "a0", "b1", "a2", "b0"]
    with pytest.raises(ValueError, match="expected 3 calls, one per copy, got 2"):
        rotation.over([lambda: None, lambda: None])


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)])
def test_implementations_take_the_same_sums(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    (inputs,) = make_inputs([(16, 64), (7, 100)], dtypes, CPU)
    inputs[1][1][3, 5] = 0.0
    expected = expected_sums(inputs)
    for sums in (baselines.by_hand, baselines.by_hand_foreach):
        assert expected.error(sums(*inputs)) < 1e-5
    whole = torch.stack([baselines.layer_sums(*x) for x in zip(*inputs, strict=True)])
    assert expected.error(whole) < 1e-5
    less = torch.stack([baselines.layer_sums(*x, rounding=False) for x in zip(*inputs, strict=True)])
    assert expected.error(less) < 1e-5
    whole[1, 2] *= 1.01
    assert expected.error(whole) > 1e-4
    rows = expected_sums(inputs, per_row=True)
    assert rows.error(baselines.by_hand_per_row(*inputs)) < 1e-5
    found = torch.cat([baselines.layer_sums(*x, per_row=True) for x in zip(*inputs, strict=True)])
    assert rows.error(found) < 1e-5
    sums = torch.stack([reference.feature_stats(*x).sums for x in zip(*inputs, strict=True)])
    assert torch.allclose(expected.sums, sums[:, :8], rtol=1e-12)


def test_first_calls() -> None:
    assert comparison.attempt(lambda: 3, CPU)[::2] == (3, None)

    def fails() -> None:
        raise RuntimeError("\nno such thing\nat all")

    assert comparison.attempt(fails, CPU)[2] == "RuntimeError: no such thing"
    assert comparison.attempt(lambda: 3, CPU, 0.0)[2].startswith("one call takes")


def test_a_compiler_that_takes_too_long_is_interrupted() -> None:
    def compiles() -> None:
        try:
            while True:
                pass
        except Exception:  # as compilers do to try something else
            pytest.fail("it could have caught the end of the time")

    handler = signal.getsignal(signal.SIGALRM)
    found = comparison.attempt(compiles, CPU, compiles=True, limit=0.2)
    assert found == (None, 0.2, "compiling takes more than 0 s")
    assert signal.getsignal(signal.SIGALRM) is handler
    assert comparison.attempt(compiles, CPU, limit=0.2)[2] == "the first call takes more than 0 s"
    assert comparison.attempt(lambda: 3, CPU, limit=60)[::2] == (3, None)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_compiling_stays_within_its_part_of_the_time() -> None:
    clock = quick.Clock(60, 3)
    assert quick.Compiler(30.0).why_not(clock) is None
    assert "more than the remaining time" in str(quick.Compiler(3.0).why_not(clock))
    assert "more than the remaining time" in str(quick.Compiler(30.0).why_not(quick.Clock(6, 3)))
    assert quick.Compiler(30.0, "no compiler").why_not(clock) == "no compiler"


def test_ranking_counts_the_bytes_of_each() -> None:
    times = {ceilings.READ: [1.0, 2.0], OURS: [2.0, 4.0], ceilings.COPY: [1.0, 1.0], EAGER: [8.0, 8.0]}
    rows = {row["implementation"]: row for row in comparison.ranking(times, 3 * 10**9, {ceilings.COPY: 10**9})}
    assert rows[ceilings.READ]["GB/s"] == 2.0
    assert rows[OURS]["of ceiling"] == 0.5
    assert rows[EAGER]["fastfs is faster by"] == 3.0
    assert rows[ceilings.COPY]["GB/s"] == 1.0
    assert rows[ceilings.COPY]["of ceiling"] == 0.5
    assert rows[ceilings.COPY]["fastfs is faster by"] is None


def test_thirds_hold_the_bytes() -> None:
    tensors = [torch.arange(3 * 64 + 10), torch.arange(5), torch.arange(6 * 64).view(2, 3, 64)]
    lists = ceilings.thirds(tensors)
    assert [[x.numel() for x in third] for third in lists] == [[64, 0, 128]] * 3
    assert [int(third[2][0]) for third in lists] == [0, 128, 256]


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_machine_is_known() -> None:
    assert machine.cache_bytes(CPU) >= 2**18
    assert machine.free_bytes(CPU) >= 2**26
    found = machine.environment(CPU)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
