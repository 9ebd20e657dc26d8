"""What the filler makes of chunks: order, limits, accounting, and what is left after a message that can't be sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import pytest

from shardq.core import records
from shardq.core.hashing import key_hash
from shardq.core.records import Key
from shardq.core.routing import RoutingTable, Shard
from shardq.errors import InvalidKey, InvalidValue, MessageTooLarge
from shardq.runtime import filling, staging
from shardq.runtime.batches import PendingBatch
from shardq.runtime.buffers import Owner, ShardBuffer
from shardq.runtime.filling import Limits
from shardq.runtime.staging import Filler
from shardq.storage.keys import ShardKeys

pytestmark = pytest.mark.anyio
Pair = tuple[Key, Any]


class Sent:
    """Takes the place of a producer and of its pipes: nothing leaves."""

    id, compression, delivery_timeout_s = "p", None, 10.0

    def __init__(self, shards: int, limits: Limits, table: RoutingTable | None = None) -> None:
        self.table = table or RoutingTable.equal(shards)
        owner = cast("Owner", self)
        keys = ShardKeys("stream", "meta", "bell", 0, "base", "base")
        self.shards = [ShardBuffer(owner, index, shard.id, keys) for index, shard in enumerate(self.table.shards)]
        self.started: list[ShardBuffer] = []
        self.filler = Filler(self.shards, self.table, limits)

    @property
    def pipes(self) -> Sent:
        return self

    def submit(self, shard: ShardBuffer) -> None:
        self.started.append(shard)

    def full(self, batch: PendingBatch) -> bool:
        return self.filler.full(batch)

    def gather(self, shard: ShardBuffer) -> None:
        self.filler.gather(shard)

    def batches(self) -> list[PendingBatch]:
        return [batch for shard in self.shards for batch in (*shard.closed, shard.open) if batch.keys]

    def pairs(self) -> list[Pair]:
        return [pair for batch in self.batches() for pair in zip(batch.keys, batch.values, strict=True)]


WIDE = Limits(1000, 256 * 1024, 1024 * 1024)


def fill(sent: Sent, pairs: Iterator[Pair]) -> int:
    """Chunks until there are no more; how many."""
    return next(number for number in itertools.count(1) if not sent.filler.put_chunk(pairs))


async def test_every_message_is_in_one_batch_of_its_shard_in_order() -> None:
    sent = Sent(5, Limits(70, 256 * 1024, 1024 * 1024))
    given = [
        (f"k{number % 97}" if number % 3 else f"b{number % 89}".encode(), b"%d" % number) for number in range(9000)
    ]
    fill(sent, iter(given))
    assert sorted(sent.pairs(), key=lambda pair: int(pair[1])) == given
    for shard in sent.shards:
        batches = [*shard.closed, shard.open]
        own = [pair for pair in given if sent.filler.shard_of(pair[0]) is shard]
        assert [pair for one in batches for pair in zip(one.keys, one.values, strict=True)] == own
        assert all(len(batch.keys) == 70 for batch in shard.closed)
        assert len(shard.open.keys) < 70
    assert sent.filler.put_messages == 9000
    assert sorted(shard.id for shard in sent.started) == [0, 1, 2, 3, 4]


async def test_a_table_that_is_not_an_equal_cut_is_followed() -> None:
    cut = 1 << 29
    sent = Sent(2, WIDE, RoutingTable(2, (Shard(7, 0, cut), Shard(9, cut, 1 << 32))))
    given: list[Pair] = [(f"k{number}", b"v") for number in range(300)]
    fill(sent, iter(given))
    for shard in sent.shards:
        own = [key for key, _ in given if sent.filler.shard_of(key) is shard]
        assert shard.open.keys == own
        assert own


@pytest.mark.parametrize("table", [None, RoutingTable(2, (Shard(7, 0, 1 << 29), Shard(9, 1 << 29, 1 << 32)))])
async def test_what_is_written_out_for_speed_hashes_as_the_hash_does(table: RoutingTable | None) -> None:
    keys = [prefix * number for number in range(1, 40) for prefix in ("k", "\u00e9", "\u65e5", "\U0001f4a1", "\0")]
    one, many = Sent(5, WIDE, table), Sent(5, WIDE, table)
    fill(many, iter([(key, b"v") for key in keys]))
    for key in keys:
        one.filler.put_one(key, b"v")
        wanted = one.table.index_for(key_hash(key))
        assert one.shards[wanted].open.keys[-1] == key
        assert key in many.shards[wanted].open.keys
        assert key_hash(key) == key_hash(key.encode())


async def test_batches_hold_no_more_bytes_than_one_message_over_the_limit() -> None:
    sent = Sent(1, Limits(1000, 1000, 1024 * 1024))
    fill(sent, iter([("key", bytes(size)) for size in [10] * 300 + [900] * 20 + [10] * 300]))
    for batch in sent.batches():
        last = len(batch.values[-1]) + 3 + filling.MESSAGE_OVERHEAD_BYTES
        assert batch.size - last <= 1000
    assert all(batch.size > 1000 for batch in sent.shards[0].closed)


async def test_what_is_buffered_is_the_size_of_the_batches_and_nothing_once_they_left() -> None:
    sent = Sent(3, Limits(64, 2000, 1024 * 1024))
    values: list[Any] = [b"bytes", "text", "t\u00e9xte", {"a": [1, 2]}, None, 7]
    keys: list[Key] = ["k", b"k", "cl\u00e9", None]
    fill(sent, iter([(keys[n % 4], values[n % 6]) for n in range(5000)]))
    batches = sent.batches()
    assert sum(len(batch.keys) for batch in batches) == sent.filler.put_messages == 5000
    assert sent.filler.buffered_bytes == sum(batch.size for batch in batches)
    assert sent.filler.unsettled == set(batches)
    for batch in batches:
        encoded = records.encode(records.RecordBatch(0, None, batch.keys, batch.values, None))
        assert len(encoded) <= batch.size + 16
        sent.filler.left(batch)
    assert sent.filler.buffered_bytes == 0
    assert not sent.filler.unsettled


async def test_messages_without_a_key_fill_one_batch_then_the_next_shards() -> None:
    sent = Sent(4, Limits(100, 256 * 1024, 1024 * 1024))
    fill(sent, iter([(None, b"v")] * 400))
    assert [[len(batch.keys) for batch in shard.closed] for shard in sent.shards] == [[100]] * 4


BAD: list[tuple[Any, Any, type[Exception]]] = [
    ("\ud800", b"v", InvalidKey),
    (5, b"v", InvalidKey),
    (type("Text", (str,), {})("k"), b"v", InvalidKey),
    ("k", "\ud800", InvalidValue),
    ("k", object(), InvalidValue),
    ("k", bytes(2000), MessageTooLarge),
    ("k" * 2000, b"v", MessageTooLarge),
    (None, bytes(2000), MessageTooLarge),
    (b"k" * 2000, b"v", MessageTooLarge),
]


@pytest.mark.parametrize(("key", "value", "error"), BAD, ids=range(len(BAD)))
async def test_all_before_a_message_that_cannot_be_sent_are_in_batches_and_nothing_behind_it(
    key: Any, value: Any, error: type[Exception]
) -> None:
    sent = Sent(3, Limits(1000, 256 * 1024, 1000))
    good = [(f"k{number}", b"%d" % number) for number in range(700)]
    source = iter([*good, (key, value), ("behind", b"it")])
    with pytest.raises(error):
        fill(sent, source)
    assert sorted(sent.pairs(), key=lambda pair: int(pair[1])) == good
    assert sent.filler.put_messages == 700
    assert next(source) == ("behind", b"it")
    fill(sent, iter([("after", b"700")]))
    assert len(sent.pairs()) == 701


async def test_what_a_source_gave_before_it_broke_is_in_batches() -> None:
    def source() -> Iterator[Pair]:
        yield from [("k", b"v")] * 30
        raise KeyError("the source's own")

    sent = Sent(3, WIDE)
    with pytest.raises(KeyError, match="own"):
        sent.filler.put_chunk(source())
    assert len(sent.pairs()) == sent.filler.put_messages == 30
    assert len(sent.started) == 1


async def test_a_chunk_takes_no_more_than_its_bytes_from_a_source() -> None:
    taken: list[int] = []

    def source() -> Iterator[Pair]:
        for number in range(10_000):
            taken.append(number)
            yield "k", bytes(1000 * 1000) if number > 600 else b""

    sent = Sent(1024, WIDE)
    assert sent.filler.put_chunk(source())
    assert sent.filler.buffered_bytes < staging.CHUNK_BYTES + 2 * 1000 * 1000


async def test_a_source_of_empty_messages_ends() -> None:
    sent = Sent(1, WIDE)
    fill(sent, iter([("", b"")] * (staging.STRETCH * 4)))
    assert sent.filler.put_messages == staging.STRETCH * 4


async def test_a_chunk_that_took_long_ends_after_one_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 60)
    monkeypatch.setattr("shardq.runtime.filling.time.thread_time", lambda: next(clock))
    sent = Sent(1, WIDE)
    assert fill(sent, iter([("k", b"v")] * (staging.STRETCH * 3))) >= 3
    assert sent.filler.put_messages == staging.STRETCH * 3
