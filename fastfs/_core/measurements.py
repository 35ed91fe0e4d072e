"""The measurements, declared once.

From this table follow the dispatcher ops with their CPU and CUDA implementations and fakes (`ops`), the comparison with
the native core when it is loaded (`ops`), and the checks against the reference (`self_check` and the tests).
`csrc/measurements.h` is the counterpart in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastfs._core import checks
from fastfs._core.optimizer_rules import OptimizerRule
from fastfs._stats import FeatureStats, ParameterStats, Stats, UpdateStats

__all__ = ["MEASUREMENTS", "InputSpec", "KernelSpec", "MeasurementSpec"]


@dataclass(frozen=True)
class InputSpec:
    """A list of tensors, one per layer.

    Attributes:
        name: Of the argument of the op.
        near: The input that examples are a small step away from.
    """

    name: str
    near: str | None = None


@dataclass(frozen=True)
class KernelSpec:
    """A kernel of the native core: `NAME_cpu` and `NAME_cuda` in `fastfs._C`.

    Attributes:
        name: As in `csrc/measurements.h`.
        inputs: How many lists of tensors it takes. All tensors of a layer have one shape.
        coefficients: Numbers per layer. With coefficients all tensors of a layer have one dtype; without, the last
            input may have another one.
        sixteen_bit: Whether it takes float16 and bfloat16.
    """

    name: str
    inputs: int
    coefficients: int = 0
    sixteen_bit: bool = True


@dataclass(frozen=True)
class MeasurementSpec:
    """An op that reduces the elements of every layer to one row of sums.

    Attributes:
        name: Of the op in `torch.ops.fastfs`, of the function in `fastfs.reference` and of the public function.
        result: Names the sums, the columns of the op's result.
        inputs: The lists of tensors that the op takes.
        kernels: One kernel, or one per rule in the order of `OptimizerRule`.
        check: Raises TypeError or ValueError for arguments that the op does not take.
        per_row: Whether there is also an op `NAME_per_row` with a row of sums per row of a layer.
    """

    name: str
    result: type[Stats]
    inputs: tuple[InputSpec, ...]
    kernels: tuple[KernelSpec, ...]
    check: Callable[..., object]
    per_row: bool = False

    @property
    def ruled(self) -> bool:
        """Whether a rule selects the kernel. The op then takes `rule` first, and `coefficients` and `pieces` last."""
        return len(self.kernels) > 1

    @property
    def arguments(self) -> str:
        """The arguments of the op, as in its schema."""
        lists = ", ".join(f"Tensor[] {x.name}" for x in self.inputs)
        return f"int rule, {lists}, Tensor coefficients, Tensor? pieces=None" if self.ruled else lists

    @property
    def columns(self) -> int:
        """Numbers per row of the result."""
        return len(self.result.names)

    def select(self, arguments: Sequence[Any]) -> tuple[int, tuple[list[Tensor], ...], Any, Tensor | None]:
        """Selects the kernel for the arguments of the op.

        Returns:
            The index of the kernel, its inputs, its coefficients or None, and the pieces that it reads or None for all
            of every input.

        Raises:
            ValueError: For an unknown rule, or for tensors that the rule does not take.
        """
        if not self.ruled:
            return 0, tuple(arguments), None, None
        rule, *lists, coefficients = arguments[: len(self.inputs) + 2]
        pieces = arguments[-1] if len(arguments) > len(self.inputs) + 2 else None
        kernel = self.kernels[OptimizerRule(rule)]
        if any(lists[kernel.inputs :]):
            raise ValueError(f"expected no {self.inputs[kernel.inputs].name} state for {OptimizerRule(rule).name}")
        return rule, tuple(lists[: kernel.inputs]), coefficients, pieces


MEASUREMENTS = (
    MeasurementSpec(
        "feature_stats",
        FeatureStats,
        (InputSpec("before"), InputSpec("after", near="before"), InputSpec("backward")),
        (KernelSpec("feature_stats", 3),),
        checks.check_feature_inputs,
        per_row=True,
    ),
    MeasurementSpec(
        "update_stats",
        UpdateStats,
        (InputSpec("gradients"), InputSpec("updates")),
        (KernelSpec("update_stats", 2),),
        checks.check_update_inputs,
    ),
    MeasurementSpec(
        "optimizer_stats",
        ParameterStats,
        (InputSpec("gradients"), InputSpec("parameters"), InputSpec("first"), InputSpec("second")),
        tuple(
            KernelSpec(
                f"{rule.name.lower()}_stats",
                2 + rule.states,
                len(rule.coefficients),
                sixteen_bit=rule is OptimizerRule.LINEAR,
            )
            for rule in OptimizerRule
        ),
        checks.check_optimizer_inputs,
    ),
)
