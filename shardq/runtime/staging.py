"""The chunks of a bulk send: many messages are taken at once, staged by shard, and gathered into batches once for many
chunks. Sends nothing itself, waits for nobody.

Invariants:
- Messages of one key enter batches in the order they came, each in one batch only: what is staged for a shard stands
  behind all that is in its batches, and is gathered before anything else enters one.
- `buffered_bytes` counts a message from when its chunk has ended.
- A message keeps the time of its chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from time import monotonic
from typing import Any

import mmh3

from shardq.core import records
from shardq.core.hashing import key_hash
from shardq.core.records import Key
from shardq.core.routing import RoutingTable
from shardq.errors import InvalidKey
from shardq.runtime.batches import PendingBatch
from shardq.runtime.buffers import ShardBuffer
from shardq.runtime.filling import MESSAGE_OVERHEAD_BYTES, SURROGATES, Filling, Limits
from shardq.runtime.holding import Holding, Node
from shardq.runtime.routes import Segment

CHUNK = 2000
CHUNK_PER_SHARD = 16  # with many shards a larger chunk, or each call would carry but a few messages
CHUNK_BYTES = 2 * 1024 * 1024
# A chunk ends when it has taken so much of the processor, looked at every STRETCH messages. Not by a wall clock: where
# others compete for the processor chunks would be small, calls many, and all of it slower still.
CHUNK_HOLDS_S = 0.005
STRETCH = 500
CHUNKS_KEPT = 64

Staged = tuple[list[Key], list[Any], list[int]]


class Filler(Filling):
    """The one that fills the batches of `shards`, which stand in the order of the table. `node_of` as in holding.py."""

    def __init__(
        self,
        shards: Sequence[ShardBuffer],
        table: RoutingTable,
        limits: Limits,
        node_of: Callable[[int], Node | None] = lambda _: None,
    ) -> None:
        self.holding = Holding(node_of)
        self._room = 0
        self._chunks: list[tuple[int, list[int]]] = []  # when, and how many each shard had then; some of it is staged
        self.put_messages = 0  # by put_chunk, ever
        self._shards: list[ShardBuffer] = []
        super().__init__([Segment(own.low, shard) for own, shard in zip(table.shards, shards, strict=True)], limits)

    def route(self, segments: Sequence[Segment]) -> None:
        """Not to be called while a chunk is taken."""
        self.gather_all()
        super().route(segments)
        # What chunks bring each shard: keys, values, sizes with the overhead.
        self._staged: list[Staged] = [(one.staged_keys, one.staged_values, one.staged_sizes) for one in self._buffers]
        self._staged_keys = [shard.staged_keys for shard in self._shards]
        self._counts = list(map(len, self._staged_keys))  # of what is staged, by `index`, as of the last chunk
        self._bare = [index for index, count in enumerate(self._counts) if not count]

    def put_chunk(self, source: Iterator[tuple[Key, Any]]) -> bool:
        """Takes a chunk of pairs; false when there are no more. Raises what the source raises, InvalidKey, InvalidValue
        and MessageTooLarge, once all before it are staged."""
        left = max(CHUNK, CHUNK_PER_SHARD * len(self._shards))
        self._room = CHUNK_BYTES
        now_ms, until_s = time.time_ns() // 1_000_000, time.thread_time() + CHUNK_HOLDS_S
        try:
            while True:
                before = self._room
                self._stage(islice(source, STRETCH), now_ms)
                left -= STRETCH
                if self._room == before:
                    return False
                if left <= 0 or self._room < 0 or time.thread_time() >= until_s:
                    return True
        except UnicodeEncodeError as error:
            raise InvalidKey(SURROGATES) from error
        finally:
            self.buffered_bytes += CHUNK_BYTES - self._room
            self._chunk_ended(now_ms)

    def _stage(self, pairs: Iterator[tuple[Key, Any]], now_ms: int) -> None:
        """Takes pairs until there is no room for their bytes; every message makes it less.

        The hot loop: nothing is done for a message that can be done once for a shard, and what core/hashing.py does is
        written out.
        """
        staged, ranges = self._staged, self._ranges
        equal, near, shift, index_for = ranges.equal, ranges.near, ranges.shift, ranges.index_for
        hash_of, most = mmh3.mmh3_32_uintdigest, self._limits.message_bytes + MESSAGE_OVERHEAD_BYTES
        room = self._room
        try:
            for key, value in pairs:
                if type(value) is bytes:
                    size = len(value) + MESSAGE_OVERHEAD_BYTES
                else:
                    value = records.pack_value(value)
                    size = records.value_bytes(value) + MESSAGE_OVERHEAD_BYTES
                if type(key) is str:
                    raw = key.encode()
                    size += len(raw)
                    if equal:
                        keys, values, sizes = staged[hash_of(raw) * equal >> 32]
                    else:
                        hash_ = hash_of(raw)
                        index = near[hash_ >> shift]
                        keys, values, sizes = staged[index if index >= 0 else index_for(hash_)]
                elif key is not None:
                    index = index_for(key_hash(key))
                    size += len(key)
                    keys, values, sizes = staged[index]
                else:
                    self._put_keyless(value, size - MESSAGE_OVERHEAD_BYTES, now_ms)
                    room -= size
                    if room < 0:
                        break
                    continue
                if size > most:
                    self.check_size(size - MESSAGE_OVERHEAD_BYTES)
                keys.append(key)
                values.append(value)
                sizes.append(size)
                room -= size
                if room < 0:
                    break
        finally:
            self._room = room

    def _put_keyless(self, value: Any, size: int, now_ms: int) -> None:
        """At once: which shard the next one goes to depends on how full this one's batch is."""
        self.check_size(size)
        shard = self._sticky_shard()
        self._add(shard, None, value, size, now_ms)
        self.buffered_bytes -= size + MESSAGE_OVERHEAD_BYTES  # counted with its chunk
        self.put_messages += 1
        shard.close_full()
        shard.start()

    def _chunk_ended(self, now_ms: int) -> None:
        """Counts what was staged, and has it sent or held. Looks at no shard but those that had nothing staged before:
        with a thousand of them their memory is not in the cache."""
        counts = list(map(len, self._staged_keys))
        before, now, holding = self._counts, monotonic(), self.holding
        self.put_messages += sum(counts) - sum(before)
        fresh, self._bare = [i for i in self._bare if counts[i]], [i for i in self._bare if not counts[i]]
        for index in fresh:
            shard = self._shards[index]
            shard.staged, shard.staged_from = True, len(self._chunks)
            if not shard.held:
                shard.staged_since_monotonic_s = now
            if not shard.busy:
                holding.ready(shard)
        self._chunks.append((now_ms, counts))
        self._counts = counts[:]
        if max(counts) >= self._limits.batch_messages:
            self._close_full(counts)
        if not holding.active or len(self._chunks) >= CHUNKS_KEPT:
            self.gather_all()
        holding.start_due()

    def _close_full(self, counts: Sequence[int]) -> None:
        """What fills a batch need not wait."""
        for index, count in enumerate(counts):
            if count >= self._limits.batch_messages:
                shard = self._shards[index]
                self.gather(shard)
                if not shard.busy:
                    self.holding.ready(shard)

    def gather_all(self) -> None:
        """Takes all that is staged into batches."""
        for shard in self._shards:
            if shard.staged:
                self.gather(shard)
        self._chunks.clear()

    def gather(self, shard: ShardBuffer) -> None:
        """The same for one shard. Not to be called while a chunk is taken."""
        keys, values, sizes = shard.staged_keys, shard.staged_values, shard.staged_sizes
        chunks = self._chunks[shard.staged_from :]
        first, count = 0, len(keys)
        while first < count:
            batch = shard.open
            last, filled = self._part(batch, sizes, first)
            if not batch.keys:
                self._open(batch, shard.staged_since_monotonic_s)
            self._mark_part(batch, chunks, shard.index, first, last)
            batch.keys += keys[first:last]
            batch.values += values[first:last]
            batch.chunked += last - first
            batch.size = filled
            first = last
            if filled > self._limits.batch_bytes or len(batch.keys) >= self._limits.batch_messages:
                shard.roll()
        keys.clear()
        values.clear()
        sizes.clear()
        shard.staged = False
        self._counts[shard.index] = 0
        self._bare.append(shard.index)

    def _part(self, batch: PendingBatch, sizes: list[int], first: int) -> tuple[int, int]:
        """Where the part ends that fills the batch, the message that exceeds its bytes among it; its size with that."""
        last = min(len(sizes), first + self._limits.batch_messages - len(batch.keys))
        filled = batch.size + sum(sizes[first:last])
        if filled <= self._limits.batch_bytes:
            return last, filled
        filled = batch.size
        for index in range(first, last):
            filled += sizes[index]
            if filled > self._limits.batch_bytes:
                return index + 1, filled
        return last, filled

    @staticmethod
    def _mark_part(
        batch: PendingBatch, chunks: Sequence[tuple[int, list[int]]], index: int, first: int, last: int
    ) -> None:
        """Notes when the messages from `first` to `last` of those that were staged for the shard of that index were
        sent: each chunk has brought all up to so many, at that time."""
        start, place, known_ms = 0, len(batch.keys) - first, batch.now_ms
        for now_ms, counts in chunks:
            end = counts[index]
            if end > start:  # most chunks bring a shard nothing where there are many
                if end > first and now_ms != known_ms:
                    batch.starts.append(place + (start if start > first else first))
                    batch.times.append(now_ms)
                    known_ms = now_ms
                if end >= last:
                    break
                start = end
        batch.now_ms = known_ms
