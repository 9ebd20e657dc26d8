"""Whether this process was out of touch with Redis for so long that it can't tell any more what happened to its group.

That a group was deleted is noted for an hour (`gone:` in scripts/group.lua, PRODUCER_IDLE_MS), for the workers that run
then: one that finds its group gone opens it anew only if there is no note, as after the queue was declared anew. A
process that stood still for longer finds neither, and must not: nobody would know that the group is back, and it would
hold back messages for ever. Asks nobody.
"""

from __future__ import annotations

import sys
import time

from shardq.errors import UnknownGroup

AWAY_S = 3000.0  # under the hour by more than clocks of different machines differ in it, and a tidy comes late


def _now_s() -> float:
    """Monotonic, and also while a machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


class Contact:
    """Kept by a process for all it asks, and by each claim for its own shard, whose node may be cut off alone."""

    def __init__(self) -> None:
        self._heard_s = _now_s()
        self._broke = False

    def heard(self) -> None:
        """Redis answered: whatever is noted now would be seen."""
        self._broke = self.is_lost()
        self._heard_s = _now_s()

    def there(self, ago_s: float = 0.0) -> None:
        """The group was there so many seconds ago: what was missed before is no matter."""
        self._heard_s = max(_now_s() - ago_s, self._heard_s)
        self._broke = False

    def is_lost(self) -> bool:
        """Whether it was cut for too long, and the group not seen since."""
        return self._broke or _now_s() - self._heard_s > AWAY_S


_AGAIN = {
    "worker": "start the worker again if it shall be opened anew",
    "coordinator": "start it again if it shall lead a new group of that name",
}


def group_gone(queue: str, group: str, who: str, *, deleted: bool) -> UnknownGroup:
    """What `who`, a worker or a coordinator, ends with: that the group was deleted, or is not there and nothing tells
    why."""
    what = f"was deleted while this {who} ran"
    if not deleted:
        what = f"is gone, and this {who} stood still, or was cut off, for too long to know why"
    return UnknownGroup(f"group {group!r} of queue {queue!r} {what}: {_AGAIN[who]}")
