"""Wrong input: the error says which layer and argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfs import feature_stats, reference, update_stats
from fastfs._core import checks
from tests.helpers.cases import run_apart

F = torch.ones(4, 3)
DTYPES = r"expected one of torch\.float16, torch\.bfloat16, torch\.float32, torch\.float64"

# Arguments of feature_stats for one layer, the problem that is reported.
LAYER_ERRORS = {
    "integer before": ((F.int(), F.int(), F), rf"before has dtype torch\.int32, {DTYPES}"),
    "bool after": ((F, F.bool(), F), rf"after has dtype torch\.bool, {DTYPES}"),
    "complex backward": ((F, F, F.to(torch.complex64)), rf"backward has dtype torch\.complex64, {DTYPES}"),
    "conjugate view": ((F, F, F.to(torch.complex64).conj()), rf"backward has dtype torch\.complex64, {DTYPES}"),
    "float8": ((F.to(torch.float8_e4m3fn), F, F), rf"before has dtype torch\.float8_e4m3fn, {DTYPES}"),
    "dtypes differ": ((F, F.half(), F), r"after has dtype torch\.float16, expected torch\.float32 as before has"),
    "shape of after": ((F, F[1:], F), r"after has shape \(3, 3\), expected \(4, 3\) as before has"),
    "shape of backward": ((F, F, F.T), r"backward has shape \(3, 4\), expected \(4, 3\) as before has"),
    "same size": ((F, F, F.reshape(-1)), r"backward has shape \(12,\), expected \(4, 3\) as before has"),
    "broadcastable": ((F, F[:1], F), r"after has shape \(1, 3\), expected \(4, 3\) as before has"),
    "0-d": ((F, F, F[0, 0]), r"backward has shape \(\), expected \(4, 3\) as before has"),
    "device": ((F, F.to("meta"), F), r"after is on device meta, expected cpu as before is"),
    "sparse": ((F, F, F.to_sparse()), r"backward is a tensor of layout torch\.sparse_coo, expected an ordinary"),
    "mkldnn": ((F.to_mkldnn(), F, F), r"before is a tensor of layout torch\._mkldnn, expected an ordinary"),
}


def raises(error: Any, match: Any, *arguments: Any) -> None:
    """Every way in gives the same error: native and reference, whole layers and rows."""
    texts = set()
    for backend in (None, "native", "reference"):
        for per_row in (False, True):
            with pytest.raises(error, match=match) as caught:
                feature_stats(*arguments, per_row=per_row, backend=backend)
            assert type(caught.value) is error
            texts.add(str(caught.value))
    with pytest.raises(error, match=match):
        reference.feature_stats(*arguments)
    assert len(texts) == 1, texts


@pytest.mark.parametrize("case", LAYER_ERRORS)
def test_one_tensor(case: Any) -> None:
    arguments, problem = LAYER_ERRORS[case]
    raises(ValueError, f"^{problem}", *arguments)


@pytest.mark.parametrize("case", LAYER_ERRORS)
def test_layer_is_named(case: Any) -> None:
    arguments, problem = LAYER_ERRORS[case]
    problem = problem.replace("as before is", r"as before\[0\] is")
    raises(ValueError, f"^layer 2: {problem}", *([F, F.double(), x, x] for x in arguments))


def test_devices_differ_between_layers() -> None:
    on_meta = [F, F, F.to("meta")]
    raises(ValueError, r"^layer 2: before is on device meta, expected cpu as before\[0\] is", on_meta, on_meta, on_meta)


def test_numbers_of_layers_differ() -> None:
    problem = r"^expected the same number of layers in every argument, got 2 in before, 2 in after, 1 in backward"
    raises(ValueError, problem, [F, F], [F, F], [F])
    raises(ValueError, "got 1 in before, 0 in after, 0 in backward", [F], [], [])
    raises(ValueError, "got 0 in before, 0 in after, 1 in backward", [], (), [F])


NOT_TENSORS = {
    "number": (1.0, "float"),
    "none": (None, "NoneType"),
    "string": ("features", "str"),
    "bytes": (b"features", "bytes"),
    "dict": ({"a": F}, "dict"),
    "set": ({1}, "set"),
    "iterator": (iter([F]), "list_iterator"),
    "range": (iter(range(2)), "range_iterator"),
    "array": (F.numpy(), "numpy.ndarray"),
}


@pytest.mark.parametrize("case", NOT_TENSORS)
def test_not_a_tensor(case: Any) -> None:
    value, kind = NOT_TENSORS[case]
    problem = rf"expected a tensor or a sequence \(list, tuple\) of tensors, one per layer, got {kind}$"
    raises(TypeError, f"^before: {problem}", value, F, F)
    raises(TypeError, f"^after: {problem}", F, value, F)
    raises(TypeError, f"^backward: {problem}", [F], [F], value)
    raises(TypeError, rf"^layer 1: expected after\[1\] to be a tensor, got {kind}$", [F, F], [F, value], [F, F])
    with pytest.raises(TypeError, match=f"^gradients: {problem}"):
        update_stats(value, [F])
    with pytest.raises(TypeError, match=rf"^layer 0: expected updates\[0\] to be a tensor, got {kind}$"):
        update_stats([F], [value])  # type: ignore[list-item]


def test_nested_lists_are_refused() -> None:
    raises(TypeError, r"^layer 0: expected before\[0\] to be a tensor, got list$", [[F]], [[F]], [[F]])


def test_tensors_and_sequences_do_not_mix() -> None:
    problem = "^expected one tensor for every argument or a sequence for every argument, but "
    raises(TypeError, problem + "before is a tensor, after is a tensor, backward is a sequence of 1$", F, F, [F])
    raises(TypeError, problem + "before is a sequence of 4, after is a tensor", list(F), F, F)
    raises(TypeError, problem, list(F), list(F), F)  # which would be a list of rows
    with pytest.raises(TypeError, match=problem + "gradients is a sequence of 4, updates is a tensor$"):
        update_stats(list(F), F)
    with pytest.raises(TypeError, match=problem):
        update_stats(F, [F])


@pytest.mark.filterwarnings("ignore")  # torch's quantization and nested tensors are deprecated or prototypes
def test_quantized_and_nested_tensors() -> None:
    quantized = torch.quantize_per_tensor(F, 0.1, 0, torch.qint8)
    raises(ValueError, rf"^after is quantized \(torch\.qint8\), {DTYPES}", F, quantized, F)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([F, F[:2]], layout=layout)
        raises(ValueError, r"^layer 0: before is a tensor of nested, expected an ordinary", [nested], [F], [F])
        raises(ValueError, r"is a tensor of nested, expected an ordinary", nested, nested, nested)


@pytest.mark.parametrize("backend", [None, "native", "reference"])
def test_update_inputs(backend: str | None) -> None:
    for gradients, updates, problem in (
        ([F, F.int()], [F, F], rf"^layer 1: gradients has dtype torch\.int32, {DTYPES}"),
        ([F, F], [F, F.T], r"^layer 1: updates has shape \(3, 4\), expected \(4, 3\) as gradients has"),
        ([F, F], [F], r"^expected the same number of layers in every argument, got 2 in gradients, 1 in updates"),
        ([F, F], [F, F.to("meta")], r"^layer 1: updates is on device meta, expected cpu as gradients\[0\] is"),
        (F, F.to_sparse(), r"^updates is a tensor of layout torch\.sparse_coo"),
        (F, F.bool(), rf"^updates has dtype torch\.bool, {DTYPES}"),
    ):
        with pytest.raises(ValueError, match=problem):
            update_stats(gradients, updates, backend=backend)
    assert update_stats([F, F], [F.half(), F.double()], backend=backend).count.tolist() == [12, 12]


@pytest.mark.parametrize("backend", ["cuda", "", 0, False, "Native"])
def test_unknown_backend(backend: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^backend: expected None, 'native' or 'reference', got {re.escape(repr(backend))}$"
    ):
        feature_stats(F, F, F, backend=backend)
    with pytest.raises(ValueError, match=r"^backend: expected"):
        update_stats(F, F, backend=backend)


@pytest.mark.parametrize("per_row", ["no", None, 1])
def test_per_row_is_a_bool(per_row: int | str | None) -> None:
    with pytest.raises(TypeError, match=r"^per_row: expected True or False, got"):
        feature_stats(F, F, F, per_row=per_row)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        feature_stats(F, F, F, True)
    with pytest.raises(TypeError):
        update_stats(F, F, None)  # type: ignore[call-arg]


def test_other_failures_come_through_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("out of memory")

    def fails(*_: Any) -> None:
        raise failure

    for name in ("feature_stats", "feature_stats_per_row", "update_stats"):
        monkeypatch.setattr(torch.ops.fastfs, name, fails)
    for call in (
        lambda: feature_stats(F, F, F),
        lambda: feature_stats([F], [F], [F], per_row=True),
        lambda: update_stats(F, F),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert caught.value is failure


def test_errors_show_no_internal_one() -> None:
    with pytest.raises(ValueError, match="after has shape") as caught:
        feature_stats(F, F.T, F)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tensors_whose_memory_was_freed_are_an_error(backend: str) -> None:
    """As sharded training does between steps. Apart, because a null pointer read would end the process."""
    output = run_apart(
        f"""
        import torch, fastfs
        f, g = torch.ones(2, 10)
        freed = torch.ones(10)
        freed.untyped_storage().resize_(0)
        try:
            fastfs.feature_stats([f, f], [f, freed], [f, f], backend={backend!r})
        except (ValueError, RuntimeError) as error:
            print("refused:", error)
        """
    )
    assert output.startswith("refused:")


def test_checks_work_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        f = mode.from_tensor(F)
        g = f[1:]
        checks.check_feature_inputs([f], [f], [f])
        checks.check_update_inputs([f], [f])
        with pytest.raises(ValueError, match=r"^layer 1: after has shape \(3, 3\), expected \(4, 3\)"):
            checks.check_feature_inputs([f, f], [f, g], [f, f])


def test_the_op_itself_refuses_too() -> None:
    """Behind the dispatcher nothing wrong may reach raw pointers, whoever calls."""
    for arguments, _ in LAYER_ERRORS.values():
        for name in ("feature_stats", "feature_stats_per_row"):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                getattr(torch.ops.fastfs, name)(*([x] for x in arguments))
    for wrong in (([F], [F], []), ([F, F], [F], [F]), ([], [F], [F])):
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            torch.ops.fastfs.feature_stats(*wrong)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.fastfs.update_stats([F], [F.T])
