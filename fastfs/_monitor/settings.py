"""Checks the monitor's arguments before anything is opened or hooked, and describes them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor.measure.capture_mode import CaptureMode
from fastfs._monitor.measure.modes import MODES
from fastfs._monitor.measure.probe import Probe
from fastfs._monitor.ranks import Ranks
from fastfs._monitor.schedule import Every
from fastfs._network.layers import parameter_names
from fastfs._network.placements import local
from fastfs._record.parameter_columns import CASTS
from fastfs._record.writing.recorder import check_recorder_state

__all__ = [
    "aligned_work",
    "check_casts",
    "check_compiled",
    "check_details",
    "check_fraction",
    "check_mode",
    "check_ranks",
    "check_samples",
    "check_select",
    "check_sizes",
    "check_state",
    "check_together",
    "describe",
    "shown",
    "speaks",
    "untrained",
]

_MIB = 2**20
_OPERATIONS, _OF_LAYERS = 60, 3  # torch operations of an aligned step, and per layer, as a dispatch mode counts them
_MOST_NAMES = 20
_TINY = 2**20  # bytes of parameters up to which host work takes longer than the pass over them


def check_mode(mode: Any, probe: Any, amplify: Any, nonlinear: Any = False) -> Probe | None:
    """Checks the arguments of a mode.

    Returns:
        The probe of probe mode; None in the other modes.

    Raises:
        TypeError: The probe, ``amplify`` or ``nonlinear`` has a wrong type.
        ValueError: The mode is unknown, or arguments exclude each other.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if not isinstance(amplify, bool):
        raise TypeError(f"amplify: expected True or False, got {amplify!r}")
    if amplify and mode != "batch":
        raise ValueError(f'amplify: is for mode="batch"; mode={mode!r} has no rounding noise to overcome')
    if not isinstance(nonlinear, bool):
        raise TypeError(f"nonlinear: expected True or False, got {nonlinear!r}")
    if nonlinear and mode != "jvp":
        raise ValueError(f'nonlinear: is for mode="jvp", which measures the first-order update; got mode={mode!r}')
    if (probe is not None) != (mode == "probe"):
        raise ValueError(
            'probe: expected with mode="probe", and only there: a pair of inputs and a loss function of the output, '
            f"or fastfs.monitor.Probe(inputs, loss); got mode={mode!r} and probe={'None' if probe is None else '...'}"
        )
    if probe is None or isinstance(probe, Probe):
        return probe
    if not isinstance(probe, tuple) or len(probe) != 2:
        raise TypeError(f"probe: expected a pair of inputs and loss function, got {type(probe).__name__}")
    return Probe(*probe)


def check_sizes(rows: Any, memory: Any, quantiles: Any) -> None:
    """Raises ValueError for a number out of range, TypeError for what is no number."""
    if rows is not None:
        _check_integer("rows", rows, 2, "rows kept of a layer, or None for all")
    _check_integer("memory", memory, 1, "bytes")
    if isinstance(quantiles, str) or not isinstance(quantiles, Sequence):
        raise TypeError(f"quantiles: expected numbers between 0 and 1, got {quantiles!r}")
    for quantile in quantiles:
        if not isinstance(quantile, (int, float)) or not 0.0 <= quantile <= 1.0:
            raise ValueError(f"quantiles: expected numbers between 0 and 1, got {quantile!r}")


def check_samples(samples: Any, rows: int | None, mode: str) -> None:
    """Raises ValueError for a number out of range, or if the mode or ``rows`` excludes ``samples``."""
    if samples is None:
        return
    _check_integer("samples", samples, 2, "samples of a batch that second forwards run on, or None for all")
    if mode == "probe":
        raise ValueError(
            'samples: is for mode="batch" and mode="jvp"; in mode="probe", pass fewer samples as the probe'
        )
    if rows is not None and rows < samples:
        raise ValueError(f"samples: expected at most rows={rows}, since a row of each sample is kept, got {samples!r}")


def check_casts(casts: Any) -> None:
    """Raises TypeError or ValueError if these are not different names of casts."""
    if isinstance(casts, str) or not isinstance(casts, Sequence):
        raise TypeError(f"casts: expected a sequence of {', '.join(map(repr, CASTS))}, got {casts!r:.100}")
    for cast in casts:
        if cast not in CASTS:
            raise ValueError(f"casts: expected some of {', '.join(map(repr, CASTS))}, got {cast!r:.100}")
    if len(set(casts)) < len(casts):
        raise ValueError(f"casts: expected each name once, got {casts!r:.100}")


def check_details(details: Any, mode: str, amplify: bool, samples: Any) -> None:
    """Raises TypeError for what is no bool, ValueError with what ``details`` cannot be combined."""
    if not isinstance(details, bool):
        raise TypeError(f"details: expected True or False, got {details!r}")
    if details and (mode != "batch" or amplify or samples is not None):
        other = "amplify=True" if amplify else f"mode={mode!r}" if mode != "batch" else f"samples={samples}"
        raise ValueError(f'details: is for mode="batch" without amplify and samples, got {other}')


def _check_integer(name: str, value: Any, least: int, unit: str) -> None:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < least:
        raise ValueError(f"{name}: expected an integer >= {least} ({unit}), got {value!r}")


def check_fraction(fraction: Any) -> int:
    """Returns k of a fraction 1/k.

    Raises:
        TypeError: The fraction is not a number.
        ValueError: It is not 1 divided by an integer.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"aligned_fraction: expected a number, got {type(fraction).__name__}")
    every = round(1 / fraction) if 0 < fraction <= 1 else 0
    if every < 1 or abs(fraction * every - 1) > 1e-9:
        raise ValueError(f"aligned_fraction: expected 1 or 1/k for an integer k, such as 0.25, got {fraction!r}")
    return every


def check_select(select: Any) -> None:
    """Raises TypeError if ``select`` is no function."""
    if not callable(select) or isinstance(select, type):
        raise TypeError(f"select: expected a function from a layer's output to a tensor in it, got {select!r:.100}")


def check_compiled(model: nn.Module, mode: type[CaptureMode]) -> None:
    """Raises ValueError if the model's own forward hooks would run inside a compiled graph only."""
    if mode.captures_training and getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "model: was compiled in place by model.compile(), so that its inputs can only be seen from inside the "
            'graph. Attach to compiled = torch.compile(model) instead and call that, or use mode="probe"'
        )


def check_state(state: Mapping[str, Any], layers: Sequence[str], step: int) -> None:
    """Raises ValueError, naming the entry, if a monitor with these layers cannot continue from a state."""
    if not isinstance(state, Mapping) or not {"step", "recorder", "engine"} <= set(state):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"load_state_dict: expected a dictionary of step, recorder and engine, got {got}")
    if isinstance(state["step"], bool) or not isinstance(state["step"], int) or state["step"] < 0:
        raise ValueError(f"load_state_dict: step: expected an integer >= 0, got {state['step']!r:.100}")
    check_recorder_state(state["recorder"])
    if not isinstance(state["engine"], Mapping) or not isinstance(state["engine"].get("layers"), (list, tuple)):
        raise ValueError("load_state_dict: engine: expected a dictionary with a list of layers")
    if step:
        raise ValueError(f"load_state_dict: expected a monitor that has seen no step, this one has seen {step}")
    theirs = state["engine"]["layers"]
    if list(theirs) != list(layers):
        raise ValueError(f"load_state_dict: expected a state of the layers {list(layers)}, got {list(theirs)}")


def check_ranks(own_parameters: Any, merge: Any, rank_timeout: Any) -> None:
    """Raises TypeError or ValueError for arguments about the ranks of the run."""
    if own_parameters is not None:
        if not isinstance(own_parameters, str):
            raise TypeError(f"own_parameters: expected a regular expression, got {type(own_parameters).__name__}")
        try:
            re.compile(own_parameters)
        except re.error as error:
            raise ValueError(f"own_parameters: {own_parameters!r} is not a regular expression: {error}") from None
    if merge not in ("store", "files"):
        raise ValueError(f"merge: expected 'store' or 'files', got {merge!r}")
    number = isinstance(rank_timeout, (int, float)) and not isinstance(rank_timeout, bool)
    if not number or not math.isfinite(rank_timeout) or rank_timeout <= 0:
        raise ValueError(f"rank_timeout: expected a number of seconds above 0, got {rank_timeout!r}")


def check_together(ranks: Ranks, mode: str, amplify: bool) -> None:
    """Raises ValueError if the mode runs forwards that the ranks cannot run together."""
    if ranks.together and (mode != "batch" or amplify):
        chosen = "amplify=True" if amplify else f"mode={mode!r}"
        raise ValueError(
            f"{'amplify' if amplify else 'mode'}: {chosen} runs forwards at other parameters than the model's own, "
            'which is not possible while these are sharded over ranks (FSDP2, tensor parallel): use mode="batch"'
        )


def shown(schedule: Any) -> Any:
    """Returns a schedule as the header shows it."""
    return schedule.steps if isinstance(schedule, Every) else None if schedule is None else repr(schedule)


def untrained(model: nn.Module, parameters: Sequence[Tensor]) -> list[str]:
    """Returns names of the parameters that require a gradient and are in no optimizer, at most 20 and how many more.

    Args:
        model: The model.
        parameters: Those that are in an optimizer.
    """
    known = {id(p) for p in parameters}
    names = list(parameter_names(model, [p for p in model.parameters() if p.requires_grad and id(p) not in known]))
    return [*names[:_MOST_NAMES], *([f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else [])]


def speaks() -> bool:
    """Returns whether this process prints: in a group of processes, the first one does."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def aligned_work(parameters: Sequence[Tensor], layers: int, fraction: float = 1.0) -> str:
    """Describes what an aligned step does besides the training's own work."""
    size = sum(local(p).nbytes for p in parameters)
    amount = f"{size / _MIB:.1f} MiB" if size >= _MIB // 10 else f"{size / 1024:.1f} KiB"
    work = (
        f"one pass over gradients, parameters and optimizer state ({len(parameters)} parameters, {amount} each), the "
        f"norm of {layers} backward vectors and some {_OPERATIONS + _OF_LAYERS * layers} small operations"
    )
    if fraction < 1:
        work = work.replace(" each)", f" each; about {fraction:.3g} of the elements of large ones)")
    if size <= _TINY:
        work += "; for so small a model these take longer than the pass, and may take as long as the step itself"
    return work


def describe(
    header: Mapping[str, Any], snapshot_bytes: int, momentary: int, ring_bytes: int, aligned_step: str = ""
) -> str:
    """Returns one line about what is measured and the memory that it takes."""
    every = header["every"]
    often = f"every {every} steps" if isinstance(every, int) else every
    aligned = ""
    if header["aligned_every"] is not None:
        how = header["aligned_every"]
        steps = ("every step" if how == 1 else f"every {how} steps") if isinstance(how, int) else f"every {how}"
        aligned = f", aligned decrease {steps}" + (f" ({aligned_step})" if aligned_step else "")
    rows = "all rows" if header["rows"] is None else f"{header['rows']} rows a layer"
    if header["samples"] is not None:
        rows += f" from {header['samples']} samples of a batch"
    snapshot = f", {snapshot_bytes / _MIB:.1f} MiB for parameters before the step" if snapshot_bytes else ""
    snapshot += f" and {momentary / _MIB:.1f} MiB for a moment after it" if momentary else ""
    budget = f"at most {header['memory_bytes'] / _MIB:.1f} MiB for inputs and {rows}"
    return (
        f"fastfs.Monitor: {len(header['layers'])} layers of {header['model']}, {header['mode']} mode, {often}{aligned}"
        f"; memory at a measured step: {budget}{snapshot}, {ring_bytes / _MIB:.1f} MiB for the record"
    )
