"""Build manylinux wheels, one per version of Python, and try each in a clean environment.

    make wheel         build them into dist/
    make wheel-test    install each with torch in a new environment, and run scripts/smoke_wheel.py there

``PYTHONS="3.11 3.13"`` chooses versions; without it, all of those in pyproject.toml that are installed. What is built
and tested, the settings of the build and the repair are those of [tool.cibuildwheel] in pyproject.toml. The tools are
those of locks/build.txt. Kernels are compiled once: only the bindings depend on the version of Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from build_backend.settings import extra_requirements, read_settings
from scripts.pyproject import ROOT, read_pyproject

DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"
CUDA = WORK / "cuda"  # one compiler for all versions of Python, so that its commands are the same
LOCK = ROOT / "locks" / "build.txt"


class WheelError(SystemExit):
    """Ends the program with a message."""


def supported_versions(table: dict[str, Any]) -> list[str]:
    """Return the versions of Python that wheels are for, such as "3.10"."""
    (names,) = re.findall(r"^cp\{([\d,]+)\}-manylinux_\*$", table["build"])
    return [f"{name[0]}.{name[1:]}" for name in names.split(",")]


def find_python(version: str) -> Path | None:
    """Return the interpreter of this version that is on PATH as ``python3.N``, also as a shim of pyenv, or None."""
    if shutil.which(f"python{version}") is None:
        return None
    program = "import sys; print('{}.{}'.format(*sys.version_info)); print(sys._base_executable)"
    found = subprocess.run(
        [f"python{version}", "-c", program],
        env={**os.environ, "PYENV_VERSION": version},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode or found.stdout.splitlines()[0] != version:
        return None
    return Path(found.stdout.splitlines()[1])


def chosen_pythons(words: list[str], supported: list[str]) -> dict[str, Path]:
    """Return the interpreters to build for, by version.

    Raises:
      WheelError: a version is named that is not supported or not installed, or none is installed.
    """
    unknown = [word for word in words if word not in supported]
    if unknown:
        raise WheelError(f"wheels are for Python {', '.join(supported)}, not {', '.join(unknown)}")
    found = {version: find_python(version) for version in words or supported}
    missing = [f"python{version}" for version, python in found.items() if python is None]
    if missing and (words or len(missing) == len(found)):
        raise WheelError(f"{', '.join(missing)} not found on PATH, or not runnable")
    if missing:
        print(f"No wheels for {', '.join(missing)}: not found on PATH, or not runnable.")
    return {version: python for version, python in found.items() if python is not None}


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    if subprocess.run(words, cwd=cwd, env=env, check=False).returncode:
        raise WheelError(f"{shlex.join(words)} failed")


def new_environment(python: Path, folder: Path) -> Path:
    """Create an empty virtual environment, and return its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def install_compiler() -> None:
    """Install the wheels of the CUDA compiler into CUDA, unless it has them."""
    wanted = "\n".join(extra_requirements(read_settings()))
    stamp = CUDA / "requirements.txt"
    if wanted and not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(CUDA, ignore_errors=True)
        run(sys.executable, "-m", "pip", "install", "--target", CUDA, *wanted.splitlines())
        stamp.write_text(wanted)


def build_wheel(version: str, base: Path, repair: str) -> Path:
    """Build and repair the wheel for one version of Python, and return it."""
    folder = WORK / f"python{version}"
    python = new_environment(base, folder)
    run(python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", LOCK)
    env = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(CUDA)}
    with tempfile.TemporaryDirectory(dir=WORK) as made:
        run(python, "-m", "build", "--wheel", "--no-isolation", "--outdir", f"{made}/raw", ".", env=env)
        (raw,) = Path(made).glob("raw/*.whl")
        run(*shlex.split(repair.format(wheel=raw, dest_dir=f"{made}/repaired")), env=env)
        (repaired,) = Path(made).glob("repaired/*.whl")
        DIST.mkdir(exist_ok=True)
        for old in DIST.glob(f"{'-'.join(repaired.name.split('-')[:4])}-*.whl"):  # with another platform tag
            old.unlink()
        return Path(shutil.move(repaired, DIST))


def wheel_for(version: str) -> Path:
    """Return the wheel in DIST for a version of Python.

    Raises:
      WheelError: there is none, or more than one.
    """
    found = sorted(DIST.glob(f"fastfs-*-cp{version.replace('.', '')}-*-manylinux*.whl"))
    if len(found) != 1:
        raise WheelError(f"expected one wheel for Python {version} in {DIST.name}/, found {len(found)}: make wheel")
    return found[0]


def test_wheel(version: str, base: Path, command: str) -> None:
    """Install a wheel in a new environment, with the pinned torch, and run the test outside of the source tree."""
    folder = WORK / f"test-python{version}"
    python = new_environment(base, folder)
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel_for(version))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    with tempfile.TemporaryDirectory() as outside:
        run(*shlex.split(command.format(project=ROOT)), cwd=Path(outside), env=env)
    shutil.rmtree(folder)  # with torch, gigabytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "test"))
    parser.add_argument("versions", nargs="*", help="such as 3.11; default: all that are installed")
    options = parser.parse_args(arguments)
    table = read_pyproject()["tool"]["cibuildwheel"]
    pythons = chosen_pythons(options.versions, supported_versions(table))
    WORK.mkdir(parents=True, exist_ok=True)
    for name, value in table["linux"]["environment"].items():
        os.environ.setdefault(name, value)
    if options.what == "build":
        install_compiler()
        wheels = [
            build_wheel(version, base, table["linux"]["repair-wheel-command"]) for version, base in pythons.items()
        ]
    else:
        for version, base in pythons.items():
            test_wheel(version, base, table["test-command"])
        wheels = [wheel_for(version) for version in pythons]
    print(f"\n{'Built' if options.what == 'build' else 'Tested'}:")
    for wheel in wheels:
        print(f"  {wheel.relative_to(ROOT)}  {wheel.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
