"""Waits until something happened or a time is over, for loops that do so once a step: a future and a timer of the event
loop's own, a fraction of what an event and a cancel scope of anyio cost. Knows nothing of what it waits for.
"""

from __future__ import annotations

import asyncio


class Waker:
    """One task waits, anyone wakes it. What happens while nobody waits is not kept: whoever waits looks first."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Wakes the one that waits, if there is one."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, within_s: float = float("inf")) -> None:
        """Until `set` is called, or for so many seconds."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        timer = loop.call_later(within_s, self.set) if within_s < float("inf") else None
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()


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
