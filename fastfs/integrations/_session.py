"""What the callbacks of all trainers share: a monitor that is opened, fed, saved and closed once per training run."""

from __future__ import annotations

import base64
import functools
import inspect
import io
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor.monitor import Monitor

__all__ = ["TrainerSession", "decoded", "encoded", "own_optimizers"]


class TrainerSession:
    """The monitor of a trainer, from the beginning of a training run to its end.

    Args:
        owner: Name of the callback, for messages.
        options: Arguments of :class:`fastfs.Monitor` other than model and optimizer.

    Attributes:
        options: As given.
        monitor: The monitor while training runs; None outside of it.
        state: What the last closed monitor has left for a checkpoint; None before.
        at_close: Undoes what the callback has changed about the trainer.

    Raises:
        TypeError: An option is no argument of the monitor.
    """

    def __init__(self, owner: str, options: Mapping[str, Any]) -> None:
        names = list(inspect.signature(Monitor).parameters)[2:]
        unknown = [name for name in options if name not in names]
        if unknown:
            raise TypeError(f"{owner}: expected arguments of fastfs.Monitor ({', '.join(names)}), got {unknown[0]!r}")
        self.owner = owner
        self.options = dict(options)
        self.monitor: Monitor | None = None
        self.state: dict[str, Any] | None = None
        self.at_close: Callable[[], None] = lambda: None

    def open(
        self, model: nn.Module, optimizers: Any, folder: str | os.PathLike[str], scaler: Any, state: Any = None
    ) -> Monitor:
        """Attaches a monitor; one that an earlier run has left open, because it has failed, is closed before.

        Args:
            model: The module that the loop calls.
            optimizers: Those that it steps.
            folder: Of the trainer's files; ``record.jsonl`` is in it if the options name no other place.
            scaler: The trainer's gradient scaler; None if it has none.
            state: Of the run to continue, from a checkpoint; None for a new run.

        Returns:
            The monitor.
        """
        self.close(failed=True)
        options = {"scaler": scaler} | self.options
        if options.get("path") is None and not options.get("sinks"):
            options["path"] = os.path.join(folder, "record.jsonl")
        if isinstance(sinks := options.get("sinks"), (list, tuple)):
            options["sinks"] = [_trainers_sink(sink) for sink in sinks]
        self.monitor = monitor = Monitor(model, optimizers, **options)
        if state is not None:
            self.resume(state)
        return monitor

    def resume(self, state: Any) -> None:
        """Continues the run of a checkpoint, if it is of the same layers. Before the first step."""
        assert self.monitor is not None
        try:
            self.monitor.load_state_dict(state)
        except ValueError as error:
            text = f"{self.owner}: the checkpoint's record cannot be continued, a new run begins ({error})"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def log(self, loss: Any) -> None:
        """Adds to the loss of the coming step, if it is a tensor with one element, of which the local part counts."""
        loss = loss.to_local() if hasattr(loss, "to_local") else loss
        if self.monitor is not None and isinstance(loss, Tensor) and loss.numel() == 1:  # methods may be overridden
            self.monitor.log(loss=loss)

    def watch(self, trainer: Any, method: str) -> None:
        """Logs the losses that a method of the trainer returns, and closes the monitor if it raises.

        Args:
            trainer: The trainer.
            method: Name of the method that runs forward and backward.
        """
        original, before = getattr(trainer, method), vars(trainer).get(method)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                loss = original(*args, **kwargs)
            except BaseException:
                self.close(failed=True)
                raise
            self.log(loss)
            return loss

        own, function = weakref.ref(trainer), weakref.ref(watched)  # a trainer that has failed can be dropped

        def restore() -> None:
            attributes = {} if (owner := own()) is None else vars(owner)
            if function() is not None and attributes.get(method) is function():
                del attributes[method]
                attributes.update({} if before is None else {method: before})

        setattr(trainer, method, watched)
        self.at_close = restore

    def take_state(self) -> dict[str, Any] | None:
        """Returns what a checkpoint needs to continue the run: of the open monitor, else of the last one."""
        return self.state if self.monitor is None else self.monitor.state_dict()

    def close(self, failed: bool = False) -> None:
        """Detaches the monitor, if there is one, and writes the rest of the record.

        Args:
            failed: Whether training has failed; an error of the device must not hide the one that ended it.
        """
        monitor, self.monitor = self.monitor, None
        if monitor is None:
            return
        self.state = None
        with ExitStack() as stack:
            stack.callback(monitor.close)
            stack.callback(self.at_close)
            with suppress(Exception) if failed else nullcontext():
                self.state = monitor.state_dict()


def _trainers_sink(sink: Any) -> Any:
    """Returns what a sink means in a trainer, whose logger gives no ``step=`` to W&B and begins few rows of its own."""
    if sink != "wandb":
        return sink
    from fastfs.monitor import WandbSink

    return WandbSink(own_rows=True)


def own_optimizers(model: nn.Module, optimizers: Sequence[Any]) -> list[Any]:
    """Returns the optimizers that update a parameter of the model."""
    own = set(map(id, model.parameters()))
    return [each for each in optimizers if any(id(p) in own for g in each.param_groups for p in g["params"])]


def encoded(state: dict[str, Any]) -> str:
    """Returns a monitor's state as text."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text: str) -> Any:
    """Returns the state in a text of :func:`encoded`."""
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
