"""Which sink a path, a name or a function stands for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import fastfs
from fastfs._monitor.run_record import RunRecord, open_recorder
from fastfs._record.sinks.callable_sink import CallableSink
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._record.sinks.parquet_sink import ParquetSink
from fastfs._record.sinks.targets import as_sink
from fastfs._record.sinks.tensorboard_sink import TensorBoardSink
from tests.helpers.record_cases import Collecting, head


def test_paths_and_functions_become_sinks(tmp_path: Path) -> None:
    kinds = {
        tmp_path / "a.jsonl": JsonlSink,
        os.fspath(tmp_path / "b"): JsonlSink,
        tmp_path / "c.parquet": ParquetSink,
        f"{tmp_path}/d.parquet/": ParquetSink,
        f"tensorboard:{tmp_path}/e": TensorBoardSink,
        print: CallableSink,
    }
    for target, kind in kinds.items():
        sink = as_sink(target)
        assert type(sink) is kind
        sink.close()
    mine = Collecting()
    assert as_sink(mine) is mine
    names = {
        "logging": "LoggingSink",
        "mlflow": "MlflowSink",
        "opentelemetry": "OpenTelemetrySink",
        "prometheus": "PrometheusSink",
        "prometheus:9100": "PrometheusSink",
        "wandb": "WandbSink",
    }
    for name, kind in names.items():
        assert type(as_sink(name)).__name__ == kind
    with pytest.raises(TypeError, match="sink: expected a path, a function or an object"):
        as_sink(3)
    with pytest.raises(TypeError, match=r"make one, JsonlSink\(...\)"):
        as_sink(JsonlSink)


@pytest.mark.parametrize("target", ["record", "WandB", "wandb ", "w&b", "neptune", "TensorBoard", "tensorboard", "-"])
def test_a_word_that_is_no_name_of_a_sink_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = "'logging', 'mlflow', 'opentelemetry', 'prometheus', 'trackio', 'wandb', 'prometheus:PORT'"
    for attach in (as_sink, lambda t: open_recorder("a.jsonl", [t], head())):
        with pytest.raises(ValueError, match=f"expected a path .*{names}, 'tensorboard:FOLDER', a function") as caught:
            attach(target)
        assert f"got {target!r}; a file of that name is {'./' + target!r}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target", ["", "wandb:project", "mlflow:run", "prometheus:", "prometheus:a", "prometheus:-1", "logging:x"]
)
def test_what_follows_a_name_is_checked(target: str) -> None:
    with pytest.raises(ValueError, match=r"expected a path .*'prometheus:PORT'"):
        as_sink(target)


def test_path_is_always_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("record", "wandb", "./mlflow", Path("logging")):
        open_recorder(name, [], head()).close()
        assert fastfs.load(name).attrs["headers"] == [head()]
    open_recorder(None, ["./trackio", tmp_path / "prometheus"], head()).close()
    wanted = ["logging", "mlflow", "prometheus", "record", "trackio", "wandb"]
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted


@pytest.mark.parametrize(
    "target", ["wandb", "mlflow", "logging", "prometheus:9100", "a.parquet", "tensorboard:x", print]
)
def test_ranks_that_write_files_of_their_own_take_no_other_sink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    part = RunRecord(None, writes=True, rank=1, sends=False)
    for path, sinks in ((None, [target]), ("a.jsonl", [target])):
        with pytest.raises(ValueError, match=r'merge="files": expected one path of JSON lines and no sinks, .*, got '):
            open_recorder(path, sinks, head(), part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [False, True])
def test_a_sink_without_its_extra_says_what_to_install(tmp_path: Path, folder: bool) -> None:
    """Also in a folder that has folders named like the packages: W&B and others make some."""
    extras = {
        "tensorboard": "tensorboard:x",
        "pyarrow": "x.parquet",
        "wandb": "wandb",
        "mlflow": "mlflow",
        "trackio": "trackio",
        "prometheus_client": "prometheus",
        "opentelemetry": "opentelemetry",
    }
    script = f"""
        import importlib.machinery, sys
        finder = importlib.machinery.PathFinder
        class Without:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {list(extras)}:
                    if {folder} and path is None:
                        return finder.find_spec(name, [{str(tmp_path)!r}])
                    if not {folder}:
                        raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Without())
        from fastfs._record.sinks.targets import as_sink
        for target in {list(extras.values())}:
            try:
                as_sink(target)
            except ImportError as error:
                print(error)
        """
    if folder:
        for name in extras:
            (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=120,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    names = ["tensorboard", "parquet", "wandb", "mlflow", "trackio", "prometheus", "opentelemetry"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout
    for line, name in zip(lines, names, strict=True):
        assert line.startswith("fastfs: a")
        assert line.endswith(f'pip install "fastfs[{name}]"')
