"""The benchmark of the build: on compilers that only write what they are asked for, and on invented results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import build
from build_backend.command import native_sources

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the native core is for Linux")

# Every object depends on one header, those of binding/ also on another one.
COMPILER = """\
while [ $# -gt 0 ]; do
  case $1 in
    -o) out=$2; shift ;;
    -MF) deps=$2; shift ;;
    *.cpp | *.cu) source=$1 ;;
  esac
  shift
done
headers=csrc/layers.h
case $source in csrc/binding/*) headers="$headers csrc/binding/../strides.h" ;; esac
[ -z "$deps" ] || echo "$out: $source $headers" > "$deps"
[ -z "$out" ] || echo object > "$out"
"""
NVCC = """\
here=$(dirname "$0")
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *--list-gpu-code*) printf "sm_%s\\n" 80 90 100 120 ;;
  *--dryrun*)
    echo "#$ TOP=$here/.." >&2
    echo "#$ PATH=$here:$PATH" >&2
    echo "#$ true -D__CUDA_ARCH__=800 -E x.cu" >&2
    echo "#$ -- Filter Dependencies -- > x.d" >&2
    echo "#$ cicc -arch compute_80 x" >&2
    echo "#$ ptxas -arch=sm_80 x" >&2
    echo "#$ ptxas -arch=sm_90 x" >&2
    echo "#$ rm no_such_file" >&2
    echo "#$ true -c x.cpp" >&2 ;;
  *) exec "$here/c++" "$@" ;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def test_everything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = tmp_path / "cuda"
    compiler = program(toolkit / "bin" / "c++", COMPILER)
    program(toolkit / "bin" / "nvcc", NVCC)
    for tool in ("cicc", "ptxas"):
        program(toolkit / "bin" / tool, "exit 0\n")
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart_static.a").touch()
    for name in ("FASTFS_NATIVE", "FASTFS_CUDA_ARCHS", "NVCC_CCBIN", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTFS_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("CXX", str(compiler))
    folder = tmp_path / "scratch"
    folder.mkdir()
    results = build.measure(folder, cuda=True, isolated=False, compiler_of_unit=str(compiler))

    def rows(what: str) -> list[dict[str, Any]]:
        return [row for row in results if row["what"] == what]

    (unit,) = rows("unit")
    assert len(unit["all"]) == 8
    assert unit["cpu_seconds"] > 0
    with_cuda, without = rows("wheel")
    assert (with_cuda["cuda"], without["cuda"]) == (True, False)
    assert with_cuda["units"] > 0
    assert with_cuda["bytes"] > 100_000
    files = {row["file"]: row for row in rows("file")}
    assert set(files) == {*native_sources(build.ROOT), "_C.so"}
    for name, row in files.items():
        kernels = {"preprocessor", "compute_80", "sm_80", "sm_90", "host"}
        assert set(row["phases"]) == (kernels if name.endswith(".cu") else {"host"})
        assert row["units"] == pytest.approx(sum(row["phases"].values()), abs=0.05)
    headers = {row["header"]: row for row in rows("header")}
    assert set(headers) == {"csrc/layers.h", "csrc/strides.h"}
    assert headers["csrc/layers.h"]["files"] == len(files) - 1
    assert headers["csrc/layers.h"]["units"] == pytest.approx(sum(row["units"] for row in files.values()), rel=0.05)
    binding = sum(name.startswith("csrc/binding/") for name in files)
    assert headers["csrc/strides.h"]["files"] == binding


def test_a_command_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit 3 failed:.*the reason"):
        build.cpu_seconds("echo the reason; exit 3", tmp_path)


def test_missed_targets() -> None:
    wheel = {"what": "wheel", "cuda": True, "units": 25.0, "bytes": 1_500_000, "target": build.MOST_WITH_CUDA}
    usual = {"what": "header", "header": "csrc/usual.h", "commits": 9, "files": 2, "units": 5.0, "target": 5.0}
    worst = {**usual, "header": "csrc/worst.h", "commits": 1, "units": 5.1}
    other = {**worst, "header": "csrc/other.h", "units": 5.05}
    assert build.missed([wheel, usual]) == []
    assert build.missed([{**wheel, "units": 25.1}]) == ["wheel with CUDA: 25.1 units"]
    assert build.missed([{**wheel, "bytes": 1_500_001}]) == ["wheel with CUDA: 1500001 bytes"]
    assert build.missed([{**wheel, "cuda": False, "units": 8.1, "bytes": 10**9, "target": 8.0}]) == [
        "wheel without CUDA: 8.1 units"
    ]
    assert build.missed([usual, worst, other]) == ["csrc/worst.h (the most expensive): 5.1 units"]
