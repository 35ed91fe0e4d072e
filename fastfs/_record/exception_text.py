"""One-line texts of exceptions that user code raised."""

from __future__ import annotations

__all__ = ["exception_text"]

_MOST = 500


def exception_text(error: BaseException) -> str:
    """Formats type and message on one line; only the type if the exception cannot be converted to a string."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # user code may raise anything; rows must not be lost over it
        text = "it cannot be shown"
    text = text if len(text) <= _MOST else f"{text[:_MOST]}..."
    return f"{type(error).__name__}: {text}"
