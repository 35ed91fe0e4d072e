"""Checks of the inputs of measurements.

The native path calls them only after a failure, to raise the clearest error; the fake kernels and the reference call
them first. They read no data, so they work on fake and meta tensors and while tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastfs._core.optimizer_rules import OptimizerRule

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Layers = Tensor | Sequence[Tensor]


def as_layers(**arguments: Layers) -> tuple[bool, list[list[Tensor]]]:
    """Converts every argument to a list of tensors.

    Returns:
        Whether the arguments are single tensors, and a list of layers per argument.

    Raises:
        TypeError: If the arguments are not all tensors or all sequences of tensors.
        ValueError: If the sequences differ in length.
    """
    single = [isinstance(value, Tensor) for value in arguments.values()]
    if all(single):
        return True, [[value] for value in arguments.values()]  # type: ignore[list-item]

    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not _is_sequence(value):
            raise TypeError(
                f"{name}: expected a tensor or a sequence (list, tuple) of tensors, one per layer, got {_kind(value)}"
            )
    if any(single):
        kinds = ", ".join(
            f"{name} is a {'tensor' if alone else f'sequence of {len(value)}'}"
            for (name, value), alone in zip(arguments.items(), single, strict=True)
        )
        raise TypeError(f"expected one tensor for every argument or a sequence for every argument, but {kinds}")

    layers = [list(value) for value in arguments.values()]
    for name, tensors in zip(arguments, layers, strict=True):
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"layer {index}: expected {name}[{index}] to be a tensor, got {_kind(tensor)}")
    if len({len(tensors) for tensors in layers}) > 1:
        counts = ", ".join(f"{len(tensors)} in {name}" for name, tensors in zip(arguments, layers, strict=True))
        raise ValueError(f"expected the same number of layers in every argument, got {counts}")
    return False, layers


def check_feature_inputs(before: Layers, after: Layers, backward: Layers) -> tuple[bool, list[list[Tensor]]]:
    """Checks the inputs of `feature_stats`: tensors, or sequences with one tensor per layer.

    Every layer needs one shape, one dtype for `before` and `after` (`backward` may have another), and all tensors
    one device.

    Returns:
        Whether the arguments are single tensors, and the layers of `before`, `after` and `backward` as lists.

    Raises:
        TypeError: For anything that is not a tensor or a sequence of tensors, or a mixture of the two.
        ValueError: For a wrong dtype, layout, shape, device or number of layers; names the layer and the argument.
    """
    single, layers = as_layers(before=before, after=after, backward=backward)
    _check_layers(("before", "after", "backward"), layers, single)
    for index, (old, new) in enumerate(zip(layers[0], layers[1], strict=True)):
        if old.dtype != new.dtype:
            _fail(index, single, f"after has dtype {new.dtype}, expected {old.dtype} as before has")
    return single, layers


def check_update_inputs(gradients: Layers, updates: Layers) -> tuple[bool, list[list[Tensor]]]:
    """Checks the inputs of `update_stats`: tensors, or sequences with one tensor per parameter.

    Every parameter needs one shape for its gradient and update (their dtypes may differ), and all tensors one device.

    Returns:
        Whether the arguments are single tensors, and the layers of `gradients` and `updates` as lists.

    Raises:
        TypeError: For anything that is not a tensor or a sequence of tensors, or a mixture of the two.
        ValueError: For a wrong dtype, layout, shape, device or number of layers; names the layer and the argument.
    """
    single, layers = as_layers(gradients=gradients, updates=updates)
    _check_layers(("gradients", "updates"), layers, single)
    return single, layers


def check_row_inputs(x: Tensor, rows: Tensor, row_dims: int, dtype: torch.dtype | None = None) -> None:
    """Checks the inputs of `gather_rows` and `row_squares`, except the values of `rows`, which are data.

    Raises:
        TypeError: If `x` or `rows` is not a tensor.
        ValueError: For a wrong dtype, layout, shape or device; names the argument.
    """
    for name, tensor in (("x", x), ("rows", rows)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_kind(tensor)}")
    _check_layers(("x",), [[x]], True)
    if not 0 <= row_dims <= x.dim():
        shape = f"x has shape {tuple(x.shape)}"
        raise ValueError(f"row_dims is {row_dims}, expected 0 to {x.dim()}, the dimensions that number rows: {shape}")
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.layout != torch.strided:
        got = f"{rows.dtype} of shape {tuple(rows.shape)}"
        raise ValueError(f"rows is {got}, expected an ordinary tensor of torch.int64 with one dimension")
    if rows.device != x.device:
        raise ValueError(f"rows is on device {rows.device}, expected {x.device} as x is")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected {_supported()} or None")


def check_optimizer_inputs(
    rule: int,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    coefficients: Tensor,
    pieces: Tensor | None = None,
) -> tuple[OptimizerRule, list[list[Tensor]]]:
    """Checks the inputs of `optimizer_stats`: sequences with one tensor per parameter, coefficients and pieces.

    The values of pieces are data, which are not read: :func:`check_pieces` does that.

    Returns:
        The rule, and the gradients, parameters and states that it takes as lists.

    Raises:
        TypeError: For anything that is not a sequence of tensors.
        ValueError: For an unknown rule, or a wrong dtype, layout, shape, device or number of tensors.
    """
    if rule not in list(OptimizerRule):
        raise ValueError(
            f"rule: expected one of {', '.join(f'{r.value} ({r.name})' for r in OptimizerRule)}, got {rule!r}"
        )
    rule = OptimizerRule(rule)
    given: dict[str, Layers] = {"gradients": gradients, "parameters": parameters, "first": first, "second": second}
    if rule.states == 1 and len(given.pop("second")) > 0:
        raise ValueError(f"second: rule {rule.name} has one state, expected an empty list, got {len(second)} tensors")
    for name, value in given.items():
        if isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a sequence of tensors, got a tensor")
    _, layers = as_layers(**given)
    _check_layers(tuple(given), layers, False)
    for index, tensors in enumerate(zip(*layers, strict=True)):
        for name, tensor in zip(given, tensors, strict=True):
            if tensor.dtype != tensors[0].dtype:
                _fail(index, False, f"{name} has dtype {tensor.dtype}, expected {tensors[0].dtype} as gradients has")
        if rule is not OptimizerRule.LINEAR and tensors[0].dtype not in (torch.float32, torch.float64):
            _fail(index, False, f"rule {rule.name} takes float32 and float64, got {tensors[0].dtype}")
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients: expected a tensor, got {_kind(coefficients)}")
    if pieces is not None:
        if not isinstance(pieces, Tensor):
            raise TypeError(f"pieces: expected a tensor or None, got {_kind(pieces)}")
        fine = pieces.dtype == torch.int64 and pieces.dim() == 2 and pieces.shape[1] == 3
        if not fine or pieces.device.type != "cpu" or not pieces.is_contiguous():
            got = f"{pieces.dtype} of shape {tuple(pieces.shape)} on {pieces.device}"
            raise ValueError(f"pieces: expected contiguous int64 of shape (P, 3) on the CPU, got {got}")
    shape = (len(layers[0]) if pieces is None else pieces.shape[0], len(rule.coefficients))
    if coefficients.dtype != torch.float64 or tuple(coefficients.shape) != shape:
        raise ValueError(
            f"coefficients: expected float64 of shape {shape} for rule {rule.name} ({', '.join(rule.coefficients)}), "
            f"got {coefficients.dtype} of shape {tuple(coefficients.shape)}"
        )
    devices = {torch.device("cpu"), *(x.device for x in layers[0][:1])}
    if coefficients.device not in devices:
        expected = " or ".join(sorted(map(str, devices)))
        raise ValueError(f"coefficients: expected them on {expected}, got {coefficients.device}")
    return rule, layers


def check_pieces(layers: Sequence[Sequence[Tensor]], pieces: Tensor) -> None:
    """Checks that pieces are parts of the tensors, and that tensors which are cut are contiguous.

    Args:
        layers: The lists of tensors of :func:`check_optimizer_inputs`.
        pieces: int64 (P, 3): index of a tensor, first element, number of elements.

    Raises:
        ValueError: For a piece that is not there; names it.
    """
    for number, (index, begin, count) in enumerate(pieces.tolist()):
        if not 0 <= index < len(layers[0]):
            raise ValueError(f"piece {number}: there is no tensor {index} among {len(layers[0])}")
        size = layers[0][index].numel()
        if begin < 0 or count < 0 or begin + count > size:
            raise ValueError(
                f"piece {number}: {count} elements from element {begin} on are not within tensor {index} of {size}"
            )
        if count < size and not all(each[index].is_contiguous() for each in layers):
            raise ValueError(f"piece {number}: tensor {index} is not contiguous, it can only be read as a whole")


def _check_layers(names: Sequence[str], arguments: list[list[Tensor]], single: bool) -> None:
    for index, tensors in enumerate(zip(*arguments, strict=True)):
        first = tensors[0]
        for name, tensor in zip(names, tensors, strict=True):
            if hasattr(tensor, "to_local"):
                local = "pass the .to_local() of every argument and merge the ranks with all_reduce()"
                _fail(
                    index, single, f"{name} is a {type(tensor).__name__}, expected a tensor of this rank alone: {local}"
                )
            if tensor.is_quantized:
                _fail(index, single, f"{name} is quantized ({tensor.dtype}), expected {_supported()}")
            if tensor.is_nested or tensor.layout != torch.strided:
                layout = "nested" if tensor.is_nested else f"layout {tensor.layout}"
                _fail(index, single, f"{name} is a tensor of {layout}, expected an ordinary (strided) tensor")
            if tensor.dtype not in DTYPES:
                _fail(index, single, f"{name} has dtype {tensor.dtype}, expected {_supported()}")
            if tensor.shape != first.shape:
                shape = f"{name} has shape {tuple(tensor.shape)}"
                _fail(index, single, f"{shape}, expected {tuple(first.shape)} as {names[0]} has")
            if tensor.device != arguments[0][0].device:
                source = names[0] if index == 0 else f"{names[0]}[0]"
                device = f"{name} is on device {tensor.device}"
                _fail(index, single, f"{device}, expected {arguments[0][0].device} as {source} is")


def _fail(index: int, single: bool, problem: str) -> NoReturn:
    raise ValueError(problem if single else f"layer {index}: {problem}")


def _supported() -> str:
    return "one of " + ", ".join(str(dtype) for dtype in DTYPES)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
