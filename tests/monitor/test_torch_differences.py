"""What differs between torch releases: each difference is felt for, and what hangs on it works or is refused."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastfs
from fastfs._monitor.capture import taps
from fastfs._network.perturbed import load_forward_mode
from tests.helpers import monitor_loops as loops
from tests.helpers.monitor_cases import train
from tests.helpers.monitor_loops import Loop, Net

PACKAGE = Path(fastfs.__file__).parent
WITHOUT = ("_bench", "_reproduce")  # CUDA graphs and the paper's networks: tested where they run


# Names


def private_names(path: Path) -> Iterator[str]:
    """Dotted names of torch with a private part that a module reads; names as strings are asked for with a default."""
    tree = ast.parse(path.read_text())
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname and a.name.startswith("torch")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.expr | None = node if isinstance(node, ast.Attribute) else None
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in aliases:
            name = ".".join([aliases[inner.id], *parts])
            if "._" in name:
                yield name
    yield from (name for name in aliases.values() if "._" in name)


def resolve(name: str) -> Any:
    """The thing of that name; of a class or an object of torch, too."""
    found: Any = torch
    done = "torch"
    for part in name.split(".")[1:]:
        done = f"{done}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(done)
    return found


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in WITHOUT]


def test_every_private_name_of_torch_is_there() -> None:
    """It may go with any release: then this says which, instead of a training that ends."""
    names = {name: path for path in modules() for name in private_names(path)}
    assert len(names) > 20
    gone = []
    for name, path in names.items():
        try:
            resolve(name)
        except (AttributeError, ImportError):
            gone.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert gone == []


def test_private_names_are_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import torch\nimport torch.autograd.forward_ad as ad\nfrom torch._C._functorch import wrapped as w\n"
        "def f():\n    torch._C._none(ad._level)\n    return torch.nn.Module, getattr(torch._C, '_asked', None)\n"
    )
    assert set(private_names(source)) == {
        "torch._C._none",
        "torch._C",
        "torch.autograd.forward_ad._level",
        "torch._C._functorch.wrapped",
    }
    with pytest.raises(ImportError):
        resolve("torch._C._none")


# Layers inside of compiled graphs


def compiled(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    return compiled


def in_place(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize("prepare", [compiled, in_place])
def test_graphs_that_cannot_be_tapped_are_left_alone_and_said(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block's output is written to in place: a tap would end the training where Dynamo makes views."""
    monkeypatch.setattr(taps, "HOOKS_IN_GRAPHS", False)
    loop = Loop("compiled", prepare=prepare, strict=False)
    torch._dynamo.reset()
    off, _ = loop.train(5, None)
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match=r"no features of 'blocks.0'.*graphs of torch.compile.*torch 2\.13 on"):
        on, (seen,) = loop.train(5, {"every": 2})
    loops.assert_bitwise(off, on)
    assert not [row for row in seen if row.get("valid")]
    torch._dynamo.reset()


def test_blocks_compiled_one_by_one_are_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "HOOKS_IN_GRAPHS", False)
    model = Net(depth=2)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = compiled(block)
    torch._dynamo.reset()
    (optimizer,) = loops.sgd(model)
    seen: list[dict[str, Any]] = []
    with fastfs.Monitor(model, optimizer, layers=loops.BLOCKS, sinks=[seen.extend], verbose=False):
        train(model, optimizer, 1)
    assert [row["valid"] for row in seen if row["kind"] == "measured"] == [True, True]
    torch._dynamo.reset()


@pytest.mark.graphs
def test_graphs_are_tapped_where_they_can_be() -> None:
    torch._dynamo.reset()
    _, (seen,) = Loop("compiled", prepare=compiled).train(1, {"every": 1})
    assert [row["valid"] for row in seen if row["kind"] == "measured"] == [True] * 3
    torch._dynamo.reset()


# Forward mode


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_goes_through_checkpoints(grad: bool) -> None:
    load_forward_mode()
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        plain = torch.tanh(torch.tanh(x @ dual) @ dual)
        once = checkpoint(lambda a, w: torch.tanh(a @ w), x, dual, use_reentrant=False)
        twice = checkpoint(lambda a: torch.tanh(a @ dual), once, use_reentrant=False)
        expected, got = forward_ad.unpack_dual(plain).tangent, forward_ad.unpack_dual(twice).tangent
    assert torch.equal(got, expected)


def test_forward_mode_loads_without_a_warning() -> None:
    """In a process of its own, as torch loads its rules once."""
    code = "from fastfs._network.perturbed import load_forward_mode; load_forward_mode()"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Export and tracing


def test_a_model_that_is_being_traced_is_not_watched() -> None:
    model = Net(depth=2)
    (optimizer,) = loops.sgd(model)
    with fastfs.Monitor(model, optimizer, layers=loops.BLOCKS, sinks=[lambda rows: None], verbose=False):
        traced = torch.fx.symbolic_trace(model)
        assert not [node for node in traced.graph.nodes if "tap" in str(node.target)]
        exported = torch.export.export(model, (torch.randn(2, 8),)).module()
    x = torch.randn(5, 8)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(exported(x[:2]), model(x[:2]))
