"""The claim of one shard's lease: asks for it until it is granted or not wanted any more, watches the holder meanwhile,
waits at the shard's gate, and tells an owner that its heir is ready. Serves nothing.

Invariants:
- A lease that is held is taken only when it stood still for a whole lease time, seen from here (core/lease.py).
- A claim that said it is ready is not dropped while the holder may still hand over to it: the lease would be with a
  worker that does not serve it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from time import monotonic

import anyio

from shardq.core.lease import Watch
from shardq.errors import ShardqError
from shardq.runtime.contact import Contact, group_gone
from shardq.runtime.gates import pause_s
from shardq.runtime.grants import GrantConfirm
from shardq.runtime.owning import Owning
from shardq.runtime.wishes import Wishes
from shardq.storage import calls
from shardq.storage.groups import Start, open_group, was_deleted
from shardq.storage.keys import ShardKeys

PAUSE_AFTER_ERROR_S = 1.0

CANT_TAKE = "can't take a lease yet"
CANT_CONSUME = "a shard can't be consumed"
CANT_SAY_READY = "can't tell an owner that its heir is ready"


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease that was taken: its epoch, the number of its last step, and when it was asked for."""

    epoch: int
    step: int
    sent_monotonic_s: float


class Claim:
    """`claimed_from` is who holds the lease now; '' when nobody does, or it is not claimed."""

    def __init__(self, owning: Owning, shard: int, keys: ShardKeys, wishes: Wishes) -> None:
        self.claimed_from = ""
        self._owning, self._shard, self._keys, self._wishes = owning, shard, keys, wishes
        self._gated_since_s: float | None = None
        self._contact = Contact()

    def was_held(self, until_monotonic_s: float) -> None:
        """The lease was held meanwhile, and renewed then for the last time."""
        self._contact.there(ago_s=monotonic() - until_monotonic_s)

    async def take(self, *, ours: bool) -> Grant | None:
        """Waits for the lease while the shard is wanted, or its holder gives no sign of life: a claim that has watched
        a dying holder is not dropped because the plan now names another worker, who would begin watching only now.
        `ours`: the lease is held still, so it must be served. None when it is not wanted any more."""
        owning, wishes, settings = self._owning, self._wishes, self._owning.settings
        watch = Watch()
        held_at: tuple[str, str, str] | None = None
        confirm = GrantConfirm(owning.pipes, self._keys.slot, owning.confirm())
        ready = False
        while wishes.wanted or ours or ready or (not wishes.leaving and owning.is_silent(self.claimed_from)):
            wishes.called = anyio.Event()
            sent = monotonic()
            seen = held_at if watch.still_for(sent) >= settings.lease_s else None
            try:
                reply = await self._acquire(seen, confirm)
            except ShardqError as error:
                owning.failed(CANT_TAKE, error, self._shard)
                await confirm.failed(error)
                await anyio.sleep(min(PAUSE_AFTER_ERROR_S, settings.lease_s / 5) * random.uniform(0.5, 1.0))
                continue
            owning.well(CANT_TAKE, self._shard)
            self._keep_contact(missing=reply.status == "MISSING")
            if reply.status == "OK":
                self._over()
                return Grant(reply.epoch, reply.step, sent)
            ours = False  # whatever else the answer is, it says that this worker does not hold it
            ready = ready and reply.status == "HELD" and reply.heir == owning.nonce
            pause = settings.claim_poll_s
            if reply.status == "HELD":
                self.claimed_from, held_at = reply.owner, reply.seen
                still = watch.see(monotonic(), *held_at)
                pause = max(min(pause * random.uniform(0.7, 1.0), settings.lease_s - still), 0.001)
                if reply.heir == owning.nonce and (ready or not wishes.leaving):
                    ready = True
                    await self._say_ready()
            elif reply.status == "GATED":
                pause, held_at = self._wait_at_gate(reply), None
            elif reply.status == "MISSING" and await owning.table.has(self._shard):
                await self._open_group()
            with anyio.move_on_after(pause):
                await wishes.called.wait()
        self._over()
        owning.well(CANT_TAKE, self._shard)
        return None

    async def _acquire(self, seen: tuple[str, str, str] | None, confirm: GrantConfirm) -> calls.Acquired:
        owning = self._owning
        return await calls.acquire(
            owning.pipes,
            self._keys,
            owning.group,
            owning.worker,
            owning.nonce,
            owning.plan_version(),
            seen,
            timeout_s=owning.settings.lease_s,
            confirm=confirm.confirm,
            parents=owning.parents(self._shard),
        )

    def _keep_contact(self, *, missing: bool) -> None:
        if missing:
            self._contact.heard()
            return
        self._contact.there()
        self._owning.contact.there()

    def _over(self) -> None:
        self.claimed_from = ""
        self._gated_since_s = None
        self._owning.gates.passed(self._shard)

    def _wait_at_gate(self, reply: calls.Acquired) -> float:
        """The group has to finish older shards first, whoever claims this one: returns how long to wait. Whoever
        finishes them rings this shard's bell."""
        self.claimed_from = ""
        if not reply.left:
            self._owning.table.doubt()
        self._owning.gates.waits(self._shard, reply.parent, reply.left)
        now = monotonic()
        if self._gated_since_s is None:
            self._gated_since_s = now
        return pause_s(now - self._gated_since_s, hears=self._owning.hears(self._keys.bell))

    async def _open_group(self) -> None:
        """The group's keys are gone. After the queue was declared anew this mends it; after a loss it says so. Raises
        UnknownGroup when somebody deleted the group, or may have so long ago that nothing tells: the worker ends."""
        owning, deleted, lost = self._owning, False, False
        try:
            deleted = await was_deleted(owning.pipes, self._keys, owning.group)
            lost = not deleted and (self._contact.is_lost() or owning.contact.is_lost())
            if not deleted and not lost:
                await open_group(owning.pipes, self._keys, owning.group, Start())
            owning.well(CANT_CONSUME, self._shard)
        except ShardqError as error:
            owning.failed(CANT_CONSUME, error, self._shard)
            await anyio.sleep(PAUSE_AFTER_ERROR_S)
        if deleted or lost:
            raise group_gone(owning.queue, owning.group, "worker", deleted=deleted)

    async def _say_ready(self) -> None:
        owning = self._owning
        try:
            await calls.lease_call(
                owning.pipes, self._keys, owning.group, "ready", [owning.nonce], timeout_s=owning.settings.lease_s
            )
            owning.well(CANT_SAY_READY, self._shard)
        except ShardqError as error:
            owning.failed(CANT_SAY_READY, error, self._shard)
