"""Measure time and memory of reading a long record with fastfs.load and the report, beside another version of fastfs.

    python -m benchmarks.monitor.load_record [--against FOLDER] [--rows N] [--json FILE] [--quick]

FOLDER holds a checkout of another version with its native core built in place. Both versions read the same record of
4 million rows with 400 to 500 bytes per row (2 GB), each call in its own process. Memory is the peak of the whole
process (`ru_maxrss`), including the imports of fastfs, torch, pandas and plotly. With --against, the target is a fifth
of the processor time, which other load on the machine affects less than wall time; in any case 1.5 GB. The exit status
is 1 if a target is missed. `--python` also reads without the native core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import count_option, file_option, print_table, write_json
from fastfs._record.columns import PER_LAYER, SCHEMA, type_of

HERE = Path(__file__).resolve().parents[2]
MOST_BYTES = 1.5e9
LEAST_RATIO = 5.0

READ = """
import json, resource, sys, time
import fastfs, pandas
what, path, native = sys.argv[1:]
if native != "native":
    from fastfs._core import ops
    ops._C = None
if what == "load":
    load = fastfs.load
    started, used = time.perf_counter(), time.process_time()
    rows = len(load(path))
else:
    from fastfs._report.page import write_page
    started, used = time.perf_counter(), time.process_time()
    rows = write_page(path, path + ".html").stat().st_size
seconds, used = time.perf_counter() - started, time.process_time() - used
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "cpu_seconds": used, "peak_bytes": peak, "rows": rows}))
"""


def write_record(path: Path, layers: int, rows: int) -> None:
    """Write a record of measured steps with every column that version 2 of the format had at first.

    Values have all their digits. The lines of 64 steps are repeated, each with its own step and time.
    """
    generator = random.Random(0)
    names = [f"blocks.{i}" for i in range(layers)]
    header = {"kind": "header", "schema": SCHEMA, "run": "long", "layers": names, "groups": {}, "metadata": {}}
    columns = [name for name in PER_LAYER if name not in ("linear", "decrease_why")]

    def value(name: str) -> Any:
        if type_of(name) == "string":
            return "plain" if name == "method" else generator.choice([None, None, None, "rounding noise"])
        return True if name == "valid" else 131_072 if type_of(name) == "integer" else generator.random()

    bodies = [json.dumps({c: [value(c) for _ in names] for c in columns}, separators=(",", ":")) for _ in range(64)]
    with path.open("w") as file:
        file.write(json.dumps(header) + "\n")
        for step in range(rows // layers):
            common = f'"step":{step},"time":{1.7e9 + step / 7},"loss":{generator.random()},"micro_batches":1'
            file.write(
                f'{{"kind":"measured","run":"long",{common},"overhead_seconds":{generator.random()},"loss_scale":null,'
                f'"layers":{bodies[step % 64]}}}\n'
            )


def read(folder: Path, what: str, path: Path, native: bool = True) -> dict[str, Any]:
    """Read a record in a separate process.

    Raises:
        RuntimeError: the process failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, what, str(path), "native" if native else "python"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed with the fastfs of {folder}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--rows", type=count_option, default=4_000_000)
    parser.add_argument("--layers", type=count_option, nargs="+", default=[100, 4])
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="200,000 rows")
    parser.add_argument("--python", action="store_true", help="also without the native core")
    arguments = parser.parse_args()
    rows = 200_000 if arguments.quick else arguments.rows
    versions = {"here": HERE, **({"against": arguments.against.resolve()} if arguments.against else {})}
    results: list[dict[str, Any]] = []
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for layers in arguments.layers:
            path = Path(folder) / "record.jsonl"
            write_record(path, layers, rows)
            for what in ("load", "report"):
                entry: dict[str, Any] = {"what": what, "layers": layers, "rows": rows, "bytes": path.stat().st_size}
                entry |= {name: read(version, what, path) for name, version in versions.items()}
                if arguments.python:
                    entry["here, no native core"] = read(HERE, what, path, native=False)
                if "against" in entry:
                    entry["ratio"] = entry["against"]["cpu_seconds"] / entry["here"]["cpu_seconds"]
                    missed |= entry["ratio"] < LEAST_RATIO
                missed |= entry["here"]["peak_bytes"] > MOST_BYTES
                results.append(entry)
                write_json(arguments.json, torch.device("cpu"), results)
    print_table("Reading a record", ["", "GB", "s", "peak GB", "times faster"], [row(entry) for entry in results])
    return int(missed)


def row(entry: dict[str, Any]) -> list[str]:
    here = entry["here"]
    return [
        f"{entry['what']}, {entry['layers']} layers, {entry['rows']:,} rows",
        f"{entry['bytes'] / 1e9:.2f}",
        f"{here['cpu_seconds']:.1f}",
        f"{here['peak_bytes'] / 1e9:.2f}",
        f"{entry['ratio']:.1f}" if "ratio" in entry else "-",
    ]


if __name__ == "__main__":
    sys.exit(main())
