"""What a handler is given: the message, and the batch it came in. Holds data; decides and does nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from shardq.core.ids import MessageId
from shardq.core.records import Headers, Key


class Batch:
    """One stream entry in the hands of its shard's owner, with what is finished of it."""

    __slots__ = ("changed", "count", "done", "entry", "owner", "remaining")

    def __init__(self, owner: Ownership, entry: str, count: int) -> None:
        self.owner = owner
        self.entry = entry
        self.count = count
        self.remaining = count
        self.done = bytearray(count)
        self.changed = False


class Ownership:
    """One lease of one shard: constant from acquire to loss. `lost` turns true once and for ever."""

    __slots__ = ("epoch", "group", "lost", "nonce", "queue", "shard", "trusted_until_monotonic_s")

    def __init__(self, queue: str, group: str, shard: int, epoch: int, nonce: str) -> None:
        self.queue = queue
        self.group = group
        self.shard = shard
        self.epoch = epoch
        self.nonce = nonce
        self.lost = False
        self.trusted_until_monotonic_s = 0.0

    @property
    def token(self) -> str:
        return f"{self.epoch}:{self.nonce}"


class Message(msgspec.Struct, eq=False, gc=False):
    """One message as a handler sees it.

    key         str, bytes or None, as it was sent
    value       bytes, str, or what msgpack carried; a dict of fields when another client wrote the entry
    headers     mapping from str to str or bytes, or None
    sent_at_ms  Unix time in ms by the producer's clock (0 for another client's entry)
    attempt     1 at the first try
    """

    key: Key
    value: Any
    headers: Headers | None
    sent_at_ms: int
    index: int
    batch: Batch
    attempt: int = 1

    @property
    def id(self) -> str:
        """`<shard>/<entry id>/<index>`: unique in the queue, stable across redelivery."""
        return str(MessageId(self.batch.owner.shard, self.batch.entry, self.index))

    @property
    def queue(self) -> str:
        return self.batch.owner.queue

    @property
    def group(self) -> str:
        return self.batch.owner.group

    @property
    def shard(self) -> int:
        return self.batch.owner.shard

    @property
    def fence(self) -> int:
        """The lease's epoch: rises at every change of the shard's owner. Hand it to an outside store that refuses a
        smaller one than it has seen, and a paused worker can't overwrite its successor there either."""
        return self.batch.owner.epoch

    def __repr__(self) -> str:
        return f"<Message {self.id} key={self.key!r} attempt={self.attempt}>"
