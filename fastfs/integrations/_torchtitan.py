"""The monitor for the Trainer of torchtitan, which is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastfs._monitor.monitor import Monitor
from fastfs.integrations._session import TrainerSession, decoded, encoded

__all__ = ["watch_torchtitan"]


@contextmanager
def watch_torchtitan(trainer: Any, **options: Any) -> Iterator[Monitor]:
    """Records how the features of each layer move in the training of torchtitan's ``Trainer``.

    ``with watch_torchtitan(trainer, every=100): trainer.train()`` attaches a :class:`fastfs.Monitor` to the model and
    the optimizers, gives it the losses, and closes it at the end or if training fails. Training is bitwise the same. If
    checkpoints are enabled, they carry the monitor's state, and a training that loads one continues the run.

    Args:
        trainer: The trainer, before ``train()``.
        **options: Arguments of :class:`fastfs.Monitor` besides model and optimizer. Without ``path`` and ``sinks``, the
            record is ``record.jsonl`` in the trainer's ``dump_folder``.

    Yields:
        The monitor.

    Raises:
        TypeError: If an option is no argument of :class:`fastfs.Monitor`.
        ValueError: If CUDA graphs are on, or with a pipeline.

    Source: The feature speed formula of arXiv 2311.18718, section 2.
    """
    session = TrainerSession("watch_torchtitan", options)
    if not trainer.config.training.disable_cuda_graphs:
        raise ValueError(
            "watch_torchtitan: CUDA graphs replay forward and backward without any hook, so that nothing can be "
            "measured: set training.disable_cuda_graphs"
        )
    if trainer.parallel_dims.pp_enabled:
        raise ValueError(
            "watch_torchtitan: a pipeline's stages have to be known: attach "
            "fastfs.Monitor(stage.submod, trainer.optimizers, pipeline=stage)"
        )
    (model,) = trainer.model_parts
    monitor = session.open(model, trainer.optimizers, trainer.config.dump_folder, None)
    session.watch(trainer, "forward_backward_step")  # returns the sum of the losses here / number of all ranks' tokens
    states = getattr(trainer.checkpointer, "states", {})  # of a disabled checkpointer there are none
    states["fastfs"] = RunState(session)
    try:
        yield monitor
    except BaseException:
        session.close(failed=True)
        raise
    finally:
        states.pop("fastfs", None)
        session.close()


class RunState:
    """The monitor's state as one entry of a distributed checkpoint, whose number of entries must not change.

    Args:
        session: Holds the monitor.
    """

    def __init__(self, session: TrainerSession) -> None:
        self._session = session

    def state_dict(self) -> dict[str, Any]:
        """Returns the entry."""
        state = self._session.take_state()
        return {"run": "" if state is None else encoded(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the run of a checkpoint."""
        if state["run"]:
            self._session.resume(decoded(state["run"]))
