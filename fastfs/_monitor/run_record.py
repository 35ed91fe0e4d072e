"""Opens the record of a run: sinks where this process writes, and what makes records of the parts of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastfs._record.ranks.assembly import Assembler
from fastfs._record.ranks.exchange import Alone, Collector, Gatherer, Inbox, PartRecords, Sender
from fastfs._record.ranks.part_files import rank_path
from fastfs._record.ranks.run_store import RunStore
from fastfs._record.sinks.targets import as_path, as_sink, checked_targets, lines_path
from fastfs._record.writing.recorder import Recorder

__all__ = ["RunRecord", "joined", "open_recorder"]

_SENDING_SECONDS = 1.0  # longest time that a part waits on a rank before it is sent


class RunRecord:
    """How this process takes part in the record of the run.

    Attributes:
        collector: Makes, from a function that takes warnings, what turns parts into records; None for those of this
            process alone.
        writes: Whether this process writes to the sinks.
        rank: Number of the file that it writes; None for the one of the run.
        sends: Whether it sends its parts to another rank.
    """

    def __init__(
        self,
        collector: Callable[[Callable[[str], None]], Collector] | None,
        *,
        writes: bool,
        rank: int | None,
        sends: bool,
    ) -> None:
        self.collector = collector
        self.writes = writes
        self.rank = rank
        self.sends = sends


def joined(store: RunStore | None, header: dict[str, Any], assembler: Assembler, merge: str) -> RunRecord:
    """Returns how this process takes part, and gives the header the run id that all ranks share.

    Args:
        store: Keys shared with the other ranks; None for a run of one process.
        header: Of this process.
        assembler: Makes records.
        merge: ``"store"`` or ``"files"``.
    """
    if store is None:
        return RunRecord(lambda _warn: Alone(assembler), writes=True, rank=None, sends=False)
    header["run"] = store.first("run", header["run"])
    if merge == "files":
        header |= {"rank": store.rank, "quantiles": list(assembler.quantiles)}
        return RunRecord(lambda _warn: PartRecords(), writes=True, rank=store.rank, sends=False)
    own = store.other_connection()
    if store.rank != store.ranks[0]:
        return RunRecord(lambda warn: Sender(own, warn), writes=False, rank=None, sends=True)

    def gatherer(warn: Callable[[str], None]) -> Collector:
        return Gatherer(assembler, own.ranks, Inbox(own, warn), own.timeout, warn)

    return RunRecord(gatherer, writes=True, rank=None, sends=False)


def open_recorder(
    path: Any, sinks: Any, header: dict[str, Any], part: RunRecord | None = None, **options: Any
) -> Recorder:
    """Opens a recorder into ``path`` and ``sinks``, or into ``record.jsonl`` if neither is given.

    Of several ranks, the first one writes, or each one to a file of its own.

    Args:
        path: See :class:`fastfs.Monitor`.
        sinks: See :class:`fastfs.Monitor`.
        header: Of the run.
        part: How this process takes part; None for a run of its own.
        **options: Of the recorder.

    If it fails, it leaves no thread, no open file, and no new file or folder behind.

    Returns:
        The recorder.

    Raises:
        ValueError: The ranks write files of their own, and something needs merged records.
    """
    targets = checked_targets(sinks)
    if path is not None or not targets:
        targets.insert(0, "record.jsonl" if path is None else as_path(path))
    if part is None:
        part = RunRecord(None, writes=True, rank=None, sends=False)
    if part.rank is not None:
        targets = [rank_path(_only_path(targets), part.rank)]
        if options.get("alerts") or options.get("on_alert"):
            raise ValueError('merge="files": expected no alerts and no on_alert, since they need merged records')
    if not part.writes:
        targets = []
    if part.sends:
        options["flush_seconds"] = min(options.get("flush_seconds", _SENDING_SECONDS), _SENDING_SECONDS)
    with ExitStack() as undo:
        opened = []
        for target in targets:
            sink = as_sink(target)
            opened.append(sink)
            if sink is not target:  # created here, so nobody else can close it
                undo.callback(getattr(sink, "discard", sink.close))
        recorder = Recorder(opened, header, collector=part.collector, **options)
        undo.pop_all()
    return recorder


def _only_path(targets: list[Any]) -> Path:
    """Returns the path from which the names of the ranks' files are made.

    Raises:
        ValueError: There are other sinks, or it is no file of JSON lines.
    """
    only = lines_path(targets[0])
    if only is None or len(targets) > 1:
        raise ValueError(
            'merge="files": expected one path of JSON lines and no sinks, since the records are made when the files of '
            f"the ranks are loaded, got {', '.join(map(repr, targets))}"
        )
    return only
