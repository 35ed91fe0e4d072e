"""The ``fastfs`` command. Each subcommand imports its dependencies when it runs."""

from __future__ import annotations

import io
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    help="Per-layer feature speed and backward-feature angle of networks in training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class DemoModel(str, Enum):
    """Models that ``fastfs demo`` can train."""

    transformer = "transformer"
    resnet = "resnet"
    all = "all"


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the result as JSON; - is standard output, without the text."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastfs._cli.doctor import version_line

        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print versions and the native core in use."
        ),
    ] = False,
) -> None:
    """Take the options of ``fastfs`` itself."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a degree sign must not end a command where the locale has none


@app.command()
def demo(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; default 160 (transformer) and 300 (ResNet).")
    ] = None,
    model: Annotated[DemoModel, typer.Option(help="What to train.")] = DemoModel.all,
    every: Annotated[int, typer.Option(min=1, help="Measure every this many steps.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Torch threads; one is stable on a busy machine.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for records, figures and summary.json.")] = Path(
        "runs/demo"
    ),
    json: Json = None,
) -> None:
    """Train a small transformer and a ResNet with the monitor, in two minutes: angles, speeds, figures, its cost."""
    try:
        from fastfs._reproduce import demo as experiment
        from fastfs._utils.devices import named_device
    except ImportError as error:
        typer.echo(f"fastfs demo: {error}", err=True)
        raise typer.Exit(1) from error
    names = list(experiment.TASKS) if model is DemoModel.all else [model.value]
    try:
        summary = experiment.run_demo(names, steps, every, out, device=named_device(device), threads=threads, json=json)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"fastfs demo: {error}", err=True)
        raise typer.Exit(1) from error
    if not all(task["bitwise_equal"] for task in summary["tasks"].values()):
        raise typer.Exit(1)


class Order(str, Enum):
    """Order of layers in ``fastfs watch`` if not all fit."""

    worst = "worst"
    layer = "layer"


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="A record, or the folder of a run. Several make one page with the runs side by side, like fastfs diff "
            "--out; PATH::ID then names one of the runs of a record.",
            metavar="RUN...",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    run_id: Annotated[
        str | None, typer.Option("--run", help="Id of the run; default is the last one in the record.")
    ] = None,
    json: Json = None,
) -> None:
    """Write one self-contained HTML page about a run, or several: heat maps, lines, predictions, alerts."""
    if len(runs) > 1:
        if run_id is not None:
            raise typer.BadParameter("it is for a single record: of several, name PATH::ID", param_hint="--run")
        from fastfs._compare.command import run_report

        raise typer.Exit(run_report(runs, out=out, json=json))
    try:
        from fastfs._record.reading.locate import find_record
        from fastfs._report.page import write_report
        from fastfs._utils.json_output import check_json_output, is_stdout, write_json

        check_json_output(json)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"fastfs report: {message}", err=True)
            summary = write_report(find_record(runs[0]), out, run=run_id)
        typer.echo(f"{out} ({summary['bytes'] / 1e6:.1f} MB)", err=is_stdout(json))
        if json is not None:
            write_json(json, summary)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"fastfs report: {error}", err=True)
        raise typer.Exit(1) from error


@app.command(epilog="Exit status: 0 nothing parts, 1 something does, 2 the records cannot be compared.")
def diff(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Records or folders of runs; PATH::ID names one of the runs of a record. A single record stands for "
            "all of its runs. Each run is compared with the first one.",
            metavar="RUN...",
        ),
    ],
    against: Annotated[
        list[str] | None, typer.Option("--against", help="A run of a second side; repeat it for more.", metavar="RUN")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page with the runs side by side, and their differences.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Probability of no false alarm in all of the comparison.")] = 0.95,
    json: Json = None,
) -> None:
    """Say which layer and which quantity of runs part first, at which step, by how many standard errors."""
    from fastfs._compare.command import run_diff

    raise typer.Exit(run_diff(runs, against or [], out=out, confidence=confidence, json=json))


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="A record, or the folder of a run.", metavar="RUN")],
    run_id: Annotated[
        str | None, typer.Option("--run", help="Id of the run; default is the last one in the record.")
    ] = None,
    json: Json = None,
) -> None:
    """Say the three things that matter most about a run: the numbers, what they mean, what to change."""
    try:
        from fastfs._report.explain import explain_run

        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"fastfs explain: {message}", err=True)
            explain_run(run, run=run_id, json=json)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"fastfs explain: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A record that is being written, or the folder of a run.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Print one table with all layers and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between reads of the record.")] = 1.0,
    layers: Annotated[str, typer.Option(help="Show only layers whose name contains this.")] = "",
    order: Annotated[Order, typer.Option(help="Which layers to show if not all fit.")] = Order.worst,
    json: Json = None,
) -> None:
    """Show the latest numbers of a running training in the terminal: angle, speed, loss, alerts. Ctrl-C exits."""
    if json is not None and not once:
        raise typer.BadParameter("it takes one look at the record: use it with --once", param_hint="--json")
    from fastfs._report.watch import watch as follow

    try:
        follow(run, once=once, interval=interval, search=layers, order=order.value, json=json)
    except (OSError, ValueError) as error:
        typer.echo(f"fastfs watch: {error}", err=True)
        raise typer.Exit(1) from error


@app.command(epilog="Exit status: 0 all numbers are in their bands, 1 some are not, 2 the computation failed.")
def reproduce(
    only: Annotated[str | None, typer.Option(help="Figures, such as a,c; default is all.", metavar="NAMES")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and wider bands: less than a minute.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for figures, tables and the summary.")] = Path(
        "runs/reproduce"
    ),
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seeds: Annotated[int | None, typer.Option(min=2, help="Number of seeds; default is that of each figure.")] = None,
    json: Json = None,
) -> None:
    """Recompute the figures and numbers of the paper and compare them with the published ones."""
    try:
        from fastfs._reproduce.paper.run import chosen
        from fastfs._reproduce.paper.run import reproduce as run
        from fastfs._reproduce.paper.study import StudySettings

        checks = run(chosen(only), StudySettings(quick=quick, first_seed=seed, seeds=seeds), out, json=json)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"fastfs reproduce: {error}", err=True)
        raise typer.Exit(2) from error
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


@app.command(epilog="Exit status: 0, 1 if something is wrong, 2 if the result cannot be written.")
def doctor(json: Json = None) -> None:
    """Report what is installed, built and in use, and check the native core against the reference."""
    from fastfs._cli.doctor import run_doctor

    try:
        status = run_doctor(json=json)
    except (OSError, ValueError) as error:
        typer.echo(f"fastfs doctor: {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(status)


@app.command(epilog="Exit status: 0, or 2 if the measurement failed.")
def bench(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default is a GPU if there is one, else the CPU.")
    ] = None,
    json: Json = None,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="Approximate duration.")] = 60.0,
) -> None:
    """Benchmark this machine in a minute: memory, the kernels, eager torch, torch.compile, torch._foreach_norm."""
    from fastfs._bench.command import run_bench

    raise typer.Exit(run_bench(device, out=json, seconds=seconds))


@app.command(
    "scaling-check",
    epilog="Exit status: 0 all desiderata pass, 1 one fails, 3 some are unclear, 2 the measurement failed.",
)
def scaling_check(
    factory: Annotated[
        str,
        typer.Argument(
            help="module:attribute or path/to/file.py:attribute of a function of width and depth that returns "
            "(model, loss_fn, batch, optimizer); optimizer may be a list of parameter groups or None.",
            metavar="FACTORY",
        ),
    ],
    widths: Annotated[str, typer.Option(help="At least three, such as 64,128,256.")],
    depths: Annotated[str, typer.Option(help="At least three, such as 4,8,16.")],
    seeds: Annotated[int, typer.Option(min=2, help="Initializations per size.")] = 8,
    optimizer: Annotated[
        str | None, typer.Option(help="sgd (default), adam or adamw, if the factory returns none.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, if the factory returns none.")] = None,
    layers: Annotated[str, typer.Option(help="Regular expression for the layers to watch, or auto.")] = "auto",
    at_width: Annotated[int | None, typer.Option(help="Width of the runs over depth; default is the largest.")] = None,
    at_depth: Annotated[int | None, typer.Option(help="Depth of the runs over width; default is a middle one.")] = None,
    tolerance: Annotated[float, typer.Option(help="Permitted deviation of an exponent from 0.")] = 0.15,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for CSV tables and a figure.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print all exponents, and all advice.")] = False,
    json: Json = None,
) -> None:
    """Check whether a first step keeps its feature size, speed, loss decrease and balance over width and depth."""
    from fastfs.scaling._command import run_check

    raise typer.Exit(
        run_check(
            factory,
            widths=widths,
            depths=depths,
            seeds=seeds,
            optimizer=optimizer,
            lr=lr,
            layers=layers,
            at_width=at_width,
            at_depth=at_depth,
            tolerance=tolerance,
            out=out,
            verbose=verbose,
            json=json,
        )
    )


@app.command(
    epilog="Exit status: 0 all quantities pass, 1 one fails, 3 some are unclear, 2 the records cannot be judged."
)
def transfer(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Records or folders of runs of different width and depth. A single record stands for all of its runs.",
            metavar="RUN...",
        ),
    ],
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Width and depth of a run; by default the entries width and depth of its metadata.",
            metavar="RUN=WIDTH,DEPTH",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of measured steps, from the first; default is all in common.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Permitted deviation of an exponent from 0.")] = 0.15,
    json: Json = None,
) -> None:
    """Judge from records which quantities change with width or depth, so that hyper-parameters do not transfer."""
    from fastfs.scaling._transfer_command import run_transfer

    raise typer.Exit(run_transfer(runs, size or [], json=json, steps=steps, tolerance=tolerance))


if __name__ == "__main__":
    app()
