"""What a rank contributes to a step, as bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fastfs._record.ranks.part import KINDS, Place, RankPart, Share

numbers = st.floats(allow_nan=True) | st.integers(-(2**60), 2**60) | st.none() | st.booleans() | st.text()
json_values = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
shares = st.builds(Share, st.text(), st.integers(1, 8), st.integers(0, 7))


@st.composite
def places(draw: Any) -> Place:
    ranks = draw(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True).map(sorted))
    rank = draw(st.sampled_from(ranks))
    peers = sorted({rank, *draw(st.lists(st.sampled_from(ranks), max_size=3))})
    kinds = tuple(draw(st.lists(shares, min_size=1, max_size=3)))
    weight = draw(st.none() | st.floats(0.1, 10))
    return Place(rank, tuple(ranks), tuple(peers), weight, kinds, draw(st.integers(0, 3)), 4)


parts = st.builds(
    RankPart,
    st.sampled_from(KINDS),
    st.integers(0, 2**53 - 1),
    st.floats(0, 1e10),
    places(),
    st.dictionaries(st.text(), numbers, max_size=4),
    st.dictionaries(st.text(), json_values, max_size=4),
    st.dictionaries(
        st.text(max_size=8),
        arrays.arrays(np.float64, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
        max_size=4,
    ),
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=200, deadline=None)
@given(parts)
def test_a_part_comes_back_as_it_was(part: RankPart) -> None:
    found = RankPart.from_bytes(part.to_bytes())
    assert (found.kind, found.step, found.time, found.place) == (part.kind, part.step, part.time, part.place)
    assert same(found.scalars, part.scalars)
    assert same(found.facts, part.facts)
    assert list(found.arrays) == list(part.arrays)
    for name, array in part.arrays.items():
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()
        assert found.arrays[name].flags.writeable


@settings(max_examples=200, deadline=None)
@given(parts, st.data())
def test_what_is_cut_off_is_refused(part: RankPart, data: st.DataObject) -> None:
    whole = part.to_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ValueError, match="expected the part of a rank, got"):
        RankPart.from_bytes(cut)
    with pytest.raises(ValueError, match="its length is not that of its arrays"):
        RankPart.from_bytes(whole + b"\0")


@settings(max_examples=300, deadline=None)
@given(parts, st.data())
def test_changed_bytes_are_refused_or_make_a_part_with_the_right_types(part: RankPart, data: st.DataObject) -> None:
    whole = bytearray(part.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = RankPart.from_bytes(bytes(whole))
    except ValueError:
        return
    assert found.kind in KINDS
    assert type(found.step) is int
    assert found.step >= 0
    assert found.place.rank in found.place.ranks
    found.to_bytes()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | json_values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="expected the part of a rank"):
        RankPart.from_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "header"}, {"step": -1}, {"step": 1.5}, {"step": True}, {"time": None}, {"time": float("nan")},
        {"scalars": []}, {"facts": None}, {"arrays": {"a": [-1, -8]}}, {"arrays": {"a": [2**70]}}, {"arrays": []},
        {"place": {}}, {"more": 1}, {"arrays": {"a": [1.0]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_refused(change: dict[str, Any]) -> None:
    head, _, rest = RankPart("skipped", 3, 1.0, Place(), {"reason": "x"}).to_bytes().partition(b"\n")
    changed = json.dumps(json.loads(head) | change).encode() + b"\n" + rest
    with pytest.raises(ValueError, match="expected the part of a rank"):
        RankPart.from_bytes(changed)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the part of a rank"):
        RankPart.from_bytes(b'{"a":' * 100_000)
