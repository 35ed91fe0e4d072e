"""Fingerprints: every way to write to a tensor, every kind of tensor, and what is compared when lists differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastfs._monitor.capture import fingerprints
from fastfs._monitor.capture.fingerprints import ELEMENTS, Fingerprint, Places


def kinds() -> list[Tensor]:
    return [
        nn.Parameter(torch.randn(40, 30)),
        nn.Parameter(torch.randn(40, 30).t()),
        torch.randn(3),
        torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last),
        torch.randn(100, dtype=torch.complex64),
        torch.randn(50).bfloat16(),
        torch.randn(200)[::2],
        torch.randn(30, 1).expand(30, 7),
        torch.arange(9),
        torch.tensor(2.0),
        torch.randn(0, 3),
        torch.eye(3).to_sparse(),
        torch.empty(4, device="meta"),
        torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
        torch.tensor([False, True]),
    ]


READ = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14]  # of which the content is looked at


def test_nothing_is_seen_where_nothing_was_done() -> None:
    tensors = kinds()
    a = Fingerprint(tensors)
    for b in (Fingerprint(tensors, a), Fingerprint(tensors)):
        assert not b.differs(a)
        assert not b.differing(a).any()
        assert b.changed_objects(a) == []


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.detach().zero_(),
    "data": lambda t: t.data.zero_(),
    "one element": lambda t: t.data.view(-1).narrow(0, 0, 1).fill_(9) if t.is_contiguous() else t.data.zero_(),
}


@pytest.mark.parametrize("index", READ)
@pytest.mark.parametrize("how", WRITES)
def test_writes_are_seen_in_the_content(index: int, how: str) -> None:
    tensors = kinds()
    before = Fingerprint(tensors)
    WRITES[how](tensors[index])
    for after in (Fingerprint(tensors, before), Fingerprint(tensors)):
        assert after.differing(before).nonzero().flatten().tolist() == [index]
        assert after.differs(before)
        assert after.changed_objects(before) == ([index] if how == "in place" else [])


def test_versions_tell_of_what_cannot_be_read() -> None:
    tensors = kinds()
    before = Fingerprint(tensors)
    tensors[11].mul_(2)
    after = Fingerprint(tensors)
    assert after.changed_objects(before) == [11]
    assert not after.differs(before)


def test_bits_are_compared() -> None:
    p = torch.tensor([torch.nan, 0.0, 1.0])
    before = Fingerprint([p])
    assert not Fingerprint([p]).differs(before)
    p[1] = -0.0
    assert Fingerprint([p]).differs(before)


def test_only_tensors_that_both_have_are_compared() -> None:
    tensors = [torch.randn(5), torch.randn(100, 3), torch.randn(4, dtype=torch.float64)]
    before = Fingerprint(tensors)
    tensors[2].data.mul_(2)
    added = [torch.randn(70), *tensors]
    after = Fingerprint(added, before)
    assert after.differing(before).tolist() == [False, False, False, True]
    assert before.differing(after).tolist() == [False, False, True]
    assert Fingerprint([torch.randn(5)]).differing(before).tolist() == [False]


def test_another_tensor_in_the_same_object() -> None:
    p = torch.randn(5)
    before = Fingerprint([p])
    p.data = p.data.clone()
    after = Fingerprint([p], before)
    assert after.changed_objects(before) == [0]
    assert not after.differs(before)
    p.data = torch.randn(6)
    assert Fingerprint([p], after).differs(before)


def test_the_elements_are_in_all_columns() -> None:
    """Masks by column and row are seen: the distance is no multiple of a row."""
    for shape in ((64, 64), (1024, 16), (100, 48), (640, 3)):
        tensor = torch.arange(shape[0] * shape[1]).view(shape)
        found = Places([tensor]).read(Places([tensor]).views([tensor])).flats[0].flatten()
        assert found.unique().numel() == ELEMENTS
        assert (found % shape[1]).unique().numel() >= min(shape[1], ELEMENTS) * 0.7, shape


def test_pairs_are_of_the_same_elements_whatever_the_strides() -> None:
    for shape, order in (((30, 20), (1, 0)), ((4, 5, 6, 7), (0, 2, 3, 1)), ((3, 4), (1, 0))):
        tensor = torch.randn(shape)
        back = torch.argsort(torch.tensor(order)).tolist()
        other = tensor.permute(order).contiguous().permute(back)
        assert other.stride() != tensor.stride()
        for like in (tensor, other):
            places = Places([like])
            views = [places.views([x]) for x in (tensor, other)]
            for change in (0.0, 1.0):
                tensor += change
                other += change
                flat = places.read(*views).flats[0]
                assert torch.equal(flat[0], flat[1])
                assert set(flat[0].tolist()) <= set(tensor.flatten().tolist())


def test_the_same_without_the_short_cuts_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "known_equal", lambda a, b: False)
    monkeypatch.setattr(fingerprints, "on_host", lambda tensor: tensor)
    test_nothing_is_seen_where_nothing_was_done()
    test_bits_are_compared()
