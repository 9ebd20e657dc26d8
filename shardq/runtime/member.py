"""One process as a member of a group: heartbeats, and what they tell of the plan and of the other members. Every worker
is a candidate for its leader (leadership.py); `shardq coordinator` is one that takes no shards. Handles no message and
owns no shard.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
from collections.abc import Callable
from time import monotonic

import anyio

from shardq.core.lease import Watch
from shardq.core.meters import GroupMeters
from shardq.core.plan import Plan
from shardq.errors import CorruptData, StoreError, UnknownQueue, UsageError
from shardq.runtime.contact import Contact, group_gone
from shardq.runtime.deletion import may_be_there, standing_of
from shardq.runtime.leadership import Leadership
from shardq.runtime.outages import Outages
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.table import BELL, TableFollower
from shardq.runtime.waker import Waker
from shardq.storage import control
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes

JOINED = "joined"  # what the control bell says of a new member

_log = logging.getLogger("shardq")


def made_up_name(role: str = "") -> str:
    """A name that no other process has, and that tells a person where it runs. Of a long host name (a pod's) the end
    is what differs; in containers the process id does not."""
    host = socket.gethostname().partition(".")[0][-30:].lstrip("-")
    return "-".join(part for part in (host, role, str(os.getpid()), secrets.token_hex(4)) if part)


class Member:
    """Beats until its task is cancelled. `on_change` is called when the plan or the set of silent workers changed;
    `claimed_from` names the holders of the leases that this worker is about to take; `samples_loads` as in
    leadership.py."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        keys: Keys,
        group: str,
        table: TableFollower,
        name: str,
        settings: WorkerSettings,
        takes_shards: bool,
        on_change: Callable[[], None],
        claimed_from: Callable[[], set[str]] = set,
        outages: Outages | None = None,
        meters: GroupMeters | None = None,
        samples_loads: bool = False,
    ) -> None:
        self.name = name
        self.nonce = secrets.token_hex(8)
        self.plan = Plan()
        self.plan_version = 0
        self.silent: frozenset[str] = frozenset()
        self.paused = False
        self.leaving = not takes_shards
        self._role = "worker" if takes_shards else "coordinator"
        self.contact = Contact()
        self._pipes, self._keys, self._group, self._settings = pipes, keys, group, settings
        self._table = table
        self._on_change = on_change
        self._claimed_from = claimed_from
        self._outages = outages = outages or Outages()
        self._label = f"{name} of {keys.queue}/{group}"
        self._meters = meters
        self._beats = 0
        self._alone = False
        self._members: dict[str, Watch] = {}
        self._nudged, self._nudge = False, Waker()
        self._riders: dict[Waker, float] = {}
        self.leadership = Leadership(
            pipes=pipes,
            keys=keys,
            group=group,
            table=table,
            name=name,
            nonce=self.nonce,
            settings=settings,
            outages=outages,
            elected=self.nudge,
            pause=self.until_beat,
            samples_loads=samples_loads,
        )

    @property
    def leads(self) -> bool:
        return self.leadership.holds()

    def nudge(self, _payload: str = "") -> None:
        """The control bell: the plan, the leader or a member changed, beat now."""
        self._nudged = True
        self._nudge.set()

    def ring(self, payload: str) -> None:
        """What the control bell says; nothing, when it can be heard from now on."""
        if payload in (BELL, ""):
            self._table.look()
        # Of a new table the leader tells when it has made a plan. Members that are not alone beat often enough to see a
        # new one; if all beat for each that comes, a rolling start would be a storm.
        if payload != BELL and (payload != JOINED or self._alone):
            self.nudge()

    def start_leaving(self) -> None:
        """From the next heartbeat on the leader gives this worker's shards to others."""
        self.leaving = True
        self.nudge()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._table.run)
            self.leadership.start(tasks)
            await self._keep_beating()

    async def _keep_beating(self) -> None:
        while True:
            self._nudged = False
            started = monotonic()
            try:
                await self._beat()
                self._outages.well(f"{self._label}: a heartbeat failed")
            except (StoreError, CorruptData, UnknownQueue) as error:
                self._outages.failed(f"{self._label}: a heartbeat failed", error)
                self._alone = False  # it is not known who comes meanwhile
            # Never longer: the others count a beat that is late.
            pause = self._pace_s * random.uniform(0.8, 1.0) - (monotonic() - started)
            if not self._nudged:
                await self._nudge.wait(max(pause, 0.01))
            if self._nudged:
                # A burst of bells (a rolling start) makes one heartbeat, not one each.
                await anyio.sleep(min(0.02, self._settings.heartbeat_s / 10))

    async def say_goodbye(self) -> None:
        """Resigns and leaves, so that nobody waits anything out."""
        try:
            await self.leadership.resign()
            left = await self._leave()
        except (StoreError, CorruptData) as error:
            _log.warning("%s could not sign off, the others will wait its lease out: %s", self.name, error)
            return
        if not left:
            await self._clear_up()

    async def _clear_up(self) -> None:
        """The last one: nothing is left of a group that is not there. One that joined just as it was deleted, or led a
        group that nobody had opened, made its hash all the same."""
        try:
            if not await may_be_there(self._pipes, self._table.queue, self._group):
                await self._leave("1")
        except (StoreError, CorruptData) as error:
            _log.debug("%s: whether its group is there still can't be told: %s", self._label, error)

    async def _leave(self, *gone: str) -> int:
        """How many members are left."""
        args = [self.name, self.nonce, self._keys.control_bell(self._group), *gone]
        lease_s = self._settings.leader_lease_s
        _, left = await control.control_call(self._pipes, self._keys, self._group, "leave", args, timeout_s=lease_s)
        return left

    @property
    def _pace_s(self) -> float:
        return self._settings.lone_heartbeat_s if self._alone else self._settings.heartbeat_s

    async def until_beat(self, seconds: float) -> None:
        """For about so many seconds, until a heartbeat is sent: what the caller asks of Redis then travels with it."""
        rider, pace_s = Waker(), self._pace_s
        self._riders[rider] = monotonic() + seconds - pace_s / 2
        try:
            await rider.wait(seconds + 2 * pace_s)  # a heartbeat that is not answered does not hold it up
        finally:
            del self._riders[rider]

    def _take_along(self) -> None:
        now = monotonic()
        for rider, from_s in self._riders.items():
            if now >= from_s:
                rider.set()

    # -- one heartbeat ---------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        self._take_along()
        term, sent = self.leadership.term, monotonic()
        beat = await control.beat(
            self._pipes,
            self._keys,
            self._group,
            worker=self.name,
            nonce=self.nonce,
            beats=self._beats + 1,
            leaving=self.leaving,
            term=term,
            plan_version=self.plan_version,
            watch=("*",) if term else sorted(self._interest()),
            timeout_s=self._settings.leader_lease_s,
            balance=self._settings.balance,
            capacity=self._settings.capacity,
        )
        if isinstance(beat, str):
            if beat == "GONE":
                await self._join_again()
                return
            msg = f"another process goes by the name {self.name!r} in group {self._group!r}: give each worker its own"
            raise UsageError(msg)
        self._beats += 1
        self.contact.heard()
        if self._beats == 1:
            await self._tell_joined()
        self._alone = bool(term) and beat.members.keys() == {self.name}
        if self._meters is not None:
            self._meters.beaten_monotonic_s = monotonic()
        self._take_pause(beat)
        self._take_plan(beat)
        self._take_members(beat.members, monotonic())
        await self.leadership.see(beat, sent)
        if term and term == self.leadership.term:  # only a heartbeat that was sent as the leader saw every member
            self.leadership.act(beat, self.plan)

    async def _join_again(self) -> None:
        """What this member joined is gone. It joins again where that was lost, and where the queue was declared anew;
        of a group that was deleted nothing must come back. Raises UnknownGroup for that, UnknownQueue while there is no
        queue."""
        self.contact.heard()
        standing = await standing_of(self._pipes, self._table.queue, self._group)
        if standing is not None and not standing.registered:
            deleted = bool(standing.deleted)
            if deleted or self.contact.is_lost():
                raise group_gone(self._keys.queue, self._group, self._role, deleted=deleted)
        self._beats = 0
        self.nudge()

    async def _tell_joined(self) -> None:
        """The control bell rings: a leader that was alone looks at once. If that is lost, it looks a little later."""
        ring = pack_command("SPUBLISH", self._keys.control_bell(self._group), JOINED)
        try:
            await self._pipes.command(self._keys.control_slot, ring, timeout_s=self._settings.leader_lease_s)
        except StoreError as error:
            _log.debug("%s: its group was not told that it is there: %s", self._label, error)

    def _interest(self) -> set[str]:
        """The workers whose death would be this one's business: it stands by for a shard of theirs, or claims one."""
        stood_by = {
            self.plan.owners[shard]
            for shard, name in self.plan.standby.items()
            if name == self.name and shard in self.plan.owners
        }
        return stood_by | self._claimed_from()

    def _take_pause(self, beat: control.Beat) -> None:
        if beat.paused != self.paused:
            self.paused = beat.paused
            _log.info("%s: the group is %s", self._label, "paused" if beat.paused else "resumed")
            self._on_change()

    def _take_plan(self, beat: control.Beat) -> None:
        if beat.plan is None or beat.plan_version == self.plan_version:
            return
        try:
            self.plan = Plan.from_bytes(beat.plan)
        except CorruptData as error:
            _log.warning("%s/%s: %s; the leader makes a new one", self._keys.queue, self._group, error)
            self.plan = Plan()
        self.plan_version = beat.plan_version
        if self.plan.owners and self.plan.owners.keys() != self._table.queue.shards.keys():
            self._table.look()  # the leader has another table, or had
        self._on_change()

    def _take_members(self, members: dict[str, control.Member], now: float) -> None:
        self._members = {name: self._members.get(name, Watch()) for name in members}
        for name, member in members.items():
            self._members[name].see(now, member.nonce, member.beats)
        silent = frozenset(
            name
            for name in self._interest()
            if name not in members or self._members[name].still_for(now) > self._settings.silent_after_s
        )
        if silent != self.silent:
            self.silent = silent
            self._on_change()
