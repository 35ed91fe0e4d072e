"""The callback for the Trainer of Lightning, under both names of its package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor.monitor import Monitor
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
        self._loaded: dict[str, Any] | None = None  # from the checkpoint with which a fit begins
        self._every_loss = True

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints: callbacks for different modules or layers have their own."""
        layers = self._session.options.get("layers")
        layers = getattr(layers, "__qualname__", layers)  # of a function, whose repr differs from process to process
        return str(self._generate_state_key(module=self._module, layers=layers))

    @property
    def monitor(self) -> Monitor | None:
        """The monitor while training runs; None outside of it."""
        return self._session.monitor

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets a checkpoint that was loaded for something else.

        Args:
            trainer: Not used.
            pl_module: Not used.
            stage: Not used.
        """
        self._loaded = None

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
                f"{type(self).__name__}: the LightningModule is compiled with its training_step, in which the network "
                "cannot be seen. Compile the network: self.model = torch.compile(self.model)"
            )
        optimizers = trainer.optimizers
        name = _network_in(pl_module, optimizers) if self._module is None else _checked(pl_module, self._module)
        model = pl_module.get_submodule(name) if name else SelfCalls(pl_module)
        mine = own_optimizers(model, optimizers)
        self._every_loss = len(mine) == len(optimizers)
        folder = trainer.log_dir or trainer.default_root_dir
        self._session.open(model, mine, folder, _scaler(trainer), self._loaded)
        if isinstance(model, SelfCalls):
            self._session.at_close = model.replace(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Logs the loss, unless it may be that of another network's optimizer.

        Args:
            trainer: The trainer.
            pl_module: Not used.
            loss: That of the backward: divided for gradient accumulation, multiplied by the scale of the scaler.
        """
        if self._session.monitor is not None and self._every_loss:
            scaler, loss = _scaler(trainer), loss.detach()
            self._session.log(loss if scaler is None else loss / scaler.scale(torch.ones_like(loss)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the monitor.

        Args:
            trainer: Not used.
            pl_module: Not used.
        """
        self._session.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Closes the monitor of a training that has failed or was interrupted.

        Args:
            trainer: Not used.
            pl_module: Not used.
            exception: Not used.
        """
        self._session.close(failed=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of the callback: the state of the monitor."""
        state = self._session.take_state()
        return {} if state is None else {"run": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state of a checkpoint for the training that is about to begin.

        Args:
            state_dict: From a checkpoint.
        """
        self._loaded = state_dict["run"]


class SelfCalls(nn.Module):
    """Stands for a ``LightningModule`` that is the network itself, in the calls ``self(x)`` of its ``training_step``.

    Strategies also call the ``LightningModule`` to run ``training_step``, through the same hooks.

    Args:
        module: The ``LightningModule``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__class__ = type(type(module).__name__, (SelfCalls,), {})  # the name in the record
        self.module = module
        self._original = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the ``forward`` that the module had before."""
        return self._original(*args, **kwargs)

    def replace(self, module: nn.Module) -> Callable[[], None]:
        """Has the module's ``forward`` call this object, and returns a function that undoes it."""
        before = vars(module).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        def undo() -> None:
            if vars(module).get("forward") is forward:
                del module.forward
                if before is not None:
                    module.forward = before

        module.forward = forward
        return undo


def _network_in(module: nn.Module, optimizers: Sequence[Any]) -> str:
    """Returns the name of the submodule that is the network, or "" for the ``LightningModule`` itself.

    Raises:
        ValueError: Several may be; the message lists them.
    """
    trained = {id(p) for each in optimizers for g in each.param_groups for p in g["params"] if p.requires_grad}
    names = [name for name, child in module.named_children() if trained & set(map(id, child.parameters()))]
    alone = len(names) == 1 and not trained & set(map(id, module.parameters(recurse=False)))
    if alone and has_forward(inner_module(module.get_submodule(names[0]))):
        return names[0]
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if owner.__name__ != "LightningModule":
        return ""
    raise ValueError(
        f"LightningCallback: {type(module).__name__} has no forward, and training_step may call any of "
        f"{', '.join(names)}: expected module=NAME, of a module that computes everything up to the loss"
    )


def _checked(module: nn.Module, name: str) -> str:
    names = [each for each, _ in module.named_modules()]
    if name not in names:
        raise ValueError(f"module: {type(module).__name__} has no {name!r}. Candidates: {', '.join(names[1:])}")
    return name


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
