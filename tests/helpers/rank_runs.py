"""Short trainings of several ranks whose records are read in the tests: whole, resumed, in one file and in several."""

from __future__ import annotations

import copy
import datetime
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F

import fastfs
from tests.helpers.parallel_cases import ddp, global_batch, make_model, make_optimizer

__all__ = ["make_records"]

LAYERS = r"^(embed|blocks\.\d+|norm)$"
STEPS, RESUMED = 6, 3


def train(path: Path, merge: str, *, saved: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Trains to the end, from a saved state or from the start; returns the state before step 3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of gloo
        model, batches, own = ddp(make_model())
    optimizer = make_optimizer(model, "adamw")
    settings = {"layers": LAYERS, "every": 2, "aligned_every": 1, "aligned_fraction": 1.0, "alerts": (), **options}
    monitor = fastfs.Monitor(model, optimizer, path=path, merge=merge, verbose=False, flush_seconds=0.2, **settings)
    first = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        monitor.load_state_dict(saved["monitor"])
        first = RESUMED
    for step in range(first, STEPS):
        if step == RESUMED and saved is None:
            state = {
                "model": copy.deepcopy(model.state_dict()),
                "optimizer": copy.deepcopy(optimizer.state_dict()),
                "monitor": monitor.state_dict(),
            }
        optimizer.zero_grad()
        x, y = (part.chunk(batches)[own] for part in global_batch(step))
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        monitor.log(loss=loss)
        optimizer.step()
    monitor.close()
    return state if saved is None else saved


def make_records(folder: str) -> None:
    """Makes ``store/``, ``files/`` and, with a restart of all ranks in a new group, ``*_restarted/``."""
    root, rank, world = Path(folder), dist.get_rank(), dist.get_world_size()
    saved = {}
    for merge in ("store", "files"):
        train(root / merge / "record.jsonl", merge, quantiles=(0.5,))
    for merge in ("store", "files"):  # as the first start has written it, with the id of the run
        saved[merge] = train(root / f"{merge}_restarted" / "record.jsonl", merge)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/again",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    for merge in ("store", "files"):
        train(root / f"{merge}_restarted" / "record.jsonl", merge, saved=saved[merge])
