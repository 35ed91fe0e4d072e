"""What is declared about a column of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Column", "Display", "ValueType"]

ValueType = Literal["number", "integer", "boolean", "string"]
"""Types of values, which may be null. A number is finite; an integer is at least 0."""


@dataclass(frozen=True)
class Display:
    """How the report shows a column.

    Attributes:
        menu: position in the menu of quantities.
        label: name on the page.
        about: one sentence for readers who do not know the formula.
        logarithmic: whether the scale is logarithmic at first.
        guarded: whether values mean nothing where ``valid`` is false.
        error: column with the standard error.
    """

    menu: int
    label: str
    about: str
    logarithmic: bool = False
    guarded: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Column:
    """One column of a record.

    Attributes:
        name: in files and tables.
        type: of its values.
        unit: empty for numbers without a unit.
        meaning: a formula or a phrase, in Markdown, for the documentation.
        per: ``layer``: one value per layer and group; ``step``: one value per record; ``row``: identifies a table row.
        kinds: kinds of records that have it.
        since: schema version that introduced it.
        source: section of the paper.
        former_name: its name in schema 1.
        optional: only some runs have it, and no option says which. A table has other columns in any case.
        from_stats: an attribute of :class:`fastfs.FeatureStats` that has the same name.
        quantiles: the monitor can also record quantiles of its values for single rows, see :func:`quantile_name`.
        tensorboard: whether TensorBoard shows it.
        display: how the report shows it; None for columns that are not quantities.
        option: of the monitor, as its name in the header and a value that it is or contains; records have the column
            with this option only.
    """

    name: str
    type: ValueType
    unit: str = ""
    meaning: str = ""
    per: Literal["layer", "step", "row"] = "layer"
    kinds: tuple[str, ...] = ("measured",)
    since: int = 2
    source: str = ""
    former_name: str | None = None
    optional: bool = False
    from_stats: bool = False
    quantiles: bool = False
    tensorboard: bool = True
    display: Display | None = None
    option: tuple[str, Any] | None = None

    def belongs_to(self, header: Mapping[str, Any]) -> bool:
        """Returns whether the records of a run may have the column, by the options in its header."""
        if self.option is None:
            return True
        name, wanted = self.option
        value = header.get(name)
        return bool(value == wanted or (isinstance(value, list) and wanted in value))
