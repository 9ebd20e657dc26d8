"""One run of a worker. Puts the parts together: membership and, by it, leadership (member.py), an owner for each shard
that the plan gives to this process (owner.py), runners for the handler (runners.py), bells (bells.py), limits. Talks to
Redis through them only.

Invariants:
- Handlers of a shard whose lease can't be trusted any more are cancelled before another worker may take it.
- At the end every shard is handed to its heir, or released; what was finished is committed before.
"""

from __future__ import annotations

import logging
import random
from time import monotonic

import anyio
from anyio.abc import TaskGroup

from shardq.core.budget import Budget
from shardq.core.meters import GroupMeters
from shardq.runtime.bells import Bells
from shardq.runtime.client import Client
from shardq.runtime.gates import Gates
from shardq.runtime.idle import IdlePolls
from shardq.runtime.limits import Limits
from shardq.runtime.member import Member
from shardq.runtime.outages import Outages
from shardq.runtime.owner import ShardOwner
from shardq.runtime.owning import Owning
from shardq.runtime.queue import Queue
from shardq.runtime.runners import Runners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.slots import Share
from shardq.runtime.table import TableFollower
from shardq.runtime.tasks import outliving_tasks
from shardq.runtime.waker import Waker
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

_log = logging.getLogger("shardq")


class WorkerRun:
    """From the membership to the goodbye; `stop` asks for the end of it."""

    def __init__(
        self,
        client: Client,
        queue: Queue,
        group: str,
        name: str,
        settings: WorkerSettings,
        runners: Runners,
        stop: anyio.Event,
        share: Share | None,
    ) -> None:
        self.client, self.queue, self.group, self.name = client, queue, group, name
        self.settings, self.runners, self.stop, self.share = settings, runners, stop, share
        self.meters = client.meters.group(queue.name, group) if client.meters is not None else GroupMeters()
        self.bells = Bells(client.cluster)
        self.outages = Outages()
        self.table = TableFollower(queue, on_change=self._take_table, outages=self.outages)
        self.gates = Gates(f"{queue.name}/{group}")
        self.budget = Budget(settings.buffer_bytes)
        self.owners: dict[int, ShardOwner] = {}
        self.idle = anyio.Event()
        self.taken = Waker()

    async def run(self) -> None:
        async with outliving_tasks() as plumbing:
            # What outlives the handlers: pipes and heartbeats carry the last commits and the goodbye.
            pipes = Pipes(self.client.cluster, plumbing, self.client.on_retry)
            member = Member(
                pipes=pipes,
                keys=self.queue.keys,
                group=self.group,
                table=self.table,
                name=self.name,
                settings=self.settings,
                takes_shards=True,
                on_change=self._replan,
                claimed_from=self._claimed_from,
                outages=self.outages,
                meters=self.meters,
            )
            self.member, self.pipes = member, pipes
            self.polls = IdlePolls(pipes, self.settings.idle_poll_s, random.random())
            self.owning = self._owning()
            control = self.queue.keys.control_bell(self.group)
            self.bells.listen(self.queue.keys.control_slot, control, member.ring)
            try:
                async with anyio.create_task_group() as tasks:
                    self.tasks: TaskGroup = tasks
                    self.runners.restrict(self._start_limits(tasks), self.share)
                    self.runners.start(tasks)
                    tasks.start_soon(self.bells.run, tasks)
                    tasks.start_soon(self._guard_trust)
                    tasks.start_soon(self.polls.run)
                    tasks.start_soon(member.run)
                    _log.info("worker %s handles %s for group %s", self.name, self.queue.name, self.group)
                    await self.stop.wait()
                    await self._stop_gracefully()
                    tasks.cancel_scope.cancel()
            finally:
                with anyio.move_on_after(self.settings.leader_lease_s, shield=True):
                    await self._release_rest()
                    await member.say_goodbye()
                self.runners.end()

    def _owning(self) -> Owning:
        return Owning(
            queue=self.queue.name,
            group=self.group,
            worker=self.name,
            nonce=self.member.nonce,
            settings=self.settings,
            bounded=lambda: self.queue.settings.max_backlog is not None,
            pipes=self.pipes,
            polls=self.polls,
            on_taken=self.taken.set,
            confirm=lambda: self.client.confirm(None),
            runners=self.runners,
            plan_version=lambda: self.member.plan_version,
            hears=self.bells.hears,
            is_silent=lambda name: name in self.member.silent,
            parents=self._parents,
            table=self.table,
            gates=self.gates,
            outages=self.outages,
            meters=self.meters,
            budget=self.budget,
            contact=self.member.contact,
        )

    def _start_limits(self, tasks: TaskGroup) -> Limits | None:
        if self.settings.limit is None and self.settings.key_limit is None:
            return None
        limits = Limits(
            pipes=self.pipes,
            keys=self.queue.keys,
            group=self.group,
            settings=self.settings,
            runners=self.runners,
            outages=self.outages,
            meters=self.meters,
        )
        limits.start(tasks)
        return limits

    @property
    def resting(self) -> bool:
        """Whether it takes no shard now: it stops, or its group is paused."""
        return self.stop.is_set() or self.member.paused

    def _replan(self) -> None:
        """The plan or the set of silent workers changed: start, keep or end a claim on each shard."""
        plan, me = self.member.plan, self.name
        for shard in self.queue.shards:
            owner = plan.owners.get(shard)
            wanted = not self.resting and (
                owner == me or (plan.standby.get(shard) == me and owner in self.member.silent)
            )
            current = self.owners.get(shard)
            if current is not None:
                if self.resting:
                    current.wishes.leave(has_heir=not self.member.paused and owner not in (None, me))
                else:
                    current.wishes.want(wanted)
            elif wanted:
                self._start_owner(shard)

    def _take_table(self) -> None:
        """There are other shards than before."""
        for shard, owner in self.owners.items():
            if shard not in self.queue.shards:
                owner.wishes.leave(has_heir=False)
        self._replan()
        if self.member.leads:
            self.member.nudge()  # a plan for them at once

    def _parents(self, shard: int) -> dict[int, ShardKeys]:
        """The retired shards that the group has to finish before it may own this one."""
        table = self.queue.table
        older = table.ancestors(shard) if shard in table.by_id else ()
        return {each.id: self.queue.shards[each.id] for each in older}

    def _claimed_from(self) -> set[str]:
        """Who holds the leases that this worker is about to take."""
        return {owner.claimed_from for owner in self.owners.values() if owner.held is None and owner.claimed_from}

    def _start_owner(self, shard: int) -> None:
        keys = self.queue.shards[shard]
        owner = ShardOwner(self.owning, shard, keys)
        self.owners[shard] = owner
        self.budget.shards = len(self.owners)
        self.bells.listen(keys.slot, keys.bell, owner.wishes.ring, owner.wishes.deaf)
        self.tasks.start_soon(self._own, owner)

    async def _own(self, owner: ShardOwner) -> None:
        await owner.run()
        if self.owners.get(owner.shard) is owner:
            del self.owners[owner.shard]
            self.budget.shards = len(self.owners)
            self.bells.drop(owner.keys.bell)
        if not self.owners:
            self.idle.set()
        self._replan_if_wanted(owner.shard)

    def _replan_if_wanted(self, shard: int) -> None:
        """The plan may have come back to this worker while the claim was ending."""
        planned = self.member.plan.owners.get(shard) == self.name and shard in self.queue.shards
        if planned and not self.resting and shard not in self.owners:
            self._start_owner(shard)

    async def _guard_trust(self) -> None:
        """Cancels the handlers of a shard whose lease can't be trusted any more, before another may take it."""
        what = f"{self.queue.name}: a lease could not be renewed in time, its handlers are stopped"
        interrupted: set[int] = set()
        look_every_s = self.settings.lease_s / 50
        while True:
            now, soonest = monotonic(), float("inf")
            for owner in self.owners.values():
                held = owner.held
                if held is None or now < held.trusted_until_monotonic_s:
                    if held is not None:
                        soonest = min(soonest, held.trusted_until_monotonic_s - now)
                    if owner.shard in interrupted:
                        interrupted.discard(owner.shard)
                        self.outages.well(what, owner.shard)
                    continue
                soonest = 0.0
                if held.running:
                    interrupted.add(owner.shard)
                    self.outages.failed(what, "the store did not answer, or this process stood still", held.shard)
                    self.runners.interrupt(held)
            # Trust that is there only grows; a lease just taken may have less of it left than all the others.
            await self.taken.wait(look_every_s if interrupted else max(soonest, look_every_s))

    async def _stop_gracefully(self) -> None:
        """Hands every shard to its heir; releases what nobody is there for."""
        self.member.start_leaving()
        _log.info("worker %s stops: it hands over %d shards", self.name, len(self.owners))
        for owner in self.owners.values():
            owner.wishes.leave(has_heir=True)
        with anyio.move_on_after(self.settings.drain_limit_s + self.settings.lease_s) as limit:
            while self.owners:
                self.idle = anyio.Event()
                await self.idle.wait()
        if limit.cancelled_caught:
            _log.warning(
                "worker %s ends with %d shards not handed over: their leases run out", self.name, len(self.owners)
            )

    async def _release_rest(self) -> None:
        """After a cancellation: commits what was finished and gives the leases back."""
        async with anyio.create_task_group() as tasks:
            for owner in self.owners.values():
                tasks.start_soon(owner.abandon)
