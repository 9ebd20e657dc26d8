"""Waits until something happened or a time is over, for loops that do so once a step: a future and a timer of the event
loop's own, a fraction of what an event and a cancel scope of anyio cost. Knows nothing of what it waits for.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from shardq.storage.alarm import NEVER, Alarm


class Waker:
    """One task waits, anyone wakes it. What happens while nobody waits is not kept: whoever waits looks first."""

    __slots__ = ("_alarm", "_loop", "_waiting")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._alarm = Alarm(self._is_over)

    def set(self) -> None:
        """Wakes the one that waits, if there is one."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, within_s: float = NEVER) -> None:
        """Until `set` is called, or for so many seconds."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()  # a system call, up to Python 3.11
        self._waiting = loop.create_future()
        self._alarm.set(monotonic() + within_s)
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _is_over(self) -> None:
        if self._waiting is not None:
            self.set()


class Signal(Waker):
    """A Waker that keeps what happened, from `clear` on, until the wait."""

    __slots__ = ("_happened",)

    def __init__(self) -> None:
        super().__init__()
        self._happened = False

    def set(self) -> None:
        self._happened = True
        super().set()

    def clear(self) -> None:
        self._happened = False

    async def wait(self, within_s: float = NEVER) -> None:
        """Not at all when `set` was called since `clear`."""
        if not self._happened:
            await super().wait(within_s)
