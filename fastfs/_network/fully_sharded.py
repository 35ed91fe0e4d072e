"""What FSDP2 (``torch.distributed.fsdp.fully_shard``) keeps of a model: groups of parameters, and their states.

Between steps a module holds sharded parameters, which the optimizer updates. A forward gathers them: the module then
holds plain *unsharded* parameters, which are the leaves of the autograd graph. Most modules release them after their
forward, the outermost one does not, since the backward begins there. A second forward without a backward would leave it
gathered, and the next forward of training would run on old values.

Everything here reads attributes of torch that are not documented, and is the only place that does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GatheredState", "GraphLeaves", "groups_of", "optimized_parameters", "states_of", "swapped"]


def states_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the states of FSDP2 of these modules, without duplicates."""
    composable = sys.modules.get("torch.distributed._composable_state")
    if composable is None:
        return []
    states = {id(state): state for module in modules if (state := composable._get_module_state(module)) is not None}
    return [state for state in states.values() if hasattr(state, "_fsdp_param_groups") or _single(state) is not None]


def groups_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers together."""
    return [group for state in states_of(modules) for group in _groups(state)]


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    single = _single(state)
    return [] if single is None else [single]


def _single(state: Any) -> Any:
    """The group of a state before torch 2.12, which had one at most."""
    return vars(state).get("_fsdp_param_group")


def optimized_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters of a model by name: those that an optimizer holds, also while FSDP2 has gathered them."""
    held = {
        id(each): p.sharded_param
        for group in groups_of(model.modules())
        for p in group.fsdp_params
        for each in _forms(p)
    }
    return [(name, held.get(id(p), p)) for name, p in model.named_parameters()]


def swapped(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Return the dictionaries of modules in which FSDP2 swaps sharded and gathered parameters."""
    infos = [p._module_info for group in groups_of(modules) for p in group.fsdp_params]
    return [module._parameters for info in infos for module in (info.module, *info.shared_modules)]


def _forms(parameter: Any) -> list[Tensor]:
    """The tensors that a module may hold in the place of a sharded parameter."""
    found = (getattr(parameter, name, None) for name in ("_unsharded_param", "_sharded_post_forward_param"))
    return [each for each in found if each is not None]


class GraphLeaves:
    """The leaves of the autograd graph that stand for parameters.

    Args:
        model: the model.
        parameters: the parameters, as the optimizers hold them.

    Attributes:
        ungathered: those that FSDP2 does not manage.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._groups = groups_of(model.modules())
        self._gathered = [p for group in self._groups for p in group.fsdp_params]
        gathered = {id(p.sharded_param) for p in self._gathered}
        self.ungathered = [p for p in self._parameters if id(p) not in gathered]
        self._any = len(self.ungathered) < len(self._parameters)

    def now(self) -> list[Tensor]:
        """Return one leaf for each parameter: the unsharded parameter under FSDP2, else the parameter itself."""
        if not self._any:
            return self._parameters
        leaves = {
            id(p.sharded_param): leaf
            for p in self._gathered
            if (leaf := getattr(p, "_unsharded_param", None)) is not None
        }
        return [leaves.get(id(p), p) for p in self._parameters]

    @property
    def unreduced(self) -> bool:
        """Whether FSDP2 holds gradients of a backward that did not synchronize: ``.grad`` does not show them."""
        if any(getattr(group, "_partial_reduce_output", None) is not None for group in self._groups):
            return True
        return any(
            getattr(p, "unsharded_accumulated_grad", None) is not None
            or ((leaf := getattr(p, "_unsharded_param", None)) is not None and leaf.grad is not None)
            for p in self._gathered
        )


class GatheredState:
    """Which parameters FSDP2 has gathered, and its records of the running iteration.

    Args:
        modules: modules of the model.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._states = [(state, state._training_state, set(_waiting(state))) for state in states_of(modules)]
        self._groups = [
            (
                group,
                group._training_state,
                group._sharded_state,
                list(group._post_forward_indices),
                group._all_gather_result is not None,
            )
            for state, *_ in self._states
            for group in _groups(state)
        ]
        shared = {id(c): c for group, *_ in self._groups if hasattr(c := group.comm_ctx, "post_forward_order")}
        self._orders = [(context, list(context.post_forward_order)) for context in shared.values()]
        roots = {id(c): c for state, *_ in self._states if hasattr(c := state._state_ctx, "iter_forward_root")}
        self._roots = [(context, context.iter_forward_root) for context in roots.values()]

    def restore(self) -> None:
        """Release what was gathered since, and restore the records; may be called any number of times."""
        for context, _ in self._orders:
            gathering = context.all_gather_state
            if gathering is not None and not self._was_gathering():
                if gathering.event is not None:
                    context.all_gather_copy_in_stream.wait_event(gathering.event)
                    context.all_gather_stream.wait_event(gathering.event)
                context.all_gather_state = None
        for group, training, sharded, indices, pending in self._groups:
            if not pending:
                _end_gathering(group)
            if group._sharded_state is not sharded and sharded.name == "SHARDED":
                group._to_sharded()
                for p in group.fsdp_params:  # a copy for a smaller mesh, which the next gathering would release
                    p._sharded_post_forward_param = p._sharded_post_forward_param_data = None
            group._training_state = training
            group._post_forward_indices[:] = indices
        for context, order in self._orders:
            context.post_forward_order[:] = order
        for context, root in self._roots:
            context.iter_forward_root = root
        for state, training, waiting in self._states:
            state._training_state = training
            if _waiting(state) != waiting:
                state._modules_to_run_forward.clear()
                state._modules_to_run_forward.update(waiting)

    def _was_gathering(self) -> bool:
        return any(root is not None for _, root in self._roots)


def _waiting(state: Any) -> set[nn.Module]:
    return getattr(state, "_modules_to_run_forward", set())


def _end_gathering(group: Any) -> None:
    """Wait for a gathering that nothing has used, as a forward with prefetching leaves it, and forget it."""
    result = group._all_gather_result
    if result is None:
        return
    if result.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(result.all_gather_event)
    if isinstance(result.all_gather_work, torch.distributed.distributed_c10d.Work):
        result.all_gather_work.wait()
    group._all_gather_result = None
