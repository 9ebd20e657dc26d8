"""When shards move for the sake of load: the plans of a group with balance="load", one after the other. Pure; the time
is an argument. Who takes what is core/load_assignment.py's.

What keeps it from swinging, besides the band of that module:
- loads are smoothed, and those of a new leader count once it has watched for `warmup_s`
- a round that moves something is followed by `cooldown_s` without one
- a shard that moved for its load stays where it is for `rest_s`, and twice as long each time it moves again soon
  after, up to 32 times as long: what noise could make swing comes to rest
- a round moves no more than a sixteenth of the shards
A member that comes, goes or says another capacity starts a round at once, and shards may move again for it: what moves
then is bounded by what joins and leaves. Shards without an owner are always placed.

Every shard that takes messages weighs at least one a second (polls and renewals) and a tenth of the mean: so a queue at
rest is spread by count, and shards without traffic do not gather on one worker. One that a reshard retired weighs what
is left to do there and next to nothing besides: it will never have more, and soon goes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shardq.core.load_assignment import Band, assign_by_load, standby_by_load
from shardq.core.plan import Plan

LEAST_LOAD = 1.0
LEAST_SHARE = 0.1
RETIRED_LEAST_LOAD = 0.01
_SOON, _LONGEST_REST = 4, 32


@dataclass(frozen=True, slots=True)
class Pace:
    """How often anything may move for load."""

    warmup_s: float = 10.0
    cooldown_s: float = 30.0
    rest_s: float = 300.0
    moves_at_least: int = 4
    moves_share: float = 1 / 16

    def most_moves(self, shards: int) -> int:
        return max(self.moves_at_least, int(shards * self.moves_share))


class _Rest(NamedTuple):
    moved_s: float
    rest_s: float


class Balancer:
    """The leader's memory of one term: what it has moved and when."""

    def __init__(self, pace: Pace | None = None, band: Band | None = None) -> None:
        self.pace, self.band = pace or Pace(), band or Band()
        self._rests: dict[int, _Rest] = {}
        self._round_s = float("-inf")
        self._capacities: Mapping[str, float] | None = None
        self._loads: Mapping[int, float] | None = None
        self._began_empty: bool | None = None

    def plan(
        self,
        now_s: float,
        shards: Collection[int],
        capacities: Mapping[str, float],
        before: Plan,
        loads: Mapping[int, float] | None,
        retired: Collection[int] = (),
    ) -> Plan:
        """The plan that follows `before`. `loads` is None until enough is known, and a new mapping for each sample;
        a shard that is not in it weighs as much as the mean. `retired` are those of `shards` that take no messages any
        more."""
        if self._began_empty is None:
            self._began_empty = not before.owners
        joined = self._capacities is not None and dict(capacities) != self._capacities
        fresh, self._loads, self._capacities = loads is not self._loads, loads, dict(capacities)
        if not joined and not fresh and _covers(before, shards, capacities):
            return before
        # A group that starts is balanced by count (and capacity) until there is something to weigh. One that was taken
        # over stays as it is until then.
        if loads is None and self._began_empty and len(set(capacities.values())) < 2:
            return Plan.make(shards, capacities, before, retired)
        may_move = loads is not None or self._began_empty
        weights = weights_of(shards, loads or {}, retired)
        owners = assign_by_load(
            weights,
            capacities,
            before.owners,
            heirs=before.standby,
            resting=() if joined else self._resting(now_s),
            most_moves=self._most_moves(now_s, len(weights), joined=joined) if may_move else 0,
            band=self.band,
        )
        self._note(now_s, before.owners, owners, capacities)
        if owners == before.owners and _has_heirs(before, capacities):
            return before  # loads change all the time: other standbys alone are no reason for a new plan
        return Plan(owners, standby_by_load(owners, weights, capacities))

    def _resting(self, now_s: float) -> Collection[int]:
        return {shard for shard, rest in self._rests.items() if now_s - rest.moved_s < rest.rest_s}

    def _most_moves(self, now_s: float, shards: int, *, joined: bool) -> int:
        if joined:
            return shards
        return self.pace.most_moves(shards) if now_s - self._round_s >= self.pace.cooldown_s else 0

    def _note(
        self, now_s: float, before: Mapping[int, str], owners: Mapping[int, str], members: Collection[str]
    ) -> None:
        for shard, owner in owners.items():
            if before.get(shard, owner) != owner and before[shard] in members:
                self._round_s = now_s
                self._rests[shard] = self._rest(now_s, self._rests.get(shard))

    def _rest(self, now_s: float, last: _Rest | None) -> _Rest:
        if last is None or now_s - last.moved_s > _SOON * last.rest_s:
            return _Rest(now_s, self.pace.rest_s)
        return _Rest(now_s, min(2 * last.rest_s, _LONGEST_REST * self.pace.rest_s))


def weights_of(shards: Collection[int], loads: Mapping[int, float], retired: Collection[int] = ()) -> dict[int, float]:
    """What each shard weighs, in messages a second; all the same where nothing is known, but for those retired."""
    old = set(retired)
    known = [loads[shard] for shard in shards if shard in loads and shard not in old]
    mean = sum(known) / len(known) if known else 0.0
    least = max(LEAST_LOAD, LEAST_SHARE * mean)
    return {
        shard: loads.get(shard, 0.0) + RETIRED_LEAST_LOAD if shard in old else loads.get(shard, mean) + least
        for shard in shards
    }


def _covers(plan: Plan, shards: Collection[int], members: Collection[str]) -> bool:
    """Whether every shard has an owner, and an heir if there is somebody else; and nobody else has."""
    if not members:
        return not plan.owners
    return (
        plan.owners.keys() == set(shards)
        and all(owner in members for owner in plan.owners.values())
        and _has_heirs(plan, members)
    )


def _has_heirs(plan: Plan, members: Collection[str]) -> bool:
    if len(members) < 2:
        return not plan.standby
    return plan.standby.keys() == plan.owners.keys() and all(
        heir in members and heir != plan.owners[shard] for shard, heir in plan.standby.items()
    )
