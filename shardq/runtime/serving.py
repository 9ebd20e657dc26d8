"""Serves one shard while its lease is held: when the next step is due and how much it fetches, until the lease is
handed over. Sends no step itself (runtime/steps.py) and knows no message (core/session.py).

Invariants:
- A handover commits everything that ran here before the lease moves: nothing is handled twice.
- A shard that waits for room (core/budget.py) commits and renews as ever; room that it does not use at once it gives
  back.
- A bell is heard whenever it rings: one that rang while this waited for an answer is looked at before the next rest.
"""

from __future__ import annotations

from time import monotonic

from shardq.core.step import LEFT_NOTHING
from shardq.runtime.handover import hand_over
from shardq.runtime.idle import IdlePoll
from shardq.runtime.owning import Owning
from shardq.runtime.shard import OwnedShard
from shardq.runtime.steps import Steps
from shardq.runtime.timekeeping import keep_time
from shardq.runtime.wishes import Wishes
from shardq.storage import calls

LAST_COMMIT_S = 0.02  # since the step that fetched it, a finished message waits for another one to share a commit with
COMMIT_AT_ONCE = 500  # so many have a commit of their own: it costs each of them next to nothing


class Serving:
    """One lease, from the first step to the last."""

    def __init__(self, owning: Owning, held: OwnedShard, wishes: Wishes, steps: Steps) -> None:
        self._owning, self._held, self._wishes, self._steps = owning, held, wishes, steps
        self._settings = owning.settings
        self._last_commit_s = 0.0 if owning.bounded() else LAST_COMMIT_S  # senders to a full queue wait for each commit
        self._caught_up = False
        self._heir_ready = False
        self._stepped_at = -1e9

    async def run(self) -> bool:
        """Steps until the lease is handed over (true) or its heir is gone (false). Raises LeaseLost if it is taken."""
        held, wishes, session, buffer = self._held, self._wishes, self._held.session, self._settings.buffer_messages
        account, drain_from = session.account, 0.0
        while True:
            if wishes.rung or (wishes.stands and not held.hand.outstanding):
                self._caught_up = False
            wishes.rung = wishes.stands = False  # the step that commits what is in hand looks too
            now = monotonic()
            if (self._heir_ready or now >= wishes.release_at_monotonic_s) and not held.draining:
                held.drain()
                drain_from = now
            if held.draining:
                if held.running == 0 and not held.hand.uncommitted:
                    if held.hand.entries or session.later.out:
                        await self._steps.step(0, renew=True, last=True)
                    return await hand_over(self._owning, held, wishes, heir_ready=self._heir_ready)
                self._hurry(now - drain_from)
            else:
                if held.keeps_time(now) and await keep_time(self._owning, held, now):
                    self._caught_up = False
                if session.later.items:
                    self._ask_for_items(now)
            limit = 0 if held.draining or account.waits else session.entries_wanted(buffer)
            pause = self._until_due(now, limit)
            if pause > 0 and (wishes.rung or wishes.stands):
                continue  # somebody rang while `keep_time` waited for its answer: that woke nobody
            if pause <= 0:
                wanted, limit = limit, session.reserve(limit, buffer)
                if wanted and not limit:
                    if self._fetch_due(wanted):
                        continue  # in line for room: unless more is due than to fetch, this rests until it is pledged
                    account.withdraw()  # more would have come with a commit, and comes with another one
                self._stepped_at = now
                renew = self._caught_up or now >= held.trust.renew_at_monotonic_s
                self._note(await self._steps.step(limit, renew=renew), limit)
                continue
            if account.pledge:
                account.withdraw()  # it came too late
            if self._caught_up and limit and session.idle and self._owning.hears(held.keys.bell):
                stepped = await self._idle(limit, now + pause)
                self._stepped_at = max(self._stepped_at, held.trust.renewed_monotonic_s)
                if stepped is not None:
                    self._note(stepped, limit)
            else:
                await self._rest(pause)

    def _note(self, stepped: calls.Stepped, limit: int) -> None:
        if limit:
            self._caught_up = stepped.status == "OK" and stepped.fetched.left == LEFT_NOTHING
        self._heir_ready = bool(stepped.heir)

    def _hurry(self, draining_s: float) -> None:
        """The drain limit passed: a stopping worker cancels what runs, a handover goes on waiting (nothing twice)."""
        if draining_s > self._settings.drain_limit_s and self._wishes.leaving:
            self._owning.runners.interrupt(self._held)

    def _ask_for_items(self, now: float) -> None:
        """Those that are due now come with the next step."""
        session, runners = self._held.session, self._owning.runners
        if session.later.due_in_s(now) <= 0 and session.items_wanted > 0:
            taken = session.later.take_due(now, session.items_wanted, lambda: runners.may_run_alone(self._held))
            session.ask(taken)

    # -- when a step is due ----------------------------------------------------------------------------------

    def _until_due(self, now: float, limit: int) -> float:
        """Seconds until the next step is due by itself; 0 when it is now. It would fetch `limit` entries."""
        held, session, hand, settings = self._held, self._held.session, self._held.hand, self._settings
        caught_up = self._caught_up
        if not held.draining:
            if self._fetch_due(limit):
                return 0.0
            if session.hungry and (session.loaded or not session.account.waits):  # the first step brings all at once
                return 0.0
        uncommitted = hand.uncommitted
        last_commit = uncommitted and (hand.outstanding == 0 or (held.draining and held.running == 0))
        if last_commit and (held.draining or not caught_up or hand.acked >= COMMIT_AT_ONCE or hand.urgent):
            return 0.0
        due = held.trust.renew_at_monotonic_s
        if last_commit:  # the next message may come within this time: then one step commits this and fetches that
            due = min(due, self._stepped_at + self._last_commit_s)
        if not held.draining:
            due = min(due, now + session.later.due_in_s(now), held.promote_at_monotonic_s)
        if hand.outstanding:
            commit = max(
                self._stepped_at + settings.commit_interval_s,
                now if uncommitted else now + settings.commit_interval_s,
            )
            due = min(due, commit)
        if caught_up:
            poll = settings.idle_poll_s if self._owning.hears(held.keys.bell) else settings.deaf_poll_s
            due = min(due, self._stepped_at + poll)
        return due - now

    def _fetch_due(self, limit: int) -> bool:
        """Whether there may be more in the store, and half of what may be in hand is through; then as many entries as
        `limit` are fetched."""
        if self._caught_up or not limit:
            return False
        hand = self._held.hand
        return hand.outstanding <= self._settings.buffer_messages // 2 and (
            hand.held_bytes <= self._held.session.account.most // 2
        )

    async def _rest(self, pause: float) -> None:
        held, account = self._held, self._held.session.account
        if self._caught_up or account.waits:
            held.wake_at = 0
        elif held.hand.held_bytes > account.most // 2:
            held.wake_at = held.hand.outstanding // 2
        else:
            held.wake_at = self._settings.buffer_messages // 2
        await held.awake.wait(pause)
        held.wake_at = -1

    async def _idle(self, limit: int, first_due: float) -> calls.Stepped | None:
        """Polled by the worker's IdlePolls until something is due, or happened. What a poll brought, if one did."""
        held, session, polls, now = self._held, self._held.session, self._owning.polls, monotonic()
        content = session.idle_step(limit, self._settings.buffer_messages)
        poll = IdlePoll(held, content, self._settings.lease_s, self._owning.meters)
        until = min(now + session.later.due_in_s(now), held.promote_at_monotonic_s, held.tidy_at_monotonic_s)
        until = min(until, self._wishes.release_at_monotonic_s)
        polls.add(poll, first_due)
        try:
            if not poll.ended:
                await held.awake.wait(until - now)
        finally:
            polls.drop(poll)
            if poll.under_way:
                self._steps.unanswered = content
        poll.awaited = True
        while poll.under_way:
            left = poll.deadline - monotonic()
            if left <= 0:
                poll.give_up()
            else:
                await held.awake.wait(left)
        self._steps.unanswered = None
        return await self._steps.polled(poll) if poll.ended else None
