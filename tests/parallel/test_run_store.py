"""The keys that the ranks of a run share: decisions are the same on every rank, and old ones are deleted."""

from __future__ import annotations

import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from fastfs._record.ranks.run_store import RankError, RunStore
from tests.helpers.rank_stores import STORES, FaultyStore, make_store, run_stores

PATIENCE = 0.15
LATE = 4 * PATIENCE


def together(stores: list[RunStore], ask: Any) -> list[Any]:
    """Calls ``ask(store)`` for all ranks at once; returns results and exceptions."""
    results: list[Any] = [None] * len(stores)

    def run(rank: int) -> None:
        try:
            results[rank] = ask(stores[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return results


BEHAVIOURS = st.sampled_from(["votes"] * 5 + ["refuses", "differs", "is absent", "is late"])


@settings(max_examples=25, deadline=None)
@given(st.lists(BEHAVIOURS, min_size=2, max_size=4), st.integers(0, 2**32))
def test_all_ranks_that_get_an_answer_get_the_same_one(behaviours: list[str], seed: int) -> None:
    waits = {"is absent", "is late"} & set(behaviours)
    stores = run_stores(HashStore(), len(behaviours), PATIENCE if waits else 15.0)

    def ask(store: RunStore) -> Any:
        mine = behaviours[store.rank]
        if mine == "is absent":
            return "absent"
        delay = LATE if mine == "is late" else random.Random(seed + store.rank).random() * PATIENCE / 3
        time.sleep(delay)
        return store.decide("a", "other" if mine == "differs" else "one", "no" if mine == "refuses" else None)

    answers = [answer for answer in together(stores, ask) if answer != "absent"]
    assert len(set(answers)) <= 1
    if {"refuses", "is absent"} & set(behaviours):
        assert answers[:1] != [None]
    if set(behaviours) == {"votes"}:
        assert answers[0] is None


@pytest.mark.parametrize("seed", range(40))
def test_a_connection_that_fails_does_not_split_the_ranks(seed: int) -> None:
    stores = run_stores(HashStore(), 3, PATIENCE)
    for store in stores:
        store._store = FaultyStore(store._store, 100 * seed + store.rank, 0.1)
    asked = [together(stores, lambda store, n=number: store.decide(str(n), "v", None)) for number in range(4)]
    for answers in asked:
        assert len({answer for answer in answers if not isinstance(answer, Exception)}) <= 1


@pytest.mark.parametrize("kind", STORES)
def test_decisions_on_every_store(kind: str, tmp_path: Path) -> None:
    stores = run_stores(make_store(kind, tmp_path), 3, 5.0)
    assert together(stores, lambda store: store.decide("a", "", None)) == [None] * 3
    refused = together(stores, lambda store: store.decide("b", "", "full" if store.rank == 1 else None))
    assert refused == ["rank 1: full"] * 3
    differ = together(stores, lambda store: store.decide("c", str(store.rank // 2), None))
    assert len(set(differ)) == 1
    assert re.fullmatch(r"rank \d has run .+, another rank .+", differ[0])
    differ = together(stores, lambda store: store.decide("d", "x" * (store.rank == 2), None))  # beside an empty vote
    assert re.fullmatch(r"rank \d has run .+, another rank .+", differ[0])
    assert len({store.first("run", f"id{store.rank}") for store in stores}) == 1


@pytest.mark.parametrize("lazy", [False, True], ids=["all", "one refuses"])
def test_keys_are_deleted(lazy: bool) -> None:
    base = HashStore()
    stores = run_stores(base, 2, 10.0)
    most = 0

    def ask(store: RunStore) -> None:
        nonlocal most
        for number in range(1500):
            store.decide(str(number), "v", "no" if lazy and store.rank == number % 2 else None)
            most = max(most, base.num_keys())

    together(stores, ask)
    assert base.num_keys() <= 20
    assert most <= 30 if not lazy else most


def test_a_rank_that_never_comes_leaves_no_keys() -> None:
    base = HashStore()
    stores = run_stores(base, 2, 0.001)
    for number in range(300):
        assert "only 1 of 2 ranks" in str(stores[1].decide(str(number), "v", None))
    assert base.num_keys() <= 20


def test_patience_shrinks_and_comes_back(tmp_path: Path) -> None:
    stores = run_stores(HashStore(), 2, 1.5)
    began = time.monotonic()
    assert "within 1.5 s" in str(stores[0].decide("a", "", None))
    assert "within 1 s" in str(stores[0].decide("b", "", None))
    assert stores[1].decide("a", "", None) == "only 1 of 2 ranks came to the measurement within 1.5 s"
    assert time.monotonic() - began > 2.4
    assert together(stores, lambda store: store.decide("c", "", None)) == [None, None]
    assert not any(store._hasty for store in stores)


def test_the_ranks_that_are_missing_are_named() -> None:
    stores = run_stores(HashStore(), 4, 0.2)
    stores[3].set("here/here/3", b"x")
    with pytest.raises(RankError, match=r"no answer from rank 1, 2 of 4 within 0\.2 s"):
        stores[0].collect("here", "x")


def test_an_attachment_that_failed_is_undone() -> None:
    base = HashStore()
    stores = run_stores(base, 2, 1.0)
    stores[0].release()
    stores[1].release()
    again = run_stores(base, 2, 1.0)
    assert [store._prefix for store in again] == [store._prefix for store in stores]
    assert run_stores(base, 2, 1.0)[0]._prefix != again[0]._prefix


def test_a_store_that_is_gone_raises_and_does_not_wait() -> None:
    stores = run_stores(HashStore(), 2, 30.0)
    stores[0]._store = FaultyStore(stores[0]._store, 0, 1.0)
    began = time.monotonic()
    with pytest.raises(RankError, match=r"the store of the process group cannot be reached \(gone\)"):
        stores[0].decide("a", "", None)
    with pytest.raises(RankError, match="cannot be reached"):
        stores[0].add("b", 1)
    assert time.monotonic() - began < 20


def test_different_values_are_collected_once_and_in_one_order() -> None:
    stores = run_stores(HashStore(), 4, 15.0)
    found = together(stores, lambda store: store.collect("layers", "ab"[store.rank % 2]))
    assert sorted(found[0]) == ["a", "b"]
    assert found == [found[0]] * 4
