"""What capture reports to the monitor."""

from __future__ import annotations

from typing import Protocol

__all__ = ["CaptureListener"]


class CaptureListener(Protocol):
    """Receives what the hooks notice and cannot handle themselves."""

    def recover(self) -> None:
        """Undoes what an interrupt has left changed. Called before every training forward of the model."""

    def forward_begins(self) -> None:
        """Called when the model begins a forward with gradient, whether it is captured or not."""

    def backward_begins(self) -> None:
        """Called when a captured forward's backward begins, before it adds to gradients."""

    def failed(self, error: Exception) -> None:
        """Called with an exception in a hook. The exception must not reach the training loop."""

    def warn(self, kind: str, message: str) -> None:
        """Called when something cannot be captured; ``kind`` identifies the warning so that it is given once."""
