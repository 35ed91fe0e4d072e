"""The result of a run of ``fastfs reproduce``, as one HTML file for readers and as JSON for programs."""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from fastfs._reproduce.paper.published import Check
from fastfs._reproduce.paper.studies import STUDIES
from fastfs._reproduce.paper.study import ComputedFigure, StudySettings, Value
from fastfs._version import __version__

__all__ = ["MADE_BY", "page", "summary", "value_text"]

MADE_BY = "fastfs reproduce"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; } .caption, .small { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; margin: 1rem 0; }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: #00664c; } .fail { color: #b00020; font-weight: bold; } .none { color: #777; }
"""


def value_text(value: Value | None) -> str:
    """Format a value with its error, if it has one."""
    if value is None:
        return "-"
    return f"{value.mean:.3f}" if math.isnan(value.error) else f"{value.mean:.3f} ± {value.error:.3f}"


def summary(results: Mapping[str, ComputedFigure], checks: Sequence[Check], settings: StudySettings) -> dict[str, Any]:
    """Return the run, for JSON: environment, every figure with its values and seconds, every check, and ``passed``."""
    return {
        "made_by": MADE_BY,
        "environment": _environment(settings),
        "passed": _passed(checks),
        "figures": {
            name: {
                "title": STUDIES[name].title,
                "caption": STUDIES[name].caption,
                "seconds": round(result.seconds, 3),
                "files": [f"{name}.png", f"{name}.csv"],
                "values": {
                    key: {"mean": v.mean, "error": v.error, "note": v.note} for key, v in result.outcome.values.items()
                },
            }
            for name, result in results.items()
        },
        "checks": [
            {
                "figure": entry.published.figure,
                "key": entry.published.key,
                "what": entry.published.what,
                "source": entry.published.source,
                "published": [entry.published.low, entry.published.high],
                "accepted": [entry.low, entry.high],
                "ours": None if entry.value is None else entry.value.mean,
                "error": None if entry.value is None else entry.value.error,
                "passed": entry.passed,
            }
            for entry in checks
        ],
    }


def page(results: Mapping[str, ComputedFigure], checks: Sequence[Check], settings: StudySettings) -> str:
    """Return the run as one HTML page with embedded figures."""
    about = _environment(settings)
    size = "quick sizes, wider bands" if settings.quick else "full sizes"
    verdict = {
        True: '<p class="pass">All compared numbers are within the accepted bands.</p>',
        False: '<p class="fail">Some numbers are outside of the accepted bands.</p>',
        None: "",
    }[_passed(checks)]
    figures = "".join(_figure(name, result, checks) for name, result in results.items())
    what = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items() if key != "size")
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>The Feature Speed Formula, reproduced</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{MADE_BY}"><style>{_STYLE}</style></head>
<body>
<h1>The Feature Speed Formula, reproduced</h1>
<p>Figures and numbers of L. Chizat and P. Netrapalli, <i>The Feature Speed Formula</i>
(<a href="https://arxiv.org/abs/2311.18718">arXiv 2311.18718</a>), recomputed by fastfs: {size}.</p>
{verdict}
{_table(checks, figures=True)}
<p class="small">± is the standard error over seeds, for exponents half of a 95 % confidence interval. Accepted: the
published range, widened by the variation of the published means and by two standard errors of ours.</p>
{figures}
<p class="small">{escape(what)}</p>
</body></html>
"""


def _figure(name: str, result: ComputedFigure, checks: Sequence[Check]) -> str:
    study = STUDIES[name]
    image = base64.b64encode(result.image).decode()
    compared = {entry.published.key for entry in checks if entry.published.figure == name}
    others = {key: value for key, value in result.outcome.values.items() if key not in compared}
    more = "".join(
        f'<tr><td>{escape(key)}</td><td class="number">{value_text(value)}</td><td>{escape(value.note)}</td></tr>'
        for key, value in others.items()
    )
    more = f'<table><tr><th>not compared</th><th class="number">ours</th><th></th></tr>{more}</table>' if more else ""
    return f"""
<h2 id="{name}">({name}) {escape(study.title)}</h2>
<img src="data:image/png;base64,{image}" alt="{escape(study.title)}">
<p class="caption">{escape(study.caption)} Rows: {name}.csv. {result.seconds:.1f} s.</p>
{_table([entry for entry in checks if entry.published.figure == name], figures=False)}{more}
"""


def _table(checks: Sequence[Check], *, figures: bool) -> str:
    if not checks:
        return ""
    rows = []
    for entry in checks:
        kind, word = {True: ("pass", "✓ pass"), False: ("fail", "✗ fail"), None: ("none", "full size only")}[
            entry.passed
        ]
        link = f'<td><a href="#{entry.published.figure}">{entry.published.figure}</a></td>' if figures else ""
        rows.append(
            f'<tr>{link}<td>{escape(entry.published.what)}</td><td class="number">{escape(entry.published.text)}</td>'
            f'<td class="number">{value_text(entry.value)}</td>'
            f'<td class="number">{entry.low:.3g} to {entry.high:.3g}</td>'
            f'<td>{escape(entry.published.source)}</td><td class="{kind}">{word}</td></tr>'
        )
    first = "<th></th>" if figures else ""
    return (
        f'<table><tr>{first}<th>number</th><th class="number">published</th><th class="number">ours</th>'
        f'<th class="number">accepted</th><th>source</th><th></th></tr>{"".join(rows)}</table>'
    )


def _passed(checks: Sequence[Check]) -> bool | None:
    """Return whether all compared numbers passed, or None if none was compared."""
    verdicts = [entry.passed for entry in checks if entry.passed is not None]
    return all(verdicts) if verdicts else None


def _environment(settings: StudySettings) -> dict[str, Any]:
    return {
        "size": "quick" if settings.quick else "full",
        "first_seed": settings.first_seed,
        "seeds": "default of each figure" if settings.seeds is None else settings.seeds,
        "fastfs": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
