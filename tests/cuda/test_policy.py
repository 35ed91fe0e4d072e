"""The tuning policies: which one an architecture gets, on the host and in device code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.tuning.sass import find_tool
from tests.cuda.on_cpu import harness

SOURCES = harness.CUDA_SOURCES / "cuda"
NVCC = find_tool("nvcc")
# The oldest architecture that the policy of each one serves.
CHOSEN = {750: 800, 800: 800, 890: 800, 900: 800, 1000: 1000, 1030: 1000, 1200: 1000}

TWO_POLICIES = """
#include "policy.cuh"
using namespace fastfs::cuda;
struct Old { static constexpr int kArchitecture = 800, kFigure = 2; };
struct New { static constexpr int kArchitecture = 1000, kFigure = 3; };
using Hub = PolicyHub<Order, PolicyList<Old, New>>;
"""


@pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))
def test_an_architecture_gets_the_newest_policy_that_is_not_newer(tmp_path: Path) -> None:
    lines = ['#include <cstdio>\n#include "shim.h"', TWO_POLICIES]
    for architecture, policy in ((0, "Old"), (800, "Old"), (999, "Old"), (1000, "New"), (1200, "New")):
        lines.append(f"static_assert(std::is_same_v<select_policy<{architecture}, Old, New>::type, {policy}>);")
    lines.append("int main() {")
    for architecture in CHOSEN:
        lines.append(f'std::printf("%d ", Policies::visit({architecture}, [](auto p) {{ return p.kArchitecture; }}));')
        lines.append(f'std::printf("%d\\n", Hub::visit({architecture}, [](auto p) {{ return p.kArchitecture; }}));')
    source, program = tmp_path / "policies.cpp", tmp_path / "policies"
    source.write_text("\n".join([*lines, "}", ""]))
    command = ["g++", *harness.FLAGS, f"-I{harness.HERE}", f"-I{SOURCES}", f"-isystem{harness.include_folder()}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert [int(x) for x in printed[::2]] == list(CHOSEN.values())
    assert [int(x) for x in printed[1::2]] == [800 if architecture < 1000 else 1000 for architecture in CHOSEN]


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc: set CUDA_HOME or PATH")
def test_device_code_has_the_policy_of_its_ptx_and_the_host_knows_the_list(tmp_path: Path) -> None:
    source = tmp_path / "policies.cu"
    source.write_text(
        TWO_POLICIES
        + "__global__ void __launch_bounds__(256, Hub::Active::kFigure) kernel(int* p) { *p = Hub::Active::kFigure; }\n"
        + "constexpr int kCompiled[] = {__CUDA_ARCH_LIST__};\n"
        + "static_assert(sizeof kCompiled == 2 * sizeof(int) && kCompiled[0] == 800 && kCompiled[1] == 1000);\n"
    )
    targets = [f"-gencode=arch=compute_{a},code=[compute_{a}]" for a in ("80", "100")]
    command = [str(NVCC), "-std=c++17", f"-I{SOURCES}", "--keep", f"--keep-dir={tmp_path}", *targets]
    subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "policies.o")], check=True)
    for architecture, figure in (("80", 2), ("100", 3)):
        (ptx,) = tmp_path.glob(f"*compute_{architecture}.ptx")
        assert re.findall(r"\.minnctapersm (\d+)", ptx.read_text()) == [str(figure)]
