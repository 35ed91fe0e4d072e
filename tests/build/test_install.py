"""Builds and installations: sdist, wheels, editable, settings, messages. Most tests compile and are slow."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from build_backend.command import native_sources, ninja_file, virtual_architecture
from build_backend.settings import CUDA_WHEELS, BuildError, Settings, extra_requirements, read_settings
from build_backend.toolchain import Nvcc, choose_architectures, find_cxx, find_nvcc
from fastfs._version import __version__
from tests.helpers.builds import copy_of_source, environment, environment_with_torch, install, linux, run
from tests.helpers.source_tree import ROOT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build an sdist and a wheel from it, both with build isolation."""
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", copy_of_source(folder), cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


# sdist and wheel


def names_in(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}


@pytest.mark.slow
def test_sdist_has_what_building_and_testing_needs(distributions: tuple[Path, Path]) -> None:
    names = names_in(distributions[0])
    for name in ("csrc/binding/module.cpp", "build_backend/hooks.py", "tests/conftest.py", "examples/deep_mlp.py"):
        assert name in names
    for name in ("LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "fastfs/py.typed", ".ci/run"):
        assert name in names
    assert any(name.startswith("benchmarks/results/") for name in names)
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_sdist_has_every_tracked_file(distributions: tuple[Path, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tracked = set(run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0"))
    generated = {"PKG-INFO", "setup.cfg"}
    names = {name for name in names_in(distributions[0]) if not name.startswith("fastfs.egg-info/")}
    assert tracked - names == set()
    assert names - tracked == generated


@pytest.mark.slow
def test_wheel_has_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    wheel = distributions[1]
    assert re.fullmatch(rf"fastfs-{re.escape(__version__)}-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"fastfs-{__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"fastfs", info}
    assert "fastfs/py.typed" in names
    licences = ("LICENSE", "THIRD_PARTY_LICENSES.md", "licenses/pybind11.txt")
    assert {name for name in names if "/licenses/" in name} == {f"{info}/licenses/{name}" for name in licences}
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o"))]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "fastfs = fastfs._cli.app:app" in entry_points


@pytest.mark.slow
@linux
def test_core_links_neither_torch_nor_cudart(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("no binutils")
    with zipfile.ZipFile(distributions[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        library = archive.extract(name, tmp_path)
    check_links(Path(library), tmp_path)


def check_links(library: Path, folder: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library, cwd=folder))
    assert set(needed) <= {f"lib{name}" for name in ("stdc++.so.6", "m.so.6", "gcc_s.so.1", "gomp.so.1", "c.so.6")} | {
        name for name in needed if name.startswith(("ld-linux", "libpthread", "libdl", "librt"))
    }
    undefined = run("nm", "-D", "-C", "--undefined-only", library, cwd=folder)
    assert not re.search(r"\b(at|c10|torch)::|cuda[A-Z]", undefined)
    exported = run("nm", "-D", "--defined-only", "--extern-only", library, cwd=folder)
    assert re.findall(r" T (\w+)", exported) == ["PyInit__C"]


@linux
def test_installed_core_links_neither_torch_nor_cudart(tmp_path: Path) -> None:
    ops = pytest.importorskip("fastfs._core.ops")
    if not ops.native_available() or shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("no native core, or no binutils")
    check_links(Path(ops._C.__file__), tmp_path)


@pytest.mark.slow
@linux
def test_wheel_works_outside_the_source_tree(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    python = environment_with_torch(tmp_path / "venv")
    install(python, distributions[1], cwd=tmp_path)
    assert "The wheel works." in run(python, ROOT / "scripts" / "smoke_wheel.py", cwd=tmp_path)
    # The smoke test tells a wheel without CUDA from one with it.
    env = environment(FASTFS_CUDA="wheel")
    assert "AssertionError" in run(python, ROOT / "scripts" / "smoke_wheel.py", cwd=tmp_path, env=env, code=1)


# Editable and incremental


@pytest.mark.slow
@linux
def test_editable_install_is_incremental(tmp_path: Path) -> None:
    source = copy_of_source(tmp_path)
    python = environment_with_torch(tmp_path / "venv")
    install(python, "-e", source, cwd=tmp_path)
    assert "Nothing is wrong" in run(tmp_path / "venv" / "bin" / "fastfs", "doctor", cwd=tmp_path)
    where = run(python, "-c", "import fastfs, fastfs._C as c; print(fastfs.__file__, c.__file__)", cwd=tmp_path)
    assert all(Path(file).is_relative_to(source) for file in where.split())

    def objects() -> dict[str, int]:
        files = [*source.glob("build/native-*/**/*.o"), *source.glob("build/native-*/**/*.so")]
        return {file.name: file.stat().st_mtime_ns for file in files}

    # A second build compiles nothing.
    first = objects()
    assert {"module.cpp.o", "dispatch.cpp.o", "_C.so"} <= set(first)
    install(python, "-e", source, cwd=tmp_path)
    assert objects() == first

    # A changed header recompiles only the files that include it.
    header = source / "csrc" / "cpu" / "dispatch.h"
    time.sleep(0.01)
    header.touch()
    install(python, "-e", source, cwd=tmp_path)
    changed = {name for name, stamp in objects().items() if stamp != first[name]}
    assert changed == {"dispatch.cpp.o", "gather_rows.cpp.o", "measure.cpp.o", "_C.so"}


# Pure Python


@pytest.mark.slow
def test_pure_python_wheel(tmp_path: Path) -> None:
    source = copy_of_source(tmp_path)
    env = environment(FASTFS_NATIVE="0", PATH="/nonexistent")  # needs no compiler
    python = environment_with_torch(tmp_path / "venv")
    options = ("--no-deps", "--no-build-isolation", "-w", tmp_path)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=tmp_path, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"fastfs-{__version__}-py3-none-any.whl"
    install(python, wheel, cwd=tmp_path)

    program = """
import warnings, torch, fastfs
x = [torch.ones(3), torch.zeros(3), torch.ones(3)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert fastfs.feature_stats(*x).count == 3
(warning,) = caught
print(warning.category.__name__, warning.message)
try:
    fastfs.feature_stats(*x, backend="native")
except RuntimeError as error:
    print("RuntimeError", error)
"""
    output = run(python, "-c", program, cwd=tmp_path)
    assert re.match(r"RuntimeWarning .*slow reference.*\nRuntimeError .*not in use", output)
    doctor = run(tmp_path / "venv" / "bin" / "fastfs", "doctor", cwd=tmp_path, env=environment(COLUMNS="200"))
    assert "FASTFS_NATIVE=0" in doctor


# Messages instead of tracebacks, from pip as the user sees it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"FASTFS_CUDA": "yes"}, "FASTFS_CUDA must be auto", id="FASTFS_CUDA"),
        pytest.param(
            {"FASTFS_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FASTFS_CUDA=1, but there is no nvcc", id="no nvcc"
        ),
        pytest.param({"PATH": "/nonexistent"}, "no C++ compiler found", id="no compiler"),
        pytest.param({"CXX": "/nonexistent/c++"}, "names no program that exists", id="CXX"),
    ],
)
@pytest.mark.slow
@linux
def test_build_says_what_is_wrong(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    source = copy_of_source(tmp_path)
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    output = run(*command, cwd=tmp_path, env=environment(**settings), code=1)
    assert message in re.sub(r"\s+", " ", output)
    assert "Traceback" not in output


# Settings


def test_default_settings() -> None:
    assert read_settings({}) == Settings(native=True, cuda="auto", architectures=None, ptx=True)
    assert read_settings({"FASTFS_CUDA": "", "FASTFS_NATIVE": " "}) == read_settings({})


def test_architectures_are_read() -> None:
    assert read_settings({"FASTFS_CUDA_ARCHS": "80, 90a"}) == Settings(True, "auto", ("80", "90a"), False)
    assert read_settings({"FASTFS_CUDA_ARCHS": "90,120+PTX"}) == Settings(True, "auto", ("90", "120"), True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FASTFS_NATIVE": "no"}, r"FASTFS_NATIVE must be 1 .* not 'no'"),
        ({"FASTFS_CUDA": "2"}, r"FASTFS_CUDA must be auto .* not '2'"),
        ({"FASTFS_CUDA_ARCHS": "8.0"}, r"'8.0' in '8.0' is none"),
        ({"FASTFS_CUDA_ARCHS": "sm_80"}, r"'sm_80'"),
        ({"FASTFS_CUDA_ARCHS": "80,,90"}, r"'' in '80,,90' is none"),
        ({"FASTFS_CUDA_ARCHS": "80,80"}, r"names an architecture twice"),
        ({"FASTFS_CUDA_ARCHS": "80", "FASTFS_CUDA": "0"}, r"unset one of them"),
        ({"FASTFS_NATIVE": "0", "FASTFS_CUDA": "1"}, r"unset one of them"),
    ],
)
def test_wrong_settings(variables: dict[str, str], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        read_settings(variables)


def test_compiler_from_wheels_is_a_build_requirement() -> None:
    assert extra_requirements(read_settings({"FASTFS_CUDA": "wheel"})) == list(CUDA_WHEELS)
    assert {name.split("==")[0] for name in CUDA_WHEELS} >= {"nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvvm"}
    for cuda in ("auto", "0", "1"):
        assert extra_requirements(read_settings({"FASTFS_CUDA": cuda})) == []


def test_default_architectures_are_those_that_nvcc_has() -> None:
    settings = read_settings({})
    assert choose_architectures(["80", "86", "90", "100", "120"], settings, "nvcc") == (
        ("80", "90", "100", "120"),
        True,
    )
    assert choose_architectures(["75", "80", "86", "90"], settings, "nvcc") == (("80", "90"), True)
    with pytest.raises(BuildError, match=r"nvcc can emit none of 80,90,100,120, only 50,60"):
        choose_architectures(["50", "60"], settings, "nvcc")


def test_named_architectures_have_to_be_those_that_nvcc_has() -> None:
    assert choose_architectures(["80", "90"], read_settings({"FASTFS_CUDA_ARCHS": "90a"}), "nvcc") == (("90a",), False)
    with pytest.raises(BuildError, match=r"names 120, but nvcc can emit 80,90"):
        choose_architectures(["80", "90"], read_settings({"FASTFS_CUDA_ARCHS": "90,120"}), "nvcc")


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc(read_settings({"FASTFS_CUDA": "0"})) is None
    assert find_nvcc(read_settings({})) is None
    assert f"without CUDA kernels, there is no nvcc (looked in CUDA_HOME={tmp_path})" in capsys.readouterr().out
    with pytest.raises(BuildError, match=r"FASTFS_CUDA=1, but there is no nvcc .*FASTFS_CUDA=wheel"):
        find_nvcc(read_settings({"FASTFS_CUDA": "1"}))
    with pytest.raises(BuildError, match=r"FASTFS_CUDA_ARCHS is set, but there is no nvcc"):
        find_nvcc(read_settings({"FASTFS_CUDA_ARCHS": "80"}))


@linux
def test_compiler_without_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'omp.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match=r"(?s)omp\.h: No such file.*apt-get install g\+\+.*FASTFS_NATIVE=0"):
        find_cxx(tmp_path)


# The ninja file


def test_virtual_architectures() -> None:
    names = ("80", "90", "90a", "100", "120")
    assert [virtual_architecture(name, names) for name in names] == ["80", "80", "90a", "80", "80"]
    assert virtual_architecture("120", ("90a", "120")) == "120"


def test_objects_without_bindings_serve_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, home = native_sources(ROOT), Path("build/here")
    nvcc = Nvcc("/cuda/bin/nvcc", "13.0.88", "/cuda/lib", ("80",), True, None)
    texts = []
    for name in ("cpython-310", "cpython-313"):
        monkeypatch.setattr("build_backend.command.python_include", lambda name=name: f"/include/{name}")
        texts.append(ninja_file(sources, home, home / name, ["g++"], nvcc).replace("$\n    ", "").splitlines())
    differing = [(one, other) for one, other in zip(*texts, strict=True) if one != other]
    assert all("cpython-310" in one and one.replace("cpython-310", "cpython-313") == other for one, other in differing)
    # The bindings with their include path, the library, and which of them is built by default.
    assert len(differing) == 4


def test_ninja_file(tmp_path: Path) -> None:
    sources = ["csrc/binding/module.cpp", "csrc/cpu/loops_avx2.cpp", "csrc/cuda/launch.cu"]
    home = Path("build/here")
    nvcc = Nvcc("/cuda/bin/nvcc", "13.0.88", "/cuda/lib", ("80", "90", "100"), True, "g++-13")
    text = ninja_file(sources, home, home / "cpython-313", ["g++"], nvcc).replace("$\n    ", "")
    assert "-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100,compute_80]" in text.replace("'", "")
    assert "-ccbin g++-13" in text
    assert "-lcudart_static" in text
    without = ninja_file(sources, home, home / "cpython-313", ["g++"], None)
    assert "nvcc" not in without
    assert "cudart" not in without
    assert str(ROOT) not in text
