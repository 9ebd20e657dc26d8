"""Which shard's buffer takes a message: by the hash of its key, or without one the shard whose turn it is. Puts nothing
anywhere.

Invariant: every key hash lies in one segment, and every segment has one shard's buffer. As long as nothing is
resharded, and when a reshard is through, the segments are the ranges of the routing table; in between, those of the
shards that did not refuse yet are still theirs (rerouting.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import mmh3

from shardq.core.hashing import key_hash
from shardq.core.ranges import Ranges
from shardq.core.records import Key
from shardq.runtime.buffers import ShardBuffer


class Segment(NamedTuple):
    """Key hashes from `low` up to the next segment's, and the buffer they go to."""

    low: int
    buffer: ShardBuffer


class Routes:
    """The way from a key to its buffer."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.route(segments)

    def route(self, segments: Sequence[Segment]) -> None:
        """From here on messages go by these, in order of `low`, the first of which is 0."""
        self.segments = segments
        self._ranges = Ranges([segment.low for segment in segments])
        self._buffers = [segment.buffer for segment in segments]
        self._shards = spread(list(dict.fromkeys(self._buffers)))
        for index, buffer in enumerate(self._shards):
            buffer.index = index
        self._sticky = self._shards[random.randrange(len(self._shards))]
        self._sticky_batch = self._sticky.open

    def shard_of(self, key: Key) -> ShardBuffer:
        """Raises InvalidKey."""
        if key is None:
            return self._sticky_shard()
        return self._buffers[self._ranges.index_for(key_hash(key))]

    def shards_of(self, keys: Sequence[Key], keyless: ShardBuffer) -> list[ShardBuffer]:
        """Of many keys that were taken before: a str among them can be encoded. core/hashing.py is written out."""
        buffers, index_for, hash_of = self._buffers, self._ranges.index_for, mmh3.mmh3_32_uintdigest
        return [
            keyless if key is None else buffers[index_for(hash_of(key.encode() if isinstance(key, str) else key))]
            for key in keys
        ]

    def _sticky_shard(self) -> ShardBuffer:
        """Messages without a key fill one batch, then the next shard's."""
        if self._sticky.open is not self._sticky_batch:
            self._sticky = self._shards[(self._sticky.index + 1) % len(self._shards)]
            self._sticky_batch = self._sticky.open
        return self._sticky


def spread(buffers: Sequence[ShardBuffer]) -> list[ShardBuffer]:
    """In an order in which those that follow one another are spread over all masters: each has a range of shards."""
    count = len(buffers)
    step = next(step for step in range(max(round(count * 0.618), 1), 2 * count + 1) if gcd(step, count) == 1)
    return [buffers[place * step % count] for place in range(count)]
