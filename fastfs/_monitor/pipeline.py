"""Pipeline stages: second forwards that pass activations from stage to stage, as the schedule does in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["StageLink", "check_pipeline"]


def check_pipeline(pipeline: Any, model: nn.Module) -> None:
    """Raises TypeError or ValueError if ``pipeline=`` is not the stage whose module the monitor watches."""
    names = ("stage_index", "num_stages", "submod", "group", "stage_index_to_group_rank")
    missing = [name for name in names if not hasattr(pipeline, name)]
    if missing:
        raise TypeError(
            "pipeline: expected a torch.distributed.pipelining.PipelineStage, got "
            f"{type(pipeline).__name__} without {', '.join(missing)}"
        )
    if pipeline.submod is not model:
        raise ValueError(
            f"pipeline: expected the stage of the watched model ({type(model).__name__}), got that of a "
            f"{type(pipeline.submod).__name__}: pass stage.submod as the model, and one stage per process"
        )
    ranks = [pipeline.stage_index_to_group_rank[i] for i in range(pipeline.num_stages)]
    if len(set(ranks)) != len(ranks):
        raise ValueError("pipeline: expected one stage per process; interleaved schedules cannot be measured")


class StageLink:
    """The neighbours of a stage, and forwards of the stage that receive from the one and send to the other.

    Every stage runs the forwards of the same micro-batches in the same order, and nothing else communicates meanwhile.

    Args:
        stage: A ``torch.distributed.pipelining.PipelineStage``.
    """

    def __init__(self, stage: Any) -> None:
        self.number = int(stage.stage_index)
        self.stages = int(stage.num_stages)
        self._group = stage.group
        self._of_stage = dict(stage.stage_index_to_group_rank)

    def linked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the forward of the stage on the activations that the stage before sends."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.number > 0:
                args = tree_map(self._received, args)
            output = forward(*args, **kwargs)
            if self.number < self.stages - 1:
                for x in tree_leaves(output):
                    if isinstance(x, Tensor):
                        torch.distributed.send(x.detach().contiguous(), self._neighbour(1), self._group)
            return output

        return run

    def _received(self, argument: Any) -> Any:
        """Returns what arrives in the place of an input."""
        if not isinstance(argument, Tensor):
            return argument
        buffer = torch.empty_like(argument, requires_grad=False)
        torch.distributed.recv(buffer, self._neighbour(-1), self._group)
        return buffer

    def _neighbour(self, offset: int) -> int:
        rank = int(self._of_stage[self.number + offset])
        return rank if self._group is None else torch.distributed.get_global_rank(self._group, rank)
