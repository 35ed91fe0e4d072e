"""What ``fastfs demo`` prints: progress, tables, the meaning of the numbers, and what to do next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastfs._report.summary import WITHHELD, predicted_text, since

__all__ = ["print_meaning", "print_next", "print_result", "training_progress"]

_LINES = 10  # of progress, where the output is not a terminal

_MEANING = (
    "\n[bold]What the numbers mean.[/bold] Angle: between the change of a layer's output in one optimizer step and the "
    "direction of steepest descent of the loss; 0 = aligned, pi/2 = 1.57 = orthogonal. Feature speed: rms of that "
    "change. Decrease: first-order decrease of the loss due to the parameters up to this layer. For the same decrease, "
    "features move further at a larger angle: |change| = decrease / (cos(angle) x |backward vector|). With the last "
    "measured angle, this predicts the speed of every step in between without an extra forward. x/÷1.30 means: at "
    "recent measured steps, 80 % of the speeds were within a factor of 1.3 of what the formula predicts.\n"
    "Step time ratio: time of a step with the monitor / time of the same step without it. Models as small as these "
    "make it large, because the monitor has a cost per operation; README.md, section Speed, has it for a larger one. "
    "Steps are predicted because of aligned_every=1; without it, they cost next to nothing."
)


@contextmanager
def training_progress(console: Console, name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Show progress: a bar on a terminal, about ten lines elsewhere.

    Args:
        console: where to show it.
        name: of the training.
        steps: number of steps.

    Yields:
        A function to call with the number of finished steps and the loss.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *times, console=console) as progress:
            bar = progress.add_task(name, total=steps, loss=float("nan"))
            yield lambda done, loss: progress.update(bar, completed=done, loss=loss)
        return
    start = time.perf_counter()

    def line(done: int, loss: float) -> None:
        if done * _LINES // steps > (done - 1) * _LINES // steps:
            passed = time.perf_counter() - start
            left = f", about {since(passed / done * (steps - done))} left" if done < steps else f" in {since(passed)}"
            console.print(f"{name}: {done} of {steps} steps, loss {loss:.3f}{left}", highlight=False, soft_wrap=True)

    yield line


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the table of a training, what its predictions are worth, and what the monitor cost.

    Args:
        console: where to print.
        result: entry of ``summary.json``.
    """
    every = result["every"]
    grid = Table(title=f"median over the last quarter of the measured steps (every {every})", title_justify="left")
    grid.add_column("layer", no_wrap=True)
    for column in ("angle (rad)", "feature speed", "predicted", "relative update", "decrease"):
        grid.add_column(column, justify="right", no_wrap=column == "predicted")
    for row in result["layers"]:
        mark = "" if row["valid"] == 1 else " *"
        grid.add_row(
            escape(row["name"]),
            f"{row['angle']:.3f}{mark}",
            f"{row['update_rms']:.2e}",
            _predicted(row),
            f"{row['relative_update']:.2e}",
            f"{row['aligned_decrease']:.2e}",
        )
    console.print(grid)
    if any(row["valid"] < 1 for row in result["layers"]):
        console.print("* not valid in every step: rounding noise or a zero vector")
    for sentence in result["predictions"]["in_words"]:
        console.print(sentence, highlight=False)
    console.print(f"Loss {result['loss_first']:.3f} -> {result['loss_last']:.3f} in {result['steps']} steps.")
    cost = result["step_time_ratio"]
    times = Table(title="step time ratio, with / without the monitor", title_justify="left", box=None, pad_edge=False)
    for column in ("", "median", "quartiles"):
        times.add_column(column, justify="left" if not column else "right")
    times.add_row(
        f"a measured step ({cost['measured_pairs']} pairs)", f"{cost['measured_step']:.2f}", _range(cost, "measured")
    )
    if cost["other_pairs"]:
        times.add_row(
            f"a predicted step ({cost['other_pairs']} pairs)", f"{cost['other_step']:.2f}", _range(cost, "other")
        )
    times.add_row(f"average at every={every}", f"{cost['at_this_every']:.2f}", "")
    times.add_row("average at every=100", f"{cost['at_every_100']:.2f}", "extrapolated")
    times.add_row("plain to plain steps", f"{cost['plain_to_plain']:.2f}", "accuracy")
    console.print(times)
    if result["bitwise_equal"]:
        console.print("With and without the monitor: losses, final parameters and random state bitwise equal.")
    else:
        console.print("[red]Losses, parameters or random state differ with and without the monitor.[/red]")


def _predicted(row: dict[str, Any]) -> str:
    if row["predictions"] == 0:
        return "-"
    if row["predicted_update_rms"] is None:
        return WITHHELD
    return predicted_text(row["predicted_update_rms"], row["predicted_factor"])


def _range(cost: dict[str, Any], which: str) -> str:
    found = cost[f"{which}_step_quartiles"]
    return f"{found[0]:.2f} to {found[1]:.2f}" if found else ""


def print_meaning(console: Console) -> None:
    """Print what the numbers mean.

    Args:
        console: where to print.
    """
    console.print(_MEANING)


def print_next(console: Console, out: Path, model: str, files: Sequence[str], pages: Sequence[str]) -> None:
    """Print what was written, and the next commands.

    Args:
        console: where to print.
        out: the folder.
        model: name of a training, below the folder.
        files: names of the files of each training.
        pages: report pages, relative to the folder; empty without plotly.
    """

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True, highlight=False)

    say(f"\nWritten to {out}: summary.json, and per model {', '.join(files)}")
    console.print("\n[bold]Next[/bold]")
    if pages:
        say(f"  Open {out / pages[0]} in a browser.")
    else:
        say('  pip install "fastfs[report]"')
    say(f"  fastfs report {out / model} -o report.html    # heat maps and lines of a run on one page")
    say(f"  fastfs watch --once {out / model}    # the latest numbers per layer; without --once it follows a run")
    say("In your own training, nothing else in the loop changes:")
    say('  with fastfs.Monitor(model, optimizer, every=100, path="run/record.jsonl"):')
