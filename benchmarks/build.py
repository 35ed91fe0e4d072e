"""Measure the processor time of building fastfs, as a whole, per file and per phase of nvcc, and the size of the wheel.

    python -m benchmarks.build [--json FILE] [--no-cuda]

A unit is the processor time (user and system, of all processes) that ``g++ -O2`` takes for a file that includes
<regex> and matches one pattern: 3 to 7 seconds. Machines differ by a factor of four, units do not. It is measured
before, between and after the other figures; each is divided by the mean of those beside it.

- ``wheel``: ``pip wheel .`` in a fresh isolated environment, with the settings of the environment (FASTFS_CUDA,
  FASTFS_CUDA_ARCHS), in a copy of the source; then the same with ``FASTFS_CUDA=0``.
- ``file``: every command of that build again, one at a time. Commands of nvcc are taken apart by ``--dryrun``:
  compute_80 is the optimiser (cicc) for that virtual architecture, sm_80 the assembler (ptxas), the rest is the
  preprocessor and the host's compiler.
- ``header``: what a change of the header compiles again, with the link, added up from the figures of the files.

The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import file_option, print_table, write_json
from build_backend.toolchain import find_ninja

ROOT = Path(__file__).resolve().parents[1]
FILES = ("LICENSE", "MANIFEST.in", "README.md", "THIRD_PARTY_LICENSES.md", "pyproject.toml", "setup.py")
FOLDERS = ("build_backend", "csrc", "fastfs", "licenses")

# Units, and bytes of the wheel with CUDA.
MOST_WITH_CUDA, MOST_WITHOUT_CUDA, MOST_FOR_A_HEADER = 25.0, 8.0, 5.0
MOST_BYTES = 1.5e6

UNIT = """\
#include <regex>
#include <string>
int main(int count, char** words) {
  const std::regex pattern("([a-z]+)=([0-9]+)");
  std::smatch found;
  const std::string text = count > 1 ? words[1] : "answer=42";
  return std::regex_match(text, found, pattern) ? 0 : 1;
}
"""


def cpu_seconds(command: list[str] | str, cwd: Path, env: dict[str, str] | None = None) -> float:
    """Run a command (a string: by the shell), and return the processor time of it and its children.

    Raises:
        RuntimeError: The command failed; the message ends with its output.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, shell=isinstance(command, str), cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            words = command if isinstance(command, str) else shlex.join(command)
            raise RuntimeError(f"{words[:400]} failed:\n{output.read().decode(errors='replace')[-4000:]}")
    return usage.ru_utime + usage.ru_stime


@dataclass
class Unit:
    """The processor time that figures are given in, measured again and again, since it changes with other load."""

    compiler: str
    folder: Path
    times: list[float] = field(default_factory=list)

    def measure(self) -> float:
        """Measure it twice; returns the mean of these and the two times before, if there are any."""
        source = self.folder / "unit.cpp"
        source.write_text(UNIT)
        for _ in range(2):
            self.times.append(cpu_seconds([self.compiler, "-O2", str(source), "-o", "unit"], self.folder))
        return statistics.mean(self.times[-4:])


@dataclass(frozen=True)
class Command:
    """One command of the build: its seconds by phase (one phase, but for nvcc)."""

    file: str
    output: str
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def copy_source(folder: Path) -> Path:
    """Copy what a build needs, without what builds have left behind."""
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def build_wheel(source: Path, env: dict[str, str], isolated: bool = True) -> tuple[float, int]:
    """Build a wheel, and return the processor time and the bytes of the wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", "dist", "."]
    seconds = cpu_seconds(command if isolated else [*command, "--no-build-isolation"], source, env)
    (wheel,) = (source / "dist").glob("*.whl")
    return seconds, wheel.stat().st_size


def ninja_tool(source: Path, *arguments: str) -> str:
    """The output of a subtool of ninja, for the build that was made in `source`."""
    (file,) = source.glob("build/native-*/*/build.ninja")
    command = [find_ninja(), "-f", str(file.relative_to(source)), "-t", *arguments]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout


def time_commands(source: Path, env: dict[str, str]) -> list[Command]:
    """Run every command of the build in `source` again, one at a time."""
    found = []
    for entry in json.loads(ninja_tool(source, "compdb")):
        if entry["file"].endswith(".cu"):
            phases = time_phases(entry["command"], source, env)
        else:
            phases = {"host": cpu_seconds(entry["command"], source, env)}
        name = entry["file"] if entry["output"].endswith(".o") else entry["output"].rpartition("/")[2]
        found.append(Command(name, entry["output"], phases))
    return found


def time_phases(command: str, cwd: Path, env: dict[str, str]) -> dict[str, float]:
    """Run what a command of nvcc consists of, and return the processor time by phase."""
    phases: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**env, "TMPDIR": folder}
        nvcc, rest = command.split(" ", 1)
        plan = subprocess.run(
            f"{nvcc} --dryrun {rest}", shell=True, cwd=cwd, env=env, capture_output=True, text=True, check=True
        ).stderr
        for line in re.findall(r"^#\$ (.+)$", plan, re.M):
            variable = re.fullmatch(r"(\w+)=(.*)", line)
            if variable is not None:
                env[variable[1]] = variable[2].strip()
            elif not line.startswith(("-- ", "rm ")):
                phase = phase_of(line)
                phases[phase] = phases.get(phase, 0.0) + cpu_seconds(line, cwd, env)
    return phases


def phase_of(line: str) -> str:
    """What one line of ``nvcc --dryrun`` is for."""
    program = Path(shlex.split(line)[0]).name
    target = re.search(r"-arch[= ](\w+)", line)
    if program in ("cicc", "ptxas") and target is not None:
        return target[1]
    return "preprocessor" if " -E " in line else "host"


def headers(source: Path, commands: list[Command]) -> dict[str, list[Command]]:
    """The commands that a change of each header runs again, but for the link."""
    by_output = {command.output: command for command in commands}
    depending: dict[str, list[Command]] = {}
    for block in ninja_tool(source, "deps").strip().split("\n\n"):
        output, *lines = block.splitlines()
        command = by_output.get(output.partition(":")[0])
        for name in {os.path.normpath(line.strip()) for line in lines}:
            if command is not None and name.startswith("csrc") and name != command.file:
                depending.setdefault(name, []).append(command)
    return depending


def changes() -> Counter[str]:
    """The number of commits that changed each file below csrc/; empty outside of a clone."""
    command = ["git", "log", "--no-merges", "--format=", "--name-only", "--", "csrc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return Counter(done.stdout.split()) if done.returncode == 0 else Counter()


def measure(folder: Path, *, cuda: bool, isolated: bool = True, compiler_of_unit: str = "g++") -> list[dict[str, Any]]:
    """Measure everything in a folder for scratch, and return the results."""
    env = dict(os.environ) if cuda else {**os.environ, "FASTFS_CUDA": "0"}
    unit = Unit(compiler_of_unit, folder)
    unit.measure()
    with_cuda = copy_source(folder / "source")
    wheels = [(cuda, *build_wheel(with_cuda, env, isolated), unit.measure())]
    commands, unit_of_commands = time_commands(with_cuda, env), unit.measure()
    if cuda:
        without = {name: value for name, value in env.items() if name != "FASTFS_CUDA_ARCHS"} | {"FASTFS_CUDA": "0"}
        wheels.append((False, *build_wheel(copy_source(folder / "without"), without, isolated), unit.measure()))

    def units(seconds: float, unit: float = unit_of_commands) -> float:
        return round(seconds / unit, 2)

    results: list[dict[str, Any]] = [{"what": "unit", "cpu_seconds": statistics.median(unit.times), "all": unit.times}]
    for has_cuda, seconds, size, unit_of_wheel in wheels:
        target = MOST_WITH_CUDA if has_cuda else MOST_WITHOUT_CUDA
        results.append({"what": "wheel", "cuda": has_cuda, "cpu_seconds": seconds})
        results[-1] |= {"units": units(seconds, unit_of_wheel), "target": target, "bytes": size}
    for command in sorted(commands, key=lambda c: -c.seconds):
        phases = {phase: units(seconds) for phase, seconds in command.phases.items()}
        results.append({"what": "file", "file": command.file, "units": units(command.seconds), "phases": phases})
    link = sum(c.seconds for c in commands if not c.output.endswith(".o"))
    often = changes()
    for name, depending in headers(with_cuda, commands).items():
        results.append({"what": "header", "header": name, "commits": often[name], "files": len(depending)})
        results[-1] |= {"units": units(sum(c.seconds for c in depending) + link), "target": MOST_FOR_A_HEADER}
    return results


def missed(results: list[dict[str, Any]]) -> list[str]:
    """What misses its target. Of the headers, the most expensive one and the one that was changed most often count."""
    found = []
    for row in results:
        if row["what"] == "wheel" and row["units"] > row["target"]:
            found.append(f"wheel {'with' if row['cuda'] else 'without'} CUDA: {row['units']} units")
        if row["what"] == "wheel" and row["cuda"] and row["bytes"] > MOST_BYTES:
            found.append(f"wheel with CUDA: {row['bytes']} bytes")
    for row, why in chosen_headers(results):
        if row["units"] > row["target"]:
            found.append(f"{row['header']} ({why}): {row['units']} units")
    return found


def chosen_headers(results: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    rows = [row for row in results if row["what"] == "header"]
    if not rows:
        return []
    worst, usual = max(rows, key=lambda row: row["units"]), max(rows, key=lambda row: row["commits"])
    return [(worst, "the most expensive"), (usual, f"changed most often, in {usual['commits']} commits")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    parser.add_argument("--no-cuda", action="store_true", help="measure only the build without CUDA")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), cuda=not options.no_cuda)
    write_json(options.json, torch.device("cpu"), results)
    rows = [
        [f"pip wheel, {'with' if row['cuda'] else 'without'} CUDA, {row['bytes'] / 1e6:.2f} MB", str(row["units"])]
        for row in results
        if row["what"] == "wheel"
    ]
    rows += [[f"header {row['header']}, {why}", str(row["units"])] for row, why in chosen_headers(results)]
    for row in results:
        if row["what"] == "file":
            phases = ", ".join(f"{phase} {units}" for phase, units in row["phases"].items())
            rows.append([row["file"] + (f": {phases}" if len(row["phases"]) > 1 else ""), str(row["units"])])
    print_table(f"a unit is {results[0]['cpu_seconds']:.2f} s", ["what", "units"], rows)
    trouble = missed(results)
    for line in trouble:
        print("target missed:", line)
    sys.exit(1 if trouble else 0)


if __name__ == "__main__":
    main()
