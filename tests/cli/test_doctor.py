"""fastfs doctor: its findings and how it reports them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastfs import _functional
from fastfs._cli import doctor
from fastfs._core import ops
from fastfs._version import __version__

INFO = {"instruction_sets": ["generic", "avx2", "avx512"], "instruction_set": "avx2", "openmp": True}
CUDA = {"architectures": "80,90,100,120+PTX", "runtime": 13000, "driver": 13000}
ALL_FLAGS = {flag for flags in doctor.CPU_FLAGS.values() for flag in flags}

native = pytest.mark.skipif(not ops.native_available(), reason="no native core")


class Distribution:
    def __init__(self, wheel: str | None) -> None:
        self.wheel = wheel

    def read_text(self, name: str) -> str | None:
        assert name == "WHEEL"
        return self.wheel


def shown(code: int) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert doctor.run_doctor(console) == code
    return console.file.getvalue()  # type: ignore[attr-defined]


@native
def test_here_nothing_is_wrong() -> None:
    text = shown(0)
    for name in ("float16", "bfloat16", "float32", "float64"):
        assert f"cpu {name}" in text
    assert torch.__version__ in text
    assert __version__ in text
    assert "Nothing is wrong" in text


@native
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(json=Path("-")) == 0
    printed = capsys.readouterr()
    assert "Nothing is wrong" in printed.err
    result = json.loads(printed.out)
    assert result["ok"] is True
    assert {"versions", "native core", "cpu", "cuda", "self-check", "threads"} == {
        finding["section"] for finding in result["findings"]
    }


@pytest.mark.gpu
def test_gpu_is_checked() -> None:
    assert "cuda:0 float32" in shown(0)


# Problems


def test_versions_have_to_agree() -> None:
    assert doctor.version_finding(__version__).status == "ok"
    finding = doctor.version_finding("0.0.1")
    assert finding.status == "wrong"
    assert "compiled from fastfs 0.0.1" in finding.why


def test_missing_core_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "native_available", lambda: False)
    monkeypatch.setattr(doctor, "installed_as_pure_python", lambda distributions: False)
    assert "missing" in shown(1)


def test_pure_python_install_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "native_available", lambda: False)
    monkeypatch.setattr(doctor, "installed_as_pure_python", lambda distributions: True)
    assert "FASTFS_NATIVE=0" in shown(0)


@pytest.mark.parametrize(
    ("wheels", "expected"),
    [
        ([], False),
        ([None], False),
        (["Root-Is-Purelib: true\nTag: py3-none-any"], True),
        (["Root-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64"], False),
        ([None, "Root-Is-Purelib: true", "Root-Is-Purelib: false"], True),
    ],
)
def test_pure_python_is_known_from_the_wheel(wheels: list[str | None], expected: bool) -> None:
    distributions: Any = [Distribution(wheel) for wheel in wheels]
    assert doctor.installed_as_pure_python(distributions) is expected


def test_unusable_instruction_set_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("FASTFS_CPU=neon: expected one of ...")

    monkeypatch.setattr(ops, "native_available", lambda: True)
    monkeypatch.setattr(ops, "build_info", refuse)
    assert "FASTFS_CPU=neon" in shown(1)


@native
def test_wrong_sums_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true_sums = _functional.feature_stats

    def off_by_little(*arguments: Any, **options: Any) -> Any:
        found = true_sums(*arguments, **options)
        for stats in found if isinstance(found, list) else [found]:
            stats.sums[..., 2] *= 1 + 1e-5
        return found

    monkeypatch.setattr(_functional, "feature_stats", off_by_little)
    text = shown(1)
    assert "backward_sq" in text
    assert "before_sq" not in text


@native
def test_exception_in_the_self_check_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(_functional, "update_stats", fail)
    assert "RuntimeError: illegal instruction" in shown(1)


# Parts in use, and reasons why others are not


def test_cpu_lacks_instructions() -> None:
    generic, avx2, avx512 = doctor.cpu_findings(INFO, ALL_FLAGS - {"avx512bw"}, {})
    assert (generic.value, generic.why) == ("built, not in use", "avx2 is faster")
    assert avx2.value == "in use"
    assert avx512.why == "the CPU lacks avx512bw"


def test_instruction_set_from_the_environment() -> None:
    _, avx2, avx512 = doctor.cpu_findings(INFO, ALL_FLAGS, {"FASTFS_CPU": "avx2"})
    assert (avx2.value, avx2.why) == ("in use", "FASTFS_CPU=avx2")
    assert avx512.why == "FASTFS_CPU=avx2"


def test_instruction_set_not_built() -> None:
    info = {**INFO, "instruction_sets": ["generic"], "instruction_set": "generic"}
    assert [f.value for f in doctor.cpu_findings(info, set(), {})] == ["in use", "not built", "not built"]


@pytest.mark.parametrize(
    ("built", "torch_cuda", "environ", "why"),
    [
        (None, None, {}, "torch is built without CUDA"),
        (CUDA, None, {}, "torch is built without CUDA"),
        ({**CUDA, "driver": 0}, "13.0", {}, "no NVIDIA driver"),
        (CUDA, "13.0", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES="),
        (CUDA, "13.0", {}, "torch sees no GPU"),
    ],
)
def test_no_gpu(built: dict[str, Any] | None, torch_cuda: str | None, environ: dict[str, str], why: str) -> None:
    findings = doctor.cuda_findings(built, torch_cuda, [], "", environ)
    assert findings[-1].why == why
    assert "wrong" not in {f.status for f in findings}


@pytest.mark.parametrize(
    ("built", "status", "why"),
    [
        (CUDA, "ok", ""),
        (None, "wrong", "reinstall with nvcc available"),
        ({**CUDA, "driver": 12080}, "wrong", "the driver is for CUDA 12.8, the kernels need 13.0"),
        ({**CUDA, "driver": 13020}, "ok", ""),
        ({**CUDA, "architectures": "100,120"}, "wrong", "FASTFS_CUDA_ARCHS=90"),
    ],
)
def test_gpu(built: dict[str, Any] | None, status: str, why: str) -> None:
    finding = doctor.cuda_findings(built, "13.0", [("NVIDIA H100", 90)], "", {})[-1]
    assert finding.status == status
    assert why in finding.why


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("80,90", 80, True),
        ("80,90", 89, True),
        ("80,90", 75, False),
        ("80,90", 100, False),
        ("86", 80, False),
        ("80,90+PTX", 100, True),
        ("80,90,100,120+PTX", 103, True),
        ("80,90,100,120+PTX", 110, True),
        ("80,90,100,120+PTX", 75, False),
        ("90a", 90, True),
        ("90a", 100, False),
        ("100f", 103, True),
    ],
)
def test_where_kernels_run(architectures: str, capability: int, expected: bool) -> None:
    assert doctor.runs_on(architectures, capability) is expected


def test_openmp_runtimes() -> None:
    files = ["/lib/libc.so.6", "/torch/lib/libgomp.so.1", "/torch/lib/libgomp.so.1", "/usr/lib/libgomp-a34b.so.1"]
    assert doctor._openmp_libraries(files) == ["/torch/lib/libgomp.so.1", "/usr/lib/libgomp-a34b.so.1"]
    assert doctor.thread_findings(INFO, ["/torch/lib/libgomp.so.1"])[-1].why == "shared with torch"
    assert doctor.thread_findings(INFO, ["/a/libgomp.so.1", "/b/libomp.so"])[-1].status == "note"
    assert doctor.thread_findings({**INFO, "openmp": False}, [])[-1].value == "not built"
