"""Which shards of a bulk send wait for more messages before their next call. Sends nothing, runs no timer.

With hundreds of shards a chunk brings each of them a few messages, and a call that carries a few costs about as much as
one that carries hundreds. So while a send_many goes on, no more than about CALLS calls are under way; the other shards
gather more messages until it is their turn. Each node has its share of the calls, and what others leave over.

Invariants:
- Only what chunks brought waits, and only while another chunk is sure to be taken or to end the send. A `send` takes
  what its shard holds along at once.
- Of one node's shards first held is first let go; nothing waits longer than until the first chunk that ends LONGEST_S
  after it came. Others have their share however many calls to a node that is slow, or away, are under way.
- While no send_many takes chunks, or one waits for room, nothing is held: whatever is buffered is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from shardq.errors import ClosedError
from shardq.runtime.buffers import ShardBuffer

# Fewer share a write badly, more leave each with fewer messages: 16 for each of three masters made a tenth more calls.
CALLS = 16
LONGEST_S = 1.0


class Node(Protocol):
    """What is to be known of a node."""

    @property
    def name(self) -> str: ...


class _Place:
    """The shards that one node has: those that wait, and those that were started and may be under way still."""

    __slots__ = ("started", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[ShardBuffer] = deque()
        self.started: list[ShardBuffer] = []


class Holding:
    """The shards of one producer that wait. `node_of` tells who has a slot now; None when nobody does."""

    def __init__(self, node_of: Callable[[int], Node | None]) -> None:
        self._node_of = node_of
        self._sends = self._paced = 0
        self._places: dict[str, _Place] = {}

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
        if not self._sends or not shard.patient:
            shard.start()
        elif not shard.held:
            waiting = self._place_of(shard).waiting
            if self._paced and not waiting:
                shard.start()  # the last: were it to wait too, no call would be under way whose end lets another go
            else:
                shard.held = True
                waiting.append(shard)

    def call_ended(self, shard: ShardBuffer) -> None:
        if self._paced:
            place = self._place_of(shard)
            while place.waiting and not self._start(place, place.waiting.popleft()):
                pass

    def start_due(self) -> None:
        """Starts those whose turn has come."""
        for place in self._places.values():
            if place.started:
                place.started = [shard for shard in place.started if shard.busy]
        due = [place for place in self._places.values() if place.waiting]
        if not due:
            return
        share = -(-CALLS // sum(bool(place.waiting or place.started) for place in self._places.values()))
        late_s = monotonic() - LONGEST_S
        for place in due:
            self._start_some(place, share - len(place.started), late_s)
        for place in due:  # what others leave over
            self._start_some(place, CALLS - sum(len(each.started) for each in self._places.values()), late_s)

    def _start_some(self, place: _Place, free: int, late_s: float) -> None:
        """So many, and those that have waited since before `late_s`."""
        waiting = place.waiting
        while waiting and (free > 0 or waiting[0].staged_since_monotonic_s < late_s):
            free -= self._start(place, waiting.popleft())

    def let_go(self) -> None:
        """Starts all."""
        for place in self._places.values():
            while place.waiting:
                self._start(place, place.waiting.popleft())

    def _place_of(self, shard: ShardBuffer) -> _Place:
        node = self._node_of(shard.slot)
        name = node.name if node is not None else ""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = _Place()
        return place

    def _start(self, place: _Place, shard: ShardBuffer) -> bool:
        """Whether it was started: a `send` may have done that before."""
        shard.held = False
        if shard.busy or not (shard.staged or shard.holds):
            return False
        try:
            shard.start()
        except ClosedError:
            return True  # then nothing leaves any more
        place.started.append(shard)
        return True
