"""What a handler is given: the message, and the batch it came in. Holds data; decides and does nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from shardq.core.effects import Atomic, Effect
from shardq.core.ids import MessageId
from shardq.core.records import Headers, Key, RecordBatch


class Batch:
    """One stream entry in the hands of its shard's owner, with what is finished of it; or one message that was put off,
    then `item` is its number among those (core/later.py) and `entry` where it lay. `raw` is what it was decoded
    from, `size` its bytes when unpacked."""

    __slots__ = ("changed", "count", "done", "entry", "headed", "item", "owner", "pristine", "raw", "remaining", "size")

    def __init__(self, owner: Ownership, entry: str, count: int, raw: bytes = b"", item: int = 0) -> None:
        self.owner = owner
        self.entry = entry
        self.count = count
        self.remaining = count
        self.done = bytearray(count)
        self.changed = False
        self.raw = raw
        self.size = len(raw)
        self.item = item
        self.pristine: RecordBatch | None = None
        self.headed = bool(item)  # whether some message may have headers


class Ownership:
    """One lease of one shard: constant from acquire to loss. `lost` turns true once and for ever."""

    __slots__ = ("effects", "epoch", "group", "lost", "nonce", "queue", "shard", "slot", "trusted_until_monotonic_s")

    def __init__(self, queue: str, group: str, shard: int, epoch: int, nonce: str, slot: int = 0) -> None:
        self.queue = queue
        self.group = group
        self.shard = shard
        self.slot = slot
        self.epoch = epoch
        self.nonce = nonce
        self.lost = False
        self.trusted_until_monotonic_s = 0.0
        # Effects of messages whose handlers still run, or whose commit is under way, by message id.
        self.effects: dict[str, list[Effect]] = {}

    @property
    def token(self) -> str:
        return f"{self.epoch}:{self.nonce}"

    def local_key(self, name: str) -> str:
        """A key of the user's own on the shard's slot."""
        raise NotImplementedError

    def now_ms(self) -> int:
        """Unix time in ms."""
        raise NotImplementedError


class Message(msgspec.Struct, eq=False, gc=False):
    """One message as a handler sees it.

    key         str, bytes or None, as it was sent
    value       bytes, str, or what msgpack carried; a dict of fields when another client wrote the entry
    headers     mapping from str to str or bytes, or None
    sent_at_ms  Unix time in ms by the producer's clock (0 for another client's entry)
    attempt     1 at the first try; a worker that died while handling it does not count
    """

    # `_next` is the next message of its key that waits for this one (core/lanes.py), for as long as it does.

    key: Key
    value: Any
    headers: Headers | None
    sent_at_ms: int
    index: int
    batch: Batch
    attempt: int = 1
    _next: Message | None = None

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

    def local_key(self, name: str) -> str:
        """The name of a Redis key that lies on this message's slot, for `atomic()`; the same for every message of the
        shard, so put the key into `name` where each has its own: `message.local_key(f"total:{message.key}")`."""
        return self.batch.owner.local_key(name)

    def atomic(self) -> Atomic:
        """Writes that happen exactly once, with this message's acknowledgement:

            async with message.atomic() as tx:  # in a plain function: with message.atomic() as tx:
                tx.incrby(message.local_key("total"), 1)

        They are carried out once the handler has returned; of a handler that raises, or a worker that dies before that,
        nothing is carried out. See core/effects.py for what is refused."""
        effects, name = self.batch.owner.effects, self.id

        def keep(added: list[Effect]) -> None:
            effects.setdefault(name, []).extend(added)

        return Atomic(self.batch.owner.slot, self.batch.owner.now_ms, keep)

    def __repr__(self) -> str:
        return f"<Message {self.id} key={self.key!r} attempt={self.attempt}>"
