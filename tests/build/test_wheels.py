"""`make wheel` and `make wheel-test`: which versions of Python, the compiler, the repair, and one wheel as a whole."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from fastfs._version import __version__
from scripts import wheels
from scripts.pyproject import ROOT, read_pyproject
from tests.helpers.builds import copy_of_source, environment, environment_with_torch, install, linux, run

TABLE = read_pyproject()["tool"]["cibuildwheel"]
VERSION = "{}.{}".format(*sys.version_info)


def test_supported_versions() -> None:
    assert wheels.supported_versions(TABLE) == ["3.10", "3.11", "3.12", "3.13"]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is PATH, with a shim of pyenv for 3.10, an idle one for 3.12, and a 3.13 that is another."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {
        "3.10": 'test "$PYENV_VERSION" = 3.10 || exit 127\nprintf "3.10\\n/there/python3.10\\n"',
        "3.11": 'printf "3.11\\n/there/python3.11\\n"',
        "3.12": "echo 'pyenv: python3.12: command not found' >&2\nexit 127",
        "3.13": 'printf "3.9\\n/there/python3.9\\n"',
    }
    for version, text in texts.items():
        (folder / f"python{version}").write_text(f"#!/bin/sh\n{text}\n")
        (folder / f"python{version}").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYENV_VERSION", "3.11.7")
    return folder


def test_pythons_that_run_are_found(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = wheels.chosen_pythons([], wheels.supported_versions(TABLE))
    assert found == {"3.10": Path("/there/python3.10"), "3.11": Path("/there/python3.11")}
    assert "No wheels for python3.12, python3.13: not found on PATH, or not runnable." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["3.9"], "wheels are for Python 3.10, 3.11, 3.12, 3.13, not 3.9"),
        (["3.11", "3.12"], "python3.12 not found on PATH, or not runnable"),
        (["python3.11"], "not python3.11"),
    ],
)
def test_a_python_that_is_named_has_to_be_there(programs: Path, words: list[str], message: str) -> None:
    with pytest.raises(wheels.WheelError, match=re.escape(message)):
        wheels.chosen_pythons(words, wheels.supported_versions(TABLE))


def test_no_python_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(wheels.WheelError, match=r"python3.10, python3.11, python3.12, python3.13 not found"):
        wheels.chosen_pythons([], wheels.supported_versions(TABLE))


@linux
def test_this_python_is_found() -> None:
    if shutil.which(f"python{VERSION}") is None:
        pytest.skip(f"no python{VERSION} on PATH")
    found = wheels.find_python(VERSION)
    assert found is not None
    program = "import sys; print(sys.version_info[:2], sys.prefix == sys.base_prefix)"
    assert run(found, "-c", program, cwd=ROOT).strip() == f"{sys.version_info[:2]} True"


def test_a_wheel_to_test_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "DIST", tmp_path / "dist")
    (tmp_path / "dist").mkdir()
    names = [
        "cp311-cp311-manylinux_2_28",
        "cp311-cp311-linux",
        "cp313-cp313-manylinux_2_28",
        "cp313-cp313-manylinux_2_34",
    ]
    for name in names:
        (tmp_path / "dist" / f"fastfs-0.1.0-{name}_x86_64.whl").touch()
    assert wheels.wheel_for("3.11").name == f"fastfs-0.1.0-{names[0]}_x86_64.whl"
    for version, count in (("3.10", 0), ("3.13", 2)):
        with pytest.raises(wheels.WheelError, match=f"one wheel for Python {version} in dist/, found {count}"):
            wheels.wheel_for(version)


def test_the_compiler_is_installed_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[object, ...]] = []

    def record(*command: object) -> None:
        calls.append(command)
        wheels.CUDA.mkdir()

    monkeypatch.setattr(wheels, "CUDA", tmp_path / "cuda")
    monkeypatch.setattr(wheels, "run", record)
    for cuda in ("0", "1", "auto"):
        monkeypatch.setenv("FASTFS_CUDA", cuda)
        wheels.install_compiler()
    assert calls == []
    monkeypatch.setenv("FASTFS_CUDA", "wheel")
    wheels.install_compiler()
    wheels.install_compiler()
    (command,) = calls  # what is there is used again
    assert "nvidia-cuda-nvcc==13.0.*" in command
    (tmp_path / "cuda" / "requirements.txt").write_text("nvidia-cuda-nvcc==12.0.*")
    wheels.install_compiler()
    assert len(calls) == 2


@pytest.mark.slow
@linux
def test_make_wheel(tmp_path: Path) -> None:
    """The targets build a manylinux wheel of this Python without CUDA, which has no library in it, and works."""
    if shutil.which(f"python{VERSION}") is None or shutil.which("make") is None:
        pytest.skip(f"no python{VERSION} or no make on PATH")
    source = copy_of_source(tmp_path)
    stale = source / "dist" / f"fastfs-{__version__}-cp{VERSION.replace('.', '')}-cp0-manylinux_2_99_x86_64.whl"
    stale.parent.mkdir()
    stale.touch()
    options = (f"PYTHONS={VERSION}", f"PYTHON={sys.executable}")
    output = run("make", "wheel", *options, cwd=source, env=environment(FASTFS_CUDA="0"))
    (wheel,) = (path for path in (source / "dist").glob("*.whl") if path != stale)
    tag = VERSION.replace(".", "")
    assert re.fullmatch(rf"fastfs-{re.escape(__version__)}-cp{tag}-cp{tag}-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert f"dist/{wheel.name}" in output
    assert "nvcc" not in output.replace("nvcc is found", "")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.split("/")[0] for name in names} == {"fastfs", f"fastfs-{__version__}.dist-info"}
        assert [name for name in names if ".so" in name and not name.startswith("fastfs/_C.")] == []
        (library,) = [name for name in names if ".so" in name]
        content = archive.read(library)
    assert b"libgomp.so.1" in content  # under the name by which it finds that of torch
    assert b"/build/" not in content
    python = environment_with_torch(tmp_path / "venv")
    install(python, wheel, cwd=tmp_path)
    assert "The wheel works." in run(python, ROOT / "scripts" / "smoke_wheel.py", cwd=tmp_path)
