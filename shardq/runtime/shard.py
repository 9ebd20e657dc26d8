"""One owned shard in a worker: its session, its lanes and the clock of its lease, seen by the runners that handle its
messages and by the loop that commits them (runtime/owner.py). Does no I/O.
"""

from __future__ import annotations

from collections import deque

import anyio

from shardq.core.lanes import Lanes
from shardq.core.lease import Trust
from shardq.core.message import Message, Ownership
from shardq.core.session import Session, dead_letter


class OwnedShard(Ownership):
    """From acquire to loss. `lost` and `draining` only ever turn true; runners drop messages of such a shard unhandled:
    they are pending in Redis, and the next owner handles them."""

    __slots__ = ("awake", "draining", "lanes", "running", "session", "suspended", "trust", "wake_at")

    def __init__(
        self, queue: str, group: str, shard: int, epoch: int, nonce: str, step: int, trust: Trust, ready: deque[Message]
    ) -> None:
        super().__init__(queue, group, shard, epoch, nonce)
        self.trust = trust
        self.trusted_until_monotonic_s = trust.until_monotonic_s
        self.session = Session(self, step, dead_letter)
        self.lanes = Lanes(ready)
        self.running = 0
        self.draining = False
        self.suspended: list[Message] = []
        self.wake_at = -1
        self.awake = anyio.Event()

    def wake(self) -> None:
        """The loop of this shard looks at once."""
        self.awake.set()

    def renewed(self, sent_monotonic_s: float) -> list[Message]:
        """A renewal succeeded: trust goes on. Returns the messages that waited for it."""
        self.trust.renewed(sent_monotonic_s)
        self.trusted_until_monotonic_s = self.trust.until_monotonic_s
        suspended, self.suspended = self.suspended, []
        return suspended

    def finish(self, message: Message) -> None:
        """The handler returned."""
        if self.lost:
            return
        self.session.finish(message)
        self._through()

    def bury(self, message: Message, record: bytes) -> None:
        """The message becomes a dead letter with the next commit."""
        if self.lost:
            return
        self.session.bury(message, record)
        self._through()

    def finish_list(self, batches: list[list[Message]]) -> None:
        """The handler of whole lists returned."""
        if self.lost:
            return
        for batch in batches:
            self.session.finish_list(batch)
        self._through()

    def _through(self) -> None:
        if self.session.outstanding <= self.wake_at:
            self.wake()

    def stopped(self) -> None:
        """A handler of this shard ended, one way or another."""
        self.running -= 1
        if self.running == 0 and (self.draining or self.lost):
            self.wake()

    def lose(self) -> None:
        """The lease is gone: nothing of this shard is handled or committed any more."""
        self.lost = True
        self.lanes.clear()
        self.suspended = []
        self.wake()
