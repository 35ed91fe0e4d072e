"""The callback for the Trainer of Hugging Face Transformers, and for trainers that derive from it."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

from fastfs.integrations._session import TrainerSession, decoded, encoded

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as missing:
    raise ImportError(
        'fastfs.integrations.FastfsCallback needs transformers and accelerate: pip install "fastfs[huggingface]"'
    ) from missing

__all__ = ["FastfsCallback"]


class FastfsCallback(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Records how the features of each layer move in the training of a Hugging Face ``Trainer``.

    ``Trainer(..., callbacks=[FastfsCallback(every=100)])`` attaches a :class:`fastfs.Monitor` to the model that the
    trainer calls (compiled, distributed) and its optimizer when training begins, gives it the losses and the gradient
    scaler, and closes it when training ends or fails. Training is bitwise the same. Checkpoints of the trainer carry
    the monitor's state: ``train(resume_from_checkpoint=...)`` continues the run in the record. Every other ``train()``
    begins a new run.

    Args:
        **options: Arguments of :class:`fastfs.Monitor` besides model and optimizer. Without ``path`` and ``sinks``, the
            record is ``record.jsonl`` in the trainer's ``output_dir``.

    Raises:
        TypeError: If an option is no argument of :class:`fastfs.Monitor`.

    Source: The feature speed formula of arXiv 2311.18718, section 2.
    """

    def __init__(self, **options: Any) -> None:
        self._session = TrainerSession(type(self).__name__, options)
        weakref.finalize(self, self._session.close)  # of a trainer that has failed and is dropped

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuses the setting by which the trainer would replace the callback by one without some of its options.

        Args:
            args: The trainer's arguments.
            state: Not used.
            control: Not used.

        Raises:
            ValueError: If callbacks are to be made from JSON, which cannot hold the options of this one.
        """
        lost = [name for name in self._session.options if name not in _portable(self._session.options)]
        if args.restore_callback_states_from_checkpoint and lost:
            raise ValueError(
                f"{type(self).__name__}: restore_callback_states_from_checkpoint=True makes callbacks from JSON, which "
                f"cannot hold {', '.join(lost)}. This callback continues its run without that argument: leave it False"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Attaches the monitor, and continues the run of the checkpoint from which the trainer resumes.

        Args:
            args: The trainer's arguments.
            state: Its state.
            control: Not used.

        Raises:
            ValueError: If the trainer uses DeepSpeed.
        """
        trainer = _calling_trainer()
        if trainer.is_deepspeed_enabled:
            raise ValueError(f"{type(self).__name__}: DeepSpeed's optimizers cannot be measured: use FSDP2")
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._session.open(
            trainer.model_wrapped,
            trainer.optimizer,
            args.output_dir,
            trainer.accelerator.scaler,
            self._run_of(saved if isinstance(saved, list) else [saved or {}]),
        )
        self._session.watch(trainer, "training_step")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the monitor.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
        """
        self._session.close()

    def state(self) -> dict[str, Any]:
        """Returns what ``trainer_state.json`` holds of the callback: its options, and in a checkpoint the run."""
        monitor = self._session.monitor
        attributes = {} if monitor is None else {"run": encoded(monitor.state_dict())}
        return {"args": _portable(self._session.options), "attributes": attributes}

    def _run_of(self, saved: list[Any]) -> Any:
        """Returns the state of the monitor in a checkpoint: of several callbacks, that with the same options."""
        own = _portable(self._session.options)
        alike = [each for each in saved if each.get("args") == own] or saved[-1:]
        run = alike[-1].get("attributes", {}).get("run")
        return None if run is None else decoded(run)


def _portable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that JSON can hold."""
    found = {}
    for name, value in options.items():
        try:
            found[name] = json.loads(json.dumps(value, default=os.fspath))
        except TypeError:
            continue
    return found


def _calling_trainer() -> Any:
    """Returns the trainer that calls the callback. It does not pass itself, nor the model that it calls.

    Raises:
        RuntimeError: There is none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError("FastfsCallback: expected to be called by a transformers.Trainer")
