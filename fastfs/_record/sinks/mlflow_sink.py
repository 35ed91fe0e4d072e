"""Records in a run of MLflow. Needs the extra ``mlflow``."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastfs._record.record import Record
from fastfs._record.sinks.alert_text import alert_texts
from fastfs._record.sinks.metrics import MAX_KEYS, Metric, Metrics, unique_keys
from fastfs._record.sinks.protocol import PartlyWrittenError

try:
    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import Metric as Point
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException
except ImportError as missing:
    raise ImportError('fastfs: an MLflow sink needs mlflow: pip install "fastfs[mlflow]"') from missing

__all__ = ["MlflowSink"]

_MOST_POINTS, _MOST_TAGS = 1000, 100  # MLflow takes no more at a time
_LONGEST_NAME = 100
_LONGEST_TAG = 5000
_JITTER = "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"
_PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "PERMISSION_DENIED")


class MlflowSink:
    """Logs the metrics of measured steps to a run of MLflow, with their own step and time; header and alerts as tags.

    The keys are ``fastfs/<quantity>/<group>`` and ``fastfs/<quantity>/median``, see ``docs/trackers.md``; other
    characters than MLflow takes become underscores. Points are sent in the background, up to 1000 at a time, also after
    the run has ended. The tag ``fastfs.alert.<rule>`` has the last alert of a rule.

    MLflow draws from Python's global random generator when it repeats a request. Training would then see other random
    numbers, so the sink sets the environment variable ``MLFLOW_HTTP_REQUEST_BACKOFF_JITTER`` to 0 unless it is set.

    Args:
        run_id: by default that of the active run in the thread that attaches the monitor.
        max_keys: largest number of keys.
        prefix: first part of the keys; different for monitors that write to the same run.

    Raises:
        ValueError: ``max_keys`` is out of range.
    """

    def __init__(self, run_id: str | None = None, *, max_keys: int = MAX_KEYS, prefix: str = "fastfs") -> None:
        Metrics({}, max_keys)
        self._given = run_id
        self._max_keys = max_keys
        self._prefix = prefix
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._metrics = Metrics({}, 1)
        self._keys: dict[Metric, str] = {}
        self._tags: dict[str, str] = {}

    def open(self, header: Mapping[str, Any]) -> None:
        """Takes the id of the run. Nothing is sent yet, so that a server that hangs does not hold up training.

        Args:
            header: The header of the run.

        Raises:
            ValueError: There is no active run in this thread, and no ``run_id`` was given.
        """
        active = mlflow.active_run()
        run_id = self._given or (active and active.info.run_id)
        if not run_id:
            raise ValueError(
                "MlflowSink: expected an active run in this thread: call mlflow.start_run() before attaching, or give "
                "run_id="
            )
        self._run_id = run_id
        os.environ.setdefault(_JITTER, "0")
        self._client = MlflowClient(mlflow.get_tracking_uri())
        self._metrics = Metrics(header, self._max_keys)
        self._keys = unique_keys(self._metrics.metrics, self._key)
        about = {name: value for name, value in header.items() if isinstance(value, (str, int, float)) and value != ""}
        about["left_out"] = ", ".join(metric.key(self._prefix) for metric in self._metrics.left_out)
        for name, value in about.items():
            self._tag(name, str(value))

    def write(self, records: Sequence[Record]) -> None:
        """Sends the records.

        Args:
            records: The records, in order.

        Raises:
            PartlyWrittenError: The server did not take all of them, which may be temporary.
            ValueError: The sink is closed.
        """
        if self._client is None:
            raise ValueError("this sink is closed")
        for title, text, _ in alert_texts(records):
            self._tag(f"alert.{title.removeprefix('fastfs: ')}", text)
        points: list[Point] = []
        sent = 0
        for done, record in enumerate(records):
            values = self._metrics.of(record)
            if len(points) + len(values) > _MOST_POINTS:
                self._send(points, sent)
                points, sent = [], done
            time = int(1000 * record.time)
            points += [Point(self._keys[metric], value, time, record.step) for metric, value in values.items()]
        self._send(points, sent)

    def close(self) -> None:
        self._client = None

    def _send(self, points: Sequence[Point], sent: int) -> None:
        assert self._client is not None
        try:
            while self._tags:
                some = list(self._tags.items())[:_MOST_TAGS]
                self._client.log_batch(self._run_id, tags=[RunTag(*one) for one in some], synchronous=True)
                self._tags = dict(list(self._tags.items())[_MOST_TAGS:])
            for start in range(0, len(points), _MOST_POINTS):
                self._client.log_batch(self._run_id, points[start : start + _MOST_POINTS], synchronous=True)
        except MlflowException as error:
            if error.error_code in _PERMANENT:
                raise
            raise PartlyWrittenError(OSError(errno.EIO, str(error)), sent) from error

    def _key(self, metric: Metric) -> str:
        label = _cleaned(metric.label)
        return Metric(metric.quantity, "_" if set(label) == {"."} else label).key(self._prefix)

    def _tag(self, name: str, value: str) -> None:
        self._tags[f"{self._prefix}.{_cleaned(name)}"] = value[:_LONGEST_TAG]


def _cleaned(name: str) -> str:
    return re.sub(r"[^\w.\- ]", "_", name)[:_LONGEST_NAME]
