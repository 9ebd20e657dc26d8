"""One timer for a moment that is moved on again and again, as that of a wait or of a reading is: most of those end long
before their time, and a timer made and cancelled for each would cost more than what it guards. Knows nothing of that.

Invariant: there is at most one timer of the event loop's own, and it comes no later than the moment. One that comes
sooner looks, and is set anew.

A timer that comes too soon wakes an event loop that may have nothing else to do, which costs many times what it takes
to set one anew. So that is done as well when the moment is moved on and the timer has less than half of the time left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

NEVER = float("inf")


class Alarm:
    """Calls `due` once the moment that was set last is over. All moments are those of time.monotonic, in seconds."""

    __slots__ = ("_due", "_loop", "_moment_s", "_timer", "_timer_s")

    def __init__(self, due: Callable[[], None]) -> None:
        self._due = due
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._moment_s = self._timer_s = NEVER

    @property
    def moment_s(self) -> float:
        """What was set last; NEVER once it is over."""
        return self._moment_s

    def set(self, moment_s: float) -> None:
        """From within the event loop; NEVER for no moment at all."""
        self._moment_s = moment_s
        if moment_s == NEVER:
            return
        now_s = monotonic()
        if self._timer is not None:
            if now_s + (moment_s - now_s) / 2 <= self._timer_s <= moment_s:
                return
            self._timer.cancel()
        self._start(now_s)

    def _start(self, now_s: float) -> None:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()  # a system call, up to Python 3.11
        self._timer_s = self._moment_s
        self._timer = loop.call_later(max(self._moment_s - now_s, 0.0), self._look)

    def _look(self) -> None:
        self._timer = None
        if self._moment_s == NEVER:
            return
        now_s = monotonic()
        if self._moment_s > now_s:
            self._start(now_s)
            return
        self._moment_s = NEVER
        self._due()
