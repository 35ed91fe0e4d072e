"""Runs the measurement around optimizer steps such that it never disturbs training.

Every part of a measurement may fail, and an interrupt (Ctrl-C, as notebooks catch it) may come between any two
bytecodes. :class:`StepRunner` guarantees in both cases that settings of torch and Python are what they are without the
monitor, and that the next step is measured as if nothing had happened. The order of its assignments matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from fastfs._monitor.capture import taps
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.engine import Engine
from fastfs._monitor.notices import IN_GRAPHS, Notices
from fastfs._monitor.schedule import Schedule
from fastfs._monitor.steps import OptimizerSteps
from fastfs._network.global_state import GlobalState
from fastfs._network.guard import WriteError
from fastfs._network.journal import Journal
from fastfs._record.ranks.run_store import RankError
from fastfs._record.writing.recorder import Recorder

__all__ = ["StepRunner"]

Loss = Tensor | float | None


class StepRunner:
    """Decides which steps are measured, and calls the engine before, around and after them.

    Implements :class:`fastfs._monitor.steps.StepListener` and
    :class:`fastfs._monitor.capture.listener.CaptureListener`.

    Args:
        schedule: Steps that are measured.
        aligned: Steps with an aligned decrease and a prediction; None for none.
        optimizers: The optimizers, in the order of the listener's indices.
        device_types: Types of the devices whose settings are restored after each part.

    Attributes:
        step: Number of the next optimizer step.
        measures: Whether it will be measured.
        aligns: Whether its aligned decrease will be computed.
        notices: Gives warnings.
        warn: Gives a warning once for each kind.
    """

    def __init__(
        self,
        schedule: Schedule,
        aligned: Schedule | None,
        optimizers: Sequence[torch.optim.Optimizer],
        device_types: Sequence[str],
    ) -> None:
        self.step = 0
        self._losses: tuple[Loss, Loss] = (None, None)  # logged for the step before the last forward began, and since
        self.measures = self.aligns = False
        self.notices = Notices(lambda: self.step)
        self.warn = self.notices.warn
        self._schedule = schedule
        self._aligned = aligned
        self._optimizers = optimizers
        self._device_types = device_types
        self._trains = False  # a forward of the model has begun
        self._initializes = False  # an optimizer only creates its state
        self._failed = False  # the measurement of this step
        self._why: str | None = None  # the reason why this step is not measured
        self._journal = Journal()  # of settings of torch and Python
        self._interrupted = False  # in the middle of a part of the measurement
        self._finishing: int | None = None  # number of the step whose end is in progress
        self._capture: Capture
        self._engine: Engine
        self._recorder: Recorder
        self._optimizer_steps: OptimizerSteps

    def attach(self, capture: Capture, engine: Engine, recorder: Recorder) -> None:
        """Sets the parts, which report to this object and are therefore created after it."""
        self._capture, self._engine, self._recorder = capture, engine, recorder

    def start(self, optimizer_steps: OptimizerSteps, measures: bool, aligns: bool) -> None:
        """Arms the taps for step 0.

        Args:
            optimizer_steps: Hooks on the optimizers, which report to this object.
            measures: Whether step 0 is measured.
            aligns: Whether its aligned decrease is computed.
        """
        self._optimizer_steps = optimizer_steps
        self.measures, self.aligns = measures, aligns
        self._arm()

    @property
    def loss(self) -> Loss:
        """Sum of the losses that were logged for the step; None if none was."""
        return _added(*self._losses)

    def log(self, loss: Tensor | float) -> None:
        """Adds to the loss of the step, if it is recorded."""
        if self.measures or self.aligns:
            if isinstance(loss, Tensor):
                loss = loss.detach().to(torch.float64, copy=True).reshape(())
            before, own = self._losses
            self._losses = before, _added(own, loss if isinstance(loss, Tensor) else float(loss))

    # Around the optimizers

    def enter(self, optimizer: int) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._run(lambda: self._engine.parameters.enter(optimizer))

    def evaluate(self, optimizer: int) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self._run(lambda: self._engine.parameters.evaluate(optimizer))

    def before(self, optimizer: int, first: bool) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        self.recover()
        if self._initializes or (not self._trains and _stands_still(self._optimizers[optimizer])):
            self._initializes = True
            return
        which, ranks = self._optimizers[optimizer], self._engine.ranks
        met = ranks.meetings
        self._run(lambda: self._engine.before(which, optimizer, self.step, first=first, measured=self.measures))
        if self._failed and self.measures and first:
            if ranks.meetings == met:
                self._abstain(lambda reason: ranks.meet(self.step, "", reason))
            self._accompany()

    def after(self, optimizer: int) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        if self._initializes:
            return
        self._run(lambda: self._engine.after(self._optimizers[optimizer], optimizer, measured=self.measures))

    def finish(self) -> None:
        """Part of :class:`fastfs._monitor.steps.StepListener`."""
        if self._initializes:
            self._initializes = False
            return
        try:
            self._finishing = self.step  # until the end is over: after an interrupt, recover() completes it
            self._settle()
            self._attempt(self._complete)
            self._leave()
            self._attempt(self._report)
        except Exception as error:  # of _settle, or a warning that a filter turns into an error
            self._leave()
            self.failed(error)
        finally:
            try:
                self.recover()
            except Exception as error:  # tried again below
                if isinstance(error, Warning):  # a filter turns it into an error
                    raise
            finally:
                self.recover()  # an interrupt may have come in the first call, too

    def forward_begins(self) -> None:
        """Part of :class:`fastfs._monitor.capture.listener.CaptureListener`."""
        self.recover()
        self._optimizer_steps.forward_begins()
        self._trains, self._initializes = True, False
        if torch._C._current_graph_task_id() == -1:
            self._engine.factor.begin()
        self._losses = self.loss, None
        self._forget_thrown_away()

    def backward_begins(self) -> None:
        """Part of :class:`fastfs._monitor.capture.listener.CaptureListener`."""
        self._forget_thrown_away()  # loops may call zero_grad() after the forward

    def _forget_thrown_away(self) -> None:
        """Records that gradients led to no step, and forgets them with the losses of the forwards before this one."""
        if self._engine.factor.thrown_away() and not self._capture.leaves.unreduced:
            self._engine.skipped(self.step, "gradients were thrown away without an optimizer step", before=True)
            self._engine.factor.clear()
            self._capture.forget_gradients()
            self._losses = None, self._losses[1]

    def failed(self, error: Exception) -> None:
        """Leaves the measurement of this step out, and records why.

        Part of :class:`fastfs._monitor.steps.StepListener` and
        :class:`fastfs._monitor.capture.listener.CaptureListener`.
        """
        self._failed = True
        if isinstance(error, Warning):  # one of the monitor's, which a filter turns into an error
            raise error
        self._explain(error)

    # Parts of a measurement, none of which may disturb training

    def _run(self, part: Callable[[], None]) -> None:
        """Runs a part of the measurement. A failure ends the measurement; all settings are restored."""
        if self._failed or not (self.measures or self.aligns):
            return
        started = time.perf_counter()
        try:
            try:
                self._journal.note(GlobalState(self._device_types).restore)
                self._attempt(part)
            finally:
                self._restore()
        finally:
            self._restore()  # an interrupt may have come in the first call; later, the settings are the loop's own
        self._capture.seconds += time.perf_counter() - started

    def _attempt(self, part: Callable[[], None]) -> None:
        """Runs a function whose exceptions must not end the training run."""
        try:
            part()
        except Exception as error:
            # The optimizers may need the memory that the mode holds. It is cleared again when the step is over, where a
            # failure is recorded; here it would hide the error that explains the step.
            with suppress(Exception):
                self._engine.mode.clear()
            self.failed(error)
        except BaseException:
            self._interrupted = True
            raise

    def _abstain(self, tell: Callable[[str], None]) -> None:
        """Tells the other ranks why this one does not measure the step, so that they do not wait for it."""
        with suppress(RankError):
            tell(self._why or "its measurement failed")

    def _leave(self) -> None:
        """After a failure, does for the other ranks what they wait for: an answer, or the forwards agreed upon."""
        if self.measures:
            self._abstain(self._engine.ranks.meet_again)
            self._accompany()

    def _accompany(self) -> None:
        try:
            self._journal.note(GlobalState(self._device_types).restore)
            with suppress(Exception):  # the step is left out already, and its record has the failure before this one
                self._engine.accompany()
        finally:
            self._restore()

    def _complete(self) -> None:
        """Measures or predicts the step that is over."""
        if (self.measures or self.aligns) and not self._failed:
            started = time.perf_counter()
            self._journal.note(GlobalState(self._device_types).restore)
            torch._C._set_grad_enabled(False)
            self._measure(started)

    def _report(self) -> None:
        """Records why the step is not measured, and passes on what the writer has reported."""
        if self._why is not None:
            self._engine.skipped(self.step, self._why)
        self._recorder.poll()

    def _measure(self, started: float) -> None:
        loss = self.loss
        loss = torch.tensor(loss, dtype=torch.float64) if isinstance(loss, float) else loss
        if not self.measures:
            self._engine.predict(self.step, loss, started)
        elif not self._engine.measure(self.step, loss, started):
            if self._capture.dropped:
                self._why = "every forward of the step was left out"
                return
            if self._any_hidden():
                self._why = f"the watched layers {IN_GRAPHS}"
                return
            if self._capture.rowless:
                self._why = "no rows of any watched layer could be kept"
                return
            self._why = "no forward and backward of the model was seen before the step"
            if self._capture.transformed:
                self._why += ": the model was called inside a torch.func transform, where its features cannot be seen"
            self.notices.unseen(self._capture.drop_unguarded())
        elif not self._any_hidden() and self._engine.idle:
            self.notices.idle(self._engine.idle)

    def _any_hidden(self) -> bool:
        """Returns whether layers run in compiled graphs without taps, and warns of them."""
        hidden = [layer for layer in self._engine.layers if self._capture.hidden(layer.index)]
        if hidden:
            self.notices.hidden(hidden)
        return bool(hidden)

    # Recovery

    def recover(self) -> None:
        """Undoes what an interrupt has left changed, and ends the step whose end it interrupted."""
        self._settle()
        if self._finishing is None:
            return
        self.step = self._finishing + 1
        self._losses = None, None
        self._why = None
        self._failed = False
        try:
            self._capture.clear()
            self._engine.clear()
        except Exception as error:
            self._explain(error)
        self.arm_for(self.step)
        self._finishing = None

    def _settle(self) -> None:
        """Undoes what an interrupt has left changed."""
        self._restore()
        if self._interrupted:  # what the parts cache for the next step may be incomplete
            self._engine.renew()
            self._interrupted = False

    def _restore(self) -> None:
        self._capture.replayer.recover()
        self._journal.restore()

    def _explain(self, error: Exception) -> None:
        if isinstance(error, RankError):
            self._why = f"not measured by all ranks: {error}"
            self.warn("ranks", f"is left out: {self._why}")
        elif isinstance(error, WriteError):
            self._why = f"{error}: a second forward would change the training"
            self.warn("writes", f"is left out: {self._why}")
        else:
            self._why = f"measurement failed ({type(error).__name__}: {error})"
            self.warn("failed", f"measurement failed and is left out ({type(error).__name__}: {error})")

    # The schedule

    def arm_for(self, step: int) -> None:
        """Asks the schedules about a step, and arms the taps for it."""
        try:
            self.measures = bool(self._schedule.due(step))
            self.aligns = self._aligned is not None and bool(self._aligned.due(step))
        except Exception as error:  # of a schedule that the user has written
            self.measures = self.aligns = False
            self.warn("schedule", f"is left out: the schedule failed ({type(error).__name__}: {error})")
        self._arm()

    def _arm(self) -> None:
        """Sets what the taps capture until the next step."""
        if self.measures and self._engine.mode.captures_training:
            self._capture.switch.level = taps.EVERYTHING
        else:
            self._capture.switch.level = taps.GRADIENTS if self.aligns else taps.OFF


def _added(total: Loss, loss: Loss) -> Loss:
    return loss if total is None else total if loss is None else total + loss


def _stands_still(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether all learning rates are 0.

    Before the first forward, such a step is none of training: torch.distributed.checkpoint takes it to have the
    optimizer create the state that a checkpoint is loaded into. Its rates are on the host; others are not waited for.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    return all(not (isinstance(x, Tensor) and x.device.type != "cpu") and float(x) == 0.0 for x in rates)
