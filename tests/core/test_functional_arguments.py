"""feature_stats and update_stats: forms of the arguments, results, side effects, backends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastfs
from fastfs import FeatureStats, UpdateStats, _functional, feature_stats, reference, update_stats
from fastfs._core import ops
from tests.helpers.cases import SHAPES, inputs, layers
from tests.helpers.compare import assert_same

# Arguments and results


def test_shapes_of_results() -> None:
    f, g, b = inputs((2, 3, 5))
    assert feature_stats(f, g, b).shape == ()
    assert feature_stats([f], [g], [b]).shape == (1,)
    assert feature_stats(f, g, b, per_row=True).shape == (6,)
    rows = feature_stats([f, f[0, 0, 0], f[0]], [g, g[0, 0, 0], g[0]], [b, b[0, 0, 0], b[0]], per_row=True)
    assert isinstance(rows, list)
    assert [r.shape for r in rows] == [(6,), (1,), (3,)]
    assert update_stats(f, b).shape == ()
    assert update_stats([f, g], [b, b]).shape == (2,)
    assert isinstance(feature_stats(f, g, b), FeatureStats)
    assert isinstance(update_stats(f, b), UpdateStats)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_layers(backend: str) -> None:
    assert feature_stats([], [], [], backend=backend).shape == (0,)
    assert feature_stats((), [], (), per_row=True, backend=backend) == []
    assert update_stats([], (), backend=backend).shape == (0,)


class Custom(list[Tensor]):
    """A sequence that is not a plain list."""


def test_any_sequence_is_taken() -> None:
    f, g, b = layers(SHAPES[:5])
    expected = feature_stats(f, g, b)
    for kind in (tuple, Custom):
        assert feature_stats(kind(f), kind(g), kind(b)) == expected
    assert feature_stats(tuple(f), g, Custom(b)) == expected
    assert len(feature_stats(Custom(f), g, b, per_row=True)) == 5
    assert update_stats(Custom(f), tuple(b)) == update_stats(f, b)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_results_are_detached(backend: str) -> None:
    f, g, b = (x.requires_grad_() for x in inputs((5, 3)))
    p = torch.nn.Parameter(f.detach().clone())
    for stats in (
        feature_stats(f, g, b, backend=backend),
        feature_stats([f * 2, p], [g, g], [b, b], backend=backend),
        *feature_stats([f, p], [g, g], [b, b], per_row=True, backend=backend),
        update_stats(p, b, backend=backend),
    ):
        assert not stats.sums.requires_grad
        assert stats.sums.grad_fn is None
        assert not stats.angle.requires_grad


def test_inputs_are_left_alone() -> None:
    f, g, b = layers()
    before = [x.clone() for x in (*f, *g, *b)]
    versions = [x._version for x in (*f, *g, *b)]
    feature_stats(f, g, b)
    feature_stats(f, g, b, per_row=True)
    update_stats(f, b)
    assert all(torch.equal(x, y) for x, y in zip((*f, *g, *b), before, strict=True))
    assert [x._version for x in (*f, *g, *b)] == versions


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_random_states_are_left_alone(backend: str) -> None:
    import random

    import numpy as np

    f, g, b = inputs((100,))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    feature_stats(f, g, b, backend=backend)
    update_stats(f, b, backend=backend)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002


# Backends


def test_reference_backend_is_the_reference() -> None:
    f, g, b = layers()
    assert_same(feature_stats(f, g, b, backend="reference").sums, reference.feature_stats(f, g, b).sums)
    assert_same(update_stats(f, b, backend="reference").sums, reference.update_stats(f, b).sums)
    for one, twin in zip(
        feature_stats(f, g, b, per_row=True, backend="reference"),
        reference.feature_stats(f, g, b, per_row=True),
        strict=True,
    ):
        assert_same(one.sums, twin.sums)
    assert_same(feature_stats(f, g, b, backend="native").sums, feature_stats(f, g, b).sums)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops, "native_available", lambda: False)
    monkeypatch.setattr(ops, "why_not_native", lambda: "it was not built; reinstall with a C++ compiler")
    _functional._warn_once.cache_clear()
    yield
    _functional._warn_once.cache_clear()


def test_without_native_core_one_warning_with_the_cure(no_native: None) -> None:
    f, g, b = inputs((10,))
    with pytest.warns(RuntimeWarning, match=r"slow reference.*reinstall with a C\+\+ compiler") as caught:
        stats = feature_stats(f, g, b)
    assert caught[0].filename == __file__
    assert stats == reference.feature_stats(f, g, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert update_stats(f, b) == reference.update_stats(f, b)
        assert feature_stats(f, g, b) == stats


def test_without_native_core_asking_for_it_is_an_error(no_native: None) -> None:
    f, g, b = inputs((10,))
    for call in (lambda: feature_stats(f, g, b, backend="native"), lambda: update_stats(f, b, backend="native")):
        with pytest.raises(RuntimeError, match=r"native.*reinstall with a C\+\+ compiler"):
            call()


def test_without_native_core_asking_for_the_reference_is_silent(no_native: None) -> None:
    f, g, b = inputs((10,))
    assert feature_stats(f, g, b, backend="reference").count == 10


def test_public_names() -> None:
    for name in ("feature_stats", "update_stats", "FeatureStats", "UpdateStats", "reference", "__version__"):
        assert hasattr(fastfs, name)
