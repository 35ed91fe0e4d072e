"""``fastfs report``: a self-contained HTML page about a run. Needs the extra ``report`` (plotly, pandas)."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fastfs._record.reading.confidence import LARGEST_FACTOR, SHARE, WINDOW
from fastfs._record.reading.load import load_compact
from fastfs._report import ranks, summary
from fastfs._report.grids import (
    Array,
    Grid,
    Thinned,
    empty_grid,
    has_numbers,
    judge_predictions,
    make_grid,
    quantities_of,
    thin,
    thin_series,
)
from fastfs._report.guide import Guide
from fastfs._report.quantities import PREDICTED, UNUSED, Quantity
from fastfs._report.run_numbers import RunNumbers, cuts
from fastfs._report.signs import CHANGE, signs
from fastfs._utils.output_files import check_output, write_whole

try:
    import pandas
    from plotly.offline import get_plotlyjs
except ImportError as missing:
    raise ImportError(f'a report needs plotly and pandas ({missing}): pip install "fastfs[report]"') from missing

__all__ = ["build_page", "header_facts", "packed", "page_data", "render", "room", "write_page", "write_report"]

# Bounds of the page: cells of grids (5.3 bytes each), alerts and text. With plotly.js (4.8 MB) it stays below 15 MB for
# up to 5,000 layers; 100 layers with all quantities take about 10 MB, however long the run.
_MEASURED_CELLS = 1_000_000
_PREDICTED_CELLS = 300_000
_MOST_COLUMNS = 800
_LEAST_COLUMNS = 10
_MOST_ALERTS = 1000
_MOST_SKIPPED = 200
_MOST_POINTS = 2000
_MOST_TEXT = 2000

_ASSETS = ("report.css", "data.js", "charts.js", "elements.js", "report.js", "compare.js")


def write_page(path: str | os.PathLike[str], out: str | os.PathLike[str], *, run: str | None = None) -> Path:
    """Builds the page of a record and writes it atomically.

    Args:
        path: a record that :func:`fastfs.load` reads.
        out: path of the page; its folder is created if missing.
        run: id of the run; the last one in the record by default.

    Returns:
        The path of the page.

    Raises:
        ImportError: plotly or pandas is not installed.
        OSError: the record cannot be read, or the page cannot be written.
        ValueError: not a record, or without that run, or ``out`` exists and is not a regular file.
    """
    write_report(path, out, run=run)
    return Path(out)


def write_report(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, run: str | None = None
) -> dict[str, Any]:
    """Does what :func:`write_page` does, for the same arguments.

    Returns:
        What the page says in words, ready for JSON: path and bytes of the page, the run, its boxes, sentences and
        alerts.
    """
    check_output(out)
    data = page_data(load_compact(Path(path), UNUSED), run=run, source=Path(path).name)
    page = render(data).encode("utf-8")
    write_whole(out, page)
    said = {key: data[key] for key in ("run", "title", "cards", "signs", "findings")}
    return {"page": str(out), "bytes": len(page), **said, "alerts": dict(data["alert_rules"])}


def build_page(table: pandas.DataFrame, *, run: str | None = None, source: str = "") -> str:
    """Builds the page of one run.

    Args:
        table: of :func:`fastfs.load`, with its ``attrs``.
        run: id of the run; the last one by default.
        source: name of the record, shown on the page.

    Returns:
        The page as HTML.

    Raises:
        ValueError: the table has no such run.
    """
    return render(page_data(table, run=run, source=source))


def render(data: Mapping[str, Any], template: str = "template.html") -> str:
    """Inserts the data into a template. All text of the record is JSON that cannot end its script element."""
    folder = files("fastfs._report") / "assets"
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in _ASSETS}
    parts["plotly.js"] = get_plotlyjs()
    parts["title"] = html.escape(f"{data['title']} - fastfs report")
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    parts["data.json"] = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = (folder / template).read_text(encoding="utf-8")
    # In a single pass, so that nothing inside a part is mistaken for a placeholder.
    return re.sub(r"@@([a-z.]+)@@", lambda match: parts[match[1]], page)


def page_data(table: pandas.DataFrame, *, run: str | None = None, source: str = "") -> dict[str, Any]:
    """Collects what the page shows, ready for JSON. For arguments and errors see :func:`build_page`."""
    headers = [dict(header) for header in table.attrs.get("headers", [])]
    runs = list(dict.fromkeys(str(header["run"]) for header in headers))
    if not runs:
        raise ValueError("the record has no header: nothing is known about its run")
    run = runs[-1] if run is None else run
    if run not in runs:
        raise ValueError(f"no run {run!r} in the record; it has: {', '.join(runs[-20:])}")
    own = [header for header in headers if str(header["run"]) == run]
    header = {**own[0], **{key: value for key, value in own[-1].items() if key != "started"}}
    mine = np.asarray(table["run"] == run, dtype=bool)
    alerts, skipped, structures = (_of_run(table, name, run) for name in ("alerts", "skipped", "structure"))

    layers = [str(name) for name in header.get("layers", [])]
    names = [*layers, *(str(name) for name in header.get("groups") or {})]
    rows = max(len(names), int(table["layer"].to_numpy()[mine].max()) + 1 if mine.any() else 0)
    names += [f"row {i}" for i in range(len(names), rows)]  # a record with more rows than its header names
    measured, shown = _grid(table, mine, "measured", rows)
    predicted, shown_predicted = _grid(table, mine, "predicted", rows)
    judged = judge_predictions(table, measured, predicted, _of_kind(table, mine, "measured"))
    if "update_rms" in measured.columns:
        measured.columns["predicted"] = measured.columns["update_rms"] / judged.ratios
    if judged.given.any():
        predicted.columns["factor"] = np.where(judged.given, judged.factors, np.nan)
        predicted.columns["update_rms"] = np.where(judged.withheld, np.nan, predicted.columns["update_rms"])

    alert_steps = [int(alert["step"]) for alert in alerts if isinstance(alert.get("step"), int)]
    kept = thin(measured, room(rows, len(measured.columns)), alert_steps)
    kept_predicted = thin(predicted, room(rows, len(predicted.columns), _PREDICTED_CELLS), alert_steps)
    line = _loss_line(measured, predicted)
    model = str(header.get("model", "run"))
    guide = Guide.read()
    numbers = RunNumbers(header, names[: len(layers)], measured, cuts(structures, len(layers)), alerts, skipped)
    rules = Counter(str(alert.get("rule")) for alert in alerts)
    return {
        "title": f"{model} ({run})" if model else run,
        "source": source,
        "run": run,
        "cards": summary.cards(header, measured, predicted, len(layers), len(alerts), len(skipped)),
        "signs": _signs(numbers, guide),
        "guide": _guide(guide, [*shown, *shown_predicted], rules),
        "findings": [
            *ranks.findings(header, names, len(layers), measured, predicted),
            *summary.findings(names, len(layers), measured, judged),
        ],
        "rows": _rows(names, len(layers), header, structures),
        "measured": packed(measured, kept, shown),
        "predicted": {
            **packed(predicted, kept_predicted, shown_predicted),
            "withheld": _base64(judged.withheld[:, kept_predicted.index], "u1"),
        },
        "confidence": {"share": SHARE, "largest": LARGEST_FACTOR, "window": WINDOW},
        "loss": {"steps": line[0].tolist(), "values": [float(f"{value:.6g}") for value in line[1]]},
        "alerts": [_alert(alert, names) for alert in _ends(alerts, _MOST_ALERTS)],
        "alert_rules": rules.most_common(50),
        "skipped": [
            {"step": one.get("step"), "reason": _text(one.get("reason"))} for one in _ends(skipped, _MOST_SKIPPED)
        ],
        "resumed": [head["resumed_at"] for head in own if isinstance(head.get("resumed_at"), int)],
        "thinned": _thinned(measured, kept, predicted, kept_predicted, line, len(alerts), len(skipped)),
        "facts": _facts(header, own, runs, run, source),
    }


def _signs(numbers: RunNumbers, guide: Guide) -> list[dict[str, Any]]:
    """What is to be changed, with the paragraph of the guide about it."""
    found = signs(numbers, guide) if len(numbers.grid.steps) else []
    return [
        {"text": sign.text, "anchor": None if sign.paragraph is None else sign.paragraph.anchor}
        for sign in found
        if sign.severity >= CHANGE
    ]


def _guide(guide: Guide, shown: Sequence[Quantity], rules: Mapping[str, int]) -> dict[str, Any]:
    """The paragraphs, and which of them is about each quantity and alert of the page."""
    named = {"columns": [quantity.key for quantity in shown], "alerts": rules}
    about = {kind: {name: guide.about(kind, name) for name in names} for kind, names in named.items()}
    return {
        "paragraphs": [{"anchor": one.anchor, "title": one.title, "text": one.text} for one in guide.paragraphs],
        **{kind: {name: one.anchor for name, one in found.items() if one} for kind, found in about.items()},
    }


def _of_run(table: pandas.DataFrame, name: str, run: str) -> list[dict[str, Any]]:
    found = table.attrs.get(name) or []
    found = [found] if isinstance(found, Mapping) else found
    return [dict(record) for record in found if str(record.get("run", run)) == run]


def _grid(table: pandas.DataFrame, mine: Array, kind: str, rows: int) -> tuple[Grid, list[Quantity]]:
    part = _of_kind(table, mine, kind)
    if not part.any():
        return empty_grid(rows), []
    found = quantities_of(table, part)
    if kind == "predicted":
        found = [quantity for quantity in found if quantity.key in PREDICTED]
    columns = [q.key for q in found] + [q.error for q in found if q.error and has_numbers(table, q.error, part)]
    return make_grid(table, rows, columns, part), found


def _of_kind(table: pandas.DataFrame, mine: Array, kind: str) -> Array:
    chosen: Array = mine & np.asarray(table["kind"] == kind, dtype=bool)
    return chosen


def room(rows: int, columns: int, cells: int = _MEASURED_CELLS) -> int:
    """Number of steps to show."""
    return max(_LEAST_COLUMNS, min(_MOST_COLUMNS, cells // max(rows * columns, 1)))


def packed(grid: Grid, kept: Thinned, quantities: Sequence[Quantity]) -> dict[str, Any]:
    """Encodes a thinned grid: arrays as base64 of little-endian numbers, row by row."""
    fields = ("key", "label", "unit", "about", "log", "guarded", "error")
    return {
        "quantities": [{name: getattr(quantity, name) for name in fields} for quantity in quantities],
        "steps": grid.steps[kept.index].tolist(),
        "total": len(grid.steps),
        "merged": kept.merged.tolist(),
        "columns": {name: _base64(cells[:, kept.index], "<f4") for name, cells in grid.columns.items()},
        "invalid": _base64(grid.invalid[:, kept.index], "u1"),
        "invalid_merged": _base64(kept.invalid, "<u2"),
        "why": _base64(grid.why[:, kept.index], "u1"),
        "reasons": [_text(reason) for reason in grid.reasons],
    }


def _base64(values: Array, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(dtype)).tobytes()).decode("ascii")


def _loss_line(measured: Grid, predicted: Grid) -> tuple[Array, Array, int]:
    steps = np.concatenate([predicted.steps, measured.steps])
    loss = np.concatenate([predicted.loss, measured.loss])
    order = np.argsort(steps, kind="stable")
    chosen = thin_series(steps[order], loss[order], _MOST_POINTS)
    return *chosen, int(np.isfinite(loss).sum())


def _rows(names: Sequence[str], layers: int, header: Mapping[str, Any], structures: Sequence[Mapping[str, Any]]) -> Any:
    """Describes each layer and group: name, whether it is a cut or why not, number of parameters."""
    about = structures[-1].get("layers", {}) if structures else {}
    groups = header.get("groups") or {}

    def entry(column: str, i: int) -> Any:
        values = about.get(column) or []
        return values[i] if i < min(len(values), layers) else None

    return [
        {
            "name": name,
            "group": i >= layers,
            "cut": entry("cut", i),
            "reason": _text(entry("reason", i)),
            "parameters": entry("parameters", i),
            "members": len(groups[name]) if i >= layers and name in groups else None,
        }
        for i, name in enumerate(names)
    ]


def _alert(alert: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    layer, value = alert.get("layer"), alert.get("value")
    return {
        "step": alert.get("step"),
        "rule": _text(alert.get("rule")),
        "layer": _text(layer),
        "row": names.index(layer) if layer in names else None,
        "value": value if isinstance(value, int | float) and math.isfinite(value) else None,
        "message": _text(alert.get("message")),
    }


def _ends(records: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Shortens a long list to its first and last entries."""
    return list(records) if len(records) <= most else [*records[: most // 2], *records[-(most // 2) :]]


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}... ({len(text):,} characters)"


def _thinned(
    measured: Grid,
    kept: Thinned,
    predicted: Grid,
    kept_predicted: Thinned,
    line: tuple[Array, Array, int],
    alerts: int,
    skipped: int,
) -> list[str]:
    """Says in sentences what the page leaves out; empty if it shows everything."""
    said = []
    for name, grid, shown in (("measured", measured, kept), ("predicted", predicted, kept_predicted)):
        if len(shown.index) < len(grid.steps):
            invalid = (
                "then the one with the most cells that are not valid, then the last: the picture looks rather too bad "
                "than too good. Hovering over a cell tells how many were not valid."
            )
            said.append(
                f"{len(shown.index):,} of {len(grid.steps):,} {name} steps are drawn, one for each "
                f"{int(shown.merged.max()):,} or so neighbours, as recorded (nothing is averaged). It is the step with "
                f"the most alerts of those, {invalid if name == 'measured' else 'then the last.'}"
            )
    if len(line[0]) < line[2]:
        said.append(
            f"Loss: {len(line[0]):,} of {line[2]:,} values; of neighbours the lowest and the highest, so that no spike "
            "is lost."
        )
    if alerts > _MOST_ALERTS:
        said.append(f"Alerts: the first and the last {_MOST_ALERTS // 2} of {alerts:,}; the counts by rule are of all.")
    if skipped > _MOST_SKIPPED:
        said.append(f"Skipped steps: the first and the last {_MOST_SKIPPED // 2} of {skipped:,}.")
    if said:
        said.append("The boxes and sentences on top are computed from all rows.")
    return said


def header_facts(header: Mapping[str, Any]) -> list[list[str]]:
    """Lists the settings in the header of a run as pairs of name and text."""
    left_out = ("kind", "layers", "metadata", "groups", "resumed_at")
    return [[key, "-" if value is None else str(_text(value))] for key, value in header.items() if key not in left_out]


def _facts(
    header: Mapping[str, Any], own: Sequence[Mapping[str, Any]], runs: Sequence[str], run: str, source: str
) -> list[list[str]]:
    """Lists the header of the run as pairs of name and text."""
    facts = [*([["record", source]] if source else []), *header_facts(header)]
    facts.append(["layers", f"{len(header.get('layers', [])):,}"])
    for name, members in (header.get("groups") or {}).items():
        facts.append([f"group {name}", f"{len(members):,} layers"])
    resumed = [str(head["resumed_at"]) for head in own if head.get("resumed_at") is not None]
    if resumed:
        facts.append(["resumed at step", ", ".join(resumed[:50])])
    metadata = header.get("metadata")
    for key, value in metadata.items() if isinstance(metadata, Mapping) else []:
        if key == summary.STEP_TIME_RATIO:
            continue  # in the boxes at the top
        facts.append([f"metadata: {key}", str(_text(value))])
    others = [other for other in runs if other != run]
    if others:
        facts.append(["other runs in this record", ", ".join(others[-50:])])
    return facts[:500]
