"""Fixtures and markers of all tests. Warnings are errors (pyproject.toml)."""

from __future__ import annotations

import functools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from fastfs._monitor.capture.taps import HOOKS_IN_GRAPHS
from tests.fuzz.world import reset_switches, switches
from tests.helpers.browser import BROWSERS, find_browser

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # workers ignore it, and so would what tests start

hypothesis.settings.register_profile("fastfs", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("fastfs")


_UNDONE_BY_OTHERS = ("warning filters", "threads", "trace")  # pytest, the fixture `threads`, a debugger


@functools.cache
def missing_gpu() -> str | None:
    """Why tests marked `gpu` cannot run, or None."""
    return None if torch.cuda.is_available() else f"no CUDA device for torch {torch.__version__}"


@functools.cache
def missing_browser() -> str | None:
    """Why tests marked `browser` cannot run, or None."""
    return None if find_browser() else f"no browser: none of {', '.join(BROWSERS)} on PATH"


def missing_graphs() -> str | None:
    """Why tests marked `graphs` cannot run, or None."""
    return None if HOOKS_IN_GRAPHS else f"torch {torch.__version__}: layers in compiled graphs are seen from 2.13 on"


NEEDS = {
    "gpu": (missing_gpu, "FASTFS_REQUIRE_GPU"),
    "browser": (missing_browser, "FASTFS_REQUIRE_BROWSER"),
    "graphs": (missing_graphs, "FASTFS_REQUIRE_GRAPHS"),
}


def pytest_configure(config: pytest.Config) -> None:
    for marker, (_, variable) in NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: needs a {marker}; skipped without, a failure with {variable}=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs files with slow tests first, so that no process is left with one of them when the others have finished."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (missing, variable) in NEEDS.items():
        if item.get_closest_marker(marker) is None or (why := missing()) is None:
            continue
        if os.environ.get(variable) == "1":
            pytest.fail(f"{variable}=1, but {why}", pytrace=False)
        pytest.skip(why)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


@pytest.fixture(autouse=True)
def switched_back(seeded: None) -> Iterator[None]:
    """A test leaves no switch of torch turned, on which the next ones would depend."""
    before = switches()
    yield
    after = switches()
    if after != before:
        reset_switches()
    assert [name for name in before if before[name] != after[name] and name not in _UNDONE_BY_OTHERS] == []


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on the CPU and, where there is one, on the GPU."""
    return request.param


@pytest.fixture
def local_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B offline and MLflow in a folder below ``tmp_path``, which is the current folder, as in a new process."""
    import mlflow
    import wandb

    store = tmp_path / "store"
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
        "WANDB_CONSOLE": "off",
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it keeps the settings of the first run
    mlflow.set_tracking_uri(f"file:{store}")
    yield store
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri("")
    wandb.teardown()


@pytest.fixture
def threads() -> Iterator[Any]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
