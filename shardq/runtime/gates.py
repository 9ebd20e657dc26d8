"""Says why shards of one worker are waited for: after a reshard a group finishes the old shards before it begins on
those that took their keys over. Keeps nobody waiting; that is the lease's (scripts/lease.lua).
"""

from __future__ import annotations

import logging
from time import monotonic

TOLD_FIRST_S, TOLD_EVERY_S = 5.0, 60.0
POLL_FIRST_S, POLL_LAST_S = 0.1, 0.5
LONG_S = 30.0

_log = logging.getLogger("shardq")


class Gates:
    """The shards that a worker waits for. One line a minute for all of them, and one when a wait of that kind ends."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._waiting: dict[int, tuple[int, int]] = {}
        self._told_s = self._since_s = 0.0
        self._told = False

    def waits(self, shard: int, parent: int | None, left: int) -> None:
        """The shard's gate is shut: the group has `left` messages to do on `parent`."""
        now = monotonic()
        if not self._waiting:
            self._since_s, self._told_s, self._told = now, now + TOLD_FIRST_S - TOLD_EVERY_S, False
        if parent is not None:
            self._waiting[shard] = parent, left
        if self._waiting and now - self._told_s >= TOLD_EVERY_S:
            self._told_s, self._told = now, True
            _log.info("%s: %s", self._label, self._words())

    def passed(self, shard: int) -> None:
        """The shard is waited for no longer: its gate opened, or it is not wanted any more."""
        if self._waiting.pop(shard, None) is not None and not self._waiting and self._told:
            _log.info("%s: no shard waits for an older one any more", self._label)

    def _words(self) -> str:
        shards = ", ".join(map(str, sorted(self._waiting)[:8])) + (", ..." if len(self._waiting) > 8 else "")
        parents = dict(sorted(self._waiting.values()))
        left = ", ".join(f"{left} messages on shard {parent}" for parent, left in list(parents.items())[:8])
        return f"shards {shards} wait until the group has finished {left}: see `shardq queue show`"


def pause_s(waited_s: float, *, hears: bool) -> float:
    """How long to wait before another look at a shut gate, unless its bell rings: 0.1 s at first, then up to 0.5 s;
    2 s where it has taken long and the bell can be heard."""
    last = 4 * POLL_LAST_S if hears and waited_s > LONG_S else POLL_LAST_S
    return min(max(POLL_FIRST_S, waited_s / 4), last)
