"""A batch that is split among shards: each message as it was, with its send time and headers, in order."""

from __future__ import annotations

from typing import Any, cast

import anyio
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import records
from shardq.errors import StoreTimeout
from shardq.runtime.batches import ConditionalBatch, PendingBatch, all_ended
from shardq.runtime.buffers import Owner, ShardBuffer
from shardq.runtime.filling import Limits
from shardq.runtime.rerouting import Rerouting, split_batch
from shardq.runtime.staging import Filler
from shardq.storage.appends import Item
from shardq.storage.keys import ShardKeys

KEYS = ShardKeys("stream", "meta", "bell", 0, "base", "base")
SHARDS = [ShardBuffer(cast("Owner", None), index, index, KEYS) for index in range(4)]

# Of each message: ms since the one before it, whether it has headers, the shard it goes to.
MESSAGES = st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 500]), st.booleans(), st.integers(1, 3)), min_size=1)


def batch_of(messages: list[tuple[int, bool, int]]) -> tuple[PendingBatch, list[tuple[Any, ...]]]:
    batch, sent, now_ms = PendingBatch(SHARDS[0]), [], 1000
    for number, (later, headed, _) in enumerate(messages):
        now_ms += later
        if not batch.times or batch.times[-1] != now_ms:
            batch.starts.append(number)
            batch.times.append(now_ms)
        batch.keys.append(f"k{number}")
        batch.values.append(f"v{number}")
        if headed:
            batch.headers = (batch.headers or {}) | {number: {"n": str(number)}}
        sent.append((now_ms, f"k{number}", f"v{number}", {"n": str(number)} if headed else None))
    batch.size, batch.opened_monotonic_s, batch.bulk = 100 * len(messages), 7.0, True
    return batch, sent


def read(part: PendingBatch) -> list[tuple[Any, ...]]:
    found = records.decode(bytes(part.encode()))
    size = len(found.keys)
    times = [found.base_ms + offset for offset in found.offsets_ms] if found.offsets_ms else [found.base_ms] * size
    return list(zip(times, found.keys, found.values, found.headers or [None] * size, strict=True))


@given(MESSAGES, st.integers(1, 10))
def test_each_message_is_in_one_part_as_it_was(messages: list[tuple[int, bool, int]], most: int) -> None:
    batch, sent = batch_of(messages)
    parts = split_batch(batch, [SHARDS[shard] for _, _, shard in messages], most)
    content = {part: read(part) for part in parts}
    for shard in SHARDS:
        wanted = [one for one, (_, _, to) in zip(sent, messages, strict=True) if to == shard.id]
        assert [one for part in parts if part.shard is shard for one in content[part]] == wanted
    assert batch.moved is not None
    assert [content[part][place] for part, place in batch.moved] == sent
    assert all(1 <= part.count <= most for part in parts)
    assert all((part.opened_monotonic_s, part.bulk) == (7.0, True) for part in parts)
    assert 0 <= 100 * len(messages) - sum(part.size for part in parts) < len(parts)


@given(st.lists(st.integers(1, 3), min_size=1), st.integers(1, 10))
def test_messages_with_conditions_keep_them(shards: list[int], most: int) -> None:
    batch = ConditionalBatch(SHARDS[0])
    items = [Item(b"%d" % number, once=f"o{number}") for number in range(len(shards))]
    for number, item in enumerate(items):
        batch.add(item, f"k{number}", 10)
    routes = list(batch.routes)
    parts = split_batch(batch, [SHARDS[shard] for shard in shards], most)
    assert batch.moved is not None
    for item, key, to, (part, place) in zip(items, routes, shards, batch.moved, strict=True):
        assert isinstance(part, ConditionalBatch)
        assert (part.items[place], part.routes[place], part.shard.id) == (item, key, to)
    assert sum(part.count for part in parts) == len(items)
    assert all(len(cast("ConditionalBatch", part).items) == part.count <= most for part in parts)


class Moving:
    """A producer's part in a move: the batches that it counts, by their bytes."""

    def __init__(self, most: int, table: dict[str, ShardBuffer]) -> None:
        self.limits, self.table = Limits(most, 10**6, 10**6), table
        self.unsettled: dict[PendingBatch, int] = {}

    def shards_of(self, keys: list[str], _keyless: ShardBuffer) -> list[ShardBuffer]:
        return [self.table[key] for key in keys]

    def left(self, batch: PendingBatch) -> None:
        assert self.unsettled.pop(batch) == batch.size

    def came(self, batch: PendingBatch) -> None:
        self.unsettled[batch] = batch.size

    def restart(self, _shard: ShardBuffer) -> None:
        pass


def moved(batches: list[PendingBatch], most: int, table: dict[str, ShardBuffer]) -> tuple[Moving, list[ShardBuffer]]:
    """Moves what a sealed shard holds to those that `table` names for each key."""
    old, heirs = ShardBuffer(cast("Owner", None), 0, 9, KEYS), list(dict.fromkeys(table.values()))
    filler = Moving(most, table)
    for batch in batches:
        filler.came(batch)
        old.closed.append(batch)
    rerouting = Rerouting.__new__(Rerouting)
    rerouting._filler, rerouting._owner = cast("Filler", filler), cast("Owner", filler)
    rerouting._move(old, heirs)
    return filler, heirs


@given(st.lists(MESSAGES, min_size=1, max_size=6), st.integers(1, 12), st.sets(st.integers(0, 5)))
def test_what_chunks_brought_fills_batches_again(
    given_batches: list[list[tuple[int, bool, int]]], most: int, held: set[int]
) -> None:
    """Split, each batch would be as many calls as it has heirs. Whoever may wait for one message keeps its batch."""
    batches: list[PendingBatch] = []
    sent: list[tuple[Any, ...]] = []
    table: dict[str, ShardBuffer] = {}
    shards = [ShardBuffer(cast("Owner", None), index, index, KEYS) for index in range(4)]
    for number, messages in enumerate(given_batches):
        batch, ones = batch_of([(later, headed and number in held, to) for later, headed, to in messages])
        batch.chunked = 0 if number in held else len(messages)
        names = [f"{number}-{place}" for place in range(len(messages))]
        batch.keys = [*names]
        sent += [(ms, name, value, headers) for name, (ms, _, value, headers) in zip(names, ones, strict=True)]
        table |= {name: shards[to] for name, (_, _, to) in zip(names, messages, strict=True)}
        batches.append(batch)

    filler, heirs = moved(batches, most, table)

    for heir in heirs:
        wanted = [one for one in sent if table[one[1]] is heir]
        if not held:
            assert len(heir.closed) == -(-len(wanted) // most), "no more batches than it takes"
        assert all(len(batch.keys) <= most for batch in heir.closed)
        assert [one for batch in heir.closed for one in read(batch)] == wanted
    assert set(filler.unsettled) == {batch for heir in heirs for batch in heir.closed}
    assert all(size == batch.size for batch, size in filler.unsettled.items())
    last = {batch for heir in heirs for batch in heir.closed}
    for batch in last:
        batch.end(None, ("1-0",))
    assert set(anyio.run(all_ended, batches)) == last, "whoever waits for the send waits for where it went"


def test_what_is_much_older_is_not_given_up_with_what_came_later() -> None:
    old, new = batch_of([(0, False, 1)])[0], batch_of([(0, False, 1)])[0]
    old.chunked = new.chunked = 1
    new.opened_monotonic_s = old.opened_monotonic_s + 10

    _, (heir,) = moved([old, new], 10, {"k0": SHARDS[1]})

    assert [batch.opened_monotonic_s for batch in heir.closed] == [7.0, 17.0]


def test_who_waits_follows_a_message_over_several_moves() -> None:
    async def main() -> None:
        batch, _ = batch_of([(0, False, 1), (0, False, 2), (0, False, 1)])
        first = split_batch(batch, [SHARDS[1], SHARDS[2], SHARDS[1]], 10)
        second = split_batch(first[0], [SHARDS[3], SHARDS[2]], 10)
        for number, part in enumerate([first[1], *second]):
            part.end(None, (f"{number}-0",))
        ends = [await batch.follow(index) for index in range(3)]
        assert [part.id_of(index) for part, index in ends] == ["3/1-0/0", "2/0-0/0", "2/2-0/0"]
        assert set(await all_ended([batch, second[0]])) == {first[1], *second}

    anyio.run(main)


def test_a_batch_that_has_ended_keeps_no_messages() -> None:
    batch = ConditionalBatch(SHARDS[0])
    batch.add(Item(b"x" * 100), "k", 100)
    batch.end(StoreTimeout("late"), ())
    assert not batch.items
    assert not batch.routes
    assert batch.count == 1
