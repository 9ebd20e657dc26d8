"""A member's part in leading its group: it stands for election, and while it leads it has plans made and published, and
its queue's shards, schedules and loads looked after. Beats no heart and owns no shard: what each heartbeat brought is
told here (`see`, `act`).

After River's terms: a term belongs to one incarnation (nonce) and one election. A leader trusts its term until the
moment its last successful heartbeat was *sent* plus the leader lease less a margin; a candidate may take over when it
has seen (term, leader's beats) unchanged for a whole leader lease on its own clock. What a deposed leader still writes
is refused: plans carry the term, offers the plan's version. No leader means that no owner changes by plan; what is
owned goes on, and standbys still take a dead worker's shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from anyio.abc import TaskGroup

from shardq.core.lease import Trust, Watch
from shardq.core.plan import Plan
from shardq.errors import CorruptData, StoreError, UnknownQueue
from shardq.runtime.coordinator import Coordinator, Round
from shardq.runtime.loads import LoadSampler
from shardq.runtime.outages import Outages
from shardq.runtime.scheduler import Scheduler
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.table import TableFollower
from shardq.runtime.upkeep import Pause, Upkeep
from shardq.storage import control
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes

_log = logging.getLogger("shardq")


class Leadership:
    """Of the member `name` with its `nonce`. `elected` is called when it begins to lead; `pause` waits until about so
    many seconds are over. `loads` are sampled while it leads where the group is balanced by load, or
    `samples_loads`."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        keys: Keys,
        group: str,
        table: TableFollower,
        name: str,
        nonce: str,
        settings: WorkerSettings,
        outages: Outages,
        elected: Callable[[], None],
        pause: Pause,
        samples_loads: bool,
    ) -> None:
        self.term = 0
        self._pipes, self._keys, self._group, self._settings = pipes, keys, group, settings
        self._table, self._name, self._nonce = table, name, nonce
        self._outages, self._elected = outages, elected
        self._not_stored = f"{name} of {keys.queue}/{group}: a plan was not stored"
        self._rival = Watch()
        self._trust = Trust(settings.leader_lease_s, -1e9)
        self._acting = False
        self.loads = LoadSampler(
            pipes=pipes,
            group=group,
            shards=table.queue.shards,
            settings=settings,
            leads=self.holds,
            outages=outages,
            label=f"{keys.queue}/{group}",
        )
        self._samples_loads = samples_loads or settings.balance == "load"
        self._coordinator = Coordinator(
            pipes=pipes,
            keys=keys,
            group=group,
            shards=table.queue.shards,
            settings=settings,
            outages=outages,
            loads=lambda: self.loads.known,
            retired=lambda: table.queue.table.retired_by_id,
        )
        self._scheduler = Scheduler(pipes=pipes, keys=keys, leads=self.holds, pause=pause)
        self._upkeep = Upkeep(pipes=pipes, keys=keys, table=table, leads=self.holds, outages=outages, pause=pause)

    def holds(self) -> bool:
        """Whether it leads now, by its own clock."""
        return self.term != 0 and self._trust.trusted(monotonic())

    def start(self, tasks: TaskGroup) -> None:
        """What is looked after while it leads: beside the heartbeats, which nothing of it holds up. What it does goes
        into the same group of tasks."""
        self._tasks = tasks
        tasks.start_soon(self._scheduler.run)
        tasks.start_soon(self._upkeep.run)
        if self._samples_loads:
            tasks.start_soon(self.loads.run)

    async def see(self, beat: control.Beat, sent: float) -> None:
        """A heartbeat that was sent then told who leads: its own term goes on, or is over; with no leader that goes on
        it stands for election. Raises StoreError, CorruptData."""
        if beat.leader_nonce == self._nonce and beat.term == self.term:
            self._trust.renewed(sent)
            return
        if self.term:
            where = f"{self._keys.queue}/{self._group}"
            _log.warning("%s of %s no longer leads: term %d was taken over", self._name, where, self.term)
            self.term = 0
        still = self._rival.see(monotonic(), beat.term, beat.leader_beats, beat.leader_nonce)
        if beat.leader_nonce and still < self._settings.leader_lease_s:
            return
        await self._stand(beat)

    async def _stand(self, beat: control.Beat) -> None:
        sent = monotonic()
        status, term = await self._call("lead", [self._name, self._nonce, beat.term, beat.leader_beats])
        if status == "OK":
            self.term = term
            self._trust = Trust(self._settings.leader_lease_s, sent)
            self._coordinator.begin(term)
            self._table.look()
            _log.info("%s leads %s/%s, term %d", self._name, self._keys.queue, self._group, term)
            self._elected()

    def act(self, beat: control.Beat, plan: Plan) -> None:
        """Has done what this heartbeat, sent as the leader, and the plan call for. In a task of its own, one at a time:
        a shard's master that hangs must not hold up the heartbeats."""
        if self.holds() and not self._acting:
            round_ = self._coordinator.look(beat, plan)
            if round_ is not None:
                self._acting = True
                self._tasks.start_soon(self._lead, round_, self.term)

    async def _lead(self, round_: Round, term: int) -> None:
        try:
            if not round_.before.owners.keys() <= self._table.queue.shards.keys():
                await self._table.read()  # before others lose the shards that only this leader does not know
                if (again := self._coordinator.look(round_.beat, round_.before)) is None:
                    return
                round_ = again
            if not await self._coordinator.perform(self._nonce, round_) and self.term == term:
                self.term = 0
            self._outages.well(self._not_stored)
        except (StoreError, CorruptData, UnknownQueue) as error:
            self._outages.failed(self._not_stored, error)
        finally:
            self._acting = False

    async def resign(self) -> None:
        """Nobody has to wait its lease out. Raises StoreError, CorruptData."""
        if self.term:
            await self._call("resign", [self._nonce, self.term, self._keys.control_bell(self._group)])
            self.term = 0

    async def _call(self, function: str, args: list[str | bytes | int]) -> tuple[str, int]:
        lease_s = self._settings.leader_lease_s
        return await control.control_call(self._pipes, self._keys, self._group, function, args, timeout_s=lease_s)
