"""Variants of the kernels that were compiled ahead are used only if they are of the same sources, flags and GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.tuning import __main__ as tuning
from benchmarks.tuning import build, sass
from benchmarks.tuning.catalogue import VARIANTS

PAIR = VARIANTS[:2]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, and a compiler that only writes a line per call: the file of the lines."""
    log, nvcc = tmp_path / "log", tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {log}\necho "$@" > "$last"\n')
    nvcc.chmod(0o755)
    log.touch()
    monkeypatch.setattr(sass, "find_tool", lambda name: str(nvcc))
    for name in ("SOURCES", "HERE"):
        shutil.copytree(getattr(build, name), tmp_path / "tree" / name)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "tree" / "SOURCES")
    monkeypatch.setattr(build, "HERE", tmp_path / "tree" / "HERE")
    return log


def test_what_was_compiled_ahead_is_used(compiled: Path, tmp_path: Path) -> None:
    ahead, here = tmp_path / "ahead", tmp_path / "here"
    for _ in range(2):
        paths = tuning.compile_all(PAIR, "90", ahead, ahead)
    assert paths == {v.name: ahead / v.slug / "variant.so" for v in PAIR}
    assert len(compiled.read_text().splitlines()) == 2
    assert tuning.compile_all(PAIR, "90", here, ahead) == paths
    assert not here.exists()


def test_what_is_of_other_sources_or_another_gpu_is_compiled(compiled: Path, tmp_path: Path) -> None:
    ahead = tmp_path / "ahead"
    tuning.compile_all(PAIR, "90", ahead)
    other = tuning.compile_all(PAIR, "80", tmp_path / "sm_80", ahead)
    assert other == {v.name: tmp_path / "sm_80" / v.slug / "variant.so" for v in PAIR}
    header = build.SOURCES / "cuda" / "policy.cuh"
    header.write_text(header.read_text() + "\n")
    changed = tuning.compile_all(PAIR, "90", tmp_path / "changed", ahead)
    assert changed == {v.name: tmp_path / "changed" / v.slug / "variant.so" for v in PAIR}
    assert len(compiled.read_text().splitlines()) == 6
