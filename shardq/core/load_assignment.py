"""Who should own which shard when shards weigh differently: even by load for each worker's capacity, sticky, and the
same on every machine. The counterpart of core/assignment.py, which counts. Never looks at a clock: when to move at all
is for core/balance.py.

The fair level is the load for each unit of capacity at which all would be equal. A shard heavier than that fills its
owner: nothing helps it, so it and its owner are left out of the level of the others.

Rules that keep noise from moving anything:
- only a worker that is `start` off the level gives or gets, and then until it is within `settle` of it
- one shard moves only when its giver had at least 1.35 times its load more than its taker. To move it back the same
  way, the difference of the two must first change by 0.7 of that
- who is short takes only from those above the level: else the shortage would just move on
- a shard without an owner goes to its planned standby, unless that would be `start` too much for it; else to whom it
  burdens least, the heaviest first
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

_CLASS = math.log(1.5)
_GAIN = 0.35
_GIVERS_TRIED = 8


@dataclass(frozen=True, slots=True)
class Band:
    """How far off the fair level, as a share of it, a worker must be before anything moves, and when it is enough."""

    start: float = 0.2
    settle: float = 0.05


def assign_by_load(
    weights: Mapping[int, float],
    capacities: Mapping[str, float],
    current: Mapping[int, str],
    *,
    heirs: Mapping[int, str] | None = None,
    resting: Collection[int] = (),
    most_moves: int = 0,
    band: Band | None = None,
) -> dict[int, str]:
    """Return the owner of every shard of `weights`, in order of id; {} without members.

    weights     each shard's load, above 0
    capacities  each member's, above 0: one of 2 gets twice the load of one of 1
    current     who owns what now; an owner who is no member counts as none
    heirs       who should take a shard that has no owner
    resting     shards that stay with their owner
    most_moves  so many shards at most leave a live owner

    Cost O(S log S + (S + moves) log M); depends on nothing but the content of its arguments.
    """
    if not capacities:
        return {}
    band = band or Band()
    floor = _Floor(weights, capacities, current)
    floor.place_orphans(heirs or {}, band)
    _Rebalance(floor, resting, most_moves, band).run()
    return dict(sorted(floor.owners.items()))


def standby_by_load(
    owners: Mapping[int, str], weights: Mapping[int, float], capacities: Mapping[str, float]
) -> dict[int, str]:
    """Return for every shard of `owners` who takes it if its owner goes away, in order of id: the shards of one owner
    are spread over those who carry least then. A shard is absent when nobody else is there."""
    floor = _Floor(weights, capacities, owners)
    order = sorted(capacities, key=lambda name: (floor.relative(name), name))
    shards = {name: sorted(owned, key=lambda shard: -weights[shard]) for name, owned in floor.owned.items()}
    shards[""] = sorted(floor.orphans)  # of owners who are no members: anybody may take them
    heirs: dict[int, str] = {}
    for owner, owned in shards.items():
        near = [name for name in order[: 2 * len(owned) + 8] if name != owner]
        heap = [(floor.relative(name), name) for name in near] if owned else []
        heapq.heapify(heap)
        for shard in owned if heap else ():
            carried, name = heap[0]
            heirs[shard] = name
            heapq.heapreplace(heap, (carried + weights[shard] / capacities[name], name))
    return dict(sorted(heirs.items()))


class _Floor:
    """Who owns what while it is being decided. Loads are sums of weights."""

    def __init__(
        self, weights: Mapping[int, float], capacities: Mapping[str, float], current: Mapping[int, str]
    ) -> None:
        self.weights, self.capacities = weights, capacities
        self.owned: dict[str, set[int]] = {name: set() for name in sorted(capacities)}
        self.load = dict.fromkeys(self.owned, 0.0)
        self.owners: dict[int, str] = {}
        self.orphans: list[int] = []
        self._classes: dict[int, list[tuple[float, str]]] = {}
        self._of_class = {name: round(math.log(capacity) / _CLASS) for name, capacity in capacities.items()}
        for shard in sorted(weights):
            owner = current.get(shard)
            if owner is None or owner not in self.owned:
                self.orphans.append(shard)
            else:
                self._own(shard, owner)
        self.total = math.fsum(weights.values())
        self.capacity = math.fsum(capacities.values())
        for name in self.owned:
            self._classes.setdefault(self._of_class[name], []).append((self.relative(name), name))
        for heap in self._classes.values():
            heapq.heapify(heap)

    def relative(self, name: str) -> float:
        """A member's load for each unit of its capacity."""
        return self.load[name] / self.capacities[name]

    def give(self, shard: int, to: str) -> None:
        before = self.owners.get(shard)
        if before is not None:
            self.owned[before].remove(shard)
            self.load[before] -= self.weights[shard]
            self._changed(before)
        self._own(shard, to)
        self._changed(to)

    def _own(self, shard: int, owner: str) -> None:
        self.owners[shard] = owner
        self.owned[owner].add(shard)
        self.load[owner] += self.weights[shard]

    def _changed(self, name: str) -> None:
        heapq.heappush(self._classes[self._of_class[name]], (self.relative(name), name))

    def lightest(self) -> Iterator[str]:
        """The member that carries least, of those of each size: a heavy shard may suit a larger one better."""
        for heap in self._classes.values():
            while heap[0][0] != self.relative(heap[0][1]):
                heapq.heappop(heap)  # said before its load changed; what is true now lies in the heap too
            yield heap[0][1]

    def place_orphans(self, heirs: Mapping[int, str], band: Band) -> None:
        enough = (1 + band.start) * self.total / self.capacity
        for shard in sorted(self.orphans, key=lambda shard: (-self.weights[shard], shard)):
            heir = heirs.get(shard)
            if heir is None or heir not in self.owned or self._then(shard, heir) > enough:
                heir = min(self.lightest(), key=lambda name: (self._then(shard, name), name))
            self.give(shard, heir)
        self.orphans = []

    def _then(self, shard: int, name: str) -> float:
        return self.relative(name) + self.weights[shard] / self.capacities[name]

    def fair_level(self) -> tuple[float, dict[str, float]]:
        """The level, and the load of those whom one shard fills, by name."""
        heaviest = {name: max(map(self.weights.__getitem__, owned)) for name, owned in self.owned.items() if owned}
        total, capacity = self.total, self.capacity
        full: dict[str, float] = {}
        for name in sorted(heaviest, key=lambda name: (-heaviest[name] / self.capacities[name], name)):
            left = capacity - self.capacities[name]
            if heaviest[name] * capacity <= total * self.capacities[name] or left <= 0:
                break
            full[name] = heaviest[name]
            total, capacity = total - heaviest[name], left
        return total / capacity, full


class _Rebalance:
    """Moves shards between live owners until nobody who was off the level is, or nothing helps, or it is enough."""

    def __init__(self, floor: _Floor, resting: Collection[int], most_moves: int, band: Band) -> None:
        self._floor, self._resting, self._left, self._band = floor, frozenset(resting), most_moves, band
        self._level, self._full = floor.fair_level()
        self._sorted: dict[str, list[tuple[float, int]]] = {}
        self._moved: set[int] = set()

    def run(self) -> None:
        if self._left <= 0 or len(self._floor.owned) < 2 or self._level <= 0:
            return
        givers = sorted(
            (name for name in self._floor.owned if self._over(name) > self._band.start),
            key=lambda name: (-self._over(name), name),
        )
        takers = sorted((name for name in self._floor.owned if self._is_short(name)), key=self._order)
        for name in givers:
            while self._over(name) > self._band.settle and self._move_from(name, self._floor.lightest()):
                pass
        if takers:
            self._fill(takers)

    def _order(self, name: str) -> tuple[float, str]:
        return self._floor.relative(name), name

    def _over(self, name: str) -> float:
        """How much more than its share a member has, as a part of the level."""
        share = self._level * self._floor.capacities[name]
        return (self._floor.load[name] - max(share, self._full.get(name, 0.0))) / share

    def _is_short(self, name: str) -> bool:
        return name not in self._full and self._over(name) < -self._band.start

    def _fill(self, takers: Iterable[str]) -> None:
        """Those who have too little get from those who have most."""
        givers = [(-self._over(name), name) for name in self._floor.owned]
        heapq.heapify(givers)
        for taker in takers:
            while self._over(taker) < -self._band.settle and self._take(taker, givers):
                pass

    def _take(self, taker: str, givers: list[tuple[float, str]]) -> bool:
        tried: list[str] = []
        moved = False
        while givers and givers[0][0] < 0 and len(tried) < _GIVERS_TRIED and not moved:
            said, giver = heapq.heappop(givers)
            if said != -self._over(giver):
                heapq.heappush(givers, (-self._over(giver), giver))
                continue
            tried.append(giver)
            moved = self._move_from(giver, [taker])
        for giver in tried:
            heapq.heappush(givers, (-self._over(giver), giver))
        return moved

    def _move_from(self, giver: str, takers: Iterable[str]) -> bool:
        """Moves the shard that evens out best; false when no move is worth it."""
        if self._left <= 0:
            return False
        found = min(
            (move for taker in takers if taker != giver and (move := self._best(giver, taker)) is not None),
            default=None,
        )
        if found is None:
            return False
        _, taker, weight, shard = found
        self._sorted[giver].remove((weight, shard))
        self._moved.add(shard)
        self._left -= 1
        self._floor.give(shard, taker)
        return True

    def _best(self, giver: str, taker: str) -> tuple[float, str, float, int] | None:
        """The load for each unit that the fuller of the two has after the best move between them, and that move."""
        give, take = 1 / self._floor.capacities[giver], 1 / self._floor.capacities[taker]
        high, low = self._floor.relative(giver), self._floor.relative(taker)
        ideal = (high - low) / (give + take)
        limit = min((high - low) / (_GAIN * give + take), 2 * ideal / (1 + _GAIN))
        if limit <= 0:
            return None
        movable = self._movable(giver)
        at = bisect_right(movable, (ideal, 1 << 62))
        around = [movable[place] for place in (at - 1, at) if 0 <= place < len(movable)]
        moves = [
            (max(high - weight * give, low + weight * take), taker, weight, shard)
            for weight, shard in around
            if weight <= limit
        ]
        return min(moves, default=None)

    def _movable(self, name: str) -> list[tuple[float, int]]:
        """By weight; a shard moves once in a round at most."""
        if name not in self._sorted:
            owned = (shard for shard in self._floor.owned[name] if shard not in self._resting)
            weights = self._floor.weights
            self._sorted[name] = sorted((weights[shard], shard) for shard in owned if shard not in self._moved)
        return self._sorted[name]
