"""What the compiler makes of the CUDA kernels, read without a GPU: registers, spills, local memory, wide loads."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.tuning.sass import Compiled, compile_cubin, find_tool, loads_ahead, sass

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FILES = ("segment_sums", "optimizer_sums", "other_sums", "../bench/stream_read")
ARCHITECTURES = ("80", "90", "120")
THREADS, REGISTER_FILE = 256, 65536
# Contiguous tensors: two measurements in three dtypes, each with a small and a large table and with any last dtype; one
# rule of optimizer_stats in three dtypes and three rules in f32, each with a small and a large table. Other tensors:
# two of each measurement and rule. The streaming read has two tables.
KERNELS = {"segment_sums": 18, "optimizer_sums": 12, "other_sums": 12, "../bench/stream_read": 2}


NVCC, CUOBJDUMP, NVDISASM = find_tool("nvcc"), find_tool("cuobjdump"), find_tool("nvdisasm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc: set CUDA_HOME or PATH")]


def check_counting(opcodes: list[str], symbol: str) -> None:
    """A block counts itself in once for its group and once for its segment: it releases before, and acquires after."""
    counts = [i for i, op in enumerate(opcodes) if op.startswith("ATOMG.E.INC")]
    assert len(counts) == 2, symbol
    for i in counts:
        assert opcodes[i].endswith("STRONG.GPU"), symbol
        assert any(op.startswith("MEMBAR") and op.endswith("GPU") for op in opcodes[i - 6 : i]), symbol
        # Then the last block reads the partial sums, all of a batch before it adds the first.
        reads = opcodes[i : next(k for k in range(i, len(opcodes)) if opcodes[k] == "DADD")]
        assert reads.count("LDG.E.128.STRONG.GPU") >= 7, symbol
        assert "CCTL.IVALL" in reads, symbol


def compile_file(name: str, architecture: str, folder: Path) -> Compiled:
    return compile_cubin(SOURCES / f"{name}.cu", architecture, folder / f"{Path(name).name}_{architecture}.cubin")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(name, architecture) for architecture in ARCHITECTURES for name in FILES]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_file(job[0], job[1], folder), jobs), strict=True))


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
        # So many blocks fit on a multiprocessor, and the grid counts on them: see policy.cuh.
        same = re.search(r"NS_\d+(B?F\d\d)E(S\d?_|NS_\d+\1E)", kernel.symbol) is not None
        blocks = 4 if "stream_read" in kernel.symbol else 3 if same and "F64" not in kernel.symbol else 2
        if "OptimizerSums" in kernel.symbol:
            blocks = 1 if "F64" in kernel.symbol or "Any" in kernel.symbol else 2
        assert kernel.registers * THREADS * blocks <= REGISTER_FILE, f"{kernel.symbol}: {kernel.registers} registers"


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
        check_counting(opcodes, symbol)
        if "F64" in symbol:
            assert len(wide) >= 2 * inputs, f"{symbol}: {len(wide)} wide loads"
        if "DenseTable" in symbol:
            # The fast loop comes first, with two wide loads of every input. All but one are in flight before the first
            # arithmetic; on sm_120, with its lower bandwidth, at least those of one tile.
            wanted = inputs if architecture == "120" else 2 * inputs - 1
            ahead = loads_ahead(opcodes)
            assert ahead >= wanted, f"{symbol}: {ahead} loads before the first arithmetic"
