"""What is known of the variants without running them: from ptxas, the machine code and published figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import print_table
from benchmarks.tuning import build, sass
from benchmarks.tuning.architectures import ARCHITECTURES, SOURCES, Architecture
from benchmarks.tuning.catalogue import BASELINE, Variant

DTYPES = {"bf16": ("4BF16", 2), "f16": ("3F16", 2), "f32": ("3F32", 4)}  # name in a symbol, bytes
COMPARED = "90"  # the architecture that variants are compared on
CUT = 2**20  # elements of a layer that is cut into small chunks
PIPES = {
    "fp32": r"FFMA|FADD|FMUL|HADD2",
    "alu": r"FSETP|FSEL|FMNMX|ISETP|SEL|LOP3|IADD|IADD3|IMAD|VIADD|SHF|PRMT|LEA|MOV|PLOP3|IABS|VIMNMX|HFMA2",
    "fp64": r"DADD|DFMA|DMUL",
    "convert": r"F2F",
    "memory": r"LDG|LDS|LDL|STL|LDC|LDCU",
}


def pipe_of(opcode: str) -> str:
    """The pipe that an instruction goes to; what is none of PIPES takes an issue slot alone."""
    name = opcode.split(".")[0]
    return next((pipe for pipe, names in PIPES.items() if re.fullmatch(names, name)), "other")


def fast_loop(code: list[sass.Instruction]) -> list[sass.Instruction]:
    """The loop over whole tiles: the first that has 16-byte loads."""
    return sass.loop_around(code, next(i for i, one in enumerate(code) if sass.is_wide_load(one.opcode)))


def around_loop(code: list[sass.Instruction], loop: list[sass.Instruction]) -> int:
    """The fewest instructions of a warp before and after the loop."""
    exits = [one.address for one in code if one.opcode == "EXIT"]
    after = code[code.index(loop[-1]) + 1].address
    before = sass.shortest_path(code, code[0].address, loop[0].address)
    return before + sass.shortest_path(code, after, *exits) + 1


def describe(
    variant: Variant, dtype: str, at: Architecture, kernel: sass.Kernel, code: list[sass.Instruction]
) -> dict[str, Any]:
    """One row of the table."""
    itemsize = DTYPES[dtype][1]
    loop = fast_loop(code)
    loads = [i for i in loop if sass.is_wide_load(i.opcode)]
    elements = len(loads) * 16 / (3 * itemsize)  # of a thread, in one turn of the loop
    pipes = Counter(pipe_of(i.opcode) for i in loop)
    pipes["other"] += sass.shortest_path(code, loop[-1].address, loop[0].address) - 1
    per_element = {pipe: pipes[pipe] / elements for pipe in [*PIPES, "other"]}
    around = around_loop(code, loop)
    per_element["around the loop"] = around / (variant.chunk(itemsize, CUT) / variant.threads)
    resident = at.resident(variant.threads, kernel.registers, kernel.shared)
    running = min(resident, variant.blocks)
    ahead = sass.loads_ahead([i.opcode for i in code])
    return {
        "variant": variant.name,
        "dtype": dtype,
        "architecture": at.name,
        "registers": kernel.registers,
        "spilled bytes": kernel.spills,
        "shared bytes": kernel.shared,
        "blocks that fit": resident,
        "blocks": running,
        "warps": running * variant.threads // 32,
        "loads ahead": ahead,
        "bytes in flight": running * ahead * 16 * variant.threads,
        "per element": {pipe: round(count, 2) for pipe, count in per_element.items()},
        "instructions around the loop": around,
        "instructions per element": round(sum(per_element.values()), 2),
        "shares": at.shares(per_element, 3 * itemsize),
    }


def remarks(row: dict[str, Any], variant: Variant) -> list[str]:
    """What speaks against a variant already here; none: only hardware can tell."""
    found = []
    if row["spilled bytes"]:
        found.append(f"spills {row['spilled bytes']} bytes")
    if row["blocks that fit"] < variant.blocks:
        found.append(f"{row['blocks that fit']} blocks fit, not {variant.blocks}")
    high = ARCHITECTURES[row["architecture"]].needed_bytes()[1]
    if row["bytes in flight"] < high:
        found.append(f"{row['bytes in flight'] // 1024} KB in flight, {-(-high // 1024)} KB may be needed")
    if max(row["shares"].values()) > 1:
        found.append("bound by arithmetic")
    return found


def compile_and_describe(variant: Variant, at: Architecture, folder: Path) -> list[dict[str, Any]]:
    """The rows of one variant on one architecture: a dtype each. The kernels are those for few layers."""
    compiled = build.compile_cubin(variant, at.name, folder)
    code = sass.instructions(compiled.cubin)
    rows = []
    for dtype in variant.only:
        (symbol,) = (s for s in compiled.kernels if f"FeatureSumsENS_{DTYPES[dtype][0]}E" in s and "ELi4096E" in s)
        rows.append(describe(variant, dtype, at, compiled.kernels[symbol], code[symbol]))
    return rows


def run(variants: list[Variant], path: Path | None) -> list[dict[str, Any]]:
    """Compiles and reads the baseline for all architectures and the variants for one of them.

    Prints the tables and writes the file.
    """
    every = ARCHITECTURES.values()
    jobs = [(v, at) for v in variants for at in every if v.name == BASELINE or at.name == COMPARED]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        tasks = [pool.submit(compile_and_describe, v, at, Path(folder) / f"{v.slug}-{at.name}") for v, at in jobs]
        rows = [row for task in tasks for row in task.result()]
    by_name = {v.name: v for v in variants}
    for row in rows:
        row["drawbacks"] = remarks(row, by_name[row["variant"]])
    for at in ARCHITECTURES.values():
        show([r for r in rows if r["architecture"] == at.name], at)
    if path is not None:
        described = {name: at.described() for name, at in ARCHITECTURES.items()}
        head = {"nvcc": nvcc_release(), "sources": SOURCES, "architectures": described}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(json.dumps(head)[:-1] + ', "results": [\n' + lines + "\n]}\n")
    return rows


def nvcc_release() -> str:
    """As nvcc names it: "13.0"."""
    text = subprocess.run([str(sass.find_tool("nvcc")), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", text)
    return found[1] if found else "unknown"


def show(rows: list[dict[str, Any]], at: Architecture) -> None:
    """One table."""
    low, high = at.needed_bytes()
    columns = ["variant", "dtype", "registers", "blocks", "KB in flight", "instructions", "most used", "drawbacks"]
    lines = []
    for row in rows:
        pipe, share = max(row["shares"].items(), key=lambda item: item[1])
        cells = [row["variant"], row["dtype"], str(row["registers"]), str(row["blocks"])]
        cells += [str(row["bytes in flight"] // 1024), f"{row['instructions per element']:.1f}", f"{pipe} {share:.0%}"]
        lines.append([*cells, "; ".join(row["drawbacks"])])
    title = f"sm_{at.name}, {at.gpu}: {low / 1024:.0f} to {high / 1024:.0f} KB needed in flight"
    print_table(title, columns, lines)


def markdown(results: list[dict[str, Any]], architecture: str) -> list[str]:
    """The lines of a table in docs/kernels.md, one for each variant."""
    lines = []
    for name in dict.fromkeys(r["variant"] for r in results):
        rows = {r["dtype"]: r for r in results if r["variant"] == name and r["architecture"] == architecture}
        if rows:
            cells = [name, *(_cell(rows[d]) if d in rows else "" for d in DTYPES)]
            against: dict[str, list[str]] = {}
            for dtype, row in rows.items():
                for text in row["drawbacks"]:
                    against.setdefault(re.sub(r"spills \d+ bytes", "spills", text), []).append(dtype)
            texts = [t if len(d) == len(rows) else f"{', '.join(d)}: {t}" for t, d in against.items()]
            lines.append(f"| {' | '.join(cells)} | {'; '.join(texts)} |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    """Registers, KB in flight, instructions an element, share of the issue slots."""
    numbers = f"{row['registers']}, {row['bytes in flight'] // 1024}, {row['instructions per element']:.1f}"
    return f"{numbers}, {row['shares']['issue']:.0%}"
