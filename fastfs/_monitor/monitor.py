"""The monitor: one line attaches it to a training loop."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastfs._monitor import settings
from fastfs._monitor.capture import taps
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.capture.memory_budget import Budget
from fastfs._monitor.capture.sampling import Sampler
from fastfs._monitor.engine import Engine
from fastfs._monitor.measure.aligned_decrease import LossScale
from fastfs._monitor.measure.gradient_treatment import GradientFactor
from fastfs._monitor.measure.modes import BatchMode, JvpMode
from fastfs._monitor.measure.parameters import Parameters
from fastfs._monitor.measure.probe import Probe, ProbeMode
from fastfs._monitor.optimizers import check_optimizers
from fastfs._monitor.payload import Names
from fastfs._monitor.schedule import Schedule, as_schedule
from fastfs._monitor.steps import OptimizerSteps
from fastfs._network.feature_tensors import first_floating
from fastfs._network.global_state import Surroundings
from fastfs._network.guard import WriteError
from fastfs._network.journal import Journal
from fastfs._network.layers import AUTO, Layer, Selection, parameter_names, select_groups, select_layers
from fastfs._record.header import checked_metadata, make_header

__all__ = ["Monitor"]

_IN_GRAPHS = "run inside graphs of torch.compile, which can be seen from torch 2.13 on"


class Monitor:
    """Records how far the features of each layer move in a training step, and how that move is aligned with the loss.

    Attached to a model and its optimizer it watches steps through hooks: nothing else in the loop changes, and
    parameters, gradients, losses, buffers and random streams stay bitwise what they are without it. At a measured step
    (every ``every``-th, the first one included) features before, backward vector and features after of each watched
    layer become angle, speed and aligned decrease, with a flag that says whether to trust them; at an aligned step
    (``aligned_every``) gradients and update alone give the decrease, and a predicted speed. The record
    is written in the background. ``docs/monitor.md`` explains every column and mode::

        monitor = fastfs.Monitor(model, optimizer, path="run/record.jsonl")
        for inputs, targets in data:
            ...  # zero_grad, forward, backward
            optimizer.step()
        monitor.close()

    What holds: a measurement that fails is left out with one warning, and training goes on; the step path does not
    wait for the device or for a sink; memory does not grow with the length of the run. Gradient accumulation, clipping,
    gradient scalers (give ``scaler``), several optimizers, optimizers that step within the backward, activation
    checkpointing, frozen layers and ``torch.compile`` are understood. What does not hold: the
    speed formula at layers that are no cut (inside a branch, around shared parameters, in several processes): there is
    an angle, but no residual and no prediction. LBFGS is refused. Under data parallelism every rank measures its own.

    Args:
        model: the module that the loop calls, wrappers included.
        optimizer: one that updates its parameters, or a list of them.
        layers: ``"auto"`` (the blocks, else every module with parameters), a regular expression, a list of names, a
            module type or a tuple of them, or a function of name and module.
        every: measure every so many optimizer steps, or a :class:`fastfs.monitor.Schedule`.
        mode: ``"batch"``: the training batch, one more forward; ``"probe"``: a fixed batch, in float32, forward,
            backward and forward; ``"jvp"``: the first-order update of the training batch, one forward in forward mode.
        aligned_every: aligned decrease and predicted speed every so many steps, without a forward; None for never.
        probe: ``(inputs, loss)`` or a :class:`fastfs.monitor.Probe`, for ``mode="probe"``: ``loss`` is a function of
            the model's output.
        amplify: measure the update enlarged, by two more forwards (one more in float32 where the model runs in 16
            bits), so that rounding does not hide it. For ``mode="batch"``.
        rows: the most rows (tokens, images) kept of a layer, a fixed random subset; None for all. Sampled statistics
            come with standard errors.
        memory: bytes that copies of inputs and rows may take at a measured step; fewer rows are kept to stay below.
        groups: name -> regular expression on the names of watched layers: totals that are recorded beside them.
        quantiles: of the rows' cosines and speeds, numbers from 0 to 1: columns ``cos_angle_q10``, ...
        select: the features in a layer's output; by default the first floating-point tensor in it.
        scaler: the :class:`torch.amp.GradScaler` of the loop.
        path: the record as JSON lines, appended to; ``record.jsonl`` if neither this nor ``sinks`` is given. A name
            that ends in ``.parquet`` is a folder of Parquet files, ``"tensorboard:FOLDER"`` one for TensorBoard.
        sinks: more places for the record: such paths, functions of a list of rows, or :class:`fastfs.monitor.Sink`.
        flush_seconds: how long a record may wait before it is written.
        alerts: rules; None for :func:`fastfs.monitor.default_alerts`, ``()`` for none.
        on_alert: called with every alert, in the training thread.
        metadata: of the run, for the header; what JSON can hold.
        verbose: say on stderr, once and on the first rank, what is measured and how much memory it may take.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no layer matches, an unknown name (the message lists the candidates), an optimizer that updates no
            parameter of the model, a value out of range, arguments that exclude each other.
        OSError: the record cannot be opened.

    Source: the feature speed formula of arXiv 2311.18718, section 2, in the form that holds for any optimizer.
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
        probe: Probe | tuple[Any, Callable[[Any], Tensor]] | None = None,
        amplify: bool = False,
        rows: int | None = 1024,
        memory: int = 2**29,
        groups: dict[str, str] | None = None,
        quantiles: Sequence[float] = (),
        select: taps.Select = first_floating,
        scaler: Any = None,
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
        self._aligned = None if aligned_every is None else as_schedule(aligned_every)
        chosen = settings.check_mode(mode, probe, amplify)
        settings.check_sizes(rows, memory, quantiles)
        self._layers = select_layers(
            model, layers, [p for o in optimizers for g in o.param_groups for p in g["params"]]
        )
        members = select_groups(self._layers, groups)
        scale = LossScale(scaler)
        settings.check_compiled(model, mode)
        settings.check_select(select)
        first = (self._schedule.due(0), self._aligned is not None and self._aligned.due(0))
        meta = checked_metadata(metadata)

        self._warned: set[str] = set()
        self._step = 0
        self._loss: Tensor | float | None = None
        self._closed = False
        self._failed = False  # this step's measurement, before it began
        self._why: str | None = None  # it is left out
        self._journal = Journal()  # of settings of torch and Python
        self._interrupted = False  # in the middle of a measurement
        self._finishing: int | None = None  # the step whose end is under way
        self._model = model
        self._optimizers = optimizers
        self._sampler = Sampler(rows)
        parameters = Parameters(found, snapshot=amplify or mode != "batch")
        names = parameter_names(model, parameters.tensors)
        device = next(iter(names.values())).device
        self._device_types = sorted({"cpu", device.type})
        self._header = make_header(
            model,
            found[0].name,
            self.layers,
            meta,
            mode=mode,
            every=settings.shown(self._schedule),
            aligned_every=settings.shown(self._aligned),
            rows=rows,
            memory_bytes=memory,
            groups={name: [self._layers[i].name for i in indices] for name, indices in members.items()},
        )
        with ExitStack() as undo:  # of a failed attach nothing is left
            self._recorder = settings.open_recorder(
                path, sinks, self._header, alerts=alerts, on_alert=on_alert, flush_seconds=flush_seconds
            )
            undo.callback(self._recorder.discard)
            self._capture = Capture(
                model,
                self._layers,
                names,
                self._sampler,
                # Of every row before, backward, after; with both sides of the probe, and before as eager execution has
                # it.
                Budget(memory, 6 if amplify else 3, len(self._layers)),
                select,
                self._warn,
                self._forward_begins,
                self._fail,
                self._owned,
            )
            undo.callback(self._capture.close)
            factor = GradientFactor(parameters.groups, self._capture.switch, always=scale.given, failed=self._fail)
            undo.callback(factor.close)
            self._engine = Engine(
                model=model,
                layers=self._layers,
                names=Names(len(self._layers), members),
                mode=self._make_mode(mode, model, chosen),
                amplify=amplify,
                quantiles=tuple(quantiles),
                capture=self._capture,
                parameters=parameters,
                factor=factor,
                scale=scale,
                device=device,
                push=self._recorder.push,
                put=self._recorder.put,
            )
            self._capture.gradients = factor
            self._capture.replayer.others = self._settings
            self._capture.recover = self._recover
            self._steps = OptimizerSteps(found, self)
            undo.callback(self._steps.close)
            self._measures, self._aligns = first
            self._arm()
            description = self.description
            undo.pop_all()
        if verbose and settings.speaks():
            print(description, file=sys.stderr)

    def _make_mode(self, mode: str, model: nn.Module, probe: Probe | None) -> BatchMode | ProbeMode:
        if probe is not None:
            return ProbeMode(model, self._layers, self._capture, self._sampler, probe)
        kind = JvpMode if mode == "jvp" else BatchMode
        return kind(model, self._layers, self._capture, self._warn)

    # What it is doing

    @property
    def step(self) -> int:
        """Number of the next optimizer step: how many the monitor has seen."""
        return self._step

    @property
    def due(self) -> bool:
        """Whether the next optimizer step will be measured."""
        return self._measures and not self._closed

    @property
    def replaying(self) -> bool:
        """True during forwards of the monitor's own: for hooks of yours that count or log."""
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
        """What is measured how often, and the memory it may take: what is printed when the monitor is attached."""
        parameters = self._engine.parameters
        moment = settings.momentary_bytes(parameters.tensors, str(self._header["mode"]), self._engine.amplify)
        return settings.describe(
            self._header,
            parameters.snapshot_bytes,
            moment,
            self._recorder.device_bytes,
            settings.aligned_work(parameters.tensors, len(self._layers)),
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"step {self._step}"
        return f"<fastfs.Monitor of {len(self._layers)} layers, {self._schedule}, {state}>"

    # What the loop may say

    def log(self, *, loss: Tensor | float) -> None:
        """Give the loss of the coming step, for the record (before ``optimizer.step()``); a tensor is not waited for.

        Several calls before one step add up, as micro-batches of a scaled loss do.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"Monitor.log: expected a scalar loss, got a tensor of shape {tuple(loss.shape)}")
        if self._closed or not (self._measures or self._aligns):
            return
        value = loss.detach().to(torch.float64, copy=True).reshape(()) if isinstance(loss, Tensor) else float(loss)
        self._loss = value if self._loss is None else self._loss + value

    def flush(self, timeout: float = 30.0) -> bool:
        """Bring everything measured so far to the sinks and wait for that; False if that took longer."""
        return self._recorder.flush(timeout)

    def close(self) -> None:
        """Remove every hook, write what is left, close the sinks. A second call does nothing."""
        if self._closed:
            return
        self._recover()
        self._say_unused()
        self._closed = True
        self._steps.close()
        self._capture.close()
        self._engine.close()
        self._recorder.close()

    def _say_unused(self) -> None:
        """An optimizer that is used in another way than by ``step`` calls no hook."""
        if self._capture.seen > 1 and not self._step:
            self._warn(
                "unused",
                f"was never reached: {self._capture.seen} backwards of the model were seen, but no step() of "
                f"{self._header['optimizer']}. Give the optimizer whose step() the loop calls",
            )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Going on with a run

    def state_dict(self) -> dict[str, Any]:
        """What another monitor needs to go on with this run: tensors on the CPU and plain values."""
        return {"step": self._step, "recorder": self._recorder.state_dict(), "engine": self._engine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run of another monitor's ``state_dict()``: same id in the record, which is appended to.

        To be called before the first step. The layers must be the same.

        Raises:
            ValueError: a state of other layers, or steps have been taken.
        """
        settings.check_state(state, self.layers, self._step)
        self._engine.load_state_dict(state["engine"])
        self._step = int(state["step"])
        self._header |= {"run": state["recorder"]["run"], "resumed_at": self._step, "replaces": self.run}
        self._recorder.resume(self._header, state["recorder"])
        self._arm_for(self._step)

    # What happens around the optimizers

    def enter(self, optimizer: int) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._run(lambda: self._engine.parameters.enter(optimizer))

    def evaluate(self, optimizer: int) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._run(lambda: self._engine.parameters.evaluate(optimizer))

    def failed(self, error: Exception) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._fail(error)

    def before(self, optimizer: int, first: bool) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._recover()
        which = self._optimizers[optimizer]
        self._run(lambda: self._engine.before(which, optimizer, first=first, measured=self._measures))

    def after(self, optimizer: int) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._run(lambda: self._engine.after(self._optimizers[optimizer], optimizer, measured=self._measures))

    def _run(self, part: Callable[[], None]) -> None:
        """A part of the measurement: what goes wrong ends it, and leaves every setting as it was."""
        if not self._active or self._failed:
            return
        started = time.perf_counter()
        try:
            try:
                self._journal.note(Surroundings(self._device_types).restore)
                self._attempt(part)
            finally:
                self._restore()
        finally:
            self._restore()  # an interrupt may have come in the first; later on the settings are the loop's own
        self._capture.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        try:
            self._finishing = self._step  # until it is over: an interrupt leaves it for _recover
            self._settle()
            self._attempt(self._complete)
            self._attempt(self._tell)
        except Exception as error:  # of _settle, or a warning that the user wants to be an error
            self._fail(error)
        finally:
            try:
                self._recover()
            except Exception as error:  # tried again
                if isinstance(error, Warning):  # that the user wants to be an error
                    raise
            finally:
                self._recover()  # an interrupt may have come in the first, too

    def _attempt(self, part: Callable[[], None]) -> None:
        """A measurement must not end a training run."""
        try:
            part()
        except Exception as error:
            self._fail(error)
        except BaseException:
            self._interrupted = True
            raise

    def _complete(self) -> None:
        if self._active and not self._failed:
            started = time.perf_counter()
            self._journal.note(Surroundings(self._device_types).restore)
            torch._C._set_grad_enabled(False)
            self._measure(started)

    def _tell(self) -> None:
        if self._why is not None:
            self._engine.skipped(self._step, self._why)
        self._recorder.poll()

    def _restore(self) -> None:
        self._capture.replayer.recover()
        self._journal.restore()

    def _settle(self) -> None:
        """Put back what an interrupt has left changed."""
        self._restore()
        if self._interrupted:  # what the parts of a measurement keep for the next one may be half of it
            self._engine.renew()
            self._interrupted = False

    def _recover(self) -> None:
        """The same, and end the step that it came in."""
        self._settle()
        if self._finishing is None:
            return
        self._step = self._finishing + 1
        self._loss = self._why = None
        self._failed = False
        try:
            self._capture.clear()
            self._engine.clear()
        except Exception as error:
            self._say_failed(error)
        self._arm_for(self._step)
        self._finishing = None

    @property
    def _active(self) -> bool:
        return self._measures or self._aligns

    def _arm_for(self, step: int) -> None:
        try:
            self._measures = bool(self._schedule.due(step))
            self._aligns = self._aligned is not None and bool(self._aligned.due(step))
        except Exception as error:  # a schedule of the user's
            self._measures = self._aligns = False
            self._warn("schedule", f"is left out: the schedule failed ({type(error).__name__}: {error})")
        self._arm()

    def _arm(self) -> None:
        """How much the taps take until the next step. A probe needs nothing of the training forward."""
        probe = isinstance(self._engine.mode, ProbeMode)
        if self._measures and not probe:
            self._capture.switch.level = taps.EVERYTHING
        else:
            self._capture.switch.level = taps.GRADIENTS if self._aligns else taps.OFF

    def _measure(self, started: float) -> None:
        loss = torch.tensor(self._loss, dtype=torch.float64) if isinstance(self._loss, float) else self._loss
        if not self._measures:
            self._engine.predict(self._step, loss, started)
        elif not self._engine.measure(self._step, loss, started):
            if self._capture.dropped:
                self._why = "every forward of the step was left out"
                return
            if self._warn_of_hidden():
                self._why = f"the watched layers {_IN_GRAPHS}"
                return
            self._why = "no forward and backward of the model was seen before the step"
            if self._capture.transformed:
                self._why += ": the model was called inside a torch.func transform, where its features cannot be seen"
            again = (
                "Graphs of torch.compile that know of no hooks were found and dropped: they are made again"
                if self._capture.drop_unguarded()
                else "The model that was given must be the one that the loop calls, with gradient"
            )
            self._warn(
                "unseen",
                "is to be measured, but no forward and backward of the model was seen before it: nothing is recorded. "
                + again,
            )
        elif not self._warn_of_hidden() and self._engine.idle:
            self._warn_of_idle(self._engine.idle)

    def _warn_of_hidden(self) -> bool:
        """Of layers in graphs that show none; whether there are any."""
        hidden = [layer.name for layer in self._layers if self._capture.hidden(layer.index)]
        if hidden:
            self._warn(
                "hidden",
                f"has no features of {', '.join(map(repr, hidden[:20]))}: they {_IN_GRAPHS}; "
                f"this is torch {torch.__version__}",
            )
        return bool(hidden)

    def _warn_of_idle(self, layers: Sequence[Layer]) -> None:
        first = layers[0]
        below = [f"{first.name}.{name}" for name, _ in first.module.named_children()]
        others = f". Below it: {', '.join(below[:20])}" if below else ""
        names = ", ".join(repr(layer.name) for layer in layers[:20])
        self._warn(
            "idle",
            f"has no forward of {names}: the model does not call {'them' if len(layers) > 1 else 'it'} in this step, "
            f"and the rows are empty{others}",
        )

    def _owned(self) -> list[Tensor]:
        """Tensors that training owns."""
        parameters = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        states = [x for o in self._optimizers for s in o.state.values() for x in s.values() if isinstance(x, Tensor)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        model = [*self._model.parameters(), *self._model.buffers()]
        return [*parameters, *states, *gradients, *model]

    def _settings(self) -> list[Any]:
        """What the optimizers hold besides tensors: groups with learning rates, states with counters."""
        return [x for o in self._optimizers for x in (o.param_groups, *o.param_groups, o.state)]

    def _forward_begins(self) -> None:
        self._recover()
        self._steps.forward_begins()
        if torch._C._current_graph_task_id() == -1:
            self._engine.factor.begin()
        if self._engine.factor.thrown_away():
            self._engine.skipped(self._step, "gradients were thrown away without an optimizer step")
            self._engine.factor.clear()
            self._capture.forget_squares()

    def _fail(self, error: Exception) -> None:
        """A step's measurement has failed: it is left out, and the record says why."""
        self._failed = True
        if isinstance(error, Warning):  # one of ours, where the user wants warnings to be errors
            raise error
        self._say_failed(error)

    def _say_failed(self, error: Exception) -> None:
        if isinstance(error, WriteError):
            self._why = f"{error}: a second forward would change the training"
            self._warn("writes", f"is left out: {self._why}")
        else:
            self._why = f"measurement failed ({type(error).__name__}: {error})"
            self._warn("failed", f"measurement failed and is left out ({type(error).__name__}: {error})")

    def _warn(self, kind: str, message: str) -> None:
        """Once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            text = f"fastfs.Monitor: step {self._step} {message}. Training goes on; said once."
            warnings.warn(text, RuntimeWarning, stacklevel=2)
