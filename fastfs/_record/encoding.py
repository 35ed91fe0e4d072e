"""How records are encoded in files: strict JSON, the mark of a torn line, the metadata of Parquet parts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["HEADER_KEY", "HEADER_START", "OTHERS_KEY", "TORN", "parse", "to_json"]

TORN = b"~"
"""Ends a line that a failed write left torn and whose record is written again."""

HEADER_START = b'{"kind":"header",'
"""How the sink begins the line of a header."""

HEADER_KEY = b"fastfs.header"
"""Metadata of a Parquet part: the header of its run, as JSON."""

OTHERS_KEY = b"fastfs.others"
"""Metadata of a Parquet part: its records that are not rows (structure, skipped, alert), as a JSON list of lines."""

_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any) -> str:
    """Encodes a value on one line. NaN and infinities, which JSON does not have, become null.

    Returns:
        The text, without a newline.

    Raises:
        TypeError: JSON cannot represent the value.
    """
    try:
        return _ENCODE(value)
    except ValueError:  # a number that is not finite
        return _ENCODE(_with_nulls(value))


def parse(raw: bytes) -> Any:
    """Decodes one line.

    Returns:
        The value.

    Raises:
        ValueError: not UTF-8, not JSON (NaN and Infinity are not), an object with a repeated name, a string with an
            unpaired surrogate, or too many nested levels.
    """
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for an unpaired surrogate
    return value


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _with_nulls(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [None if type(x) is float and not math.isfinite(x) else _with_nulls(x) for x in value]
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object with a repeated name")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
