"""UpdateMeter on a real GPU: implementations that only CUDA has, no waiting, graphs."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer, RMSprop

from benchmarks.ops.graphs import nothing_waits
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._functional import optimizer_stats
from fastfs._monitor.measure.update_meter import UpdateMeter
from tests.helpers.cases import step_arguments, step_inputs
from tests.helpers.compare import assert_same, assert_step
from tests.helpers.optimizer_cases import give_gradients, make_parameters, name_of, truth

pytestmark = pytest.mark.gpu

CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}),  # foreach by default: the gradients are rewritten
    (SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
    (SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    *((k, {"weight_decay": 0.1, **how}) for k, how in itertools.product((Adam, AdamW), ({}, {"fused": True}))),
    *(
        (k, {"capturable": True, "foreach": foreach})
        for k, foreach in itertools.product((Adam, AdamW, Adamax, RMSprop), (False, True))
    ),
    (AdamW, {"capturable": True, "amsgrad": True, "weight_decay": 0.1}),
    (RMSprop, {"centered": True}),
    (RMSprop, {"weight_decay": 0.1}),
]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=name_of)
def test_steps(kind: type[Optimizer], options: dict[str, Any], tensor_lr: bool) -> None:
    if tensor_lr and not (options.get("capturable") or options.get("fused")):
        pytest.skip("torch takes such a learning rate from the device to the host")
    lr = torch.tensor(0.01, device="cuda") if tensor_lr else 0.01
    optimizer = kind(make_parameters(torch.float32, "cuda"), lr=lr, **options)  # type: ignore[call-arg]
    meter = UpdateMeter(optimizer)
    for step in range(3):
        gradients = give_gradients(meter.parameters)
        before = [p.clone() for p in meter.parameters]
        watch = nothing_waits if step else nullcontext  # the first step makes what is kept
        with watch():
            meter.before()
        optimizer.step()
        with watch():
            stats = meter.after().stats
        cpu = [[x.cpu() for x in part] for part in (gradients, before, meter.parameters)]
        expected = truth(*cpu)
        for i, p in enumerate(meter.parameters):
            if p.grad is not None:
                assert_step(stats.sums[i], expected[i], torch.float32, f"step {step} parameter {i}")


@pytest.mark.parametrize("rule", OptimizerRule)
def test_coefficients_near_and_far(rule: OptimizerRule) -> None:
    parameters = [step_inputs(rule, (100 * i,), device="cuda") for i in range(60)]
    *tensors, table = step_arguments(rule, parameters)
    near, far = optimizer_stats(*tensors, table), optimizer_stats(*tensors, table.cuda())  # type: ignore[call-arg]
    assert_same(near.sums, far.sums)


def test_graph_of_a_training_step() -> None:
    parameters = make_parameters(torch.float32, "cuda")
    twins = [p.clone() for p in parameters]
    give_gradients(parameters)
    for p, q in zip(parameters, twins, strict=True):
        q.grad = p.grad
    optimizers = [AdamW(x, lr=torch.tensor(0.01, device="cuda"), capturable=True) for x in (parameters, twins)]
    meters = [UpdateMeter(o) for o in optimizers]

    def step(i: int) -> torch.Tensor:
        meters[i].before()
        optimizers[i].step()
        return meters[i].after().stats.sums

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(0)
            step(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(0)
    for _ in range(3):
        graph.replay()
        assert_same(captured, step(1))
