"""Who is next: handler slots handed out to several queues in proportion to their weights (stride scheduling). Pure.

Every share has a virtual time that moves by 1 / weight with each slot it is given; the one that is furthest behind is
next. Reckoned in whole numbers, so that no rounding ever adds up.

Invariants (tests/core/test_fair_share.py):
- Of shares that want slots all the time, none is ever more than one of its own turns from its part: for any two of them
  |given_a / weight_a - given_b / weight_b| <= max(1 / weight_a, 1 / weight_b), counted from when they began to want.
- A share that wanted nothing for a while comes back level with the others: it gains no credit, and keeps its debt.
- None starves: a weight of 1 against 1000 is given one slot in 1001.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from shardq.errors import UsageError

MAX_WEIGHT = 1000


class FairShare:
    """Shares are numbers from 0, in the order of `weights`."""

    def __init__(self, weights: Sequence[int]) -> None:
        for weight in weights:
            if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
                msg = f"a weight is a whole number from 1 to {MAX_WEIGHT}, not {weight!r:.40}"
                raise UsageError(msg)
        whole = math.lcm(*weights)
        self._strides = [whole // weight for weight in weights]
        self._times = [0] * len(weights)
        self._now = 0
        self._wanting: Collection[int] = frozenset()

    def next(self, wanting: Collection[int]) -> int:
        """Gives a slot to one of those that want one now (at least one), and returns it."""
        for share in wanting:
            if share not in self._wanting:
                self._times[share] = max(self._times[share], self._now)
        self._wanting = frozenset(wanting)
        chosen = min(wanting, key=lambda share: (self._times[share], share))
        self._now = self._times[chosen]
        self._times[chosen] += self._strides[chosen]
        return chosen

    def give_back(self, share: int) -> None:
        """It could not use the slot after all: the turn does not count."""
        self._times[share] -= self._strides[share]
