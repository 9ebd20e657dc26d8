"""Which shards of a bulk send wait for more messages before their next call. Sends nothing, runs no timer.

With hundreds of shards a chunk brings each of them a few messages, and a call that carries a few costs about as much as
one that carries hundreds. So while a send_many goes on, no more than CALLS calls are under way; the other
shards gather more messages until it is their turn.

Invariants:
- Only what chunks brought waits, and only while another chunk is sure to be taken or to end the send. A `send` takes
  what its shard holds along at once.
- First held, first let go; nothing waits longer than until the first chunk that ends LONGEST_S after it came.
- While no send_many takes chunks, or one waits for room, nothing is held: whatever is buffered is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from shardq.errors import ClosedError
from shardq.runtime.buffers import ShardBuffer

# Fewer share a write badly, more leave each with fewer messages: 16 for each of three masters made a tenth more calls.
CALLS = 16
LONGEST_S = 1.0


class Holding:
    """The shards of one producer that wait."""

    def __init__(self) -> None:
        self._sends = self._paced = 0
        self._waiting: deque[ShardBuffer] = deque()
        self._started: list[ShardBuffer] = []

    @property
    def active(self) -> bool:
        """Whether some send_many takes chunks."""
        return self._sends > 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """While a send_many takes chunks."""
        self._sends += 1
        try:
            yield
        finally:
            self._sends -= 1
            self.let_go()

    @contextmanager
    def paced(self) -> Iterator[None]:
        """While that send_many waits for room: whenever a call has ended, the next shard is started."""
        self._paced += 1
        self.start_due()  # of the calls that were under way then some may have ended
        try:
            yield
        finally:
            self._paced -= 1

    @contextmanager
    def off(self) -> Iterator[None]:
        """While it waits for room and that takes long."""
        self._sends -= 1
        self.let_go()
        try:
            yield
        finally:
            self._sends += 1

    def ready(self, shard: ShardBuffer) -> None:
        """A shard that is not busy has something to send: at once, or when its turn has come."""
        if not self._sends or not shard.patient or (self._paced and not self._waiting):
            shard.start()  # the last: were it to wait too, no call would be under way whose end lets another go
        elif not shard.held:
            shard.held = True
            self._waiting.append(shard)

    def call_ended(self) -> None:
        while self._paced and self._waiting and not self._start(self._waiting.popleft()):
            pass

    def start_due(self) -> None:
        """Starts those whose turn has come."""
        waiting = self._waiting
        if not waiting:
            return
        self._started = [shard for shard in self._started if shard.busy]
        free, now = CALLS - len(self._started), monotonic()
        while waiting and (free > 0 or waiting[0].staged_since_monotonic_s < now - LONGEST_S):
            free -= self._start(waiting.popleft())

    def let_go(self) -> None:
        """Starts all."""
        while self._waiting:
            self._start(self._waiting.popleft())

    def _start(self, shard: ShardBuffer) -> bool:
        """Whether it was started: a `send` may have done that before."""
        shard.held = False
        if shard.busy or not (shard.staged or shard.holds):
            return False
        try:
            shard.start()
        except ClosedError:
            return True  # then nothing leaves any more
        self._started.append(shard)
        return True
