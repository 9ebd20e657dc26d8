"""One shard of one worker: claim its lease, fetch and commit while it holds it, hand it over. The loop, not the rules:
those are in core/lease.py (time), core/session.py (what a step carries) and scripts/*.lua (what is atomic).

    claim -> serve -> (lost | transferred | released) -> claim again while the shard is wanted

Invariants:
- A step that got no answer is sent again as it is; TRYAGAIN, MOVED, timeouts and a cluster that is down are not a lost
  lease. Only FENCED is.
- A handover commits everything that ran here before the lease moves: nothing is handled twice.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from time import monotonic

import anyio

from shardq.core.effects import redirected
from shardq.core.jobs import DEAD
from shardq.core.lease import Trust, Watch
from shardq.core.meters import GroupMeters
from shardq.core.session import LEFT_NOTHING, Step
from shardq.errors import CorruptData, LeaseLost, ShardqError, StoreError, UnknownGroup
from shardq.runtime.delete import read_marks, redact_marked
from shardq.runtime.failures import dead_record_of
from shardq.runtime.gates import Gates, pause_s
from shardq.runtime.grants import GrantConfirm
from shardq.runtime.idle import IdlePoll, IdlePolls
from shardq.runtime.outages import Outages
from shardq.runtime.runners import Runners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.shard import OwnedShard
from shardq.runtime.table import TableFollower
from shardq.storage import calls
from shardq.storage.commands import Confirm
from shardq.storage.groups import Start, open_group, was_deleted
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

_log = logging.getLogger("shardq")

PAUSE_AFTER_ERROR_S = 1.0
FULL_PAUSE_S = 0.1
LAST_COMMIT_S = 0.02  # since the step that fetched it, a finished message waits for another one to share a commit with
COMMIT_AT_ONCE = 500  # so many have a commit of their own: it costs each of them next to nothing
TIDY_EVERY_S = 60.0
TIDY_TOGETHER_S = 5.0  # the shards of a worker that are due within so much share a write
PROMOTE_AT_ONCE = 500
HEIR_PATIENCE_S = 2.0

CANT_TAKE = "can't take a lease yet"
CANT_CONSUME = "a shard can't be consumed"
CANT_SAY_READY = "can't tell an owner that its heir is ready"
CANT_KEEP_TIME = "can't look after what is due"
CANT_READ_MARKS = "can't read what was deleted"
NO_ANSWER = "a commit got no answer, it is sent again"
CANT_HAND_OVER = "can't hand a shard over yet"


class ShardOwner:
    """Claims and serves one shard until it is neither wanted nor held."""

    def __init__(
        self,
        *,
        queue: str,
        group: str,
        shard: int,
        keys: ShardKeys,
        worker: str,
        nonce: str,
        settings: WorkerSettings,
        bounded: bool,
        pipes: Pipes,
        confirm: Callable[[], Confirm | None],
        polls: IdlePolls,
        on_taken: Callable[[], None],
        runners: Runners,
        plan_version: Callable[[], int],
        hears: Callable[[str], bool],
        is_silent: Callable[[str], bool],
        parents: Callable[[], Mapping[int, ShardKeys]],
        table: TableFollower,
        gates: Gates,
        outages: Outages,
        meters: GroupMeters,
    ) -> None:
        self.shard = shard
        self.held: OwnedShard | None = None
        self.wanted = True
        self.leaving = False
        self.keys = keys
        self._queue, self._group, self._keys = queue, group, keys
        self._parents, self._table, self._gates = parents, table, gates
        self._gated_since_s: float | None = None
        self._worker, self._nonce = worker, nonce
        self._taken = f"taken {nonce}"  # what the bell says when this very worker took the lease
        self._settings, self._pipes, self._confirm = settings, pipes, confirm
        self._last_commit_s = 0.0 if bounded else LAST_COMMIT_S  # senders to a full queue wait for each commit
        self._polls, self._on_taken, self._runners = polls, on_taken, runners
        self._plan_version, self._hears, self._is_silent = plan_version, hears, is_silent
        self._outages, self._meters = outages, meters
        self.claimed_from = ""
        self._rung = self._stands = False
        self._bell = anyio.Event()
        self._leaving_since: float | None = None
        self._unanswered: Step | None = None

    def ring(self, payload: str) -> None:
        """The shard's bell: a message came, the lease moved, or (nothing) the bell can be heard from now on."""
        if payload == self._taken:
            return
        if payload:
            self._rung = True
        else:
            self._stands = True
        self._rouse()
        if self.held is not None:
            self._pipes.expect(self._keys.slot)  # the step that looks is written in the turn in which it is built

    def deaf(self) -> None:
        """The bell can't be heard any more: the shard is polled faster."""
        if self.held is not None:
            self.held.wake()

    def _look(self) -> None:
        self._rung = True
        self._rouse()

    def _rouse(self) -> None:
        self._bell.set()
        if self.held is not None:
            self.held.wake()

    def want(self, wanted: bool) -> None:
        """Whether the plan (or a silent owner's standby) gives this shard to this worker."""
        if wanted != self.wanted and not self.leaving:  # once it leaves, another claim follows it, if any
            self.wanted = wanted
            self._look()

    def leave(self, *, has_heir: bool) -> None:
        """The worker stops: hand over to the heir, or, without one, release once what runs is finished."""
        if self._leaving_since is None or not has_heir:
            self._leaving_since = monotonic() if has_heir else -1e9
            self.leaving, self.wanted = True, False
            self._look()

    async def run(self) -> None:
        """Until the shard is neither wanted nor held."""
        ours = False
        while True:
            held = await self._claim(ours=ours)
            if held is None:
                return
            self.held = held
            self._on_taken()
            lost: LeaseLost | None = None
            self._meters.shards += 1
            try:
                ours = not await self._serve(held)
            except LeaseLost as error:
                lost, ours = error, False
            finally:
                self._meters.shards -= 1
            held.lose()
            self._runners.interrupt(held)
            if lost is not None:
                await self._tell_lost(lost)
            while held.running:  # a handler slow to end must not meet its key's next one in a claim of our own
                await held.awake.wait()
            self.held = self._unanswered = None

    async def _tell_lost(self, error: LeaseLost) -> None:
        if await self._table.has(self.shard):
            _log.warning("%s", error)
            self._meters.fenced += 1
        else:
            _log.info("shard %d of %s, which was retired, is removed", self.shard, self._queue)

    async def abandon(self) -> None:
        """After a cancellation: one last commit of what was finished, and the lease back. Errors leave it to time."""
        held = self.held
        if held is None:
            return
        try:
            applied = True
            if self._unanswered is not None:  # what it carries may not have been applied yet
                stepped = await self._call_step(held, self._unanswered, renew=False)
                applied = stepped.status not in ("EFFECT", "FULL")
            if applied:  # else the next step would acknowledge entries whose other messages the refused one stood for
                await self._call_step(held, held.session.last_step(), renew=False)
            await self._lease("release", held.token)
        except ShardqError as error:
            _log.warning(
                "shard %d of %s: its lease was not given back, it runs out: %s", self.shard, self._queue, error
            )
        finally:
            held.lose()

    # -- claiming --------------------------------------------------------------------------------------------

    async def _claim(self, *, ours: bool) -> OwnedShard | None:
        """Waits for the lease while the shard is wanted, or its holder gives no sign of life: a claim that has watched
        a dying holder is not dropped because the plan now names another worker, who would begin watching only now.
        `ours`: the lease is held still, so it must be served. Nor is a claim dropped that said it is ready, while the
        holder may still hand over to it: the lease would be with a worker that doesn't serve it."""
        watch = Watch()
        held_at: tuple[str, str, str] | None = None
        grant = GrantConfirm(self._pipes, self._keys.slot, self._confirm())
        ready = False
        while self.wanted or ours or ready or (not self.leaving and self._is_silent(self.claimed_from)):
            self._bell = anyio.Event()
            sent = monotonic()
            seen = held_at if watch.still_for(sent) >= self._settings.lease_s else None
            try:
                reply = await calls.acquire(
                    self._pipes,
                    self._keys,
                    self._group,
                    self._worker,
                    self._nonce,
                    self._plan_version(),
                    seen,
                    timeout_s=self._settings.lease_s,
                    confirm=grant.confirm,
                    parents=self._parents(),
                )
            except ShardqError as error:
                self._failed(CANT_TAKE, error)
                await grant.failed(error)
                await anyio.sleep(min(PAUSE_AFTER_ERROR_S, self._settings.lease_s / 5) * random.uniform(0.5, 1.0))
                continue
            self._well(CANT_TAKE)
            if reply.status == "OK":
                self.claimed_from = ""
                self._pass_gate()
                held = OwnedShard(
                    self._queue,
                    self._group,
                    self.shard,
                    reply.epoch,
                    self._nonce,
                    keys=self._keys,
                    step=reply.step,
                    trust=Trust(self._settings.lease_s, sent),
                    ready=self._runners.ready,
                    by_key=self._settings.ordering == "key",
                )
                held.tidy_at_monotonic_s = _together(sent + random.uniform(1, 1 + TIDY_EVERY_S))
                self._runners.attach(held)
                return held
            ours = False  # whatever else the answer is, it says that this worker does not hold it
            ready = ready and reply.status == "HELD" and reply.heir == self._nonce
            pause = self._settings.claim_poll_s
            if reply.status == "HELD":
                self.claimed_from, held_at = reply.owner, reply.seen
                still = watch.see(monotonic(), *held_at)
                pause = max(min(pause * random.uniform(0.7, 1.0), self._settings.lease_s - still), 0.001)
                if reply.heir == self._nonce and (ready or not self.leaving):
                    ready = True
                    await self._say_ready()
            elif reply.status == "GATED":
                pause, held_at = self._wait_at_gate(reply), None
            elif reply.status == "MISSING" and await self._table.has(self.shard):
                await self._open_group()
            with anyio.move_on_after(pause):
                await self._bell.wait()
        self.claimed_from = ""
        self._pass_gate()
        self._well(CANT_TAKE)
        return None

    def _wait_at_gate(self, reply: calls.Acquired) -> float:
        """The group has to finish older shards first, whoever claims this one: returns how long to wait. Whoever
        finishes them rings this shard's bell."""
        self.claimed_from = ""
        if not reply.left:
            self._table.doubt()
        self._gates.waits(self.shard, reply.parent, reply.left)
        now = monotonic()
        if self._gated_since_s is None:
            self._gated_since_s = now
        return pause_s(now - self._gated_since_s, hears=self._hears(self._keys.bell))

    def _pass_gate(self) -> None:
        self._gated_since_s = None
        self._gates.passed(self.shard)

    def _failed(self, what: str, error: object) -> None:
        self._outages.failed(f"{self._queue}/{self._group}: {what}", error, self.shard)

    def _well(self, what: str) -> None:
        self._outages.well(f"{self._queue}/{self._group}: {what}", self.shard)

    async def _open_group(self) -> None:
        """The group's keys are gone. After the queue was declared anew this mends it; after a loss it says so. Raises
        UnknownGroup when somebody deleted the group: the worker ends."""
        deleted = False
        try:
            deleted = await was_deleted(self._pipes, self._keys, self._group)
            if not deleted:
                await open_group(self._pipes, self._keys, self._group, Start())
            self._well(CANT_CONSUME)
        except ShardqError as error:
            self._failed(CANT_CONSUME, error)
            await anyio.sleep(PAUSE_AFTER_ERROR_S)
        if deleted:
            what = f"group {self._group!r} of queue {self._queue!r} was deleted while this worker ran"
            raise UnknownGroup(f"{what}: start the worker again if it shall be opened anew")

    async def _say_ready(self) -> None:
        try:
            await self._lease("ready", self._nonce)
            self._well(CANT_SAY_READY)
        except ShardqError as error:
            self._failed(CANT_SAY_READY, error)

    # -- serving ---------------------------------------------------------------------------------------------

    async def _serve(self, held: OwnedShard) -> bool:
        """Steps until the lease is handed over (true) or its heir is gone (false). Raises LeaseLost if it is taken."""
        buffer = self._settings.buffer_messages
        caught_up, heir_ready, stepped_at, drain_from = False, False, -1e9, 0.0
        while True:
            if self._rung or (self._stands and not held.session.outstanding):
                caught_up = False
            self._rung = self._stands = False  # the step that commits what is in hand looks too
            now = monotonic()
            if not held.draining and (heir_ready or self._release_due(now)):
                held.drain()
                drain_from = now
            if held.draining:
                if held.running == 0 and not held.session.uncommitted:
                    if held.session.in_flight or held.session.later.out:
                        await self._step(held, 0, renew=True, last=True)
                    return await self._hand_over(held, heir_ready)
                self._hurry(held, now - drain_from)
            if not held.draining:
                if await self._keep_time(held, now):
                    caught_up = False
                self._ask_for_items(held, now)
            pause = self._until_due(held, now, stepped_at, caught_up)
            if pause > 0 and (self._rung or self._stands):
                continue  # somebody rang while `_keep_time` waited for its answer: that woke nobody
            limit = 0 if held.draining else held.session.entries_wanted(buffer)
            if pause > 0 and not (caught_up and limit and held.session.idle and self._hears(self._keys.bell)):
                await self._rest(held, pause, 0 if caught_up else buffer // 2)
                continue
            if pause > 0:
                stepped = await self._idle(held, limit, now + pause)
                stepped_at = max(stepped_at, held.trust.renewed_monotonic_s)
                if stepped is None:
                    continue
            else:
                stepped_at = now
                stepped = await self._step(held, limit, renew=caught_up or now >= held.trust.renew_at_monotonic_s)
            if limit:
                caught_up = stepped.status == "OK" and stepped.fetched.left == LEFT_NOTHING
            heir_ready = bool(stepped.heir)

    def _until_due(self, held: OwnedShard, now: float, stepped_at: float, caught_up: bool) -> float:
        """Seconds until the next step is due by itself; 0 when it is now."""
        session, settings = held.session, self._settings
        buffer = settings.buffer_messages
        fetch = not held.draining and (
            session.hungry
            or (not caught_up and session.outstanding <= buffer // 2 and session.entries_wanted(buffer) > 0)
        )
        last_commit = session.uncommitted and (session.outstanding == 0 or (held.draining and held.running == 0))
        at_once = held.draining or session.urgent or not caught_up or session.acked >= COMMIT_AT_ONCE
        if fetch or (last_commit and at_once):
            return 0.0
        due = held.trust.renew_at_monotonic_s
        if last_commit:  # the next message may come within this time: then one step commits this and fetches that
            due = min(due, stepped_at + self._last_commit_s)
        if not held.draining:
            due = min(due, now + session.later.due_in_s(now), held.promote_at_monotonic_s)
        if session.outstanding:
            commit = max(
                stepped_at + settings.commit_interval_s,
                now if session.uncommitted else now + settings.commit_interval_s,
            )
            due = min(due, commit)
        if caught_up:
            poll = settings.idle_poll_s if self._hears(self._keys.bell) else settings.deaf_poll_s
            due = min(due, stepped_at + poll)
        return due - now

    @staticmethod
    async def _rest(held: OwnedShard, pause: float, wake_at: int) -> None:
        held.wake_at = wake_at
        await held.awake.wait(pause)
        held.wake_at = -1

    async def _idle(self, held: OwnedShard, limit: int, first_due: float) -> calls.Stepped | None:
        """Polled by the worker's IdlePolls until something is due, or happened. What a poll brought, if one did."""
        session, now = held.session, monotonic()
        content = session.idle_step(limit, self._settings.buffer_messages)
        poll = IdlePoll(held, content, self._settings.lease_s, self._meters)
        until = min(now + session.later.due_in_s(now), held.promote_at_monotonic_s, held.tidy_at_monotonic_s)
        if self._leaving_since is not None:
            until = min(until, self._leaving_since + HEIR_PATIENCE_S)
        self._polls.add(poll, first_due)
        try:
            if not poll.ended:
                await held.awake.wait(until - now)
        finally:
            self._polls.drop(poll)
            if poll.under_way:
                self._unanswered = content
        poll.awaited = True
        while poll.under_way:
            left = poll.deadline - monotonic()
            if left <= 0:
                poll.give_up()
            else:
                await held.awake.wait(left)
        self._unanswered = None
        return await self._polled(held, poll) if poll.ended else None

    async def _polled(self, held: OwnedShard, poll: IdlePoll) -> calls.Stepped:
        content = poll.content
        self._unanswered = content
        try:
            if poll.error is not None:
                raise poll.error
            stepped, sent = calls.read_step(self._keys, self._group, content, poll.reply), poll.sent_monotonic_s
        except (StoreError, CorruptData) as error:
            self._failed(NO_ANSWER, error)
            stepped, sent = await self._send(held, content, renew=True)
            self._well(NO_ANSWER)
        self._unanswered = None
        return await self._stepped(held, content, stepped, sent, renew=True)

    def _ask_for_items(self, held: OwnedShard, now: float) -> None:
        """Those that are due now come with the next step."""
        session = held.session
        if session.later.due_in_s(now) <= 0 and session.items_wanted > 0:
            session.ask(session.later.take_due(now, session.items_wanted, lambda: self._runners.may_run_alone(held)))

    async def _keep_time(self, held: OwnedShard, now: float) -> bool:
        """Moves delayed messages that are due into the stream, true when there were any; now and then forgets what has
        had its time."""
        moved = 0
        try:
            if now >= held.promote_at_monotonic_s:
                moved, next_ms = await calls.promote(
                    self._pipes, self._keys, most=PROMOTE_AT_ONCE, timeout_s=self._settings.lease_s / 3
                )
                held.promoted(now, next_ms)
            if now >= held.tidy_at_monotonic_s:
                more = await calls.tidy(self._pipes, self._keys, timeout_s=self._settings.lease_s / 3)
                held.tidy_at_monotonic_s = now if more else _together(now + TIDY_EVERY_S * random.uniform(0.8, 1.2))
                if held.marked:
                    await redact_marked(self._pipes, self._keys, held.marked)
                self._well(CANT_KEEP_TIME)
        except (StoreError, CorruptData) as error:
            # Steps come first: this is tried again when they have had their turn.
            self._failed(CANT_KEEP_TIME, error)
            held.promote_at_monotonic_s = max(held.promote_at_monotonic_s, now + PAUSE_AFTER_ERROR_S)
            held.tidy_at_monotonic_s = now + TIDY_EVERY_S
        return moved > 0

    async def _step(self, held: OwnedShard, limit: int, *, renew: bool, last: bool = False) -> calls.Stepped:
        """One step, sent until it is answered; hands what it brought to the runners."""
        session = held.session
        content = session.last_step() if last else session.next_step(limit, self._settings.buffer_messages)
        stepped, sent = await self._send(held, content, renew=renew)
        return await self._stepped(held, content, stepped, sent, renew=renew)

    async def _stepped(
        self, held: OwnedShard, content: Step, stepped: calls.Stepped, sent: float, *, renew: bool
    ) -> calls.Stepped:
        session = held.session
        while stepped.status in ("EFFECT", "FULL"):
            if stepped.status == "EFFECT":
                if not await self._redirect(held, content, stepped):
                    self._refuse(held, content, stepped)
            else:
                await self._wait_for_room(held, content)
            renew = True
            stepped, sent = await self._send(held, content, renew=renew)
        session.applied(content)
        if renew:
            self._runners.resume(held, held.renewed(sent))
        if stepped.status == "OK" and stepped.fetched.marks != session.marks_version:
            await self._load_marks(held)
        now = monotonic()
        if stepped.status == "REPEAT":
            session.reread(content, now)
        else:
            held.due_in(now, stepped.fetched.due_in_ms)
            self._runners.deliver(held, session.receive(content, stepped.fetched, now))
        return stepped

    async def _load_marks(self, held: OwnedShard) -> None:
        """Before anything that the step brought is handled; tried until it is answered, like the step itself."""
        while True:
            try:
                held.set_marks(*await read_marks(self._pipes, self._keys, timeout_s=self._settings.lease_s))
            except (StoreError, CorruptData) as error:
                self._failed(CANT_READ_MARKS, error)
                await anyio.sleep(PAUSE_AFTER_ERROR_S * random.uniform(0.5, 1.0))
            else:
                self._well(CANT_READ_MARKS)
                return

    async def _redirect(self, held: OwnedShard, content: Step, stepped: calls.Stepped) -> bool:
        """A shard that the step sends to was sealed: what it sends there goes to those that took the keys over, once
        they are known. False where that is not it."""
        _, refused = (
            content.effects[max(stepped.effect, 1) - 1] if stepped.effect <= len(content.effects) else (0, None)
        )
        if refused is None or refused.to is None or stepped.why not in ("SEALED", "MISSING"):
            return False
        looked = True
        try:
            await refused.to[0].refresh()
        except StoreError:
            looked = False  # the sealed shard's children are asked for again
        except ShardqError:
            return False  # there is no such queue any more
        new = redirected(refused, self._keys.slot)
        if new is None or (new.key == refused.key and looked and stepped.why == "MISSING"):
            return False
        if new.key == refused.key:
            await self._wait_for_room(held, content)
        content.effects = [
            (message, (each.key == refused.key and redirected(each, self._keys.slot)) or each)
            for message, each in content.effects
        ]
        held.session.renumber(content)
        return True

    def _refuse(self, held: OwnedShard, content: Step, stepped: calls.Stepped) -> None:
        """Redis refused an effect: nobody but its author can mend that, so its message is a dead letter."""
        if not 1 <= stepped.effect <= len(content.effects):
            msg = f"shard {self.shard} of {self._queue}: the store refused an effect that was not sent"
            raise CorruptData(msg)
        message, effect = content.effects[stepped.effect - 1]
        error = f"Redis refused {effect.command} on {effect.key}: {stepped.why}"
        _log.error("message %s (key %r) is a dead letter: %s", message.id, message.key, error)
        held.session.amend(content, message, dead_record_of(message, error))
        held.tell_job(message, DEAD, error=error)

    async def _wait_for_room(self, held: OwnedShard, content: Step) -> None:
        """A queue that this step sends to is full, or sealed with no table published yet: everything waits until its
        workers have made room, or whoever began the reshard has done it."""
        if self.leaving and not held.trust.trusted(monotonic() + self._settings.lease_s / 2):
            msg = (
                f"shard {self.shard} of {self._queue}: left without its last commit, a queue it sends to takes nothing"
            )
            raise LeaseLost(msg)
        await anyio.sleep(FULL_PAUSE_S)

    async def _send(self, held: OwnedShard, content: Step, *, renew: bool) -> tuple[calls.Stepped, float]:
        """Sends one step until it is answered; returns the answer and when the answered try began."""
        self._unanswered, failed = content, False
        while True:
            sent = monotonic()
            try:
                stepped = await self._call_step(held, content, renew=renew)
            except (StoreError, CorruptData) as error:
                failed = True
                self._failed(NO_ANSWER, error)
                if self.leaving and held.running == 0 and not held.trust.trusted(monotonic()):
                    msg = f"shard {self.shard} of {self._queue} was left without its last commit: its lease runs out"
                    raise LeaseLost(msg) from error
                await anyio.sleep(min(PAUSE_AFTER_ERROR_S, self._settings.lease_s / 5) * random.uniform(0.5, 1.0))
            else:
                if failed:
                    self._well(NO_ANSWER)
                self._unanswered = None
                self._meters.steps.observe(monotonic() - sent)
                return stepped, sent

    async def _call_step(self, held: OwnedShard, content: Step, *, renew: bool) -> calls.Stepped:
        wait = content.entries_max > 0
        return await calls.step(
            self._pipes,
            self._keys,
            self._group,
            held.token,
            content,
            renew=renew,
            wait=wait,
            timeout_s=self._settings.lease_s,
        )

    # -- handing over ----------------------------------------------------------------------------------------

    def _release_due(self, now: float) -> bool:
        return self._leaving_since is not None and now >= self._leaving_since + HEIR_PATIENCE_S

    def _hurry(self, held: OwnedShard, draining_s: float) -> None:
        """The drain limit passed: a stopping worker cancels what runs, a handover goes on waiting (nothing twice)."""
        if draining_s > self._settings.drain_limit_s and self.leaving:
            self._runners.interrupt(held)

    async def _hand_over(self, held: OwnedShard, heir_ready: bool) -> bool:
        """Transfers to the heir, or releases. False when the heir is gone: the claim that follows finds the lease ours
        still, and the pending entries are read again."""
        if not heir_ready and not self.leaving:
            return False  # the offer was withdrawn while this drained
        function = "transfer" if heir_ready else "release"
        grant = GrantConfirm(self._pipes, self._keys.slot, self._confirm())
        while True:
            try:
                status = await self._lease(function, held.token, grant.confirm)
            except (StoreError, CorruptData) as error:
                if not held.trust.trusted(monotonic()):
                    return True  # whoever comes next waits the lease out
                await anyio.sleep(self._settings.claim_poll_s * random.uniform(0.5, 1.0))
                self._failed(CANT_HAND_OVER, error)
                await grant.failed(error)
                continue
            self._well(CANT_HAND_OVER)
            if status == "NOHEIR" and self.leaving:
                function = "release"
                continue
            return status != "NOHEIR"

    async def _lease(self, function: str, proof: str, confirm: Confirm | None = None) -> str:
        """release, ready or transfer, with the token or nonce that proves the right to it."""
        return await calls.lease_call(
            self._pipes, self._keys, self._group, function, [proof], timeout_s=self._settings.lease_s, confirm=confirm
        )


def _together(moment_s: float) -> float:
    return moment_s - moment_s % TIDY_TOGETHER_S
