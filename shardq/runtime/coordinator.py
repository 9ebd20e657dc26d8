"""What the leader of a group does at each heartbeat: see who lives, plan, publish, offer what has to move. It only
decides who should own what: reading, committing, renewing and the moves themselves go on without it.

Decide, then perform: core/plan.py computes the plan from members and the plan before; here it is compared with what is
stored and only differences are written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

from shardq.core.balance import Balancer
from shardq.core.lease import Watch
from shardq.core.plan import Plan
from shardq.errors import CorruptData, StoreError
from shardq.runtime.outages import Outages
from shardq.runtime.settings import WorkerSettings
from shardq.storage import control, offers
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes

_log = logging.getLogger("shardq")

AUDIT_EVERY = 60
FREE_FIRST_S, FREE_LAST_S = 0.25, 8.0


@dataclass(frozen=True, slots=True)
class Round:
    """What one heartbeat calls for: `plan` in place of `before`, without those that are `dead`."""

    beat: control.Beat
    before: Plan
    plan: Plan
    dead: list[str]

    @property
    def lost(self) -> bool:
        """Whether the store has no plan any more: its master lost what it had, or somebody deleted the group. Whoever
        comes under a name that the plan has already would wait for it for ever."""
        return self.beat.plan_version == 0 and bool(self.plan.owners)


class _Free(NamedTuple):
    """A shard whose lease nobody holds, when it was offered last: when to look again, and how long that was put off."""

    again_s: float
    pause_s: float


class Coordinator:
    """The leader's work for one group. `begin` at each election, `look` at each heartbeat, `perform` what it found."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        keys: Keys,
        group: str,
        shards: dict[int, ShardKeys],
        settings: WorkerSettings,
        outages: Outages,
        loads: Callable[[], Mapping[int, float] | None],
        retired: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._pipes, self._keys, self._group, self._settings = pipes, keys, group, settings
        self._shards, self._retired = shards, retired
        self._outages, self._cant_offer = outages, f"{keys.queue}/{group}: can't offer a shard yet"
        self._loads, self._balancer = loads, Balancer(settings.pace)
        self._differ: list[str] = []
        self._term = 0
        self._watches: dict[str, Watch] = {}
        self._unsettled: set[int] = set()
        self._free: dict[int, _Free] = {}
        self._ticks = 0
        self._made: tuple[tuple[list[str], tuple[int, ...], tuple[int, ...]], Plan, Plan] | None = None

    def begin(self, term: int) -> None:
        """A new term: whoever is a member counts as alive until it has stood still for a whole lease from now."""
        self._term = term
        self._watches = {}
        self._unsettled = set(self._shards)
        self._free = {}
        self._ticks = 0
        self._balancer = Balancer(self._settings.pace)

    def look(self, beat: control.Beat, before: Plan) -> Round | None:
        """What is to be done after this heartbeat; None when that is nothing, as nearly always."""
        if not beat.members:
            return None
        plan, dead = self._decide(beat.members, before)
        if plan is before or plan == before:
            plan = before
            self._ticks += not dead
            if not dead and self._ticks % AUDIT_EVERY == 0:
                self._unsettled = set(self._shards)
        todo = Round(beat, before, plan, dead)
        return todo if plan is not before or dead or todo.lost or self._due() else None

    async def perform(self, nonce: str, todo: Round) -> bool:
        """Does it; false when another leader's term has begun."""
        plan, before, beat, version = todo.plan, todo.before, todo.beat, todo.beat.plan_version
        if plan is not before or todo.dead or todo.lost:
            # Before the write: when its answer is lost, the next round sees no difference any more.
            changed = {shard for shard, owner in plan.owners.items() if before.owners.get(shard) != owner}
            self._unsettled |= changed
            self._free = {shard: free for shard, free in self._free.items() if shard not in changed}
            published = await self._publish(nonce, plan, todo.dead, beat.members)
            if published is None:
                return False
            version = published
        await self._settle(plan, version, beat.members)
        return True

    def _decide(self, members: dict[str, control.Member], before: Plan) -> tuple[Plan, list[str]]:
        now = monotonic()
        self._watches = {name: self._watches.get(name, Watch()) for name in members}
        alive, dead = [], []
        for name, member in members.items():
            if self._watches[name].see(now, member.nonce, member.beats) >= self._settings.lease_s:
                dead.append(name)
            elif not member.leaving:
                alive.append(name)
        self._warn_of_others({name: members[name] for name in alive})
        if self._settings.balance == "count":
            return self._by_count(alive, before), dead
        capacities = {name: members[name].capacity for name in alive}
        return self._balancer.plan(now, self._shards, capacities, before, self._loads(), self._retired()), dead

    def _by_count(self, alive: list[str], before: Plan) -> Plan:
        """The plan for these members, made anew only when it can be another one."""
        made, shards, retired = self._made, tuple(self._shards), tuple(self._retired())
        if made is None or made[0] != (alive, shards, retired) or made[1] is not before:
            made = self._made = ((alive, shards, retired), before, Plan.make(shards, alive, before, retired))
        return made[2]

    def _warn_of_others(self, alive: Mapping[str, control.Member]) -> None:
        """Workers that would have it otherwise: said once while there are any. The next leader may be one."""
        own = self._settings.balance
        differ = sorted(name for name, member in alive.items() if member.balance != own)
        if differ and not self._differ:
            _log.warning(
                "%s/%s is balanced by %s, as its leader has it, but by %s for %s: give every worker and coordinator of "
                "the group the same balance",
                self._keys.queue,
                self._group,
                own,
                "count" if own == "load" else "load",
                ", ".join(differ[:5]) + (", ..." if len(differ) > 5 else ""),
            )
        self._differ = differ

    async def _publish(self, nonce: str, plan: Plan, dead: list[str], members: dict[str, control.Member]) -> int | None:
        removed = [part for name in dead for part in (name, members[name].value)]
        status, version = await control.control_call(
            self._pipes,
            self._keys,
            self._group,
            "plan",
            [nonce, self._term, plan.to_bytes(), self._keys.control_bell(self._group), *removed],
            timeout_s=self._settings.leader_lease_s,
        )
        if status != "OK":
            return None
        for name in dead:
            _log.warning(
                "worker %s of %s/%s gave no sign of life for %g s: its shards go to others",
                name,
                self._keys.queue,
                self._group,
                self._settings.lease_s,
            )
        return version

    def _due(self) -> list[int]:
        """The shards to offer now, by id: not those that were just found free."""
        now = monotonic()
        return sorted(
            shard for shard in self._unsettled if (free := self._free.get(shard)) is None or free.again_s <= now
        )

    async def _settle(self, plan: Plan, version: int, members: dict[str, control.Member]) -> None:
        """Offers every shard whose living owner is not the planned one, until it has moved."""
        self._unsettled &= self._shards.keys()  # some may have been removed
        self._free = {shard: free for shard, free in self._free.items() if shard in self._unsettled}
        wanted = [(shard, plan.owners.get(shard, "")) for shard in self._due()]
        wanted = [(shard, owner) for shard, owner in wanted if owner in members]
        if not wanted:
            return
        made = [(self._shards[shard], version, owner, members[owner].nonce) for shard, owner in wanted]
        limit_s = self._settings.leader_lease_s / 2
        answers = await offers.offer_all(self._pipes, self._group, made, timeout_s=limit_s)
        for (shard, _), answer in zip(wanted, answers, strict=True):
            self._take_answer(shard, answer)

    def _take_answer(self, shard: int, answer: str | StoreError | CorruptData) -> None:
        if not isinstance(answer, str):
            self._outages.failed(self._cant_offer, answer, shard)
            return
        self._outages.well(self._cant_offer, shard)
        free = self._free.pop(shard, None)
        if answer == "OWNED":
            self._unsettled.discard(shard)
        elif answer == "FREE":  # its owner takes it by itself, after a reshard perhaps only in an hour
            pause_s = min(2 * free.pause_s, FREE_LAST_S) if free is not None else FREE_FIRST_S
            self._free[shard] = _Free(monotonic() + pause_s, pause_s)
