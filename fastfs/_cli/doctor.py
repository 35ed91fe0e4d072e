"""`fastfs doctor`: report what is installed and in use, why other parts are not, and whether results are correct.

`diagnose` collects the findings and needs only torch; `run_doctor` shows them.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastfs._core import ops
from fastfs._core.checks import DTYPES
from fastfs._core.self_check import self_check
from fastfs._utils.json_output import check_json_output, is_stdout, write_json
from fastfs._version import __version__

Status = Literal["ok", "note", "wrong"]

# Flags of /proc/cpuinfo that each instruction set needs.
CPU_FLAGS = {
    "generic": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
}


@dataclass(frozen=True)
class Diagnosis:
    """One line of the diagnosis. ``why`` says why something is not in use, or what is wrong and how to fix it."""

    section: str
    name: str
    value: str
    status: Status = "ok"
    why: str = ""


def diagnose(environ: Mapping[str, str] | None = None) -> list[Diagnosis]:
    """Inspect the installation and run the self-check.

    Args:
        environ: environment variables to use in explanations; None means those of the process.

    Returns:
        The findings, in display order.
    """
    env = os.environ if environ is None else environ
    findings = [
        Diagnosis("versions", "python", f"{platform.python_version()} ({platform.machine()}, {sys.platform})"),
        Diagnosis("versions", "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        Diagnosis("versions", "fastfs", __version__),
    ]
    info, core = _core()
    findings += core
    gpus, gpu_trouble = _gpus()
    if info is not None:
        findings += cpu_findings(info, _cpu_flags(), env)
        findings += cuda_findings(info["cuda"], torch.version.cuda, gpus, gpu_trouble, env)
        findings += self_check_findings("cpu")
        if info["cuda"] is not None:
            for index in range(len(gpus)):
                findings += self_check_findings(f"cuda:{index}")
        findings += thread_findings(info, _openmp_libraries(_mapped_files()))
    return findings


# What is installed


def _core() -> tuple[dict[str, Any] | None, list[Diagnosis]]:
    """Return build_info() of the native core, or None, and findings on its presence."""
    section = "native core"
    if not ops.native_available():
        if installed_as_pure_python(importlib.metadata.distributions(name="fastfs")):
            why = "installed as pure Python (FASTFS_NATIVE=0): measurements run on the slow reference"
            return None, [Diagnosis(section, "compiled module", "none", "note", why)]
        return None, [Diagnosis(section, "compiled module", "missing", "wrong", ops.why_not_native())]
    try:
        info = ops.build_info()
    except RuntimeError as error:  # FASTFS_CPU names an unavailable instruction set
        return None, [Diagnosis(section, "compiled module", "refuses to work", "wrong", str(error))]
    return info, [version_finding(info["version"]), Diagnosis(section, "compiler", info["compiler"])]


def version_finding(built: str) -> Diagnosis:
    """Compare the version of the compiled module with that of the Python files."""
    if built == __version__:
        return Diagnosis("native core", "compiled module", built)
    why = (
        f"compiled from fastfs {built}, but the Python files are {__version__}: "
        "install again (pip install --force-reinstall --no-deps, or pip install -e . in a source tree)"
    )
    return Diagnosis("native core", "compiled module", built, "wrong", why)


def installed_as_pure_python(distributions: Iterable[importlib.metadata.Distribution]) -> bool:
    """Whether the metadata of the installed wheel says that it was built without native core on purpose."""
    wheels = (text for text in (d.read_text("WHEEL") for d in distributions) if text)  # the imported one comes first
    return "Root-Is-Purelib: true" in next(wheels, "")


# What is in use, and why not the rest


def cpu_findings(info: Mapping[str, Any], flags: set[str] | None, environ: Mapping[str, str]) -> list[Diagnosis]:
    """Return one finding per instruction set. `flags` are those of the processor, or None if unknown."""
    used, built = info["instruction_set"], info["instruction_sets"]
    wanted = environ.get("FASTFS_CPU", "")
    findings = []
    for name, needed in CPU_FLAGS.items():
        missing = [flag for flag in needed if flags is not None and flag not in flags]
        if name == used:
            findings.append(Diagnosis("cpu", name, "in use", why=f"FASTFS_CPU={wanted}" if wanted else ""))
        elif name not in built:
            findings.append(Diagnosis("cpu", name, "not built", "note", f"not for {platform.machine()}"))
        elif missing:
            findings.append(Diagnosis("cpu", name, "built, not in use", "note", f"the CPU lacks {', '.join(missing)}"))
        elif wanted:
            findings.append(Diagnosis("cpu", name, "built, not in use", "note", f"FASTFS_CPU={wanted}"))
        else:
            findings.append(Diagnosis("cpu", name, "built, not in use", why=f"{used} is faster"))
    return findings


def cuda_findings(
    built: Mapping[str, Any] | None,
    torch_cuda: str | None,
    gpus: list[tuple[str, int]],
    trouble: str,
    environ: Mapping[str, str],
) -> list[Diagnosis]:
    """Return findings on CUDA.

    Args:
        built: `cuda` of build_info().
        torch_cuda: CUDA version of torch, or None for a torch without CUDA.
        gpus: name and compute capability (major * 10 + minor) of the GPUs that torch can use.
        trouble: warnings of torch while it looked for GPUs.
        environ: environment variables.

    Returns:
        The findings, in display order.
    """
    findings = []
    if built is None:
        why = "no nvcc was found when fastfs was installed, or FASTFS_CUDA=0 was set"
        findings.append(Diagnosis("cuda", "kernels", "not built", "note", why))
    else:
        findings.append(Diagnosis("cuda", "kernels", f"sm_{built['architectures'].replace(',', ', sm_')}"))
        findings.append(Diagnosis("cuda", "runtime", f"{_cuda_version(built['runtime'])} (linked in)"))
        driver = f"for CUDA {_cuda_version(built['driver'])}" if built["driver"] else "none"
        findings.append(Diagnosis("cuda", "driver", driver, "ok" if built["driver"] else "note"))
    if not gpus:
        if torch_cuda is None:
            why = "torch is built without CUDA"
        elif built is not None and not built["driver"]:
            why = "no NVIDIA driver"
        elif "CUDA_VISIBLE_DEVICES" in environ:
            why = f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']}"
        else:
            why = "torch sees no GPU"
        findings.append(Diagnosis("cuda", "GPU", "none in use", "note", f"{why}; {trouble}" if trouble else why))
    for index, (name, capability) in enumerate(gpus):
        findings.append(_gpu_finding(f"GPU {index}", name, capability, built))
    return findings


def _gpu_finding(label: str, name: str, capability: int, built: Mapping[str, Any] | None) -> Diagnosis:
    value = f"{name} (sm_{capability})"
    if built is None:
        why = "CUDA tensors cannot be measured natively: reinstall with nvcc available, or with FASTFS_CUDA=wheel"
        return Diagnosis("cuda", label, value, "wrong", why)
    if 0 < built["driver"] // 1000 < built["runtime"] // 1000:
        why = (
            f"the driver is for CUDA {_cuda_version(built['driver'])}, the kernels need "
            f"{_cuda_version(built['runtime'])}: update the driver, or build with an older CUDA toolkit"
        )
        return Diagnosis("cuda", label, value, "wrong", why)
    if not runs_on(built["architectures"], capability):
        why = f"no kernel for this GPU: reinstall with FASTFS_CUDA_ARCHS={capability}"
        return Diagnosis("cuda", label, value, "wrong", why)
    return Diagnosis("cuda", label, value)


def runs_on(architectures: str, capability: int) -> bool:
    """Whether code for `architectures` ("80,90+PTX") runs on a GPU: same major version, or PTX of an older one."""
    names = architectures.removesuffix("+PTX").split(",")
    for name in names:
        if name.endswith("a"):
            if int(name[:-1]) == capability:
                return True
        elif int(name.rstrip("f")) // 10 == capability // 10 and int(name.rstrip("f")) <= capability:
            return True
    if not architectures.endswith("+PTX") or not names[-1].isdigit():
        return False
    # The PTX is that of the oldest architecture in the generation of the last one (build_backend/command.py).
    generation = [int(name) for name in names if name.isdigit() and (int(name) >= 100) == (int(names[-1]) >= 100)]
    return min(generation) <= capability


def thread_findings(info: Mapping[str, Any], libraries: list[str]) -> list[Diagnosis]:
    """Return findings on threads and on the OpenMP runtimes loaded in the process."""
    threads = Diagnosis("threads", "torch.get_num_threads()", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    if not info["openmp"]:
        return [threads, Diagnosis("threads", "OpenMP", "not built", "note", "the native core uses one thread")]
    if len(libraries) == 1:
        return [threads, Diagnosis("threads", "OpenMP", libraries[0], why="shared with torch")]
    why = "not one runtime shared with torch: threads of both may compete"
    return [threads, Diagnosis("threads", "OpenMP", ", ".join(libraries) or "unknown", "note", why)]


# Self-check


def self_check_findings(device: str) -> list[Diagnosis]:
    """Compare native results with the reference on `device`: one finding per dtype of the features."""
    findings = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            failures = self_check(torch.device(device), dtype)
        except Exception as error:  # any failure is a finding
            failures = [f"{type(error).__name__}: {error}"]
        if failures:
            findings.append(Diagnosis("self-check", f"{device} {name}", "differs", "wrong", "; ".join(failures)))
        else:
            findings.append(Diagnosis("self-check", f"{device} {name}", "native agrees with reference"))
    return findings


# The machine


def _gpus() -> tuple[list[tuple[str, int]], str]:
    """Return name and compute capability of the GPUs, and the warnings of torch while it looked for them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = []
        for index in range(count):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append((torch.cuda.get_device_name(index), 10 * major + minor))
    return gpus, "; ".join(str(w.message).splitlines()[0] for w in caught)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _cpu_flags() -> set[str] | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return None


def _mapped_files() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return [line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line]


def _openmp_libraries(files: list[str]) -> list[str]:
    names = ("libgomp", "libomp", "libiomp5")
    return sorted({file for file in files if Path(file).name.startswith(names)})


# Output


def run_doctor(console: Console | None = None, *, json: Path | None = None) -> int:
    """Show the diagnosis on `console`, and write it as JSON.

    Args:
        console: where to print; None means standard output, or standard error if the JSON goes to standard output.
        json: file for the JSON, `-` for standard output, or None.

    Returns:
        The exit status: 1 if something is wrong, else 0.

    Raises:
        OSError: the file cannot be written.
        ValueError: it exists and is not a regular file.
    """
    check_json_output(json)
    findings = diagnose()
    wrong = sum(f.status == "wrong" for f in findings)
    _show(console or Console(stderr=is_stdout(json)), findings, wrong)
    if json is not None:
        write_json(json, {"ok": not wrong, "findings": [asdict(f) for f in findings]})
    return 1 if wrong else 0


def version_line() -> str:
    """Versions of fastfs and torch, and the native core in use, in one line."""
    native = "none (slow reference)"
    if ops.native_available():
        try:
            native = f"in use ({ops.build_info()['instruction_set']})"
        except RuntimeError as error:  # FASTFS_CPU names an unavailable instruction set
            native = f"refuses to work ({error})"
    return f"fastfs {__version__}, torch {torch.__version__}, native core {native}"


def _show(console: Console, findings: list[Diagnosis], wrong: int) -> None:
    marks = {"ok": Text("ok", "green"), "note": Text("--", "yellow"), "wrong": Text("!!", "bold red")}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, group in itertools.groupby(findings, key=lambda f: f.section):
        table.add_row("", Text(section, "bold"), "")
        for finding in group:
            told = Text(finding.value)
            if finding.why:
                told.append(f"  {finding.why}", "red" if finding.status == "wrong" else "dim")
            table.add_row(marks[finding.status], Text(f"  {finding.name}"), told)
    console.print(table)
    if wrong:
        console.print(Text(f"\n{wrong} of {len(findings)} findings are wrong (marked !!).", "bold red"))
    else:
        console.print(Text("\nNothing is wrong.", "bold green"))
