"""What is said of trouble that may last: the first failure at once, then how many there were, at growing intervals, and
a line when it is over. So a log stays short however long an outage is. Decides nothing and tries nothing again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

AGAIN_FIRST_S = 15.0
AGAIN_LAST_S = 600.0

_log = logging.getLogger("shardq")


class _Outage:
    __slots__ = ("again_s", "count", "due_s", "since_s", "who")

    def __init__(self, now_s: float) -> None:
        self.since_s = now_s
        self.count = 0
        self.due_s = now_s
        self.again_s = AGAIN_FIRST_S
        self.who: set[object] = set()


class Outages:
    """The troubles of one process, worker or listener. One is named by `what`, and may strike many (`who`, such as
    shards) at the same time: they share its lines. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[str, _Outage] = {}

    def failed(self, what: str, error: object, who: object = None) -> None:
        """`what` failed, once more or for the first time."""
        now = self._clock()
        outage = self._open.get(what)
        if outage is None:
            outage = self._open[what] = _Outage(now)
        outage.count += 1
        outage.who.add(who)
        if now < outage.due_s:
            return
        outage.due_s = now + outage.again_s
        outage.again_s = min(outage.again_s * 2, AGAIN_LAST_S)
        place = f" (shard {who})" if who is not None else ""
        if outage.count == 1:
            _log.warning("%s%s: %s", what, place, error)
        else:
            _log.warning("%s%s: %s [%s]", what, place, error, self._extent(outage, now))

    def well(self, what: str, who: object = None) -> None:
        """It went well for `who`; when for all, the outage is over. Costs nothing where there was none."""
        outage = self._open.get(what)
        if outage is None:
            return
        outage.who.discard(who)
        if not outage.who:
            del self._open[what]
            _log.warning("over: %s [%s]", what, self._extent(outage, self._clock()))

    @staticmethod
    def _extent(outage: _Outage, now: float) -> str:
        times = "1 failure" if outage.count == 1 else f"{outage.count} failures"
        where = f", {len(outage.who)} shards now" if len(outage.who) > 1 else ""
        return f"{times} in {now - outage.since_s:.0f} s{where}"
