"""Which shards of a bulk send wait: how many calls are under way, who is next, and that nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from shardq.core import records
from shardq.errors import ClosedError
from shardq.runtime import holding, staging
from shardq.runtime.buffers import ShardBuffer
from shardq.runtime.producer import Producer
from shardq.runtime.routes import spread
from shardq.storage.requests import Request
from tests.benchmarks.counts import instant_producer
from tests.runtime.test_filling import WIDE, Sent

pytestmark = pytest.mark.anyio
MANY = 200
AT_ONCE = holding.CALLS


@pytest.fixture(autouse=True)
def whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end by their size, not by the processor time they took."""
    monkeypatch.setattr(staging, "CHUNK_HOLDS_S", 3600.0)


class Held(Sent):
    """The same with calls that end: what they stored, by key."""

    confirm = None

    def __init__(self, shards: int, nodes: int = 1) -> None:
        super().__init__(shards, WIDE)
        self._masters = [SimpleNamespace(name=f"n{node}") for node in range(nodes)]
        for shard in self.shards:
            shard.slot = shard.index
        self.filler.holding = holding.Holding(self.node_of)
        self.stored: dict[str, list[int]] = {}
        self.calls = 0

    def node_of(self, slot: int) -> holding.Node:
        return self._masters[slot % len(self._masters)]

    def ended(self, batch: Any, error: Exception | None, _entries: tuple[str, ...]) -> None:
        assert error is None
        for key, value in zip(batch.keys, batch.values, strict=True):
            self.stored.setdefault(key, []).append(int(value))
        self.filler.left(batch)
        self.filler.holding.call_ended(batch.shard)
        batch.end(None, ())

    def restart(self, shard: ShardBuffer) -> None:
        self.filler.holding.ready(shard)

    def refused(self, *_: Any) -> None:
        raise AssertionError

    def answer(self, shard: ShardBuffer) -> None:
        self.calls += 1
        self.started.remove(shard)
        shard.pack()
        shard.settle([b"OK", b"1-%d" % self.calls])

    def answer_all(self) -> None:
        for shard in list(self.started):
            self.answer(shard)


def numbered(count: int, keys: int = 2000) -> list[tuple[str, bytes]]:
    return [(f"k{number * 7919 % keys}", b"%d" % number) for number in range(count)]


def in_order(given: list[tuple[str, bytes]]) -> dict[str, list[int]]:
    wanted: dict[str, list[int]] = {}
    for key, value in given:
        wanted.setdefault(key, []).append(int(value))
    return wanted


@pytest.mark.parametrize("nodes", [1, 3, AT_ONCE - 1])
async def test_with_few_shards_nothing_waits(nodes: int) -> None:
    """However they are spread over the nodes."""
    sent = Held(AT_ONCE)
    sent.filler.holding = holding.Holding(lambda slot: SimpleNamespace(name=f"n{min(slot, nodes - 1)}"))
    with sent.filler.holding.on():
        assert not sent.filler.put_chunk(iter(numbered(1000)))
        assert len(sent.started) == AT_ONCE


@pytest.mark.parametrize("nodes", [1, 2, 3])
async def test_with_many_only_so_many_calls_are_under_way_and_the_others_gather(nodes: int) -> None:
    sent, given = Held(MANY, nodes), numbered(40_000)
    source, at_once = iter(given), -(-AT_ONCE // nodes) * nodes
    with sent.filler.holding.on():
        while sent.filler.put_chunk(source):
            assert len(sent.started) <= at_once
            sent.answer_all()
        under_way = len(sent.started)
    assert under_way <= at_once < len(sent.started), "those that waited go when the send is over"
    sent.answer_all()
    assert sent.stored == in_order(given)
    assert sent.filler.buffered_bytes == 0
    assert not sent.filler.unsettled


async def test_who_waits_longest_is_next() -> None:
    sent = Held(MANY)
    with sent.filler.holding.on():
        turns: list[ShardBuffer] = []
        while len(turns) < MANY:
            sent.filler.put_chunk(iter(numbered(3000)))
            turns += sent.started
            sent.answer_all()
        assert len(set(turns[:MANY])) == MANY


@pytest.mark.parametrize("nodes", [2, 3, 5])
async def test_a_node_that_does_not_answer_holds_up_no_shard_of_another(
    monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    """However long it lasts; time stands still here, so that nothing goes because it waited for long."""
    for module in (staging, holding):
        monkeypatch.setattr(module, "monotonic", lambda: 100.0)
    sent, given = Held(MANY, nodes), numbered(40_000)
    source, share = iter(given), -(-AT_ONCE // nodes)

    def of_slow(shard: ShardBuffer) -> bool:
        return sent.node_of(shard.slot).name == "n0"

    def answer_others() -> None:
        for shard in [shard for shard in sent.started if not of_slow(shard)]:
            sent.answer(shard)

    with sent.filler.holding.on():
        while sent.filler.put_chunk(source):
            assert sum(map(of_slow, sent.started)) <= AT_ONCE
            assert len(sent.started) <= AT_ONCE + (nodes - 1) * share
            answer_others()
        with sent.filler.holding.paced():
            while any(not of_slow(shard) for shard in sent.started):
                answer_others()
        slow = {key for key, _ in given if of_slow(sent.filler.shard_of(key))}
        assert sent.stored == {key: values for key, values in in_order(given).items() if key not in slow}
        assert share <= sum(map(of_slow, sent.started)) <= AT_ONCE
    sent.answer_all()
    sent.answer_all()
    assert sent.stored == in_order(given)


async def test_a_shard_that_changes_its_node_goes_on() -> None:
    """What waited for the old one goes with the next chunk, or as calls of the old one end."""
    sent, moved, given = Held(MANY, 2), False, numbered(40_000)
    before = sent.node_of
    sent.filler.holding = holding.Holding(lambda slot: None if moved else before(slot))
    source = iter(given)
    with sent.filler.holding.on():
        while sent.filler.put_chunk(source):
            moved = True
            sent.answer_all()
    while sent.started:
        sent.answer_all()
    assert sent.stored == in_order(given)


async def test_a_message_that_is_waited_for_takes_what_its_shard_holds_along() -> None:
    sent = Held(MANY)
    with sent.filler.holding.on():
        given = numbered(3000)
        sent.filler.put_chunk(iter(given))
        waits = next(key for key, _ in given if not sent.filler.shard_of(key).busy)
        shard = sent.filler.shard_of(waits)
        sent.filler.put_one(waits, b"3000")
        assert shard in sent.started
        sent.answer(shard)
        assert sent.stored[waits] == in_order([*given, (waits, b"3000")])[waits]
        assert shard not in sent.started


async def test_one_that_is_waited_for_behind_a_call_goes_next() -> None:
    sent = Held(MANY)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(numbered(3000)))
        shard = sent.started[0]
        shard.pack()
        key = next(key for key, _ in numbered(3000) if sent.filler.shard_of(key) is shard)
        sent.filler.put_one(key, b"3000")
        sent.filler.put_chunk(iter(numbered(3000)))
        sent.answer(shard)
        assert shard in sent.started


async def test_a_full_batch_does_not_wait() -> None:
    sent = Held(MANY)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(numbered(3000)))
        hot = next(key for key, _ in numbered(3000) if not sent.filler.shard_of(key).busy)
        sent.filler.put_chunk(iter([(hot, b"0")] * WIDE.batch_messages))
        assert sent.filler.shard_of(hot) in sent.started


async def test_while_a_send_waits_for_room_each_call_that_ends_lets_the_next_go() -> None:
    sent, given = Held(MANY), numbered(3000)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(given))
        with sent.filler.holding.paced():
            while sent.started:
                assert len(sent.started) <= AT_ONCE
                sent.answer(sent.started[0])
    assert sent.stored == in_order(given)


async def test_all_go_when_it_takes_long() -> None:
    sent = Held(MANY)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(numbered(3000)))
        with sent.filler.holding.off():
            assert len(sent.started) == MANY


async def test_nothing_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(staging, "monotonic", lambda: now[0])
    monkeypatch.setattr(holding, "monotonic", lambda: now[0])
    sent = Held(MANY)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(numbered(3000)))
        now[0] += holding.LONGEST_S / 2
        sent.filler.put_chunk(iter(numbered(3000)))
        assert len(sent.started) == AT_ONCE
        now[0] += holding.LONGEST_S
        sent.filler.put_chunk(iter([("k", b"0")]))
        assert len(sent.started) == MANY


async def test_each_message_keeps_the_time_of_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = [1_700_000_000_000]
    monkeypatch.setattr("shardq.runtime.filling.time.time_ns", lambda: now_ms[0] * 1_000_000)
    sent, given = Held(MANY), numbered(3 * staging.CHUNK_PER_SHARD * MANY + 3 * staging.CHUNK)
    times: dict[int, int] = {}
    source, taken = iter(given), 0
    with sent.filler.holding.on():
        more = True
        while more:
            now_ms[0] += 7
            more = sent.filler.put_chunk(source)
            times |= dict.fromkeys(range(taken, sent.filler.put_messages), now_ms[0])
            taken = sent.filler.put_messages
    assert len(set(times.values())) > 2
    for shard in sent.shards:
        shard.gather()
        for batch in (*shard.closed, shard.open):
            if batch.keys:
                found = records.decode(bytes(batch.encode()))
                offsets = found.offsets_ms or [0] * len(found.values)
                for value, offset in zip(found.values, offsets, strict=True):
                    assert found.base_ms + offset == times[int(value)]


async def test_a_producer_that_was_closed_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Held(MANY)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(numbered(3000)))

        def closed(_: Request) -> None:
            raise ClosedError("closed")

        monkeypatch.setattr(sent, "submit", closed)
    assert len(sent.started) == AT_ONCE


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 192, 1000, 1024])
def test_shards_are_spread_over_all_ranges_each_once(count: int) -> None:
    places: list[Any] = list(range(count))
    found: list[Any] = list(spread(places))
    assert sorted(found) == places
    if count > 100:
        for first in range(0, count - 48, 7):
            thirds = [place * 3 // count for place in found[first : first + 48]]
            assert all(thirds.count(third) >= 12 for third in range(3))


# -- with a producer -----------------------------------------------------------------------------------------


class SlowStore:
    """Answers the requests in the order they came, some in each turn of the event loop."""

    def __init__(self, a_turn: int) -> None:
        self._a_turn = a_turn
        self.waiting: deque[Request] = deque()
        self.calls = 0

    def submit(self, request: Request) -> None:
        if not self.waiting:
            asyncio.get_running_loop().call_soon(self._turn)
        self.waiting.append(request)

    def _turn(self) -> None:
        for _ in range(min(self._a_turn, len(self.waiting))):
            request = self.waiting[0]
            request.pack()
            self.calls += 1
            request.settle([b"OK", b"1-%d" % self.calls])
            self.waiting.popleft()
        if self.waiting:
            asyncio.get_running_loop().call_soon(self._turn)


def slow_producer(store: Any, room: int, shards: int = MANY) -> Producer:
    producer = instant_producer(shards).producer
    producer._pipes, producer._max_buffered_bytes = store, room
    return producer


@pytest.mark.parametrize("room", [1, 400_000, 32 * 1024 * 1024])
async def test_a_send_ends_however_little_room_there_is(room: int) -> None:
    producer = slow_producer(SlowStore(5), room)
    with anyio.fail_after(60):
        assert await producer.send_many(numbered(30_000)) == 30_000
    assert producer.buffered_bytes == 0


@pytest.mark.parametrize("shards", [1, 3, MANY])
@pytest.mark.parametrize("a_turn", [1, 20, 1000])
async def test_no_shard_waits_for_time_to_pass_while_a_send_waits_for_room(
    shards: int, a_turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.runtime.settling.LONGEST_S", 3600.0)
    producer = slow_producer(SlowStore(a_turn), 10_000, shards)
    with anyio.fail_after(60):
        assert await producer.send_many(numbered(30_000)) == 30_000


async def test_calls_that_ended_just_before_a_send_waits_for_room_let_others_go() -> None:
    sent, given = Held(MANY), numbered(3000)
    with sent.filler.holding.on():
        sent.filler.put_chunk(iter(given))
        sent.answer_all()
        with sent.filler.holding.paced():
            assert len(sent.started) == AT_ONCE


async def test_sends_side_by_side_all_end() -> None:
    producer = slow_producer(SlowStore(20), 300_000)
    counts: list[int] = []

    async def many() -> None:
        counts.append(await producer.send_many(numbered(20_000)))

    async def some() -> None:
        for key, value in numbered(200):
            await producer.send(value, key=key)
        await producer.flush()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for task in (many, some, many, some):
                tasks.start_soon(task)
    assert counts == [20_000, 20_000]
    assert producer.buffered_bytes == 0


async def test_what_a_source_gave_before_it_broke_is_stored() -> None:
    store = SlowStore(20)
    producer = slow_producer(store, 300_000)

    def source() -> Iterator[tuple[str, bytes]]:
        yield from numbered(30_000)
        raise KeyError("the source's own")

    with pytest.raises(KeyError):
        await producer.send_many(source())
    await producer.flush()
    assert producer.buffered_bytes == 0
    assert not store.waiting


async def test_a_plain_iterable_is_taken_many_at_a_time_and_an_async_one_lets_others_go_on() -> None:
    """As the docstring of send_many says, which is why a plain one must not wait."""
    turns, seen = 0, list[int]()

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    def plain() -> Iterator[tuple[str, bytes]]:
        for pair in numbered(2000):
            seen.append(turns)
            yield pair

    async def waits() -> AsyncIterator[tuple[str, bytes]]:
        for pair in numbered(2000):
            await anyio.lowlevel.checkpoint()
            seen.append(turns)
            yield pair

    producer = instant_producer(3).producer
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        await anyio.lowlevel.checkpoint()
        await producer.send_many(plain())
        assert len(set(seen)) <= 2000 / staging.STRETCH
        seen.clear()
        await producer.send_many(waits())
        assert len(set(seen)) == 2000
        tasks.cancel_scope.cancel()
