"""Pairs on their way from a thread that iterates over them to the loop that sends them: `SyncProducer.send_many`.

The iterable is the caller's: it may wait, read a database or count on its own thread, so it is never touched in the
loop. Memory stays bounded: a few megabytes are here at a time. Pairs pass without a lock, which would cost as much as
all else that the thread does: one thread appends to a deque, the loop alone takes from it.

Invariants: pairs are sent in their order, and none waits for a later one to come; what was taken from the iterable is
sent, also when the iterable raises or the caller is interrupted; nobody waits here once sending has ended.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import anyio

from shardq.core import records
from shardq.core.records import Key
from shardq.errors import InvalidValue, NotStored, UsageError
from shardq.runtime.producer import Producer

PART_BYTES = 512 * 1024
PAIR_BYTES = 128  # about what the objects take beside the value's own bytes
MOST_PARTS = 8
TAKEN_AT_ONCE = 4000

Pair = tuple[Key, Any]


class Feed:
    """One `send_many`: `fill` is for the thread, `carry` for the loop."""

    def __init__(self) -> None:
        self._pairs: deque[Pair] = deque()
        self._wanted = False  # the loop has none left, or takes no more: the thread should look up
        self._over = False
        self._refused = False
        self._taken = 0
        self._current: Iterator[Pair] = iter(())
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._parts: deque[int] = deque()  # how many pairs there had been at the end of each part that is not taken yet
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asleep: anyio.Event | None = None

    # -- the thread ------------------------------------------------------------------------------------------

    def fill(self, pairs: Iterable[Pair]) -> bool:
        """Hands the pairs over; false when not all of them were taken."""
        count, size, append = 0, 0, self._pairs.append
        try:
            for key, value in pairs:
                if type(value) is bytes:
                    size += len(value) + PAIR_BYTES
                else:
                    value, more = _packed(value)
                    size += more + PAIR_BYTES
                append((key, value))
                count += 1
                if size > PART_BYTES:
                    size = 0
                    if not self._end_part(count):
                        return False
                elif self._wanted and not self._look_up():
                    return False
        finally:
            # An interrupted thread comes here too: this never waits.
            self._over = True
            complete = self._look_up()
        return complete

    def _look_up(self) -> bool:
        """Wakes the loop if it sleeps; whether more is taken."""
        with self._lock:
            if self._asleep is not None:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._asleep.set)
                self._asleep = None
            self._wanted = self._refused
            return not self._refused

    def _end_part(self, count: int) -> bool:
        """Waits while too much is here; whether more is taken."""
        with self._room:
            self._parts.append(count)
            while len(self._parts) >= MOST_PARTS and not self._refused:
                self._room.wait()
        return self._look_up()

    def with_rest(self, error: NotStored) -> NotStored:
        """The error, counting also what was taken from the iterable and never sent. For after the end."""
        rest = len(self._pairs) + len(list(self._current))
        return NotStored(f"{error}; {rest} more were taken and not sent", error.failed + rest) if rest else error

    # -- the loop --------------------------------------------------------------------------------------------

    async def carry(self, producer: Producer) -> int:
        """Sends what comes until there is no more; returns how many, when all are stored."""
        self._loop = asyncio.get_running_loop()
        sent = 0
        try:
            while await self._more():
                sent += await producer.send_many(chain.from_iterable(iter(self._take, None)))
        except UsageError as error:
            # Its own note counts from the last time that the loop had caught up with the thread.
            before = self._taken - len(list(self._current)) - 1
            error.__notes__ = [f"{before} messages before it were sent"]
            raise
        return sent

    async def _more(self) -> bool:
        while True:
            event = anyio.Event()
            with self._lock:
                self._asleep = event
            self._wanted = True  # before the look: a pair that comes after it is one whose thread sees this
            if self._pairs or self._over:
                with self._lock:
                    self._asleep, self._wanted = None, self._refused
                return bool(self._pairs)
            await event.wait()

    def _take(self) -> Iterator[Pair] | None:
        pop = self._pairs.popleft
        taken = [pop() for _ in range(min(len(self._pairs), TAKEN_AT_ONCE))]
        if not taken:
            return None
        self._taken += len(taken)
        self._current = iter(taken)
        if self._parts and self._parts[0] <= self._taken:
            self._forget_parts()
        return self._current

    def _forget_parts(self) -> None:
        with self._lock:
            while self._parts and self._parts[0] <= self._taken:
                self._parts.popleft()
            if not self._parts:  # not sooner: two threads that both run all the time take the interpreter in turns
                self._room.notify()

    def refuse(self, _: object = None) -> None:
        """No more pairs are taken: sending has ended, or the producer closes. For any thread."""
        with self._lock:
            self._refused = self._over = True
            self._room.notify()
        self._look_up()


def _packed(value: Any) -> tuple[Any, int]:
    """The value as it is now, and its bytes; one that can't be carried stays, to be refused when its turn comes."""
    try:
        packed = records.pack_value(value)
    except InvalidValue:
        return value, 0
    return packed, records.value_bytes(packed)
