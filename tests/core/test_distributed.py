"""Merging over ranks, in a real group of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastfs import feature_stats, update_stats
from tests.helpers.cases import inputs

RANKS = 2


def batch() -> tuple[list[torch.Tensor], ...]:
    """Three layers of 8 rows, the same on every rank."""
    torch.manual_seed(0)
    parts = [
        inputs((8, width), dtype) for width, dtype in ((5, torch.float32), (33, torch.bfloat16), (7, torch.float64))
    ]
    return tuple(list(x) for x in zip(*parts, strict=True))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        f, g, b = batch()
        mine = slice(rank * 4, rank * 4 + 4)
        local = feature_stats([x[mine] for x in f], [x[mine] for x in g], [x[mine] for x in b])
        kept = local.clone()
        merged = local.all_reduce()
        assert local == kept, "all_reduce changed its input"

        update = update_stats([x[mine] for x in f], [x[mine] for x in b]).all_reduce(dist.group.WORLD)
        part = local[1].all_reduce()  # a view into the sums of all layers
        assert part == merged[1]
        assert local == kept

        alone = dist.new_group([rank], use_local_synchronization=True)
        assert local.all_reduce(alone) == local
        torch.save((merged.sums, update.sums), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_gives_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=RANKS, join=True)  # type: ignore[attr-defined]
    f, g, b = batch()
    expected = feature_stats(f, g, b), update_stats(f, b)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for features, updates in results:
        assert torch.equal(features[:, -2:], expected[0].sums[:, -2:])
        torch.testing.assert_close(features, expected[0].sums, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(updates, expected[1].sums, rtol=2e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.filterwarnings("ignore")  # torch's own, about devices of the mesh
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_of_sharded_tensors_the_local_part_is_measured(tmp_path: Path, backend: Literal["native", "reference"]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        f, g, b = (distribute_tensor(x, mesh, [Shard(0)]) for x in inputs((4, 3)))
        local = feature_stats(f, g, b, backend=backend)
        assert local == feature_stats(f.to_local(), g.to_local(), b.to_local(), backend=backend)
        assert local.all_reduce().count == 12
        partial = DTensor.from_local(b.to_local(), mesh, [Partial()])
        with pytest.raises(ValueError, match=r"^backward is a partial sum over ranks \(0:1@1:partial\).*redistribute"):
            feature_stats(f, g, partial, backend=backend)
        columns = distribute_tensor(b.to_local(), mesh, [Shard(1)])
        with pytest.raises(ValueError, match=r"^backward has the placements .*, expected .*, as before: redistribute"):
            feature_stats(f, g, columns, backend=backend)
    finally:
        dist.destroy_process_group()


def test_without_a_group_is_an_error() -> None:
    f, g, b = inputs((4,))
    with pytest.raises((ValueError, RuntimeError), match="process group has not been initialized"):
        feature_stats(f, g, b).all_reduce()
