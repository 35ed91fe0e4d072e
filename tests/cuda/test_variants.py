"""The variants of the kernel: they have the policies they claim, compile, and on the host compute what they should."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tuning import __main__ as command
from benchmarks.tuning import build, measure, sass, static
from benchmarks.tuning.architectures import ARCHITECTURES
from benchmarks.tuning.catalogue import BASELINE, VARIANTS, Variant, variant
from benchmarks.tuning.library import Library
from tests.cuda.on_cpu import harness
from tests.cuda.on_cpu.harness import Case, rows

ON_HOST = (BASELINE, "chunks of 64 KB at first", "rows by whole warps", "no cache hint")
BF16 = torch.bfloat16
on_host = pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))
with_nvcc = pytest.mark.skipif(
    any(sass.find_tool(tool) is None for tool in ("nvcc", "cuobjdump", "nvdisasm")), reason="no nvcc or cuobjdump"
)


# the catalogue


@pytest.mark.slow
@on_host
@pytest.mark.parametrize("name", [v.name for v in VARIANTS])
def test_policies_have_the_figures_of_the_catalogue(name: str, tmp_path: Path) -> None:
    """Compiles assertions. Those on the baseline are that the defaults of the catalogue are the library's figures."""
    v = variant(name)
    lines = ['#include "shim.h"', '#include "../feature_sums.h"', '#include "policy.cuh"']
    lines += ["using namespace fastfs;", "using namespace fastfs::cuda;"]
    order = {"kChunkBits": v.chunk_bits, "kLargestChunkBits": v.largest_bits, "kGroupBits": v.group_bits}
    order |= {"kLaneElements": v.lane_elements, "kChain": v.chain, "kThreads": v.threads}
    lines += [f"static_assert(Policies::Order::{member} == {value});" for member, value in order.items()]
    lines.append("template <class F> using Policy = Policies::Active::SegmentSums<FeatureSums, F, F>;")
    for dtype in v.only:
        policy = f"Policy<{dtype.upper()}>"
        lines.append(f"static_assert({policy}::kBlocksPerSm == {v.blocks});")
        lines.append(f"static_assert(std::is_same_v<{policy}::Load, {v.load}>);")
    for itemsize, width in itertools.product(
        (2, 4, 8), (0, 2**14, 2**14 + 1, 2**16, 2**16 + 1, 2**24, 2**24 + 1, 2**26, 2**30)
    ):
        bits = v.chunk(itemsize, width).bit_length() - 1
        lines.append(f"static_assert(chunk_bits<Policies::Order>({itemsize}, {width}) == {bits});")
    source = tmp_path / "figures.cpp"
    source.write_text("\n".join(lines) + "\n")
    command = ["g++", *harness.FLAGS, *build.flags(v), f"-I{harness.HERE}", f"-isystem{harness.include_folder()}"]
    done = subprocess.run([*command, "-fsyntax-only", str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_and_claims_are_consistent() -> None:
    assert len({v.slug for v in VARIANTS}) == len(VARIANTS)
    for v in VARIANTS:
        assert v.what, v.name
        assert v.prediction, v.name
        assert v.same_bits in ("all", "rows", "layers", "none"), v.name
    with pytest.raises(ValueError, match="no variant 'x'; there are baseline, chunks of 16 KB at first"):
        variant("x")


def test_the_command_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (
        ([], "sees no CUDA device; --static needs none"),
        (["--variant", "x"], "no variant 'x'"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["tuning", *arguments])
        with pytest.raises(SystemExit):
            command.command_line()
        assert words in capsys.readouterr().err
    assert [v.name for v in command.chosen([variant("2 blocks")], quick=True)] == [BASELINE, "2 blocks"]
    assert command.chosen([], quick=False) == list(VARIANTS)


# the arithmetic on published figures


def test_occupancy_and_bytes_under_way() -> None:
    h100, rtx = ARCHITECTURES["90"], ARCHITECTURES["120"]
    assert h100.resident(256, 80, 1024) == 3
    assert h100.resident(256, 64, 1024) == 4
    assert h100.resident(256, 32, 74 * 1024) == 3  # with 1 KB of the system's, three in 228 KB
    assert h100.resident(256, 32, 228 * 1024) == 0
    assert rtx.resident(512, 32, 0) == 3  # 48 warps
    assert h100.bytes_per_clock == pytest.approx(3350 / 1.98 / 132)
    assert h100.needed_bytes() == [round(400 * h100.bytes_per_clock), round(1000 * h100.bytes_per_clock)]
    shares = h100.shares({"fp32": 10, "alu": 6, "fp64": 0.5, "convert": 0.5, "other": 3}, 6)
    elements = h100.bytes_per_clock / 6
    assert shares["issue"] == pytest.approx(20 * elements / 128, abs=1e-3)
    assert shares["fp64"] == pytest.approx(0.5 * elements / 64, abs=1e-3)


def test_loops_and_paths_of_machine_code() -> None:
    def one(address: int, opcode: str, target: int | None = None, always: bool = False) -> sass.Instruction:
        return sass.Instruction(address, opcode, target, always)

    code = [one(0, "S2R"), one(16, "LDG.E.128"), one(32, "FFMA"), one(48, "BRA", 16), one(64, "BRA", 96, True)]
    code += [one(80, "DADD"), one(96, "SHFL"), one(112, "BRA", 0), one(128, "EXIT")]
    assert [i.address for i in sass.loop_around(code, 1)] == [16, 32, 48]
    assert sass.shortest_path(code, 64, 16) == 4  # BRA, SHFL, BRA, S2R
    assert sass.shortest_path(code, 64, 16, 112) == 2
    with pytest.raises(ValueError, match="no path"):
        sass.shortest_path(code, 64, 80)
    assert sass.loads_ahead(["LDG.E.NA.128.CONSTANT", "LDG.E.128", "FFMA", "LDG.E.128"]) == 2


# on the host


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("variants")

    def load(v: Variant) -> Library:
        return Library(harness.compile_library("tuning_driver.cpp", folder / v.slug, *build.definitions(v)))

    return {name: load(variant(name)) for name in ON_HOST}


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_HOST)
def test_checks_of_the_gpu_run_pass_on_the_host(libraries: dict[str, Library], name: str) -> None:
    found = measure.check(variant(name), libraries[name], libraries[BASELINE], torch.device("cpu"))
    assert found["error"] <= measure.ALLOWED
    assert found["runs"] >= 3
    kept = {"all": 33, "rows": 12, "layers": 21}
    assert found["cases with the baseline's bits"] == kept[variant(name).same_bits]


@on_host
@pytest.mark.slow
def test_checks_notice_wrong_sums_and_other_bits(libraries: dict[str, Library]) -> None:
    cpu = torch.device("cpu")
    other = Variant("other order", "", "", same_bits="all")
    with pytest.raises(AssertionError, match="not the baseline's bits"):
        measure.check(other, libraries["chunks of 64 KB at first"], libraries[BASELINE], cpu)


@on_host
@pytest.mark.slow
def test_driver_has_the_bits_of_the_launchers(libraries: dict[str, Library], tmp_path: Path) -> None:
    program = harness.compile_driver("plain", tmp_path, harness.CUDA_SOURCES, harness.BF16_ONLY)
    for inputs, per_row in measure.check_layers(BF16, torch.device("cpu")):
        (expected,) = rows(program, Case(list(zip(*inputs, strict=True)), per_row=per_row))
        for name in (BASELINE, "no cache hint"):
            assert measure.same(libraries[name].prepare(inputs, per_row).sums(), expected)


@on_host
@pytest.mark.slow
def test_the_run_on_the_host(libraries: dict[str, Library], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = command.Machine(torch.device("cpu"), "90", multiprocessors=1, cache=2**20)
    chosen = [variant(BASELINE), variant("no cache hint")]
    command.run(chosen, machine, libraries, rounds=1, quick=True, path=tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    checks, timed = results[:2], results[2:]
    assert [r["variant"] for r in checks] == [v.name for v in chosen]
    assert [(r["workload"], r["dtype"]) for r in timed] == [
        (name, dtype) for dtype in ("bf16", "f16", "f32") for name in ("3 MiB", "rows of 1024")
    ]
    for result in timed:
        assert [row["variant"] for row in result["rows"]] == [measure.CEILING, BASELINE, "no cache hint"]
        assert result["rows"][1]["of baseline"] == 1
        assert result["input sets"] * result["bytes"] > 4 * machine.cache
    assert "all workloads, speed relative to the baseline" in " ".join(capsys.readouterr().out.split())


# machine code


@with_nvcc
@pytest.mark.slow
def test_baseline_compiles_without_spills(tmp_path: Path) -> None:
    at = ARCHITECTURES["90"]
    compiled = build.compile_cubin(variant(BASELINE), "90", tmp_path / "baseline")
    assert compiled.warnings == []
    assert all(k.spills == k.stack == 0 for k in compiled.kernels.values())
    assert len([s for s in compiled.kernels if "segment_sums" in s]) == 6  # three dtypes, two tables
    for row in static.compile_and_describe(variant(BASELINE), at, tmp_path / "again"):
        assert row["blocks"] == 3
        assert row["bytes in flight"] > at.needed_bytes()[1]
        assert 10 < row["instructions per element"] < 40


def test_same_bits_know_nan() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert measure.same(nan, nan.clone())
    assert not measure.same(nan, torch.tensor([1.0, 2.0]))
