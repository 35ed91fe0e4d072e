# %% [markdown]
# # One record of a run on several ranks, across a restart
#
# A small transformer learns the bytes of Python's own standard library. Its parameters are sharded by FSDP2
# (`fully_shard`), every rank has a batch of its own, and every rank attaches a monitor with the same path: rank 0
# writes one record, whose numbers are those of the global batch. Runs in seconds on two cores; on GPUs, each rank
# takes one.
#
#     torchrun --nproc-per-node 2 --max-restarts 1 examples/train_fsdp2.py
#     fastfs watch runs/train_fsdp2/record.jsonl        # meanwhile
#     fastfs report runs/train_fsdp2/record.jsonl       # afterwards
#
# `python examples/train_fsdp2.py` runs it in one process. To see a rank die and the run go on, let rank 1 kill itself
# before step 25 of the first attempt:
#
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     KILL=1:25 torchrun --nproc-per-node 2 --max-restarts 1 examples/train_fsdp2.py
#
# The variable gives every attempt a store of its own. Without it, ranks that are started again find the addresses of
# the dead ones in the store of torch, and fail (seen with torch 2.13).
#
# The cells also open as a notebook (`# %%` is the percent format of Jupytext, VS Code, PyCharm and Spyder).

# %%
from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import typing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastfs
from fastfs.models import Transformer

FOLDER = Path("runs/train_fsdp2")
CHECKPOINTS = FOLDER / "checkpoints"
STEPS, SAVE_EVERY, BATCH, CONTEXT = 40, 10, 8, 64  # batch: sequences per rank and step

# %% [markdown]
# ## 1. The ranks
#
# `torchrun` starts the script once per rank, and says in environment variables who is who. Started by itself, the
# script is a group of one.

# %%
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
if dist.is_torchelastic_launched():
    dist.init_process_group()
else:
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()

# %% [markdown]
# ## 2. Data and model
#
# The text is what Python ships: sources of three modules, as bytes. A batch follows from step and rank, so that a
# resumed run reads what the first one would have read.

# %%
sources = [Path(str(module.__file__)) for module in (argparse, pathlib, typing)]
text = torch.frombuffer(bytearray(b"".join(source.read_bytes() for source in sources)), dtype=torch.uint8)


def batch_of(step: int) -> torch.Tensor:
    """Returns this rank's sequences of a step, (BATCH, CONTEXT + 1)."""
    generator = torch.Generator().manual_seed(step * ranks + rank)
    starts = torch.randint(0, len(text) - CONTEXT, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)].to(device, torch.int64)


model = Transformer(width=32, depth=2, heads=2, context=CONTEXT, generator=torch.Generator().manual_seed(0)).to(device)
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# %% [markdown]
# ## 3. Checkpoints
#
# A checkpoint has the model and the optimizer, sharded as they are, and what the monitor of each rank needs to
# continue. `dcp.save` writes the file `.metadata` when all ranks are done: a folder without it is not complete.


# %%
def save(step: int) -> None:
    """Saves the state before a step."""
    folder = CHECKPOINTS / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(monitor.state_dict(), folder / f"monitor-{rank}.pt")
    parameters, moments = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": moments}, checkpoint_id=folder)


def load() -> int:
    """Restores model and optimizer from the last complete checkpoint; returns its step, 0 if there is none."""
    step = max((int(file.parent.name) for file in CHECKPOINTS.glob("*/.metadata")), default=0)
    if step:
        parameters, moments = get_state_dict(model, optimizer)
        dcp.load({"model": parameters, "optimizer": moments}, checkpoint_id=CHECKPOINTS / str(step))
        set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=moments)
    return step


# %% [markdown]
# ## 4. The monitor
#
# It is attached after `load`: `get_state_dict` creates the state of a new optimizer by a step of its own, which is none
# of the training. With the state of the first attempt it continues that run: same id, same file, and rows after the
# checkpoint that the first attempt has written are replaced.

# %%
first = load()
monitor = fastfs.Monitor(model, optimizer, every=5, aligned_every=1, path=FOLDER / "record.jsonl")
if first:
    monitor.load_state_dict(torch.load(CHECKPOINTS / str(first) / f"monitor-{rank}.pt"))

# %% [markdown]
# ## 5. Training
#
# The loop has one more line, `monitor.log`, with the loss of this rank: the record has the average.

# %%
victim, _, fatal = os.environ.get("KILL", "").partition(":")
victim = victim if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" else ""

for step in range(first, STEPS):
    if step % SAVE_EVERY == 0 and step > first:
        save(step)
    if victim == str(rank) and fatal == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
    batch = batch_of(step)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    monitor.log(loss=loss)
    optimizer.step()
monitor.close()

# %% [markdown]
# ## 6. The record
#
# One table of the whole run, whoever has died meanwhile. `ranks` says how many ranks' numbers a row has,
# `rank_angle_sd` how far the angles of the ranks' batches scatter, and `rank_apart` names a rank that stands far apart
# from the others.

# %%
dist.barrier()
if rank == 0:
    shutil.rmtree(CHECKPOINTS)  # the run is over: the next one begins anew
    table = fastfs.load(FOLDER / "record.jsonl").query(f"run == '{monitor.run}'")
    shown = ["step", "name", "loss", "angle", "update_rms", "ranks", "rank_angle_sd", "rank_apart"]
    last = table[(table["kind"] == "measured") & (table["step"] == table["step"].max() // 5 * 5)]
    print(last[[name for name in shown if name in last.columns]].to_string(index=False))
dist.destroy_process_group()
