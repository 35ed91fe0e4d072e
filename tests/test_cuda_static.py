"""What the compiler makes of the CUDA kernels, read without a GPU: registers, spills, local memory, wide loads."""

import bisect
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
DTYPES = ("f16", "bf16", "f32", "f64")
FILES = (*(f"{kind}_sums_{d}" for kind in ("segment", "optimizer") for d in DTYPES), "launch")
# As the build does: real architecture, and the virtual one whose PTX it is assembled from.
ARCHITECTURES = {"80": "80", "90": "80", "120": "100"}
THREADS, REGISTER_FILE = 256, 65536
ARITHMETIC = ("FFMA", "FMUL", "DFMA", "DMUL")
# Of every dtype: equal dtypes with a small and a large table, another last dtype (not for f64), any strides (two for
# f64); times two measurements; and the streaming read with two tables. Of the four rules of optimizer_stats (one for
# 16 bits): a small and a large table, and any strides.
KERNELS = {"launch": 2, **{f"segment_sums_{d}": 8 for d in DTYPES}}
KERNELS |= {f"optimizer_sums_{d}": 3 if d.endswith("16") else 12 for d in DTYPES}


def find_tool(name: str) -> str | None:
    folders = [os.path.join(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders += [str(p) for p in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin")]
    folders.append("/usr/local/cuda/bin")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


NVCC, CUOBJDUMP, NVDISASM = find_tool("nvcc"), find_tool("cuobjdump"), find_tool("nvdisasm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc: set CUDA_HOME or PATH")]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin and what ptxas says of it."""

    symbol: str
    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    warnings: list[str]
    kernels: dict[str, Kernel]


def compile_file(name: str, architecture: str, folder: Path) -> Compiled:
    assert NVCC is not None
    cubin = folder / f"{name}_{architecture}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "-cubin", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    command += [f"-gencode=arch=compute_{ARCHITECTURES[architecture]},code=sm_{architecture}"]
    done = subprocess.run(
        [*command, str(SOURCES / f"{name}.cu"), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = {}
    report = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for symbol, stack, stores, loads, registers in report.findall(done.stderr):
        kernels[symbol] = Kernel(symbol, int(registers), int(stack), int(stores) + int(loads))
    warnings = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    return Compiled(cubin, warnings, kernels)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(name, architecture) for architecture in ARCHITECTURES for name in FILES]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_file(*job, folder), jobs), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_no_spills_and_bounded_registers(
    compiled: dict[tuple[str, str], Compiled], file: str, architecture: str
) -> None:
    result = compiled[file, architecture]
    assert len(result.kernels) == KERNELS[file], sorted(result.kernels)
    assert result.warnings == []
    for kernel in result.kernels.values():
        assert (kernel.stack, kernel.spills) == (0, 0), kernel.symbol
        # So many blocks fit on a multiprocessor, and the grid counts on them: kBlocksPerSm, kReadBlocksPerSm.
        same = re.search(r"NS_\d+(B?F\d\d)E(S\d?_|NS_\d+\1E)", kernel.symbol) is not None
        blocks = 4 if "stream_read" in kernel.symbol else 3 if same and "F64" not in kernel.symbol else 2
        if "OptimizerSums" in kernel.symbol:
            blocks = 1 if "F64" in kernel.symbol else 2
        assert kernel.registers * THREADS * blocks <= REGISTER_FILE, f"{kernel.symbol}: {kernel.registers} registers"


def sass(cubin: Path) -> dict[str, list[str]]:
    """Opcodes of every kernel, in order."""
    assert CUOBJDUMP is not None
    assert NVDISASM is not None
    path = os.pathsep.join([str(Path(NVDISASM).parent), os.environ.get("PATH", "")])
    command = [CUOBJDUMP, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, PATH=path)).stdout
    kernels = {}
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part)
        kernels[part.split()[0]] = lines
    return kernels


@pytest.mark.skipif(CUOBJDUMP is None or NVDISASM is None, reason="no cuobjdump or no nvdisasm (wheels nvidia-cuda-*)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_wide_loads_and_no_local_memory(
    compiled: dict[tuple[str, str], Compiled], file: str, architecture: str
) -> None:
    kernels = sass(compiled[file, architecture].cubin)
    assert set(kernels) == set(compiled[file, architecture].kernels)
    for symbol, opcodes in kernels.items():
        counts = Counter(opcodes)
        assert sum(counts.values()) > 100, symbol
        assert not [op for op in counts if op.startswith(("LDL", "STL"))], symbol
        wide = [i for i, op in enumerate(opcodes) if op.startswith("LDG.E.128")]
        if "stream_read" in symbol:
            assert len(wide) >= 8, symbol
            continue
        inputs = 2 if "UpdateSums" in symbol else 3 if "FeatureSums" in symbol or "Linear" in symbol else 4
        assert len(wide) >= inputs, f"{symbol}: {len(wide)} wide loads"
        assert any(op.startswith("ATOMG") and "INC" in op for op in counts), symbol
        if "DenseTable" in symbol:
            # The fast loop comes first, with two wide loads of every input. All but one are under way before the first
            # arithmetic; on sm_120, with its lower bandwidth, at least those of one tile.
            wanted = inputs if architecture == "120" else 2 * inputs - 1
            arithmetic = (i for i, op in enumerate(opcodes) if i > wide[0] and op.startswith(ARITHMETIC))
            ahead = bisect.bisect(wide, next(arithmetic))
            assert ahead >= wanted, f"{symbol}: {ahead} loads before the first arithmetic"
