"""Exceptions of other people's code in words."""

from __future__ import annotations

__all__ = ["in_words"]

_MOST = 500


def in_words(error: BaseException) -> str:
    """Type and message on one line; the type alone if the exception cannot say what it is."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # whatever it raises, it is not worth losing rows over
        text = "it cannot be shown"
    text = text if len(text) <= _MOST else f"{text[:_MOST]}..."
    return f"{type(error).__name__}: {text}"
