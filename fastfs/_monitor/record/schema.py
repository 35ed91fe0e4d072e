"""The format of a record: kinds of lines, columns and their types, versions; and the check of a line against it.

Every reader (:func:`fastfs.load`, :func:`fastfs._report.read_header`, ``fastfs report``, ``fastfs watch``, Parquet)
goes through :class:`Checker`, so that all of them take the same lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "BOOLEANS",
    "COLUMNS",
    "INTEGERS",
    "KEYS",
    "MORE_SCALARS",
    "QUANTITIES",
    "SCALARS",
    "SCHEMA",
    "SCHEMAS",
    "STRINGS",
    "TABLED",
    "Checked",
    "Checker",
    "UnknownSchemaError",
    "parse",
    "row_names",
    "type_of",
]

SCHEMA = 2
"""Version of the record's format: raised when a column changes its meaning or goes."""

SCHEMAS = (1, 2)
"""Versions that can be read."""

TABLED = ("measured", "predicted")
"""Kinds of records that become rows of a table."""

KEYS = ("kind", "run", "step", "time", "layer", "name", "group")
"""The first columns of a table."""

QUANTITIES = (
    "angle",
    "cos_angle",
    "update_rms",
    "relative_update",
    "feature_rms",
    "backward_rms",
    "radial_update",
    "tangential_update",
    "noise_floor",
)
"""Columns that come from :class:`fastfs.FeatureStats`, under the names that they have there."""

COLUMNS = (
    *QUANTITIES,
    "valid",
    "why",
    "linear",
    "method",
    "nonfinite",
    "count",
    "rows",
    "angle_se",
    "update_rms_se",
    "residual_se",
    "aligned_decrease",
    "decrease_why",
    "residual",
    "parameter_norm",
    "parameter_update_norm",
    "gradient_norm",
)
"""Columns with a value for each layer and group, in the order of a table. A record may have others (quantiles)."""

SCALARS = ("loss", "micro_batches", "overhead_seconds", "loss_scale")
"""One number for a whole record."""

MORE_SCALARS = ("kappa", "choices", "choices_changed")
"""Numbers for a whole record that only some runs have; a table has the columns where the record has them."""

BOOLEANS = ("valid", "linear")
INTEGERS = ("nonfinite", "count", "rows", "micro_batches", "choices", "choices_changed")
STRINGS = ("why", "method", "decrease_why")

MOST_STEPS = 2**53
"""Steps are below: JSON readers elsewhere hold numbers as doubles."""

_OLD_NAMES = {"measure_seconds": "overhead_seconds"}  # of schema 1
_RESERVED = frozenset((*KEYS, "layers", *COLUMNS, *SCALARS, *MORE_SCALARS))

Array = np.ndarray[Any, Any]
Line = dict[str, Any]


class UnknownSchemaError(ValueError):
    """A header of a version that this package cannot read."""


@dataclass(frozen=True)
class Checked:
    """A line of the format.

    Attributes:
        line: the object that the line holds.
        kind: ``header``, ``structure``, ``measured``, ``predicted``, ``skipped`` or ``alert``.
        length: layers and groups of a measured or predicted line; 1 in schema 1.
        first: layer of the first value.
        columns: of such a line, as arrays: float64 (NaN for null), int8 for booleans (-1 for null), objects for
            strings.
        scalars: of such a line: numbers (NaN for null), booleans, strings.
    """

    line: Line
    kind: str
    length: int = 0
    first: int = 0
    columns: dict[str, Array] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)


def row_names(header: Mapping[str, Any]) -> tuple[list[str], int]:
    """Names of the layers and then of the groups, and how many are layers."""
    layers = list(header.get("layers", ()))
    return layers + list(header.get("groups") or ()), len(layers)


def type_of(name: str) -> str | None:
    """``number``, ``integer``, ``boolean`` or ``string``; None for a column that this version does not know."""
    if name in STRINGS:
        return "string"
    if name in BOOLEANS:
        return "boolean"
    if name in INTEGERS:
        return "integer"
    return "number" if name in _RESERVED else None


def parse(raw: bytes) -> Any:
    """What one line holds.

    Raises:
        ValueError: not UTF-8, not JSON (NaN and Infinity are none), an object with a name twice, a string that is no
            text, or nested too deeply.
    """
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    return value


class Checker:
    """Checks the lines of one record, in their order: rows have as many values as the header of their run has names."""

    def __init__(self) -> None:
        self._headers: dict[str, Line] = {}

    def check_bytes(self, raw: bytes) -> Checked:
        """:func:`parse` and :meth:`check`."""
        return self.check(parse(raw))

    def check(self, line: Any) -> Checked:
        """A line that has been parsed.

        Raises:
            UnknownSchemaError: a header of another version; the record cannot be read.
            ValueError: not of the format; says why.
        """
        if not isinstance(line, dict):
            raise ValueError(f"expected an object, got {_short(line)}")
        kind = line.get("kind")
        if kind == "header":
            self._header(line)
            return Checked(line, "header")
        if not isinstance(kind, str) or kind not in ("structure", "skipped", "alert", *TABLED):
            raise ValueError(f"unknown kind {_short(kind)}")
        run = line.get("run")
        if not isinstance(run, str) or run not in self._headers:
            raise ValueError(f"no header of run {_short(run)}")
        header = self._headers[run]
        if not is_step(line.get("step")):
            raise ValueError(f"step: expected an integer >= 0, got {_short(line.get('step'))}")
        if not _is_finite(line.get("time")):
            raise ValueError(f"time: expected a number, got {_short(line.get('time'))}")
        if kind not in TABLED:
            _check_other(line, header)
            return Checked(line, kind)
        return _row(line, header) if "layer" not in line else _old_row(line, header)

    def names(self, run: str) -> tuple[list[str], int]:
        """:func:`row_names` by the last header of a run."""
        return row_names(self._headers[run])

    def _header(self, header: Line) -> None:
        schema, run, layers = header.get("schema"), header.get("run"), header.get("layers")
        if type(schema) is not int:
            raise ValueError(f"header: expected a schema, got {_short(schema)}")
        if schema not in SCHEMAS:
            raise UnknownSchemaError(f"schema {_short(schema)}; this version of fastfs reads {list(SCHEMAS)}")
        if not isinstance(run, str) or not run:
            raise ValueError(f"header: expected the id of a run, got {_short(run)}")
        if not _is_strings(layers):
            raise ValueError(f"header: layers: expected a list of names, got {_short(layers)}")
        groups = header.get("groups")
        if groups is not None and not (isinstance(groups, dict) and all(map(_is_strings, groups.values()))):
            raise ValueError(f"header: groups: expected lists of names, got {_short(groups)}")
        for name, wanted in (("started", str), ("replaces", str), ("metadata", dict)):
            if header.get(name) is not None and not isinstance(header[name], wanted):
                raise ValueError(f"header: {name}: got {_short(header[name])}")
        if header.get("resumed_at") is not None and not is_step(header["resumed_at"]):
            raise ValueError(f"header: resumed_at: expected an integer >= 0, got {_short(header['resumed_at'])}")
        known = self._headers.get(run)
        if known is not None and (known["layers"] != layers or known["schema"] != schema):
            raise ValueError(f"header: other layers than before in run {_short(run)}")
        self._headers[run] = header


def is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_STEPS


def column(name: str, values: Any, length: int) -> Array:
    """A column of one record as an array, see :class:`Checked`.

    Raises:
        ValueError: not a list of that length, or of other values than the column holds.
    """
    if type(values) is not list or len(values) != length:
        got = f"{len(values)} values" if isinstance(values, list) else _short(values)
        raise ValueError(f"{_short(name)}: expected a list of {length} values, got {got}")
    kinds = set(map(type, values)) - {type(None)}
    wanted = type_of(name)
    if wanted is None:  # a column of a later version
        wanted = "string" if kinds == {str} else "boolean" if kinds == {bool} else "number"
    if wanted == "string" and kinds <= {str}:
        array = np.empty(length, dtype=object)
        array[:] = values
        return array
    if wanted == "boolean" and kinds <= {bool}:
        return np.array([-1 if value is None else value for value in values], dtype=np.int8)
    if wanted in ("number", "integer") and kinds <= {float, int}:
        return _numbers(name, values, wanted == "integer")
    raise ValueError(f"{_short(name)}: expected {wanted} values, got {', '.join(sorted(k.__name__ for k in kinds))}")


def _numbers(name: str, values: Sequence[Any], integer: bool) -> Array:
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:
        raise ValueError(f"{_short(name)}: a number that is too large") from None
    if int(np.isfinite(array).sum()) != len(values) - values.count(None):
        raise ValueError(f"{_short(name)}: a number that is not finite")
    if integer and not np.all(np.isnan(array) | ((array >= 0) & (array == np.floor(array)))):
        raise ValueError(f"{_short(name)}: expected integers >= 0")
    return array


def _row(line: Line, header: Line) -> Checked:
    length = len(header["layers"]) + len(header.get("groups") or ())
    given = line.get("layers")
    if not isinstance(given, dict) or not given or not length:
        raise ValueError(f"layers: expected columns, got {_short(given)}")
    columns: dict[str, Array] = {}
    for name, values in given.items():
        if name in _RESERVED and name not in COLUMNS:
            raise ValueError(f"{name}: is no column of layers")
        columns[name] = column(name, values, length)
    scalars = {name: _scalar(name, value) for name, value in line.items() if name not in _ENVELOPE}
    return Checked(line, line["kind"], length, 0, columns, scalars)


def _old_row(line: Line, header: Line) -> Checked:
    """A line of schema 1: one layer."""
    layer, name, names = line["layer"], line.get("name"), header["layers"]
    if header["schema"] != 1 or type(layer) is not int or not 0 <= layer < len(names) or names[layer] != name:
        raise ValueError(f"layer: expected number and name of a layer, got {_short(layer)} and {_short(name)}")
    values = {_OLD_NAMES.get(key, key): value for key, value in line.items() if key not in KEYS}
    scalars = {key: _scalar(key, value) for key, value in values.items() if key in (*SCALARS, *MORE_SCALARS)}
    columns = {key: column(key, [value], 1) for key, value in values.items() if key not in scalars}
    return Checked(line, line["kind"], 1, layer, columns, scalars)


_ENVELOPE = ("kind", "run", "step", "time", "layers")


def _scalar(name: str, value: Any) -> Any:
    """A value of a whole step: NaN for null where it is a number."""
    wanted = type_of(name)
    if name in _RESERVED and name not in SCALARS and name not in MORE_SCALARS:
        raise ValueError(f"{name}: is no value of a whole step")
    if wanted is None and isinstance(value, (str, bool)):
        return value
    return float(column(name, [value], 1)[0])


def _check_other(line: Line, header: Line) -> None:
    """Structure, skipped steps and alerts."""
    kind = line["kind"]
    texts = {"skipped": ("reason",), "alert": ("rule", "message")}.get(kind, ())
    for name in texts:
        if not isinstance(line.get(name), str):
            raise ValueError(f"{name}: expected a string, got {_short(line.get(name))}")
    if kind == "alert":
        if not isinstance(line.get("layer"), (str, type(None))):
            raise ValueError(f"layer: expected a name, got {_short(line['layer'])}")
        if line.get("value") is not None and not _is_finite(line["value"]):
            raise ValueError(f"value: expected a number, got {_short(line['value'])}")
    if kind == "structure":
        layers = len(header["layers"])
        given = line.get("layers")
        if not isinstance(given, dict):
            raise ValueError(f"layers: expected columns, got {_short(given)}")
        for name, types in (("cut", bool), ("reason", str), ("parameters", int)):
            values = given.get(name)
            if not isinstance(values, list) or len(values) not in (layers, layers + len(header.get("groups") or ())):
                raise ValueError(f"{name}: expected a list of {layers} values, got {_short(values)}")
            if not all(value is None or type(value) is types for value in values):
                raise ValueError(f"{name}: expected values of type {types.__name__}")
            if types is int and not all(value is None or 0 <= value < MOST_STEPS for value in values):
                raise ValueError(f"{name}: expected integers >= 0")
    known = {*_ENVELOPE, *texts, *(("layer", "value") if kind == "alert" else ())}
    for name, value in line.items():
        if name not in known and not (value is None or isinstance(value, (str, bool)) or _is_finite(value)):
            raise ValueError(f"{_short(name)}: expected a number or a string, got {_short(value)}")
    if kind != "structure" and "layers" in line:
        raise ValueError(f"layers: not in a line of kind {kind}")


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is str for item in value)


def _short(value: Any) -> str:
    """For a message of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(pairs: list[tuple[str, Any]]) -> Line:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object with a name twice")
    return result


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
