"""The monitor: attaches to a training loop and measures it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfs._monitor import settings
from fastfs._monitor.capture import taps
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.memory_budget import MemoryBudget
from fastfs._monitor.capture.sampling import RowSampler
from fastfs._monitor.engine import Engine
from fastfs._monitor.measure.aligned_decrease import LossScale
from fastfs._monitor.measure.assessment import UpdateAssessor
from fastfs._monitor.measure.capture_mode import ModeResources
from fastfs._monitor.measure.casts import CastSamples
from fastfs._monitor.measure.details import Details, matrix_bytes
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.modes import find_mode
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.probe import Probe
from fastfs._monitor.optimizers import TrainingState, check_optimizers
from fastfs._monitor.ranks import Ranks, Weight, describe
from fastfs._monitor.run_record import joined, open_recorder
from fastfs._monitor.schedule import Schedule, as_schedule
from fastfs._monitor.step_runner import StepRunner
from fastfs._monitor.steps import OptimizerSteps
from fastfs._network.feature_tensors import first_floating
from fastfs._network.layers import AUTO, Selection, parameter_names, select_groups, select_layers
from fastfs._record.header import checked_metadata, make_header
from fastfs._record.ranks.assembly import Assembler

__all__ = ["Monitor"]


class Monitor:
    """Records how far the features of each layer move in a training step, and how the move is aligned with the loss.

    Attached to a model and its optimizer, the monitor watches training steps through hooks. Nothing else in the loop
    changes: parameters, gradients, losses, buffers and random streams stay bitwise what they are without it. At a
    measured step (every ``every``-th, including the first), the features before, the backward vector and the features
    after of each watched layer give angle, speed and aligned decrease, with a flag that says whether to trust them. At
    an aligned step (``aligned_every``), gradients and update alone give the decrease and a predicted speed. The record
    is written in the background; ``docs/monitor.md`` explains every mode, ``docs/record.md`` every column::

        monitor = fastfs.Monitor(model, optimizer, path="run/record.jsonl")
        for inputs, targets in data:
            ...  # zero_grad, forward, backward
            optimizer.step()
        monitor.close()

    A measurement that fails is left out with one warning, and training goes on. The training step waits neither for
    the device nor for a sink, and memory does not grow with the length of the run. Gradient accumulation, clipping,
    gradient scalers (give ``scaler``), several optimizers, optimizers that step within the backward, activation
    checkpointing, frozen layers and ``torch.compile`` are supported. LBFGS is refused. In a process group, every rank
    attaches a monitor, and one record has the numbers of the global batch (``docs/parallel.md``).

    The speed formula does not hold for layers that are no cuts: inside a branch, around shared parameters. Such layers
    have an angle, but neither a residual nor a prediction.

    Args:
        model: The module that the training loop calls, wrappers included.
        optimizer: The optimizer that updates the model's parameters, or a list of optimizers.
        layers: The layers to watch: ``"auto"`` (the repeated blocks, else every module with parameters), a regular
            expression, a list of names, a module type or a tuple of types, or a function of name and module.
        every: Number of optimizer steps between measurements, or a :class:`fastfs.monitor.Schedule`.
        mode: ``"batch"`` measures the training batch with one more forward; ``"probe"`` a fixed batch in float32 with
            two more forwards and a backward; ``"jvp"`` the first-order update on the training batch, with one forward
            in forward mode.
        aligned_every: Number of steps between aligned decreases and predicted speeds, which need no forward; None for
            none.
        aligned_fraction: Share of the elements of large parameters that an aligned step reads between measured steps,
            a random sample: 1/k for an integer k. Aligned decreases from a sample have standard errors; 1 reads
            everything.
        probe: ``(inputs, loss)`` or a :class:`fastfs.monitor.Probe`, for ``mode="probe"``; ``loss`` is a function of
            the model's output.
        amplify: Whether to measure the update enlarged, with two more forwards (and one in float32 if the model runs in
            16 bits), so that rounding does not hide it. For ``mode="batch"``.
        rows: The most rows (tokens, images) kept of a layer, a fixed random subset; None for all. Sampled statistics
            have standard errors.
        samples: Run the second forwards on so many samples of each batch only, a fixed random subset, and keep rows of
            these; None for all. For ``mode="batch"`` and ``"jvp"``, and models whose samples do not act on one another,
            which is checked at every measured step. The first dimension of the inputs counts the samples.
        memory: Bytes that copies of inputs and rows may take at a measured step; fewer rows are kept to stay below.
        details: Whether to look into second forwards: what moves the outputs of every weight matrix, how it is aligned
            with its inputs, attention logits, dead features, loads of experts (:func:`fastfs.monitor.load_details`).
            Measured steps have one more forward. For ``mode="batch"``.
        groups: Name -> regular expression on the names of watched layers; totals of groups are recorded, too.
        quantiles: Quantiles from 0 to 1 of the rows' cosines and speeds, as columns ``cos_angle_q10``, ...
        nonlinear: Whether ``mode="jvp"`` also runs a plain second forward, for the column ``nonlinear_update``.
        casts: Casts of the parameters before the forward whose effect on each step is recorded, as columns
            ``cast_loss_bfloat16``, ...: ``"bfloat16"``, ``"float8_e4m3fn"``, ``"mxfp8"``.
        select: Function that returns the features in a layer's output; by default its first floating-point tensor.
        scaler: The :class:`torch.amp.GradScaler` of the loop.
        loss_weight: w in "gradient used = w times the sum over ranks of the gradients of their losses", or a function
            that returns it at each step. None takes it from DistributedDataParallel or FSDP2, else 1 / number of
            batches.
        own_parameters: Regular expression on the names of parameters of which every rank holds its own, such as
            experts; not needed for DTensors and what DistributedDataParallel ignores.
        pipeline: The ``torch.distributed.pipelining.PipelineStage`` whose module ``model`` is; for one record of all.
        merge: How one record of several ranks is made: ``"store"`` sends their sums to rank 0 in the background;
            ``"files"`` has each rank write a file of its own, and :func:`fastfs.load` merges them.
        rank_timeout: Longest time in seconds that a rank is waited for, in agreements and in the record.
        path: File that JSON lines are appended to; ``record.jsonl`` if neither ``path`` nor ``sinks`` is given. A name
            that ends in ``.parquet`` is a folder of Parquet files, ``"tensorboard:FOLDER"`` one for TensorBoard.
        sinks: More places for the record: such paths, functions of a list of rows, :class:`fastfs.monitor.Sink`, or
            names: ``"wandb"``, ``"mlflow"``, ``"trackio"``, ``"prometheus"``, ``"opentelemetry"``, ``"logging"``.
        flush_seconds: Longest time in seconds before a record is written.
        alerts: Rules that examine every record; None for :func:`fastfs.monitor.default_alerts`, ``()`` for none.
        on_alert: Function that is called with every alert, in the training thread.
        metadata: Description of the run for the header; anything that JSON can hold.
        verbose: Whether to print once to stderr, on the first rank, what is measured and how much memory it may take.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If no layer matches, a name is unknown (the message lists the candidates), an optimizer updates no
            parameter of the model, a value is out of range, or arguments exclude each other.
        OSError: If the record cannot be opened.

    Source: The feature speed formula of arXiv 2311.18718, section 2, in the form that holds for any optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        layers: Selection = AUTO,
        every: int | Schedule = 100,
        mode: Literal["batch", "probe", "jvp"] = "batch",
        aligned_every: int | Schedule | None = None,
        aligned_fraction: float = 0.25,
        probe: Probe | tuple[Any, Callable[[Any], Tensor]] | None = None,
        amplify: bool = False,
        rows: int | None = 1024,
        samples: int | None = None,
        memory: int = 2**29,
        details: bool = False,
        groups: dict[str, str] | None = None,
        quantiles: Sequence[float] = (),
        select: taps.Select = first_floating,
        nonlinear: bool = False,
        casts: Sequence[str] = (),
        scaler: Any = None,
        loss_weight: Weight = None,
        own_parameters: str | None = None,
        pipeline: Any = None,
        merge: Literal["store", "files"] = "store",
        rank_timeout: float = 20.0,
        path: str | os.PathLike[str] | None = None,
        sinks: Sequence[Any] = (),
        flush_seconds: float = 5.0,
        alerts: Sequence[Any] | None = None,
        on_alert: Callable[[dict[str, Any]], object] | None = None,
        metadata: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        found = check_optimizers(model, optimizer)
        optimizers = [each.optimizer for each in found]
        self._schedule = as_schedule(every)
        aligned = None if aligned_every is None else as_schedule(aligned_every)
        chosen = settings.check_mode(mode, probe, amplify, nonlinear)
        settings.check_sizes(rows, memory, quantiles)
        settings.check_samples(samples, rows, mode)
        settings.check_casts(casts)
        settings.check_details(details, mode, amplify, samples)
        sampled_every = settings.check_fraction(aligned_fraction)
        self._layers = select_layers(
            model, layers, [p for o in optimizers for g in o.param_groups for p in g["params"]]
        )
        members = select_groups(self._layers, groups)
        scale = LossScale(scaler)
        mode_class = find_mode(mode, amplify)
        settings.check_compiled(model, mode_class)
        settings.check_select(select)
        settings.check_ranks(own_parameters, merge, rank_timeout)
        first = (self._schedule.due(0), aligned is not None and aligned.due(0))
        meta = checked_metadata(metadata)

        self._closed = False
        named = functools.partial(parameter_names, model)
        parameters = Parameters(found, snapshot=mode_class.needs_previous, sampled_every=sampled_every, names=named)
        names = named(parameters.tensors)
        device = next(iter(names.values())).device
        ranks = Ranks(model, names, loss_weight, own_parameters, rank_timeout, pipeline)
        self._runner = runner = StepRunner(self._schedule, aligned, optimizers, sorted({"cpu", device.type}))
        self._header = make_header(
            model,
            found[0].name,
            self.layers,
            meta,
            mode=mode,
            every=settings.shown(self._schedule),
            aligned_every=settings.shown(aligned),
            aligned_fraction=1 / sampled_every,
            rows=rows,
            samples=samples,
            details=details,
            casts=list(casts),
            nonlinear=nonlinear,
            memory_bytes=memory,
            untrained=settings.untrained(model, parameters.tensors),
            groups={name: [self._layers[i].name for i in indices] for name, indices in members.items()},
            **describe(ranks.place),
        )
        with ExitStack() as undo:  # a failed attach leaves nothing behind
            undo.callback(ranks.release)
            settings.check_together(ranks, mode, amplify)
            self._header["layers"] = ranks.attach(self.layers)
            self._assembler = Assembler(self._header, quantiles)
            merged = joined(ranks.store, self._header, self._assembler, merge)
            self._recorder = open_recorder(
                path, sinks, self._header, merged, alerts=alerts, on_alert=on_alert, flush_seconds=flush_seconds
            )
            undo.callback(self._recorder.discard)
            self._capture = Capture(
                model,
                self._layers,
                names,
                RowSampler(rows, samples),
                MemoryBudget(memory, mode_class.row_copies + (samples is not None), len(self._layers)),
                select,
                runner,
                TrainingState(model, optimizers),
            )
            undo.callback(self._capture.close)
            factor = GradientFactor(parameters.groups, self._capture.switch, always=scale.given, failed=runner.failed)
            undo.callback(factor.close)
            assessor = UpdateAssessor(parameters.tensors, device)
            resources = ModeResources(
                model=model,
                layers=self._layers,
                replayer=self._capture.replayer,
                keeper=self._capture.keeper,
                hidden=self._capture.hidden,
                assessor=assessor,
                quantiles=tuple(quantiles),
                device=device,
                warn=runner.warn,
                probe=chosen,
                nonlinear=nonlinear,
                linked=(lambda forward: forward) if ranks.link is None else ranks.link.linked,
                details=Details(model, self._layers, self._capture.keeper, device, runner.warn) if details else None,
            )
            self._engine = Engine(
                model=model,
                layers=self._layers,
                mode=mode_class(resources),
                ranks=ranks,
                assessor=assessor,
                capture=self._capture,
                parameters=parameters,
                factor=factor,
                scale=scale,
                casts=CastSamples(casts, device),
                device=device,
                push=self._recorder.push,
                put=self._recorder.put,
            )
            self._capture.gradients = factor
            self._capture.inputs_count = ranks.link is not None and ranks.link.number > 0
            runner.attach(self._capture, self._engine, self._recorder)
            self._steps = OptimizerSteps(found, runner)
            undo.callback(self._steps.close)
            runner.start(self._steps, *first)
            description = self.description
            undo.pop_all()
        if verbose and settings.speaks():
            print(description, file=sys.stderr)

    # State

    @property
    def step(self) -> int:
        """Number of the next optimizer step, i.e. how many the monitor has seen."""
        return self._runner.step

    @property
    def due(self) -> bool:
        """Whether the next optimizer step will be measured."""
        return self._runner.measures and not self._closed

    @property
    def replaying(self) -> bool:
        """Whether a forward of the monitor's own is running, for hooks that count or log."""
        return self._capture.replaying

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the watched layers, in the order of the record."""
        return tuple(layer.name for layer in self._layers)

    @property
    def run(self) -> str:
        """Id of the run in the record."""
        return self._recorder.run

    @property
    def description(self) -> str:
        """What is measured, how often, and the memory that it may take; printed when the monitor is attached."""
        parameters = self._engine.parameters
        return settings.describe(
            self._header,
            parameters.snapshot_bytes + (matrix_bytes(parameters.tensors) if self._header["details"] else 0),
            self._engine.mode.momentary_bytes(parameters.tensors),
            self._recorder.device_bytes,
            settings.aligned_work(parameters.tensors, len(self._layers), self._header["aligned_fraction"]),
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"step {self.step}"
        return f"<fastfs.Monitor of {len(self._layers)} layers, {self._schedule}, {state}>"

    # Calls of the training loop

    def log(self, *, loss: Tensor | float) -> None:
        """Logs the loss of the coming step, before ``optimizer.step()``; a tensor is not waited for.

        Several calls before one step add up, as the scaled losses of micro-batches do.

        Args:
            loss: A scalar tensor or a number.

        Raises:
            ValueError: If ``loss`` is a tensor with more than one element.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"Monitor.log: expected a scalar loss, got a tensor of shape {tuple(loss.shape)}")
        if not self._closed:
            self._runner.log(loss)

    def flush(self, timeout: float = 30.0) -> bool:
        """Writes everything measured so far to the sinks and waits for it.

        Args:
            timeout: Longest time to wait, in seconds.

        Returns:
            Whether everything was written in time.
        """
        return self._recorder.flush(timeout)

    def close(self) -> None:
        """Removes every hook, writes what is left and closes the sinks. A second call does nothing."""
        if self._closed:
            return
        self._runner.recover()
        if self._capture.backwards_seen > 1 and not self.step:  # the optimizer is used in another way than by step()
            self._runner.notices.unused(self._capture.backwards_seen, str(self._header["optimizer"]))
        self._closed = True
        with ExitStack() as stack:  # each is closed, also if another one fails
            for part in (self._recorder, self._engine, self._capture, self._steps):
                stack.callback(part.close)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Resuming a run

    def state_dict(self) -> dict[str, Any]:
        """Returns what another monitor needs to continue this run: tensors on the CPU and plain values."""
        return {
            "step": self.step,
            "recorder": self._recorder.state_dict(),  # which flushes, so that the angles are those of the last step
            "engine": self._engine.state_dict(),
            "angles": self._assembler.angles.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the run of another monitor, with the same id and appending to its record.

        Must be called before the first step.

        Args:
            state: The ``state_dict()`` of a monitor with the same layers.

        Raises:
            ValueError: If the state is of other layers, or steps have been taken.
        """
        settings.check_state(state, self.layers, self.step)
        self._engine.load_state_dict(state["engine"])
        self._assembler.angles.load_state_dict(state.get("angles", ()))
        self._runner.step = int(state["step"])
        self._header |= {"run": state["recorder"]["run"], "resumed_at": self.step, "replaces": self.run}
        self._recorder.resume(self._header, state["recorder"])
        self._runner.arm_for(self.step)
