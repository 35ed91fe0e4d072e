"""The monitor: one line attaches it to a training loop."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastfs.monitor.capture import Capture, Pass, Visit
from fastfs.monitor.header import make_header
from fastfs.monitor.layers import select_layers
from fastfs.monitor.measure import Triple, measure
from fastfs.monitor.record import Record, Recorder
from fastfs.monitor.schedule import Schedule, as_schedule
from fastfs.monitor.sinks import Sink, as_sink, as_sinks, checked_metadata
from fastfs.stats import FeatureStats

__all__ = ["Monitor"]

_QUANTITIES = (
    "angle",
    "cos_angle",
    "update_rms",
    "relative_update",
    "feature_rms",
    "backward_rms",
    "radial_update",
    "noise_floor",
    "valid",
    "nonfinite",
    "count",
)


class Monitor:
    r"""Measures, every few optimizer steps, how far and at which angle the features of each watched layer move.

        with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", every=100, path="run/record.jsonl"):
            for batch in data:      # the loop stays as it is
                ...

    At a measured step the features f of the watched layers and their backward vectors b = dLoss/df are copied as the
    training step computes them; after ``optimizer.step()`` the model runs forward once more on the same inputs, without
    gradient, for the features after the update. Training does not notice: parameters, gradients, losses, buffers, modes
    and random streams are bitwise the same with and without the monitor.

    What holds and what does not:

    - *Same rows, same masks.* The model's inputs are copied at the forward: tensors, numbers, strings, NumPy arrays,
      and plain dataclasses and containers of them (lists, dictionaries, what is registered with
      ``torch.utils._pytree``). A forward with other inputs - an iterator, an object of some class - is left out, and
      one warning names the type. The second forward gets the same random numbers (torch on CPU and devices, Python's
      ``random``, NumPy), autocast, buffers and modes as the first. Generators of the model's own and plain tensors or
      counters kept as attributes are not known and not restored. Another thread that draws from the global generators
      during the second forward gets other numbers, and disturbs those of the measurement.
    - *Gradient accumulation.* Every forward with a backward since the last step counts as a micro-batch; the sums of
      all add up, as if their rows were one batch. b is the gradient of the loss as ``backward()`` got it: divide the
      loss by the number of micro-batches if it is a mean, as for training. After a skipped optimizer step,
      ``zero_grad()`` marks the earlier forwards as thrown away; with ``set_to_none=False`` it cannot be seen.
    - *Loss scaling.* With a gradient scaler b carries the scale: ``backward_rms`` is multiplied by it, nothing else.
    - *Data parallel.* Numbers are those of this process: its rows, its local loss. *Model parallel* is not there yet:
      all watched layers must be on one device.
    - *Layers that run several times in a forward* count as one layer with all the rows. A layer that does not run, or
      has no gradient, gets a row of nulls with ``valid`` false.
    - *Your hooks* on the model run in the second forward, too, since they may be part of the function (weight
      normalisation, adapters). One that counts or logs can ask ``monitor.replaying``. Hooks on the
      optimizer that are registered after the monitor run after the measurement.
    - *torch.compile.* Watched modules may be compiled themselves (``model.blocks[i] = torch.compile(...)``), not be
      inside something compiled: a ``ValueError`` says so. If compiled after attaching, one warning says that nothing
      can be seen.
    - *Copies* of the model (``copy.deepcopy``, ``torch.save``) are not watched.
    - *Memory.* At a measured step, up to three copies of every watched feature tensor per micro-batch. Nothing between.
      A micro-batch for which memory runs out is left out with a warning (``micro_batches`` counts those measured).

    Args:
        model: the module that the loop calls.
        optimizer: the optimizer whose steps count; it must update parameters of the model.
        layers: regular expression searched for in module names, or a list of exact names. Choose modules
            through which the whole signal passes (the residual stream after each block).
        every: measure steps 0, every, 2 every, ...; or a :class:`fastfs.monitor.Schedule`.
        path: file that rows are appended to, as JSON lines; ``record.jsonl`` in the current folder if neither ``path``
            nor ``sinks`` is given.
        sinks: further places for the rows: paths, functions of a list of rows, or :class:`fastfs.monitor.Sink` objects.
        metadata: anything that JSON can hold, for the header of the record.

    Raises:
        TypeError: an argument of the wrong type, or metadata that JSON cannot hold; from the first measured forward, a
            layer whose output holds no floating-point tensor.
        ValueError: no layer matches (the message lists the candidates), a layer inside a compiled module, a schedule
            below 1, an optimizer without a parameter of the model or that evaluates the loss several times in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: str | Sequence[str],
        every: int | Schedule = 100,
        path: str | os.PathLike[str] | None = None,
        sinks: Sequence[Any] = (),
        metadata: Mapping[str, Any] | None = None,
        alerts: Sequence[Any] | None = None,
        on_alert: Any = None,
        flush_seconds: float = 5.0,
    ) -> None:
        _check(model, optimizer)
        self._schedule = as_schedule(every)
        due = self._schedule.due(0)
        self._layers = select_layers(model, layers)
        self._warned: set[str] = set()
        self._step = 0
        self._loss: Tensor | float | None = None
        self._closed = False
        head = make_header(model, optimizer, self.layers, checked_metadata(metadata))
        targets = as_sinks(sinks)
        if path is not None or not targets:
            targets.insert(0, "record.jsonl" if path is None else path)
        with ExitStack() as undo:
            opened: list[Sink] = []
            for target in targets:
                sink = as_sink(target)
                opened.append(sink)
                if sink is not target:  # made here: nobody else could close it
                    undo.callback(sink.close)
            self._recorder = Recorder(opened, head, alerts=alerts, on_alert=on_alert, flush_seconds=flush_seconds)
            undo.pop_all()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._capture = Capture(model, self._layers, parameters, self._warn)
        self._handle = optimizer.register_step_post_hook(self._after_step)
        self._capture.armed = due

    @property
    def step(self) -> int:
        """Number of the next optimizer step: how many the monitor has seen."""
        return self._step

    @property
    def due(self) -> bool:
        """Whether the next optimizer step will be measured."""
        return self._capture.armed

    @property
    def replaying(self) -> bool:
        """True during the second forward of a measurement: for hooks of yours that count or log."""
        return self._capture.replaying

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the watched layers, in the order of the record."""
        return tuple(layer.name for layer in self._layers)

    def log(self, *, loss: Tensor | float) -> None:
        """Give the loss of the coming step, for the record (before ``optimizer.step()``); a tensor is not waited for.

        Several calls before one step add up, as micro-batches of a scaled loss do.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"Monitor.log: expected a scalar loss, got a tensor of shape {tuple(loss.shape)}")
        if self._closed or not self._capture.armed:
            return
        value = loss.detach().to(torch.float64, copy=True).reshape(()) if isinstance(loss, Tensor) else float(loss)
        self._loss = value if self._loss is None else self._loss + value

    def flush(self, timeout: float = 30.0) -> bool:
        """Bring all rows to the sinks; False if that failed."""
        return self._recorder.flush(timeout)

    def close(self) -> None:
        """Remove every hook, write what is left, close the sinks. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._handle.remove()
        self._capture.close()
        self._recorder.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"step {self._step}"
        return f"<fastfs.Monitor of {len(self._layers)} layers, {self._schedule}, {state}>"

    # A step

    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        try:
            if self._capture.armed:
                try:
                    self._measure()
                except Exception as error:  # a measurement must not end a training run
                    self._warn("failed", f"measurement failed and is left out ({type(error).__name__}: {error})")
            self._recorder.poll()
        finally:
            self._capture.clear()
            self._loss = None
            self._step += 1
            self._capture.armed = self._schedule.due(self._step)

    def _measure(self) -> None:
        start = time.perf_counter()
        passes = self._capture.collect()
        if not passes:
            if self._capture.dropped:  # which has been said
                return
            self._warn(
                "unseen",
                "is to be measured, but no forward and backward of the model was seen before it: nothing is recorded. "
                "The model that was given must be the one that the loop calls, with gradient. If torch.compile "
                "compiled it after the monitor was attached, its hooks are not called: compile the watched blocks one "
                "by one (model.blocks[i] = torch.compile(model.blocks[i])) and attach after that",
            )
            return
        count = len(passes)
        total: FeatureStats | None = None
        while passes:
            stats = measure(self._triples(passes.pop(0)))
            total = stats if total is None else total + stats
        assert total is not None
        seconds = self._capture.seconds + time.perf_counter() - start
        sums = total.sums.reshape(-1)
        loss, step, now, layers = self._loss, self._step, time.time(), len(self._layers)
        with_loss = isinstance(loss, Tensor)
        payload = torch.cat([sums, loss.to(sums).reshape(1)]) if isinstance(loss, Tensor) else sums

        def decode(host: Tensor) -> list[Record]:
            stats = FeatureStats(host[: layers * 9].reshape(layers, 9))
            scalars = {
                "loss": host[-1].item() if with_loss else loss,
                "micro_batches": count,
                "overhead_seconds": seconds,
            }
            columns = {name: getattr(stats, name).tolist() for name in _QUANTITIES}
            return [Record("measured", step, now, scalars, columns)]  # type: ignore[arg-type]

        self._recorder.push(payload, decode)

    def _triples(self, passed: Pass) -> list[list[Triple]]:
        after = self._capture.replay(passed)
        triples: list[list[Triple]] = []
        for layer, first, second in zip(self._layers, passed.visits, after, strict=True):
            if [v.shape for v in first] != [f.shape for f in second]:
                self._warn(
                    layer.name,
                    f"layer {layer.name!r} ran {len(first)} times in the forward and {len(second)} times in the second "
                    "one on the same inputs, or with other shapes: it is left out. The forward depends on something "
                    "besides inputs, parameters, buffers and global random numbers",
                )
                triples.append([])
                continue
            triples.append(
                [(v.before, f, _backward(v)) for v, f in zip(first, second, strict=True) if v.before is not None]
            )
        return triples

    def _warn(self, kind: str, message: str) -> None:
        """Once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            text = f"fastfs.Monitor: step {self._step} {message}. Training goes on; said once."
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def _backward(visit: Visit) -> Tensor:
    """No gradient came to a feature in the graph: the loss does not depend on it."""
    assert visit.before is not None
    return torch.zeros_like(visit.before) if visit.backward is None else visit.backward


def _check(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS evaluates the loss several times in a step; a step cannot be measured")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"optimizer: {type(optimizer).__name__} updates no parameter of {type(model).__name__}")
