"""What the compiler makes of a kernel, read without a GPU: registers, spills, machine code and its loops."""

from __future__ import annotations

import bisect
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# The architectures of the machine code read here, each with the virtual one whose PTX the build assembles it from.
VIRTUAL = {"80": "80", "90": "80", "100": "80", "120": "80"}
FLAGS = ("-std=c++17", "-O3", "--fmad=false")
ARITHMETIC = ("FFMA", "FMUL", "DFMA", "DMUL")


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: from CUDA_HOME, the wheels of this Python, PATH or the usual place."""
    folders = [os.path.join(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders += [str(p) for p in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin")]
    folders.append("/usr/local/cuda/bin")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin and what ptxas says of it. Sizes in bytes; `shared` is what is declared, not dynamic."""

    symbol: str
    registers: int
    stack: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A cubin, the warnings of its compilation and its kernels by symbol."""

    cubin: Path
    warnings: list[str]
    kernels: dict[str, Kernel]


def compile_cubin(source: Path, architecture: str, cubin: Path, *flags: str, virtual: str | None = None) -> Compiled:
    """Compiles one file for one architecture ("90"), by way of the PTX of another one as the build does, or `virtual`.

    Raises RuntimeError with the compiler's words if that fails.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc: set CUDA_HOME or PATH")
    code = f"-gencode=arch=compute_{virtual or VIRTUAL[architecture]},code=sm_{architecture}"
    command = [nvcc, *FLAGS, "-cubin", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", code, *flags]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{architecture}:\n{done.stderr[-4000:]}")
    kernels = {}
    report = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for symbol, stack, stores, loads, registers, rest in report.findall(done.stderr):
        shared = re.search(r"(\d+) bytes smem", rest)
        size = int(shared[1]) if shared else 0
        kernels[symbol] = Kernel(symbol, int(registers), int(stack), int(stores) + int(loads), size)
    warnings = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    return Compiled(cubin, warnings, kernels)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. `target` is the address that a branch names; `always`: it leaves without condition."""

    address: int
    opcode: str
    target: int | None
    always: bool = False


def instructions(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of every kernel, in order; raises RuntimeError without cuobjdump and nvdisasm."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise RuntimeError("no cuobjdump or no nvdisasm: set CUDA_HOME, or install the wheels nvidia-cuda-*")
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, PATH=path)).stdout
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*)")
    kernels = {}
    for part in text.split("Function : ")[1:]:
        found = []
        for address, predicate, opcode, operands in line.findall(part):
            branch = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
            leaves = opcode in ("EXIT", "RET") or (branch is not None and opcode == "BRA" and "P" not in operands)
            always = leaves and not predicate
            found.append(Instruction(int(address, 16), opcode, int(branch[1], 16) if branch else None, always))
        kernels[part.split()[0]] = found
    return kernels


def sass(cubin: Path) -> dict[str, list[str]]:
    """The opcodes of every kernel, in order."""
    return {symbol: [i.opcode for i in found] for symbol, found in instructions(cubin).items()}


def is_wide_load(opcode: str) -> bool:
    """Is this a load of 16 bytes from global memory, with whatever hints?"""
    return opcode.startswith("LDG.") and "128" in opcode.split(".")


def loads_ahead(opcodes: list[str]) -> int:
    """16-byte loads before the first arithmetic that follows the first of them: those of the fast loop in flight."""
    wide = [i for i, op in enumerate(opcodes) if is_wide_load(op)]
    arithmetic = (i for i, op in enumerate(opcodes) if wide and i > wide[0] and op.startswith(ARITHMETIC))
    return bisect.bisect(wide, next(arithmetic, len(opcodes)))


def loop_around(code: list[Instruction], inside: int) -> list[Instruction]:
    """The innermost loop (a backward branch and what lies between) around instruction number `inside`."""
    at = code[inside].address
    loops = [(i.address - i.target, i) for i in code if i.target is not None and i.target <= at <= i.address]
    if not loops:
        raise ValueError(f"no loop around {code[inside].opcode} at {at:#x}")
    _, end = min(loops, key=lambda loop: loop[0])
    assert end.target is not None
    return [i for i in code if end.target <= i.address <= end.address]


def shortest_path(code: list[Instruction], start: int, *ends: int) -> int:
    """The fewest instructions from the one at address `start` until one at an address of `ends` comes, without it."""
    place = {one.address: i for i, one in enumerate(code)}
    last = {place[end] for end in ends}
    seen, edge, length = {place[start]}, [place[start]], 0
    while edge:
        if last.intersection(edge):
            return length
        length += 1
        following = []
        for i in edge:
            one = code[i]
            if one.target is not None and not one.opcode.startswith("BRA.DIV"):
                following.append(place[one.target])
            if not one.always and i + 1 < len(code):
                following.append(i + 1)
        edge = [i for i in dict.fromkeys(following) if i not in seen]
        seen.update(edge)
    raise ValueError(f"no path from {start:#x} to {', '.join(map(hex, ends))}")
