#!/usr/bin/env python3
"""One wheel under several torch releases: does it import, measure right and work with the dispatcher?

    scripts/smoke_torch_versions.py [WHEEL] PYTHON [PYTHON ...]

Each PYTHON is an interpreter whose environment has torch. The wheel (built first if none is given) is installed without
dependencies into a temporary folder per interpreter; the environments stay as they are. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Tries one fastfs wheel under several torch installations.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a wheel (optional), then interpreters with torch")
    parser.add_argument("--probe", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        return probe(Path(arguments.probe))
    paths = list(arguments.paths)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(paths.pop(0)) if paths and paths[0].endswith(".whl") else build_wheel(Path(scratch))
        if not paths:
            parser.error("no interpreter given")
        failed = [python for python in paths if not smoke(wheel.resolve(), python, Path(scratch))]
    print(f"{len(paths) - len(failed)} of {len(paths)} torch installations work with {wheel.name}")
    return 1 if failed else 0


def build_wheel(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("fastfs-*.whl")
    return wheel


def smoke(wheel: Path, python: str, scratch: Path) -> bool:
    target = Path(tempfile.mkdtemp(dir=scratch))
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    env = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
    for command in (install, [python, str(Path(__file__).resolve()), "--probe", str(target)]):
        # Not in the source tree, whose fastfs would come first.
        result = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"FAILED {python}\n{result.stdout}{result.stderr}")
            return False
    print(f"ok     {python}: {result.stdout.strip()}")
    return True


def probe(folder: Path) -> int:
    """Runs under the interpreter to be tried, with the wheel unpacked in `folder`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import fastfs
    from fastfs import doctor, ops

    assert Path(fastfs.__file__).is_relative_to(folder), f"{fastfs.__file__} is not the wheel's"
    assert ops.native_available(), ops.why_not_native()

    # Versions, architectures, and native against reference for all dtypes.
    findings = doctor.diagnose()
    wrong = [f"{f.name}: {f.why}" for f in findings if f.status == "wrong"]
    assert not wrong, wrong
    checked = [f.name for f in findings if f.section == "self-check"]
    assert len(checked) >= len(fastfs.checks.DTYPES), checked

    # The dispatcher: eager, inference mode, fake tensors and a compiled graph.
    layers = [[torch.randn(shape) for shape in ((8, 33), (5,))] for _ in range(3)]
    layers[2] = [x.bfloat16() for x in layers[2]]
    eager = torch.ops.fastfs.feature_stats(*layers)
    with torch.inference_mode():
        assert torch.equal(torch.ops.fastfs.feature_stats(*layers), eager)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.fastfs.feature_stats(*layers)
    assert (fake.shape, fake.dtype) == (eager.shape, eager.dtype)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(f: list[torch.Tensor], g: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.fastfs.feature_stats(f, g, b)

    assert torch.equal(compiled(*layers), eager)
    negative = [torch.ones(4, dtype=torch.complex64).conj().imag]
    assert negative[0].is_neg()
    assert torch.equal(torch.ops.fastfs.update_stats(negative, negative)[0], torch.tensor([0.0, 0, 0, 0, 4]).double())

    told = subprocess.run([sys.executable, "-m", "fastfs.doctor", "--json"], capture_output=True, check=False)
    assert told.returncode == 0, told
    assert json.loads(told.stdout)["ok"]
    info = ops.build_info()
    cuda = info["cuda"]["architectures"] if info["cuda"] else "not built"
    print(f"torch {torch.__version__}, {info['instruction_set']}, CUDA kernels {cuda}, {len(checked)} dtypes agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
