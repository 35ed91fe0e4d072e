"""Find the repeated blocks on the main path of a model from its module tree: the layers of ``layers="auto"``.

The module tree does not show how a forward combines its parts. It does show where modules of one class are repeated,
and that happens at several levels: stages of blocks, blocks, heads, experts, convolutions with their normalization. The
search proceeds from the outside to the inside and stops at the last level at which a member still carries the whole
signal:

- **Containers are transparent**: lists and dictionaries, which have no forward, and sequences of composite modules.
- **Blocks** are modules of one class with at least two weights (linear maps, convolutions, ...), in one container or in
  numbered attributes (``layer1``, ``layer2``).
- A repeated module is a **stage**, whose blocks are searched for inside of it, if it holds a container of blocks with
  nearly all of its weights. If more remains (attention beside a list of experts), the module itself is the block.
- Lists named heads, experts, branches and the like hold parallel modules and are not part of the main path.
- Every other module (an encoder, a decoder, a tower, a wrapper) is a namespace, searched separately.

Members of lists with one weight each (linear maps, graph convolutions, a norm and a linear map) count if they make up
at least a third of the result. If nothing is repeated, every module with parameters of its own is selected or,
if there is none, the model itself. Only trained modules count, provided that the model has any.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastfs._network.wrappers import has_forward, inner_module

__all__ = ["blocks"]

_WEIGHTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_NO_WEIGHTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.ParameterList, nn.ParameterDict)
_PARALLEL = re.compile(r"(^|_)(heads?|experts?|branch(es)?|paths?|ops)(_|$)")
_NUMBERED = re.compile(r"(.*?)_?\d+([a-z]\d*)?$")
_PARTS_OF_STAGES = re.compile(r"(.*_)?(b|(res)?(blocks?|layers?|stages?|units?|cells?|nets?|resnets?|attentions?))")
_CLASSES_OF_BLOCKS = re.compile(r"block|layer|bottleneck|residual|cell", re.IGNORECASE)
_RESAMPLING = re.compile(r"(^|_)(down|up|resampl|reduc|merg|pool|patch|embed)")
_GLUE = 1  # weights that a stage may have besides its blocks and its resampling layers
_PARAMETRIZATIONS = "parametrizations"
_ADAPTER = "adapter_layer_names"  # attribute of PEFT's layers, which wrap the layer that they adapt


def blocks(
    model: nn.Module, modules: Iterable[nn.Module], trained: Collection[Tensor] | None = None
) -> list[nn.Module]:
    """Return the modules to watch, including wrappers around them, or the model itself if it offers no choice.

    Args:
        model: the network without its outer wrappers.
        modules: all submodules; those with parameters of their own are selected if no block is repeated.
        trained: parameters that are trained; None means those that require a gradient.

    Returns:
        Modules without duplicates, in no particular order.
    """
    tree = _Tree(model, trained)
    search = _Search(tree)
    found = search.blocks([model], within=False)
    repeated = [m for m in _unique(found) if tree.is_trained(m)]
    lists = [m for m in _unique(search.lists) if tree.is_trained(m)]
    if 2 * sum(map(tree.weights, lists)) >= sum(map(tree.weights, repeated)):
        repeated += lists  # the lists are more than the stem of a network of blocks
    return repeated or [m for m in modules if tree.owns(m)] or [model]


Kind: TypeAlias = tuple[type[nn.Module], frozenset[type[nn.Module]]]


class _Tree:
    """Properties of single modules that the search needs, each computed once."""

    def __init__(self, model: nn.Module, trained: Collection[Tensor] | None) -> None:
        self._weights: dict[int, int] = {}
        self._trained: dict[int, bool] = {}
        own = list(model.parameters())
        named = own if trained is None else trained
        wanted = {id(p) for p in named if p.requires_grad} or {id(p) for p in named}
        everything = {id(p) for p in own}
        self._ids = wanted & everything or everything
        self._visit(model)

    def children(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return named children, including repeated ones; an operation has none."""
        inner = inner_module(module)
        if _is_operation(inner):
            return []
        return [(name, m) for name, m in inner._modules.items() if m is not None and name != _PARAMETRIZATIONS]

    def weights(self, module: nn.Module) -> int:
        """Return the number of linear maps, convolutions and the like in the module."""
        return self._weights[id(module)]

    def is_trained(self, module: nn.Module) -> bool:
        return self._trained[id(module)]

    def owns(self, module: nn.Module) -> bool:
        """Whether the module has a forward and trained parameters of its own; parts of an operation have no forward."""
        own = _own(module) if id(module) in self._weights and has_forward(inner_module(module)) else []
        return any(id(p) in self._ids for p in own)

    def is_sequence(self, module: nn.Module) -> bool:
        """Whether the module is a ``Sequential`` with the forward of ``nn.Sequential``."""
        inner = inner_module(module)
        return isinstance(inner, nn.Sequential) and type(inner).forward is nn.Sequential.forward

    def is_container(self, module: nn.Module) -> bool:
        return not has_forward(inner_module(module)) or self.is_sequence(module)

    def is_looked_through(self, module: nn.Module) -> bool:
        """Whether the module is a list without a forward, or a sequence of more than operations."""
        if not has_forward(inner_module(module)):
            return True
        members = [m for _, m in self.children(module) if self.weights(m)] if self.is_sequence(module) else []
        composite = [m for m in members if self.children(m)]
        return bool(composite) and (len(composite) == len(members) or any(self.weights(m) > 1 for m in composite))

    def kind(self, module: nn.Module) -> Kind:
        """Return what identifies a family: the class, and for sequences also the classes of the operations in it."""
        inner = inner_module(module)
        if not self.is_sequence(module):
            return _class(inner), frozenset()
        return _class(inner), frozenset(_class(inner_module(m)) for m in inner.children() if self.weights(m))

    def _visit(self, model: nn.Module) -> None:
        """Visit children first, without recursion, because Python's stack is limited."""
        stack = [(model, False)]
        entered: set[int] = set()
        while stack:
            module, complete = stack.pop()
            children = [child for _, child in self.children(module)]
            if complete:
                own = _own(module)
                self._weights[id(module)] = _weights(inner_module(module)) + sum(
                    self._weights.get(id(m), 0) for m in children
                )
                self._trained[id(module)] = any(id(p) in self._ids for p in own) or any(
                    self._trained.get(id(m), False) for m in children
                )
            elif id(module) not in entered:
                entered.add(id(module))
                stack.append((module, True))
                stack.extend((child, False) for child in children)


class _Member(NamedTuple):
    """A member of a container, found through all transparent containers."""

    module: nn.Module
    holder: nn.Module
    single: bool  # eligible without another of its class: in a list of lists, or the only member of a list


class _Search:
    """The search for blocks.

    Attributes:
        lists: candidates besides the blocks: members with a single weight, from lists in which most are of one class.
    """

    def __init__(self, tree: _Tree) -> None:
        self.lists: list[nn.Module] = []
        self._tree = tree
        self._entered: set[int] = set()

    def blocks(self, nodes: Sequence[nn.Module], *, within: bool) -> list[nn.Module]:
        """Return the blocks below the nodes.

        Args:
            nodes: the members of a family, or a single module.
            within: whether the blocks replace the members of a family. Otherwise the nodes are a namespace, and all
                blocks in it are returned.

        Returns:
            The blocks found, possibly with duplicates.
        """
        containers: defaultdict[str, list[list[_Member]]] = defaultdict(list)
        numbered: defaultdict[str, list[nn.Module]] = defaultdict(list)
        namespaces: list[nn.Module] = []
        for node in nodes:
            held: defaultdict[str, list[_Member]] = defaultdict(list)
            for name, child in [("", node)] if self._tree.is_container(node) else self._tree.children(node):
                match = _NUMBERED.fullmatch(name)
                stem = name if match is None else match[1]
                parallel = _PARALLEL.search(stem) is not None
                if self._tree.is_container(child) and (match is None or not self._is_block(child)):
                    if not parallel or has_forward(inner_module(child)):
                        held[stem] += self._members(child, in_list=False)
                elif match is not None and not parallel:
                    numbered[stem].append(child)
                else:
                    namespaces.append(child)
            for stem, members in held.items():
                containers[stem].append(members)
        found: list[nn.Module] = []
        for stem, held_by in containers.items():
            found += self._of_containers(stem, held_by, within)
        for stem, attributes in numbered.items():
            blocks, others = self._of_numbered(stem, attributes, len(nodes), within)
            found += blocks
            namespaces += others
        return found if within else found + [block for module in namespaces for block in self._below(module)]

    def _below(self, namespace: nn.Module) -> list[nn.Module]:
        if id(namespace) in self._entered or not self._tree.children(namespace):
            return []
        self._entered.add(id(namespace))
        return self.blocks([namespace], within=False)

    def _refined(self, family: Sequence[nn.Module]) -> list[nn.Module]:
        """Return the blocks inside of the members of a family if these are stages; otherwise the members."""
        members = _unique(family)
        if isinstance(inner_module(members[0]), (nn.ModuleList, nn.ModuleDict)) or (
            isinstance(inner_module(members[0]), nn.Sequential) and not self._tree.is_sequence(members[0])
        ):
            return members  # its own forward decides how the children are combined
        inner = _unique(self.blocks(members, within=True))
        if not inner:  # also if its weights are called up and down, like resampling layers
            return members
        covered = sum(map(self._tree.weights, inner))
        left = sum(map(self._tree.weights, members)) - covered
        for member in members:
            parts = self._tree.children(member)
            left -= sum(self._tree.weights(part) for name, part in parts if _RESAMPLING.search(name))
        return inner if left <= max(_GLUE * len(members), covered // 6) and 2 * left <= covered else members

    def _of_containers(self, stem: str, held: Sequence[Sequence[_Member]], within: bool) -> list[nn.Module]:
        """Return the blocks in containers of the same name, one container per node."""
        members = [member for each in held for member in each]
        composite = [member for member in members if self._tree.weights(member.module) > 1]
        kinds = Counter(self._tree.kind(member.module) for member in composite)
        if within:
            repeated = {kind for each in held for kind in self._repeated(each)}
            chosen = set(kinds) if len(kinds) == 1 else repeated
            if _PARTS_OF_STAGES.fullmatch(stem) is None:
                chosen = {kind for kind in chosen if _CLASSES_OF_BLOCKS.search(kind[0].__name__)}
        else:
            chosen = {kind for kind, times in kinds.items() if times > 1}
            alone = _is_stage(stem, composite)
            chosen |= {self._tree.kind(member.module) for member in composite if member.single or alone}
        family = [m for m in composite if self._tree.kind(m.module) in chosen]
        found = self._families([m.module for m in family])
        usual = 2 * len(family) >= len(composite) and {id(m.module) for m in family} <= {id(m) for m in found}
        for member in (m for m in composite if self._tree.kind(m.module) not in chosen):
            below = [] if within else self._below(member.module)
            beside = bool(family) and usual and not isinstance(member.holder, nn.ModuleDict)
            found += below or ([member.module] if beside else [])
        found += self._beside(members, {id(m) for m in found})
        if not found and not within:
            self.lists += self._alike(stem, members)
        return found

    def _of_numbered(
        self, stem: str, members: Sequence[nn.Module], nodes: int, within: bool
    ) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the blocks among attributes that differ only by their number, and the remaining attributes."""
        composite = [m for m in members if self._tree.weights(m) > 1]
        kinds = Counter(map(self._tree.kind, composite))
        chosen = {kind for kind, times in kinds.items() if times > nodes}
        if not chosen or (within and not _PARTS_OF_STAGES.fullmatch(stem)):
            return [], list(members)
        family = [m for m in composite if self._tree.kind(m) in chosen]
        found = self._families(family)
        usual = 2 * len(family) >= len(composite) and {id(m) for m in family} <= {id(m) for m in found}
        rest = [m for m in members if self._tree.weights(m) < 2 or self._tree.kind(m) not in chosen]
        if usual and not within:
            for other in (m for m in rest if self._tree.weights(m) > 1):
                found += self._below(other) or [other]
        return found, rest

    def _families(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Return, for each class in turn, its members or the blocks inside of them."""
        families: defaultdict[Kind, list[nn.Module]] = defaultdict(list)
        for module in modules:
            families[self._tree.kind(module)].append(module)
        return [block for family in families.values() for block in self._refined(family)]

    def _repeated(self, members: Sequence[_Member]) -> set[Kind]:
        kinds = Counter(self._tree.kind(m.module) for m in members if self._tree.weights(m.module) > 1)
        return {kind for kind, times in kinds.items() if times > 1}

    def _beside(self, members: Sequence[_Member], found: set[int]) -> list[nn.Module]:
        """Return single weights in sequences and lists in which at least half of the members are blocks.

        These are, for instance, the first or last convolution.
        """
        holders: defaultdict[int, list[_Member]] = defaultdict(list)
        for member in members:
            if not isinstance(member.holder, nn.ModuleDict) and self._tree.weights(member.module):
                holders[id(member.holder)].append(member)
        mixed = [each for each in holders.values() if 2 * sum(id(m.module) in found for m in each) >= len(each)]
        return [m.module for each in mixed for m in each if self._tree.weights(m.module) == 1]

    def _alike(self, stem: str, members: Sequence[_Member]) -> list[nn.Module]:
        """Return members with one weight each if at least half of the weighted members are of one class.

        Operations in a sequence do not count: there, every module with parameters is selected anyway.
        """
        weighted = [m for m in members if self._tree.weights(m.module) and has_forward(inner_module(m.module))]
        kinds = Counter(self._tree.kind(m.module) for m in weighted if self._tree.weights(m.module) == 1)
        if not kinds:
            return []
        usual, times = kinds.most_common(1)[0]
        family = [m for m in weighted if self._tree.kind(m.module) == usual]
        composite = bool(self._tree.children(family[0].module))
        if times == 1 and not (composite and (family[0].single or _is_stage(stem, weighted))):
            return []
        if 2 * times < len(weighted) or not (composite or any(not has_forward(m.holder) for m in family)):
            return []
        own = [m for m in members if any(True for _ in m.module.parameters()) and has_forward(inner_module(m.module))]
        return [m.module for m in own if not isinstance(m.holder, nn.ModuleDict) or self._tree.kind(m.module) == usual]

    def _members(self, container: nn.Module, in_list: bool) -> Iterator[_Member]:
        holder = inner_module(container)
        children = self._tree.children(container)
        is_list = isinstance(holder, nn.ModuleList)
        single = not has_forward(holder) and (in_list or (is_list and len(children) == 1))
        for name, child in children:
            if not self._tree.is_looked_through(child):
                yield _Member(child, holder, single)
            elif has_forward(inner_module(child)) or not _PARALLEL.search(name):
                yield from self._members(child, in_list=is_list and not has_forward(holder))

    def _is_block(self, container: nn.Module) -> bool:
        """Whether the container is a sequence of operations with several weights, such as two convolutions."""
        return self._tree.weights(container) > 1 and not self._tree.is_looked_through(container)


def _is_stage(stem: str, members: Sequence[_Member]) -> bool:
    """Whether a container has a single member and a name that marks it as one of the stages or blocks."""
    return len(members) == 1 and _PARTS_OF_STAGES.fullmatch(stem) is not None


def _unique(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _class(module: nn.Module) -> type[nn.Module]:
    """Return the class as written, without the per-module subclasses that parametrizations and FSDP create."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(kind, fsdp.FSDPModule):
        kind = kind.__bases__[-1]
    return kind


def _is_operation(module: nn.Module) -> bool:
    """Whether the parts of a module are not layers, because they have no forward or only adapt its weight."""
    return isinstance(module, nn.MultiheadAttention) or hasattr(type(module), _ADAPTER)


def _weights(module: nn.Module) -> int:
    """Return the number of weights of the module itself, without those of its children."""
    if isinstance(module, _WEIGHTS) or _is_operation(module):
        return 1
    if isinstance(module, _NO_WEIGHTS):
        return 0
    return sum(is_lazy(p) or sum(size > 1 for size in p.shape) > 1 for p in _own(module))


def _own(module: nn.Module) -> list[Tensor]:
    """Return the parameters of the module and of the wrappers around it, including those behind parametrizations."""
    inner = inner_module(module)
    if _is_operation(inner):
        return list(module.parameters())
    own: list[Tensor] = []
    while True:
        own += [p for p in module._parameters.values() if p is not None]
        if module is inner:
            break
        module = next(module.children())
    if _PARAMETRIZATIONS in inner._modules:
        own += inner._modules[_PARAMETRIZATIONS].parameters()  # type: ignore[union-attr]
    return own
