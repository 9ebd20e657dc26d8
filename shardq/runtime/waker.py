"""Waits until something happened or a time is over, for loops that do so once a step: a future and a timer of the event
loop's own, a fraction of what an event and a cancel scope of anyio cost. Knows nothing of what it waits for.

Most waits end long before their time: the timer stays for the next one, and looks whether its time has come.
"""

from __future__ import annotations

import asyncio
from time import monotonic


class Waker:
    """One task waits, anyone wakes it. What happens while nobody waits is not kept: whoever waits looks first."""

    __slots__ = ("_loop", "_timer", "_timer_monotonic_s", "_until_monotonic_s", "_waiting")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_monotonic_s = self._until_monotonic_s = 0.0

    def set(self) -> None:
        """Wakes the one that waits, if there is one."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, within_s: float = float("inf")) -> None:
        """Until `set` is called, or for so many seconds."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()  # a system call, up to Python 3.11
        self._waiting = loop.create_future()
        self._until_monotonic_s = monotonic() + within_s
        if within_s < float("inf"):
            self._start(loop, within_s)
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _start(self, loop: asyncio.AbstractEventLoop, within_s: float) -> None:
        """Has the timer come at the end of the wait at the latest."""
        if self._timer is not None:
            if self._timer_monotonic_s <= self._until_monotonic_s:
                return
            self._timer.cancel()
        self._timer_monotonic_s = self._until_monotonic_s
        self._timer = loop.call_later(within_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiting is None or self._until_monotonic_s == float("inf"):
            return
        left_s = self._until_monotonic_s - monotonic()
        if left_s <= 0:
            self.set()
        elif self._loop is not None:
            self._start(self._loop, left_s)


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

    async def wait(self, within_s: float = float("inf")) -> None:
        """Not at all when `set` was called since `clear`."""
        if not self._happened:
            await super().wait(within_s)
