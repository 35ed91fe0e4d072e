"""Checks the lines of a record against the declared columns.

Every reader (:func:`fastfs.load`, ``fastfs report``, ``fastfs watch``, the Parquet reader) goes through
:class:`Checker`, so all of them accept the same lines. The native reader of JSON lines accepts a subset of these, with
the same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastfs._record.column import Column
from fastfs._record.columns import (
    BY_NAME,
    COLUMNS,
    EVENT_FIELDS,
    KEYS,
    PART,
    PER_LAYER,
    PER_STEP,
    ROW_KINDS,
    SCHEMAS,
    type_of,
)
from fastfs._record.detail_columns import DETAILS
from fastfs._record.encoding import parse

__all__ = ["MOST_STEPS", "Array", "CheckedLine", "Checker", "Line", "UnknownSchemaError", "row_names"]

MOST_STEPS = 2**53
"""Exclusive bound of step numbers: many JSON readers represent numbers as doubles."""

Array = np.ndarray[Any, Any]
Line = dict[str, Any]

_ENVELOPE = ("kind", "run", "step", "time", "layers")
_KEYS = frozenset(column.name for column in KEYS)
_PER_LAYER, _PER_STEP = frozenset(PER_LAYER), frozenset(PER_STEP)
_RESERVED = frozenset((*BY_NAME, "layers"))
_FORMER_NAMES = {column.former_name: column.name for column in COLUMNS if column.former_name is not None}
_JSON_TYPES = {"boolean": bool, "string": str, "integer": int}


class UnknownSchemaError(ValueError):
    """A header of a schema version that this package cannot read."""


@dataclass(frozen=True)
class CheckedLine:
    """A line that conforms to the schema, with typed values.

    Attributes:
        line: the JSON object.
        kind: one of :data:`fastfs._record.columns.KINDS`.
        length: number of values per column of a measured or predicted line; 1 in schema 1.
        first: index of the layer that the first value belongs to.
        columns: columns of a measured or predicted line: float64 arrays (NaN for null), int8 arrays for booleans (-1
            for null), object arrays for strings.
        scalars: its values per step: numbers (NaN for null), booleans, strings.
    """

    line: Line
    kind: str
    length: int = 0
    first: int = 0
    columns: dict[str, Array] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)


def row_names(header: Mapping[str, Any]) -> tuple[list[str], int]:
    """Names of the layers followed by those of the groups, and the number of layers."""
    layers = list(header.get("layers", ()))
    return layers + list(header.get("groups") or ()), len(layers)


class Checker:
    """Checks the lines of one record in order: the number of values in a row depends on the last header of its run."""

    def __init__(self) -> None:
        self._headers: dict[str, Line] = {}

    def check_bytes(self, raw: bytes) -> CheckedLine:
        """Decodes and checks a line; see :func:`fastfs._record.encoding.parse` and :meth:`check`."""
        return self.check(parse(raw))

    def check(self, line: Any) -> CheckedLine:
        """Checks a decoded line.

        Returns:
            The line with typed values.

        Raises:
            UnknownSchemaError: a header of another version; the record cannot be read.
            ValueError: the line does not conform to the schema; the message says why.
        """
        if not isinstance(line, dict):
            raise ValueError(f"expected an object, got {_short(line)}")
        kind = line.get("kind")
        if kind == "header":
            self._check_header(line)
            return CheckedLine(line, "header")
        if not isinstance(kind, str) or kind not in (*EVENT_FIELDS, *ROW_KINDS, PART):
            raise ValueError(f"unknown kind {_short(kind)}")
        run = line.get("run")
        if not isinstance(run, str) or run not in self._headers:
            raise ValueError(f"no header of run {_short(run)}")
        header = self._headers[run]
        if not _is_step(line.get("step")):
            raise ValueError(f"step: expected an integer >= 0, got {_short(line.get('step'))}")
        if not _is_finite(line.get("time")):
            raise ValueError(f"time: expected a number, got {_short(line.get('time'))}")
        if kind in EVENT_FIELDS:
            _check_event(line, header)
            return CheckedLine(line, kind)
        if kind == PART:
            if header.get("rank") is None:
                raise ValueError("kind part: expected in the file of one rank only, whose header has its number")
            if type(line.get("data")) is not str:
                raise ValueError(f"data: expected a string, got {_short(line.get('data'))}")
            return CheckedLine(line, kind)
        return _check_row(line, header) if "layer" not in line else _check_first_schema_row(line, header)

    def names(self, run: str) -> tuple[list[str], int]:
        """Applies :func:`row_names` to the last header of a run."""
        return row_names(self._headers[run])

    def _check_header(self, header: Line) -> None:
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
        if header.get("resumed_at") is not None and not _is_step(header["resumed_at"]):
            raise ValueError(f"header: resumed_at: expected an integer >= 0, got {_short(header['resumed_at'])}")
        if header.get("rank") is not None and not _is_step(header["rank"]):
            raise ValueError(f"header: rank: expected an integer >= 0, got {_short(header['rank'])}")
        known = self._headers.get(run)
        if known is not None and (known["layers"] != layers or known["schema"] != schema):
            raise ValueError(f"header: layers or schema differ from the previous header of run {_short(run)}")
        self._headers[run] = header


def _check_row(line: Line, header: Line) -> CheckedLine:
    length = len(header["layers"]) + len(header.get("groups") or ())
    given = line.get("layers")
    if not isinstance(given, dict) or not given or not length:
        raise ValueError(f"layers: expected columns, got {_short(given)}")
    columns: dict[str, Array] = {}
    for name, values in given.items():
        if name in _RESERVED and name not in _PER_LAYER:
            raise ValueError(f"{name}: is not a column per layer")
        columns[name] = _column(name, values, length)
    scalars = {name: _scalar(name, value) for name, value in line.items() if name not in _ENVELOPE}
    return CheckedLine(line, line["kind"], length, 0, columns, scalars)


def _check_first_schema_row(line: Line, header: Line) -> CheckedLine:
    """Checks a row of schema 1, which has a line of its own for each layer."""
    layer, name, names = line["layer"], line.get("name"), header["layers"]
    if header["schema"] != 1 or type(layer) is not int or not 0 <= layer < len(names) or names[layer] != name:
        raise ValueError(f"layer: expected the index and name of a layer, got {_short(layer)} and {_short(name)}")
    if "layers" in line:
        raise ValueError("layers: does not belong to schema 1")
    values = {_FORMER_NAMES.get(key, key): value for key, value in line.items() if key not in _KEYS}
    scalars = {key: _scalar(key, value) for key, value in values.items() if key in _PER_STEP}
    columns = {key: _column(key, [value], 1) for key, value in values.items() if key not in scalars}
    return CheckedLine(line, line["kind"], 1, layer, columns, scalars)


def _column(name: str, values: Any, length: int) -> Array:
    """Converts a column of one record to an array, as described at :class:`CheckedLine`.

    Returns:
        The array.

    Raises:
        ValueError: not a list of that length, or values of another type than the column's.
    """
    if type(values) is not list or len(values) != length:
        got = f"{len(values)} values" if isinstance(values, list) else _short(values)
        raise ValueError(f"{_short(name)}: expected a list of {length} values, got {got}")
    types = set(map(type, values)) - {type(None)}
    wanted = type_of(name)
    if wanted is None:  # a column of a later version
        wanted = "string" if types == {str} else "boolean" if types == {bool} else "number"
    if wanted == "string" and types <= {str}:
        array = np.empty(length, dtype=object)
        array[:] = values
        return array
    if wanted == "boolean" and types <= {bool}:
        return np.array([-1 if value is None else value for value in values], dtype=np.int8)
    if wanted in ("number", "integer") and types <= {float, int}:
        return _numbers(name, values, wanted == "integer")
    raise ValueError(f"{_short(name)}: expected {wanted} values, got {', '.join(sorted(t.__name__ for t in types))}")


def _numbers(name: str, values: Sequence[Any], integer: bool) -> Array:
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:
        raise ValueError(f"{_short(name)}: a number is too large for float64") from None
    if int(np.isfinite(array).sum()) != len(values) - values.count(None):
        raise ValueError(f"{_short(name)}: a number is not finite")
    if integer and not np.all(np.isnan(array) | ((array >= 0) & (array == np.floor(array)))):
        raise ValueError(f"{_short(name)}: expected integers >= 0")
    return array


def _scalar(name: str, value: Any) -> Any:
    """Checks a value per step; null becomes NaN where the value is a number."""
    if name in _RESERVED and name not in _PER_STEP:
        raise ValueError(f"{name}: is not a value per step")
    if type_of(name) is None and isinstance(value, (str, bool)):
        return value
    return float(_column(name, [value], 1)[0])


def _check_event(line: Line, header: Line) -> None:
    """Checks a line of kind structure, details, skipped or alert."""
    kind = line["kind"]
    fields = EVENT_FIELDS[kind]
    known = set(_ENVELOPE)
    if kind == DETAILS:
        _check_entries(line.get("entries"), fields)
        known.add("entries")
    elif kind == "structure":
        _check_structure(line.get("layers"), header, fields)
    else:
        for one in fields:
            _check_field(one, line.get(one.name))
            known.add(one.name)
    for name, value in line.items():
        if name not in known and not (value is None or isinstance(value, (str, bool)) or _is_finite(value)):
            raise ValueError(f"{_short(name)}: expected a number or a string, got {_short(value)}")
    if kind != "structure" and "layers" in line:
        raise ValueError(f"layers: does not belong to a line of kind {kind}")


def _check_structure(given: Any, header: Line, fields: Sequence[Column]) -> None:
    layers = len(header["layers"])
    if not isinstance(given, dict):
        raise ValueError(f"layers: expected columns, got {_short(given)}")
    for one in fields:
        values, wanted = given.get(one.name), _JSON_TYPES[one.type]
        if not isinstance(values, list) or len(values) not in (layers, layers + len(header.get("groups") or ())):
            raise ValueError(f"{one.name}: expected a list of {layers} values, got {_short(values)}")
        if not all(value is None or type(value) is wanted for value in values):
            raise ValueError(f"{one.name}: expected {one.type} values")
        if one.type == "integer" and not all(value is None or 0 <= value < MOST_STEPS for value in values):
            raise ValueError(f"{one.name}: expected integers >= 0")


def _check_entries(given: Any, fields: Sequence[Column]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"entries: expected lists by name, got {_short(given)}")
    lengths = {len(values) if isinstance(values, list) else None for values in map(given.get, [x.name for x in fields])}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"entries: expected lists of one length: {', '.join(one.name for one in fields)}")
    for one in fields:
        for value in given[one.name]:
            if one.type == "integer" and value is not None and not _is_step(value):
                raise ValueError(f"entries: {one.name}: expected integers >= 0, got {_short(value)}")
            if one.type != "integer":
                _check_field(one, value)


def _check_field(field_of: Column, value: Any) -> None:
    if value is None and field_of.optional:
        return
    if not (_is_finite(value) if field_of.type == "number" else isinstance(value, str)):
        raise ValueError(f"{field_of.name}: expected a {field_of.type}, got {_short(value)}")


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_STEPS


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is str for item in value)


def _short(value: Any) -> str:
    """Formats a value for a one-line message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
