"""The example on two ranks under ``torchrun``: one is killed, all are started again, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastfs
from tests.helpers.source_tree import ROOT

STEPS, KILLED, SAVED = 40, 25, 20
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


@pytest.mark.slow
def test_a_killed_rank_and_a_restart_make_one_record(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    wanted = {
        "KILL": f"1:{KILLED}",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(ROOT / "examples/train_fsdp2.py")],
        cwd=tmp_path,
        env={**os.environ, **wanted},
        timeout=180,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "exitcode: -9" in done.stderr  # the rank was killed, and not by us
    folder = tmp_path / "runs/train_fsdp2"
    assert [file.name for file in folder.iterdir()] == ["record.jsonl"]
    table = fastfs.load(folder / "record.jsonl")

    assert table["run"].nunique() == 1
    first, second = table.attrs["headers"]
    assert first["run"] == second["run"]
    assert "resumed_at" not in first
    assert second["resumed_at"] == SAVED
    assert first["ranks"] == second["ranks"] == 2

    one = table[table["layer"] == 0]
    assert one["step"].tolist() == list(range(STEPS))  # each once, also those that were repeated
    assert one.loc[one["kind"] == "measured", "step"].tolist() == list(range(0, STEPS, 5))
    assert (table["ranks"] == 2).all()
    assert (table.loc[table["kind"] == "measured", "valid"]).all()
    assert table["loss"].notna().all()
    assert one["loss"].iloc[-1] < 0.7 * one["loss"].iloc[0]
    assert abs(one["loss"].iloc[SAVED] - one["loss"].iloc[SAVED - 1]) < 0.5  # model and moments are the saved ones
