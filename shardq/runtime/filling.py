"""Puts single messages into the open batches of a producer's shards. Sends nothing, waits for nobody; many messages at
once are staged (staging.py).

Invariants:
- Messages of one key enter batches in the order they came, each in one batch only.
- `buffered_bytes` counts a message from when it is in a batch until its batch has `left`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from time import monotonic
from typing import Any, NamedTuple

import mmh3

from shardq.core import records
from shardq.core.records import Key
from shardq.errors import InvalidKey, MessageTooLarge
from shardq.runtime.batches import PendingBatch
from shardq.runtime.buffers import ShardBuffer
from shardq.runtime.routes import Routes, Segment

MESSAGE_OVERHEAD_BYTES = 8
SURROGATES = "a str key has surrogates that UTF-8 can't carry: send the key as bytes instead"


class Limits(NamedTuple):
    """Of one batch, and of one message."""

    batch_messages: int
    batch_bytes: int
    message_bytes: int


class Filling(Routes):
    """The batches of one producer's shards that messages enter, and what is known of those that have not left."""

    def __init__(self, segments: Sequence[Segment], limits: Limits) -> None:
        self._limits = limits
        self.buffered_bytes = 0
        self.unsettled: set[PendingBatch] = set()
        super().__init__(segments)

    @abstractmethod
    def gather(self, shard: ShardBuffer) -> None:
        """Takes into batches what is staged for a shard, which all that is put there afterwards comes behind."""

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
                raise InvalidKey(SURROGATES) from error
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

    def _mark(self, batch: PendingBatch, now_ms: int) -> None:
        """Notes when the messages from here on were sent."""
        if not batch.keys:
            self._open(batch, monotonic())
        batch.starts.append(len(batch.keys))
        batch.times.append(now_ms)
        batch.now_ms = now_ms

    def _open(self, batch: PendingBatch, now_s: float) -> None:
        """A batch gets its first message."""
        batch.opened_monotonic_s = now_s
        self.unsettled.add(batch)
        batch.starts.clear()
        batch.times.clear()
        batch.now_ms = 0
