"""The interface of sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fastfs._record.record import Record

__all__ = ["PartlyWrittenError", "Sink"]


class PartlyWrittenError(OSError):
    """A write that failed after its first records were safe. Only the others are written again.

    Args:
        error: What failed.
        written: Number of records that are safe.
    """

    def __init__(self, error: OSError, written: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.written = written


@runtime_checkable
class Sink(Protocol):
    """Receives a header, then batches of records.

    :meth:`open` runs in the thread that attaches the monitor, and attaching fails if it raises. Everything else runs
    in the writer's thread. If :meth:`write` raises, the sink gets the same batch again later, from its first record
    (or, after a :class:`fastfs.monitor.PartlyWrittenError`, from the first one that is not safe).

    Optional methods: A sink that buffers records has ``flush()``, after which all of them are safe, and
    ``due() -> float | None``, the time (``time.monotonic()``) at which ``flush`` is to be called. A sink whose target
    may end before the monitor does has ``bind(flush)``, called after :meth:`open` with a function of a timeout in
    seconds that brings everything recorded so far to the sinks; it must not be called in the writer's thread. A sink
    that creates files has ``discard()``, called instead of ``close`` when attaching fails: it closes the sink and
    removes what the sink created. :meth:`open` is called again when a run is resumed; the header then has the same run
    id and ``resumed_at``.
    """

    def open(self, header: Mapping[str, Any]) -> None:
        """Begins or resumes a run.

        Args:
            header: The header of the run.
        """

    def write(self, records: Sequence[Record]) -> None:
        """Writes a batch of records.

        Args:
            records: The records, in order.
        """

    def close(self) -> None:
        """Writes what is still buffered, and releases files and connections."""
