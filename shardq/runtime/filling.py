"""Puts messages into the open batches of a producer's shards. Sends nothing, waits for nobody.

Invariants:
- Messages of one key enter batches in the order they came, each in one batch only.
- `buffered_bytes` counts a message from when it is in a batch until its batch has `left`.
- Every key hash lies in one segment, and every segment has one shard's buffer. As long as nothing is resharded, and
  when a reshard is through, the segments are the ranges of the routing table; in between, those of the shards that did
  not refuse yet are still theirs (rerouting.py).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from math import gcd
from time import monotonic
from typing import Any, NamedTuple

import mmh3

from shardq.core import records
from shardq.core.hashing import key_hash
from shardq.core.ranges import Ranges
from shardq.core.records import Key
from shardq.core.routing import RoutingTable
from shardq.errors import InvalidKey, MessageTooLarge
from shardq.runtime.buffers import PendingBatch, ShardBuffer
from shardq.runtime.holding import Holding

CHUNK = 2000
CHUNK_PER_SHARD = 16  # with many shards a larger chunk, or each call would carry but a few messages
CHUNK_BYTES = 2 * 1024 * 1024
# A chunk ends when it has taken so much of the processor, looked at every STRETCH messages. Not by a wall clock: where
# others compete for the processor chunks would be small, calls many, and all of it slower still.
CHUNK_HOLDS_S = 0.005
STRETCH = 500
CHUNKS_KEPT = 64
MESSAGE_OVERHEAD_BYTES = 8
_SURROGATES = "a str key has surrogates that UTF-8 can't carry: send the key as bytes instead"


class Limits(NamedTuple):
    """Of one batch, and of one message."""

    batch_messages: int
    batch_bytes: int
    message_bytes: int


Staged = tuple[list[Key], list[Any], list[int]]


class Segment(NamedTuple):
    """Key hashes from `low` up to the next segment's, and the buffer they go to."""

    low: int
    buffer: ShardBuffer


class Filler:
    """The one that fills the batches of `shards`, which stand in the order of the table."""

    def __init__(self, shards: Sequence[ShardBuffer], table: RoutingTable, limits: Limits) -> None:
        self._limits = limits
        self.holding = Holding()
        self._room = 0
        self._chunks: list[tuple[int, list[int]]] = []  # when, and how many each shard had then; some of it is staged
        self.buffered_bytes = 0
        self.put_messages = 0  # by put_chunk, ever
        self.unsettled: set[PendingBatch] = set()
        self._shards: list[ShardBuffer] = []
        self.route([Segment(own.low, shard) for own, shard in zip(table.shards, shards, strict=True)])

    def route(self, segments: Sequence[Segment]) -> None:
        """From here on messages go by these, in order of `low`, the first of which is 0. Not to be called while a chunk
        is taken."""
        self.gather_all()
        self.segments = segments
        self._ranges = Ranges([segment.low for segment in segments])
        self._buffers = [segment.buffer for segment in segments]
        # What chunks bring each shard: keys, values, sizes with the overhead.
        self._staged: list[Staged] = [(one.staged_keys, one.staged_values, one.staged_sizes) for one in self._buffers]
        self._shards = spread(list(dict.fromkeys(self._buffers)))
        self._staged_keys = [shard.staged_keys for shard in self._shards]
        self._counts = list(map(len, self._staged_keys))  # of what is staged, by `index`, as of the last chunk
        for index, buffer in enumerate(self._shards):
            buffer.index = index
        self._sticky = self._shards[random.randrange(len(self._shards))]
        self._sticky_batch = self._sticky.open

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        for buffer in self._shards:
            buffer.close_full()

    def left(self, batch: PendingBatch) -> None:
        """A batch was stored or given up."""
        self.unsettled.discard(batch)
        self.buffered_bytes -= batch.size

    def came(self, batch: PendingBatch) -> None:
        """A batch was made of messages that were in others."""
        self.unsettled.add(batch)
        self.buffered_bytes += batch.size

    def full(self, batch: PendingBatch) -> bool:
        """Whether a batch takes no more messages."""
        return batch.size > self._limits.batch_bytes or len(batch.keys) >= self._limits.batch_messages

    def shard_of(self, key: Key) -> ShardBuffer:
        """Raises InvalidKey."""
        if key is None:
            return self._sticky_shard()
        return self._buffers[self._ranges.index_for(key_hash(key))]

    def shards_of(self, keys: Sequence[Key], keyless: ShardBuffer) -> list[ShardBuffer]:
        """Of many keys that were taken before."""
        buffers, index_for = self._buffers, self._ranges.index_for
        return [keyless if key is None else buffers[index_for(key_hash(key))] for key in keys]

    def _sticky_shard(self) -> ShardBuffer:
        """Messages without a key fill one batch, then the next shard's."""
        if self._sticky.open is not self._sticky_batch:
            self._sticky = self._shards[(self._sticky.index + 1) % len(self._shards)]
            self._sticky_batch = self._sticky.open
        return self._sticky

    def check_size(self, size: int) -> None:
        """Raises MessageTooLarge."""
        most = self._limits.message_bytes
        if size > most:
            msg = (
                f"a message of {size} bytes is larger than max_message_bytes={most}: store it elsewhere and send a "
                "reference, or raise the limit"
            )
            raise MessageTooLarge(msg)

    def put(self, shard: ShardBuffer, key: Key, value: Any, size: int, now_ms: int) -> tuple[PendingBatch, int]:
        """Adds one packed message of so many bytes; the batch it is in and its place there. The caller calls `sent`."""
        if shard.staged:
            self.gather(shard)
        return self._add(shard, key, value, size, now_ms)

    def _add(self, shard: ShardBuffer, key: Key, value: Any, size: int, now_ms: int) -> tuple[PendingBatch, int]:
        batch = shard.open
        if batch.keys and batch.size + size > self._limits.batch_bytes:
            shard.roll()
            batch = shard.open
        if batch.now_ms != now_ms:
            self._mark(batch, now_ms)
        batch.keys.append(key)
        batch.values.append(value)
        batch.size += size + MESSAGE_OVERHEAD_BYTES
        self.buffered_bytes += size + MESSAGE_OVERHEAD_BYTES
        return batch, len(batch.keys) - 1

    def put_one(self, key: Key, value: Any) -> tuple[PendingBatch, int]:
        """The same for a value as it was given, without headers, and its shard is told: what `send` does for most."""
        if type(value) is bytes:
            size = len(value)
        else:
            value = records.pack_value(value)
            size = records.value_bytes(value)
        ranges = self._ranges
        equal = ranges.equal
        if type(key) is str:  # as shard_of does, but encoded once, and without a call for each message
            try:
                raw = key.encode()
            except UnicodeEncodeError as error:
                raise InvalidKey(_SURROGATES) from error
            size += len(raw)
            hash_ = mmh3.mmh3_32_uintdigest(raw)
            index = hash_ * equal >> 32 if equal else ranges.near[hash_ >> ranges.shift]
            shard = self._buffers[index if index >= 0 else ranges.index_for(hash_)]
        else:
            shard = self.shard_of(key)
            size += len(key) if key is not None else 0
        limits = self._limits
        if size > limits.message_bytes:
            self.check_size(size)
        if shard.staged:
            self.gather(shard)
        # `_add`, written out: this runs for every message.
        batch = shard.open
        if batch.size + size > limits.batch_bytes and batch.keys:
            shard.roll()
            batch = shard.open
        now_ms = time.time_ns() // 1_000_000
        if batch.now_ms != now_ms:
            self._mark(batch, now_ms)
        keys = batch.keys
        index = len(keys)
        keys.append(key)
        batch.values.append(value)
        size += MESSAGE_OVERHEAD_BYTES
        self.buffered_bytes += size
        batch.size = filled = batch.size + size
        if filled > limits.batch_bytes or index + 1 >= limits.batch_messages:
            shard.roll()
        if not shard.busy:
            shard.start()
        return batch, index

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
            raise InvalidKey(_SURROGATES) from error
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
        fresh = [index for index, (count, had) in enumerate(zip(counts, before, strict=True)) if count and not had]
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
        chunks = [(counts[shard.index], now_ms) for now_ms, counts in self._chunks[shard.staged_from :]]
        first, count = 0, len(keys)
        while first < count:
            batch = shard.open
            last, filled = self._part(batch, sizes, first)
            if not batch.keys:
                self._open(batch, shard.staged_since_monotonic_s)
            self._mark_part(batch, chunks, first, last)
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

    def _mark(self, batch: PendingBatch, now_ms: int) -> None:
        """Notes when the messages from here on were sent."""
        if not batch.keys:
            self._open(batch, monotonic())
        batch.marks.append((len(batch.keys), now_ms))
        batch.now_ms = now_ms

    def _open(self, batch: PendingBatch, now_s: float) -> None:
        """A batch gets its first message."""
        batch.opened_monotonic_s = now_s
        self.unsettled.add(batch)
        batch.marks.clear()
        batch.now_ms = 0

    @staticmethod
    def _mark_part(batch: PendingBatch, chunks: Sequence[tuple[int, int]], first: int, last: int) -> None:
        """The same for messages from `first` to `last` of those that were staged: each chunk has brought all up to so
        many, at that time."""
        start, place = 0, len(batch.keys) - first
        for end, now_ms in chunks:
            if start < last and end > max(first, start) and batch.now_ms != now_ms:
                batch.marks.append((place + max(start, first), now_ms))
                batch.now_ms = now_ms
            start = end


def spread(buffers: Sequence[ShardBuffer]) -> list[ShardBuffer]:
    """In an order in which those that follow one another are spread over all masters: each has a range of shards."""
    count = len(buffers)
    step = next(step for step in range(max(round(count * 0.618), 1), 2 * count + 1) if gcd(step, count) == 1)
    return [buffers[place * step % count] for place in range(count)]
