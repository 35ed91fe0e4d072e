"""How the parts of the ranks come together: any order, delay, loss and death leaves an ordered record."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from fastfs._record.ranks import exchange
from fastfs._record.ranks.exchange import Alone, Gatherer, Inbox, Sender
from fastfs._record.ranks.part import RankPart
from fastfs._record.record import Record
from tests.helpers.rank_stores import Clock, CountingAssembler, FaultyStore, run_stores, small_part

TIMEOUT = 5.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(exchange, "time", made)
    return made


def who(records: list[Record]) -> list[tuple[int, str]]:
    return [(record.step, str(record.scalars.get("who"))) for record in records]


# The gatherer alone

EVENTS = st.sampled_from(["next", "next", "next", "lost", "dead", "sleep", "ends"])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.integers(0, 3), EVENTS, st.sampled_from([0.0, 0.3, 2.0, 7.0])), max_size=60),
)
def test_any_order_of_events(world: int, events: list[tuple[int, str, float]]) -> None:
    clock: Clock = vars(exchange)["time"]
    queue: list[tuple[int, RankPart | None]] = []

    def inbox() -> list[tuple[int, RankPart | None]]:
        taken = queue[:]
        queue.clear()
        return taken

    warned: list[str] = []
    gatherer = Gatherer(CountingAssembler(), range(world), inbox, TIMEOUT, warned.append)
    steps = [0] * world
    gone: set[int] = set()
    arrived: dict[int, set[int]] = {}
    first: dict[int, float] = {}
    records: list[Record] = []
    for number, event, delay in events:
        rank = number % world
        if event == "sleep":
            clock.now += delay
        elif rank not in gone:
            if event == "next":
                part = small_part(rank, steps[rank], world)
                if rank:
                    queue.append((rank, part))
                else:
                    records += gatherer.take([part])
                arrived.setdefault(steps[rank], set()).add(rank)
            if event in ("dead", "ends") and rank:
                gone.add(rank)
                queue.extend([(rank, None)] if event == "ends" else [])
            steps[rank] += event in ("next", "lost")
        before = clock.now
        records += gatherer.collect(force=False, last=False)
        assert clock.now == before  # it waits for nobody
        for step in arrived:
            first.setdefault(step, clock.now)
        open_steps = set(arrived) - {record.step for record in records}
        assert all(clock.now - first[step] < TIMEOUT for step in open_steps if step >= gatherer._done[0])
    before = clock.now
    records += gatherer.collect(force=True, last=True)
    assert clock.now - before <= TIMEOUT + 0.1
    found = [record.step for record in records]
    assert found == sorted(set(found))
    total = 0
    for record in records:
        ranks = {int(rank) for rank in str(record.scalars["who"]).split(",")}
        assert ranks <= arrived[record.step]
        total += len(ranks)
    assert total + gatherer.lost == sum(map(len, arrived.values()))  # every part is in a record, or counted
    assert not gatherer._steps
    assert gatherer._values == 0


def test_a_late_rank_is_waited_for_again_once_it_is_heard_of(clock: Clock) -> None:
    queue: list[tuple[int, RankPart | None]] = []
    warned: list[str] = []
    gatherer = Gatherer(CountingAssembler(), [0, 1], lambda: [queue.pop(0)] if queue else [], TIMEOUT, warned.append)

    def step(number: int) -> list[tuple[int, str]]:
        gatherer.take([small_part(0, number, 2)])
        return who(gatherer.collect(force=False, last=False))

    assert step(0) == []
    clock.now += TIMEOUT
    assert step(1) == [(0, "0"), (1, "0")]
    assert warned == ["fastfs.Monitor: nothing has come from rank 1 for 5 s; the record goes on without, and says so"]
    queue.append((1, small_part(1, 0, 2)))
    assert step(2) == []  # rank 1 is back
    assert gatherer.lost == 1
    queue.append((1, small_part(1, 2, 2)))
    assert who(gatherer.collect(force=False, last=False)) == [(2, "0,1")]
    assert len(warned) == 1


def test_several_parts_of_a_step_are_matched_in_order() -> None:
    gatherer = Gatherer(CountingAssembler(), [0, 1], list, TIMEOUT, print)
    for rank in (0, 1):
        gatherer.take([small_part(rank, 3, 2, "skipped", before=True), small_part(rank, 3, 2), small_part(rank, 4, 2)])
    records = gatherer.collect(force=False, last=False)
    assert [(r.kind, r.step, r.scalars["who"]) for r in records] == [
        ("skipped", 3, "0,1"), ("measured", 3, "0,1"), ("measured", 4, "0,1"),
    ]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before the row is complete", "after it"])
def test_what_a_rank_says_after_its_row_waits_for_nobody(after: bool) -> None:
    gatherer = Gatherer(CountingAssembler(), [0, 1], list, TIMEOUT, print)
    remark = small_part(1, 3, 2, "skipped")
    gatherer.take([small_part(1, 3, 2)] if after else [small_part(1, 3, 2), remark])
    gatherer.take([small_part(0, 3, 2)])
    records = who(gatherer.collect(force=False, last=False))
    gatherer.take([remark] if after else [])
    records += who(gatherer.collect(force=False, last=False))
    assert records == ([(3, "0,1"), (3, "1")] if after else [(3, "0,1,1")])
    assert not gatherer._remarks
    assert gatherer.due_at() is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_MOST", 10)
    gatherer = Gatherer(CountingAssembler(), [0, 1], list, TIMEOUT, lambda _: None)
    records = []
    for step in range(100):
        gatherer.take([small_part(0, step, 2)])
        records += gatherer.collect(force=False, last=False)
        assert len(gatherer._steps) <= 10
    monkeypatch.setattr(exchange, "_MOST_VALUES", 1)
    records += gatherer.collect(force=False, last=False)
    assert len(records) == 100


class Failing(CountingAssembler):
    def records(self, parts: list[RankPart]) -> list[Record]:
        if parts[0].step == 1:
            raise KeyError("touched")
        return super().records(parts)


@pytest.mark.parametrize("alone", [True, False])
def test_parts_that_do_not_belong_together_lose_their_step_only(alone: bool) -> None:
    gatherer = Gatherer(Failing(), [0], list, TIMEOUT, print)
    collector: Any = Alone(Failing()) if alone else gatherer
    records = collector.take([small_part(0, step, 1) for step in range(3)])
    records += collector.collect(force=False, last=False)
    assert [record.kind for record in records] == ["measured", "skipped", "measured"]
    assert records[1].scalars == {"reason": "the parts of the ranks could not be merged (KeyError: 'touched')"}


# Through a store


def test_a_sender_that_died_after_it_took_a_number_holds_up_nobody(clock: Clock) -> None:
    stores = run_stores(HashStore(), 3, TIMEOUT)
    inbox, sender = Inbox(stores[0], print), Sender(stores[2], print)
    stores[1].add("sent", 1)  # by rank 1, which has died
    sender.take([small_part(2, step, 3) for step in range(2)])
    sender.collect(force=False, last=False)
    assert [(rank, part.step) for rank, part in inbox()] == [(2, 0), (2, 1)]
    assert list(inbox._missing) == [1]
    clock.now += TIMEOUT + 0.1
    assert inbox() == []
    assert not inbox._missing


def test_a_message_that_comes_later_than_its_number() -> None:
    stores = run_stores(HashStore(), 2, TIMEOUT)
    inbox = Inbox(stores[0], print)
    number = stores[1].add("sent", 1)
    assert inbox() == []
    stores[1].set(f"part/{number}", b"1 1 " + small_part(1, 7, 2).to_bytes())
    assert [(rank, part.step) for rank, part in inbox()] == [(1, 7)]


@pytest.mark.parametrize("garbage", [b"", b"no numbers", b"1 5 not a part", b"1 5", b"\xff\xfe 1 \n", b"x" * 5000])
def test_a_message_that_cannot_be_read_is_lost_alone(garbage: bytes) -> None:
    base = HashStore()
    stores = run_stores(base, 2, TIMEOUT)
    warned: list[str] = []
    inbox, sender = Inbox(stores[0], warned.append), Sender(stores[1], print)
    sender.take([small_part(1, 0, 2)])
    sender.collect(force=False, last=False)
    stores[1].set(f"part/{stores[1].add('sent', 1)}", garbage)
    sender.take([small_part(1, 1, 2)])
    sender.collect(force=False, last=True)
    assert [(rank, part and part.step) for rank, part in inbox()] == [(1, 0), (1, 1), (1, None)]
    assert inbox.unreadable == 1
    assert len(warned) == 1
    assert base.num_keys() <= 6


@pytest.mark.parametrize("seed", range(60))
def test_a_store_that_fails_now_and_then_loses_and_doubles_nothing(seed: int, clock: Clock) -> None:
    base = HashStore()
    stores = run_stores(base, 3, TIMEOUT)
    for store in stores:
        store._store = FaultyStore(store._store, 10 * seed + store.rank, 0.15)
    choose = random.Random(seed)
    senders = [Sender(store, lambda _: None) for store in stores[1:]]
    gatherer = Gatherer(CountingAssembler(), range(3), Inbox(stores[0], print), 1000.0, print)
    records: list[Record] = []
    sent = [0, 0, 0]
    for _ in range(200):
        rank = choose.randrange(3)
        if sent[rank] < 20:
            part = small_part(rank, sent[rank], 3)
            sent[rank] += 1
            if rank == 0:
                gatherer.take([part])
            else:
                senders[rank - 1].take([part])
        for sender in senders:
            sender.collect(force=False, last=False)
        records += gatherer.collect(force=False, last=False)
        clock.now += choose.choice([0.0, 0.5, TIMEOUT])
    for _ in range(60):
        for sender in senders:
            sender.collect(force=True, last=False)
        clock.now += TIMEOUT + 0.1
        records += gatherer.collect(force=False, last=False)
    assert who(records) == [(step, "0,1,2") for step in range(len(records))]
    assert len(records) >= min(sent)


def test_messages_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(exchange, "_MOST_BYTES", 10_000)
    base = HashStore()
    stores = run_stores(base, 2, TIMEOUT)
    warned: list[str] = []
    sender = Sender(stores[1], warned.append)
    for step in range(200):
        sender.take([small_part(1, step, 2)])
        sender.collect(force=False, last=False)
        clock.now += TIMEOUT
    assert base.num_keys() < 40
    assert sender._bytes <= 10_000
    assert sender.lost > 100
    assert len(warned) == 1
    assert "nobody takes what the ranks send" in warned[0]
    inbox = Inbox(stores[0], print)
    got = 0
    for _ in range(20):
        got += len(inbox())
        sender.collect(force=True, last=False)
        clock.now += TIMEOUT + 0.1
    assert got > 20
    assert not sender._waiting


def test_a_part_that_cannot_be_encoded_is_lost_alone() -> None:
    stores = run_stores(HashStore(), 2, TIMEOUT)
    warned: list[str] = []
    sender = Sender(stores[1], warned.append)
    odd = small_part(1, 0, 2)
    odd.facts["object"] = object()
    sender.take([odd, small_part(1, 1, 2)])
    sender.collect(force=False, last=True)
    assert [part and part.step for _, part in Inbox(stores[0], print)()] == [1, None]
    assert "TypeError" in warned[0]


def test_a_store_that_is_gone_ends_in_a_record_without_the_others(clock: Clock) -> None:
    stores = run_stores(HashStore(), 2, TIMEOUT)
    stores[0]._store = FaultyStore(stores[0]._store, 0, 1.0)
    gatherer = Gatherer(CountingAssembler(), [0, 1], Inbox(stores[0], print), TIMEOUT, lambda _: None)
    gatherer.take([small_part(0, step, 2) for step in range(3)])
    before = clock.now
    assert who(gatherer.collect(force=True, last=True)) == [(0, "0"), (1, "0"), (2, "0")]
    assert clock.now - before <= TIMEOUT + 0.1
