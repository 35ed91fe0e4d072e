"""Compiles the kernels for the host and runs cases through them."""

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastfs._core.measurements import MEASUREMENTS

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[2] / "csrc"
TUNING = HERE.parents[2] / "benchmarks" / "tuning"
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
# The kernels in the order of csrc/measurements.h. RULES + rule: optimizer_stats.
COLUMNS = [measurement.columns for measurement in MEASUREMENTS for _ in measurement.kernels]
FEATURES, UPDATES, RULES = range(3)
STREAM_READ = -1

FLAGS = "-std=c++17 -w -fno-strict-aliasing -ffp-contract=off -pthread -DFASTFS_CUDA_ON_CPU".split()
SMALL = '-DFASTFS_POLICIES="shim_policy.h"'
# name: flags of the kernels, flags of the runtime (which is never compiled with a sanitizer)
BUILDS = {
    "plain": (["-O1"], []),
    "small": (["-O1", SMALL], []),  # with small blocks, chunks and groups of chunks
    "asan": (
        [
            *("-O1", "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
            *("-DSHIM_SHARED_STATIC", SMALL),
        ],
        ["-DSHIM_ASAN", "-DSHIM_SHARED_STATIC"],
    ),
    # The thread sanitizer tells about 255 contexts apart: blocks of 64 threads, see README.md.
    "tsan": (["-O1", "-fsanitize=thread", "-DSHIM_TSAN", SMALL], ["-DSHIM_TSAN"]),
}
BF16_ONLY = "-DDRIVER_BF16_ONLY"


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    if include_folder() is None:
        return "no CUDA headers (vector_types.h): set CUDA_HOME"
    return None


def include_folder() -> Path | None:
    """The CUDA headers, for the vector types."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        folders.append(str(Path(nvcc).resolve().parents[1]))
    for folder in folders:
        if folder and (Path(folder) / "include" / "vector_types.h").is_file():
            return Path(folder) / "include"
    return None


@dataclass
class Case:
    """Layers, each a tuple of the inputs of the operation, and how to launch them."""

    layers: list[tuple[Tensor, ...]]
    op: int = FEATURES
    per_row: bool = False
    multiprocessors: int = 2
    large_parameters: bool = False
    repeats: int = 1
    misaligned: tuple[int, ...] = (0, 0, 0, 0)  # elements
    coefficients: Tensor | None = None  # (layers, C)
    far: bool = False  # coefficients in device memory


@dataclass
class Result:
    """What the driver wrote for one case."""

    rows: Tensor
    launches: int
    dirty_tickets: int


@dataclass
class Run:
    """A finished driver."""

    code: int
    text: str
    results: list[Result] = field(default_factory=list)


def with_change(folder: Path, path: Path, old: str, new: str) -> Path:
    """A copy of csrc in `folder` with one change of a header, which may also be one of benchmarks/tuning."""
    shutil.copytree(CUDA_SOURCES, folder, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} places like {old!r}, expected one"
    (folder / "cuda" / path.name).write_text(text.replace(old, new))
    return folder


def compile_driver(
    build: str, folder: Path, sources: Path = CUDA_SOURCES, *flags: str, driver: str = "driver.cpp"
) -> Path:
    """Builds the driver with the kernels in `sources`; raises with the compiler's words when that fails."""
    kernel_flags, runtime_flags = BUILDS[build]
    include = include_folder()
    assert include is not None
    folder.mkdir(parents=True, exist_ok=True)
    common = ["g++", *FLAGS, f"-I{HERE}", f"-I{sources / 'cuda'}", f"-I{TUNING}", f"-isystem{include}"]
    runtime, program = folder / "shim_rt.o", folder / "driver"
    for command in (
        [*common, "-O2", *runtime_flags, "-c", str(HERE / "shim_rt.cpp"), "-o", str(runtime)],
        [*common, *kernel_flags, *flags, str(HERE / driver), str(runtime), "-o", str(program)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return program


def compile_library(driver: str, folder: Path, *flags: str) -> Path:
    """Builds a driver as a shared library for the host, plain build."""
    include = include_folder()
    assert include is not None
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "library.so"
    command = [
        "g++",
        *FLAGS,
        "-O1",
        "-fPIC",
        "-fno-gnu-unique",
        "-shared",
        *flags,
        f"-I{HERE}",
        f"-I{CUDA_SOURCES / 'cuda'}",
        f"-I{TUNING}",
        f"-isystem{include}",
    ]
    command += [str(HERE / driver), str(HERE / "shim_rt.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return library


@dataclass
class Programs:
    """Drivers, compiled beside one another from the start of the session; ask for one to wait for it."""

    folder: Path
    pool: ThreadPoolExecutor
    built: dict[str, Future[Path]] = field(default_factory=dict)

    def start(self, name: str, build: str, sources: Path, *flags: str, driver: str = "driver.cpp") -> None:
        folder = self.folder / name.replace(" ", "_")
        self.built[name] = self.pool.submit(compile_driver, build, folder, sources, *flags, driver=driver)

    def __getitem__(self, name: str) -> Path:
        return self.built[name].result()


def environment(seed: int) -> dict[str, str]:
    """That of a driver: the order of blocks and threads, and sanitizers that end at the first finding."""
    return dict(
        os.environ,
        SHIM_SEED=str(seed),
        TSAN_OPTIONS="halt_on_error=1:exitcode=66:symbolize=0",
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:symbolize=0",
    )


def exchange(program: Path, cases: Sequence[bytes], seed: int, check: bool) -> tuple[int, str, bytes]:
    """Runs a driver on encoded cases; `seed` shuffles the order of blocks and threads.

    Returns:
        The exit status, the end of what the driver printed, and the encoded results.
    """
    given, found = program.parent / f"cases.{os.getpid()}", program.parent / f"results.{os.getpid()}"
    given.write_bytes(struct.pack("q", len(cases)) + b"".join(cases))
    found.write_bytes(b"")
    done = subprocess.run(
        [str(program), str(given), str(found)], capture_output=True, text=True, check=False, env=environment(seed)
    )
    text = (done.stdout + done.stderr)[-6000:]
    if check:
        assert done.returncode == 0, f"the driver ended with {done.returncode}\n{text}"
    data = found.read_bytes()
    given.unlink()
    found.unlink()
    return done.returncode, text, data


def run(program: Path, cases: list[Case], *, seed: int = 0, check: bool = True) -> Run:
    """Runs the cases in one process; `seed` shuffles the order of blocks and threads."""
    code, text, data = exchange(program, [_encode(case) for case in cases], seed, check)
    outcome = Run(code, text)
    if code == 0:
        at = 0
        for case in cases:
            launches, dirty, size = struct.unpack_from("3q", data, at)
            rows = torch.frombuffer(bytearray(data[at + 24 : at + 24 + 8 * size] or b"\0" * 8), dtype=torch.float64)
            at += 24 + 8 * size
            columns = 1 if case.op == STREAM_READ else COLUMNS[case.op]
            outcome.results.append(Result(rows[:size].view(-1, columns), launches, dirty))
        assert at == len(data)
    return outcome


def rows(program: Path, *cases: Case, seed: int = 0) -> list[Tensor]:
    """The sums of every case: (rows, columns). Tickets must be zero again."""
    results = run(program, list(cases), seed=seed).results
    dirty = [r.dirty_tickets for r in results]
    assert dirty == [0] * len(cases), f"tickets are not zero again: {dirty}"
    return [r.rows for r in results]


def _encode(case: Case) -> bytes:
    head = [case.op, case.multiprocessors, int(case.large_parameters), case.repeats, int(case.far), len(case.layers)]
    table = [[]] * len(case.layers) if case.coefficients is None else case.coefficients.tolist()
    layers = (_encode_layer(layer, row, case) for layer, row in zip(case.layers, table, strict=True))
    return struct.pack("6q", *head) + b"".join(layers)


def _encode_layer(layer: tuple[Tensor, ...], coefficients: list[float], case: Case) -> bytes:
    shape = layer[0].shape
    if case.per_row:
        width = shape[-1] if shape else 1
        segments = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
    else:
        segments, width = 1, layer[0].numel()
    dims = list(shape) or [1]
    dtypes = DTYPES[layer[0].dtype], DTYPES[layer[-1].dtype]
    parts = [struct.pack("5q", *dtypes, segments, width, int(case.per_row))]
    parts.append(struct.pack(f"q{len(coefficients)}d", len(coefficients), *coefficients))
    parts.append(struct.pack(f"{len(dims) + 1}q", len(dims), *dims))
    for tensor, misaligned in zip(layer, case.misaligned, strict=False):
        strides = list(tensor.stride()) or [1]
        data = reached(tensor)
        parts.append(struct.pack(f"{len(dims) + 1}q", int(tensor.is_contiguous()), *strides))
        parts.append(struct.pack("2q", misaligned * tensor.element_size(), len(data)))
        parts.append(data)
    return b"".join(parts)


def reached(tensor: Tensor) -> bytes:
    """What lies between the first and the last element that the tensor reaches."""
    if tensor.numel() == 0:
        return b""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.as_strided(tensor, (last + 1,), (1,), tensor.storage_offset()).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()
