"""The ``fastfs`` command. Each command imports what it needs when it runs."""

from __future__ import annotations

import importlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    help="Per-layer feature speed and backward-feature angle of networks in training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DemoModel(str, Enum):
    """What ``fastfs demo`` can train."""

    transformer = "transformer"
    resnet = "resnet"
    all = "all"


@app.callback()
def _root() -> None:
    """Keeps commands named when there is only one."""


@app.command()
def demo(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; 200 (transformer) and 300 (ResNet) if not given.")
    ] = None,
    model: Annotated[DemoModel, typer.Option(help="What to train.")] = DemoModel.all,
    every: Annotated[int, typer.Option(min=1, help="Measure every this many steps.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; one is steady on a busy machine.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for record.jsonl, plots and summary.json.")] = Path("runs/demo"),
) -> None:
    """Train a small transformer and a ResNet with the monitor on; show angles, speeds, pictures and what it costs."""
    try:
        from fastfs.experiments import demo as experiment

        importlib.import_module("fastfs.report.plots")  # if it cannot be, now rather than after minutes of training
    except ImportError as error:
        typer.echo(f"fastfs demo: {error}", err=True)
        raise typer.Exit(1) from error
    names = list(experiment.TASKS) if model is DemoModel.all else [model.value]
    try:
        summary = experiment.run_demo(names, steps, every, out, threads=threads)
    except (experiment.OutputError, ImportError, OSError) as error:
        typer.echo(f"fastfs demo: {error}", err=True)
        raise typer.Exit(1) from error
    if not all(task["bitwise_equal"] for task in summary["tasks"].values()):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what is installed, built and in use, and check the native core against the reference."""
    from fastfs.doctor import run_doctor

    raise typer.Exit(run_doctor())


if __name__ == "__main__":
    app()
