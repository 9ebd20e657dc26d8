"""How many replicas a write can wait for: those that are seen, and nodes that are away and may come back. Asks nobody
itself.

A node that is down, or reads its data after a restart, stays in the cluster's list until somebody forgets it (CLUSTER
FORGET), and counts as a replica: a client that comes while the cluster comes back must not take it for one without
replicas. So the count falls only when nodes are forgotten, and then only when two looks in a row say so: one alone may
have met a cluster that changes.
"""

from __future__ import annotations

from collections.abc import Mapping


class Replicas:
    """The replicas of the master that has fewest, over a client's life."""

    def __init__(self) -> None:
        self.away = 0
        self.unconfirmed = False  # a write was not confirmed since the last look
        self.falls = 0  # how often the count fell
        self._told: dict[str, int] = {}
        self._known: dict[str, int] = {}
        self._count = 0
        self._fewer_before: int | None = None
        self._listed: int | None = None
        self._spread = 0

    @property
    def count(self) -> int:
        return self._count

    @property
    def in_doubt(self) -> bool:
        """Whether there is a reason to look again."""
        seen = self._seen()
        listed = seen if self._listed is None else self._listed  # the topology in use may be older than the list
        return self._count < 1 or self.away > 0 or self.unconfirmed or min(seen, listed) < self._count

    def see(self, known: Mapping[str, int]) -> None:
        """The topology as it is now: replicas of each master."""
        self._known = dict(known)
        self._rise()

    def tell(self, master: str, count: int) -> None:
        """What a master itself says; the topology leaves out a replica that has not replicated anything yet."""
        self._told[master] = count
        self._rise()

    def see_listed(self, away: int, listed: int, spread: int) -> None:
        """What the cluster's own list says: nodes that are away, replicas of the master that has fewest, and how many
        each would have if they were spread evenly, those that are away included. Without it nothing is known of nodes
        that were forgotten."""
        self.away, self._listed, self._spread = away, listed, spread
        self._rise()

    def looked(self) -> bool:
        """A look at all of it is over; true when the count fell."""
        self.unconfirmed = False
        if self._listed is None:
            return False
        seen, before = max(self._seen(), self._listed), self._fewer_before
        fell = before is not None and seen < self._count
        if before is not None and fell:
            self._count = max(seen, before)
            self.falls += 1
        self._fewer_before = seen if seen < self._count else None
        return fell

    def _rise(self) -> None:
        self._count = max(self._count, self._seen())

    def _seen(self) -> int:
        """Those that are away count as if they were spread evenly: by the list alone, for the topology may name some of
        them still, or again."""
        least = min((max(count, self._told.get(name, 0)) for name, count in self._known.items()), default=0)
        return max(least, self._spread) if self.away else least
