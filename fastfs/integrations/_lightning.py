"""The callback for the Trainer of Lightning, under both names of its package."""

from __future__ import annotations

import importlib
import sys
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._network.wrappers import has_forward, inner_module
from fastfs.integrations._session import TrainerSession, own_optimizers

__all__ = ["LightningCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _package() -> Any:
    """Returns the package that is in use, else the one that is installed. Trainers of both take callbacks of either."""
    used = [name for name in _PACKAGES if name in sys.modules]
    for name in used or _PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError('fastfs.integrations.LightningCallback needs lightning: pip install "fastfs[lightning]"')


_lightning = _package()


class LightningCallback(_lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
    """Records how the features of each layer move in the training of a Lightning ``Trainer``.

    ``Trainer(..., callbacks=[LightningCallback(every=100)])`` attaches a :class:`fastfs.Monitor` to the network inside
    the ``LightningModule`` and to its optimizers when training begins, gives it the losses and the gradient scaler, and
    closes it when training ends or fails. Training is bitwise the same. Checkpoints carry the monitor's state:
    ``fit(ckpt_path=...)`` continues the run in the record. Every other ``fit()`` begins a new run.

    A measured step calls the network again, but not ``training_step``, so nothing is logged twice.

    Args:
        module: Name of the submodule that ``training_step`` calls and whose output the loss comes from; ``""`` is the
            ``LightningModule`` itself, called as ``self(x)``. None chooses the only submodule with trained parameters,
            else the ``LightningModule`` if it has a ``forward``.
        **options: Arguments of :class:`fastfs.Monitor` besides model and optimizer. Without ``path`` and ``sinks``, the
            record is ``record.jsonl`` in the trainer's ``log_dir`` or, without a logger, in ``default_root_dir``.

    Raises:
        TypeError: If an option is no argument of :class:`fastfs.Monitor`.

    Source: The feature speed formula of arXiv 2311.18718, section 2.
    """

    def __init__(self, module: str | None = None, **options: Any) -> None:
        super().__init__()
        self._module = module
        self._session = TrainerSession(type(self).__name__, options)
        self._loaded: dict[str, Any] | None = None  # from the checkpoint that a fit begins with
        weakref.finalize(self, self._session.close)

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints: callbacks for different modules have their own."""
        return self._generate_state_key(module=self._module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the monitor, and continues the run of the checkpoint that was loaded.

        Args:
            trainer: The trainer.
            pl_module: The ``LightningModule``.

        Raises:
            ValueError: If ``module`` names none, if none can be chosen, or if the ``LightningModule`` is compiled.
        """
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise ValueError(
                f"{type(self).__name__}: the LightningModule is compiled, with its training_step, in which the network "
                "cannot be seen. Compile the network: self.model = torch.compile(self.model)"
            )
        name = self._choose(trainer, pl_module)
        model = pl_module.get_submodule(name) if name else _OwnForward(pl_module)
        optimizers = own_optimizers(model, trainer.optimizers)
        folder, scaler = trainer.log_dir or trainer.default_root_dir, _scaler(trainer)
        state, self._loaded = self._loaded, None
        if isinstance(model, _OwnForward):
            model.install()
        ...
