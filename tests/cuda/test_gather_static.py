"""What the compiler makes of the CUDA kernels of the row ops: spills, local memory, wide loads and stores."""

from collections import Counter

import pytest

from benchmarks.tuning.sass import Compiled, sass
from tests.cuda.test_cuda_static import ARCHITECTURES, CUOBJDUMP, NVCC, NVDISASM, compile_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc: set CUDA_HOME or PATH")]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_file("gather_rows", request.param, tmp_path_factory.mktemp("cubins"))


def test_no_spills(compiled: Compiled) -> None:
    assert len(compiled.kernels) == 5, sorted(compiled.kernels)  # of each dtype, and the merge of chunks
    assert compiled.warnings == []
    for kernel in compiled.kernels.values():
        assert (kernel.stack, kernel.spills) == (0, 0), kernel.symbol


@pytest.mark.skipif(CUOBJDUMP is None or NVDISASM is None, reason="no cuobjdump or no nvdisasm (wheels nvidia-cuda-*)")
def test_wide_loads_and_stores(compiled: Compiled) -> None:
    kernels = sass(compiled.cubin)
    assert set(kernels) == set(compiled.kernels)
    for symbol, opcodes in kernels.items():
        counts = Counter(opcodes)
        assert not [op for op in counts if op.startswith(("LDL", "STL"))], symbol
        if "gather_rows" in symbol:
            assert any(op.startswith("LDG.E.128") for op in counts), symbol
            assert any(op.startswith("STG.E.128") for op in counts), symbol
