"""What the leader of a group sends by the clock: the ticks of its queue's schedules. Sets no schedule.

Every leader of the queue does this, whatever its group, without asking the others: a tick that several send is stored
once (core/schedule.py). So a leader that is paused, deposed or of the wrong opinion may do too little, never too much.

Time here is this machine's wall clock. Leaders whose clocks differ still send each tick once, the fastest clock first;
a tick comes late by at most what the clock of the one who sends it is slow. A clock that is set back sends nothing
again.

What was changed is seen after READ_EVERY_S; each schedule waits in a task of its own, so that a shard whose master
hangs holds up no other.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup

from shardq.core import records
from shardq.core.routing import RoutingTable
from shardq.core.schedule import Due, Schedule, due_ticks
from shardq.errors import CorruptData, StoreError, StoreRefused, UsageError
from shardq.runtime.cron import Cron
from shardq.runtime.outages import Outages
from shardq.runtime.schedules import home
from shardq.storage import schedules
from shardq.storage.commands import Confirm, confirm_replicas, pack_command
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes

READ_EVERY_S = 1.0
RETRY_S = 1.0
STEP_S = 5.0  # the longest sleep without a look at the clock: it may be set, and a sleeping machine's stands

_log = logging.getLogger("shardq")


class Scheduler:
    """Sends while `leads()` says so, until its task is cancelled. `clock` gives Unix seconds."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        keys: Keys,
        leads: Callable[[], bool],
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._pipes, self._keys, self._leads, self._clock, self._pause = pipes, keys, leads, clock, pause
        self._version: bytes | None = None
        self._kept: dict[str, tuple[bytes, anyio.CancelScope]] = {}
        self._told: dict[str, str] = {}
        self._sealed: set[str] = set()
        self._outages, self._unread = Outages(), f"the schedules of {keys.queue} can't be read"

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                await self._look(tasks)
                await self._pause(READ_EVERY_S * random.uniform(0.8, 1.0))

    async def _look(self, tasks: TaskGroup) -> None:
        """Starts and ends the tasks of schedules as these come, change and go; ends all when this is no leader."""
        if not self._leads():
            self._version = None
            self._keep(tasks, {})
            return
        try:
            if await schedules.version(self._pipes, self._keys) != self._version:
                self._version, stored = await schedules.read_all(self._pipes, self._keys)
                self._keep(tasks, stored)
            self._outages.well(self._unread)
        except (StoreError, CorruptData) as error:
            self._outages.failed(self._unread, error)

    def _keep(self, tasks: TaskGroup, stored: dict[str, bytes]) -> None:
        for name, (data, scope) in list(self._kept.items()):
            if stored.get(name) != data:
                scope.cancel()
                del self._kept[name]
                self._told.pop(name, None)
        for name, data in stored.items():
            if name not in self._kept:
                self._kept[name] = data, anyio.CancelScope()
                tasks.start_soon(self._attend, name, *self._kept[name])

    async def _attend(self, name: str, data: bytes, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                schedule = Schedule.from_bytes(name, data)
                await self._send_for_ever(schedule, Cron(schedule.cron, schedule.timezone))
            except (UsageError, CorruptData) as error:
                self._tell(name, f"schedule {name} of {self._keys.queue} sends nothing: {error}")

    async def _send_for_ever(self, schedule: Schedule, cron: Cron) -> None:
        decided_s, shard = schedule.since_ms // 1000, None
        following: int | None = 0
        waits = f"schedule {schedule.name} of {self._keys.queue} waits"
        while following is not None:
            await self._sleep_until(following)
            now_s = int(self._clock())
            decided = False
            try:
                shard = shard or await self._home(schedule)
                decided = await self._send_due(schedule, cron, shard, decided_s, now_s)
                self._outages.well(waits)
            except (StoreError, CorruptData) as error:
                self._outages.failed(waits, error)
            if decided:
                decided_s = max(decided_s, now_s)
                following = cron.after(now_s)
            else:
                shard = None
                await anyio.sleep(RETRY_S * random.uniform(0.5, 1.0))

    async def _sleep_until(self, moment_s: int) -> None:
        """Until the clock shows it and this is a leader."""
        while True:
            left_s = moment_s - self._clock()
            if left_s <= 0 and self._leads():
                return
            await anyio.sleep(min(left_s, STEP_S) if left_s > 0 else RETRY_S)

    async def _home(self, schedule: Schedule) -> ShardKeys:
        data = await self._pipes.command(self._keys.control_slot, pack_command("HGET", self._keys.routing, "table"))
        if data is None:
            msg = f"queue {self._keys.queue!r} has no routing table: it was deleted, or a master lost its data"
            raise StoreRefused(msg)
        return home(self._keys, RoutingTable.from_bytes(data), schedule)

    async def _send_due(self, schedule: Schedule, cron: Cron, shard: ShardKeys, decided_s: int, now_s: int) -> bool:
        """False when that has to be looked at again: it is not known what others sent."""
        last_s, closed = await schedules.last_tick(self._pipes, shard, schedule.name)
        if closed:
            if now_s > last_s:
                await self._undo_move(schedule, shard)
            return False
        due = due_ticks(cron.until(now_s), max(last_s, decided_s), now_s, schedule.missed)
        for tick in due.ticks:
            batch = self._message(schedule, cron.iso(tick), due.left_out if tick == due.ticks[0] else 0)
            status = await schedules.append_tick(self._pipes, shard, schedule.name, tick, batch, self._confirm())
            if status == "STALE":  # another leader was faster, or the shard was closed just now
                return False
            if status == "SEALED" and schedule.name not in self._sealed:  # by a reshard: the next look knows where to
                self._sealed.add(schedule.name)
                return False
            if status != "OK":
                msg = f"{shard.stream} takes no messages ({status})"
                raise StoreRefused(msg)
            self._sealed.discard(schedule.name)
        if due.late:
            self._tell_missed(schedule, due)
        return True

    async def _undo_move(self, schedule: Schedule, shard: ShardKeys) -> None:
        """The shard was closed long ago and the schedule is still here: who would move it died, or sleeps. First the
        definition changes, so that he finds another one than he saw when he wakes; then the shard is open again."""
        pipes, name, wanted = self._pipes, schedule.name, schedule.next_turn().to_bytes()
        seen = await schedules.read_one(pipes, self._keys, name)
        if not seen or Schedule.from_bytes(name, seen).to_bytes() != schedule.to_bytes():
            return
        if await schedules.swap(pipes, self._keys, name, seen, wanted, self._confirm()):
            await schedules.open_ticks(pipes, shard, name, 0, self._confirm())

    def _message(self, schedule: Schedule, tick: str, left_out: int) -> bytes:
        headers = {**(schedule.headers or {}), "shardq-schedule": schedule.name, "shardq-tick": tick}
        if left_out:
            headers["shardq-missed"] = str(left_out)
        value = records.pack_value(schedule.value)
        now_ms = int(self._clock() * 1000)
        return records.encode(records.RecordBatch(now_ms, None, [schedule.key], [value], [headers]))

    def _confirm(self) -> Confirm | None:
        """A producer's own default: a replica has it too, where every master has one."""
        return confirm_replicas(1) if self._pipes.cluster.least_replicas() >= 1 else None

    def _tell_missed(self, schedule: Schedule, due: Due) -> None:
        _log.warning(
            "schedule %s of %s: %d ticks were missed; %d are sent, %d are left out (missed=%r)",
            schedule.name,
            self._keys.queue,
            due.late,
            len(due.ticks),
            due.left_out,
            schedule.missed,
        )

    def _tell(self, name: str, text: str) -> None:
        """Once, not at every try."""
        if self._told.get(name) != text:
            self._told[name] = text
            _log.warning("%s", text)
