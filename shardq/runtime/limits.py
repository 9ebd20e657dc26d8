"""A worker's rate limits: takes leave to handle messages from Redis, in advance and in small portions, and tells the
runners when there is some. How much a limit allows is core/limits.py's and scripts/limit.lua's.

Invariants:
- Redis is asked for what waits here, not for each message: one call for all that wait, and none before the time that
  the last answer named (or ASK_AGAIN_S, so that a stricter limit of another worker is never long forgotten).
- Waiting holds no runner. What waits belongs to its shard's owner like anything fetched: when the shard is handed over
  it stays behind unhandled, its delivery uncounted.
- A key that must wait long does not hold up others: when a shard's buffer fills with such messages they are put back
  into Redis, to come again when their time has come (core/later.py), as retries do, but with the same attempt.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from shardq.core.gate import KeyGate
from shardq.core.limits import AHEAD_S, Grant, Limit, Tokens
from shardq.core.meters import GroupMeters
from shardq.errors import CorruptData, StoreError
from shardq.runtime.outages import Outages
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.waker import Signal
from shardq.storage import limits
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes

if TYPE_CHECKING:
    from shardq.runtime.runners import Runners
    from shardq.runtime.shard import OwnedShard

ASK_AGAIN_S = 5.0
PAUSE_AFTER_ERROR_S = 0.5
SHORTEST_PAUSE_S = 0.002
PUT_BACK_AFTER_S = 3.0
FULL_PART = 4  # a shard's buffer counts as full of waiting messages from this part of it on, or when others lack room
PACE_OVER_S = 0.1
PLENTY_PAUSE_S = 0.01

CANT_TAKE = "can't ask what the rate limit allows"
TOO_FAR = "what a rate limit allows lapsed before it was known here; where that lasts, give the limit a larger burst"

_log = logging.getLogger("shardq")


class GroupLimiter:
    """The group's limit in one worker. `demand()` tells how many messages would be begun at once but for the limit, and
    how many wait in all."""

    def __init__(
        self, limits: Limits, limit: Limit, demand: Callable[[], tuple[int, int]], wake: Callable[[int], None]
    ) -> None:
        self.tokens = Tokens()
        self._limits, self._limit, self._demand, self._wake = limits, limit, demand, wake
        self._wanted = anyio.Event()
        self._again_s = 0.0
        self._pace = Pace()
        self._short_since_s: float | None = None

    def want(self) -> None:
        """A runner found a message and no leave."""
        self._wanted.set()

    def spend(self, now_s: float, most: int = 1) -> int:
        spent = self.tokens.spend(now_s, most)
        self._pace.spent += spent
        if len(self.tokens) < self._pace.ask_below:
            self.want()
        return spent

    async def run(self) -> None:
        while True:
            self._wanted = anyio.Event()
            now = monotonic()
            (at_once, waiting), usable = self._demand(), self.tokens.count_usable(now)
            self._count_shortage(now, short=bool(waiting) and not usable)
            if at_once and usable:
                self._wake(min(at_once, usable))
            wanted = min(waiting, max(at_once, self._pace.expected(now)))
            self._pace.ask_below = wanted // 2
            if now >= self._again_s and wanted > 2 * len(self.tokens):
                await self._ask(wanted - len(self.tokens))
                continue
            with anyio.move_on_after(self._until_more(now) if waiting and not usable else math.inf):
                await self._wanted.wait()

    def _until_more(self, now_s: float) -> float:
        due = self.tokens.next_s(now_s)
        return max((due if due < math.inf else self._again_s) - now_s, SHORTEST_PAUSE_S)

    async def _ask(self, wanted: int) -> None:
        sent = monotonic()
        grant = await self._limits.take(self._limit, wanted)
        received = monotonic()
        if grant is None:
            self._again_s = received + PAUSE_AFTER_ERROR_S * random.uniform(0.5, 1.0)
            return
        self.tokens.add(grant, sent, received)
        if grant.given:  # if it is less than was asked for, there is more in a while: not each token is asked for alone
            self._again_s = received + (AHEAD_S / 4 if grant.given < wanted else 0.0)
        else:  # those who were told the same moment must not all come at once, the same one first each time
            again_s = min(grant.again_us / 1e6, ASK_AGAIN_S)
            self._again_s = received + again_s + random.uniform(0, min(again_s / 4, grant.step_us / 4e6))

    def _count_shortage(self, now_s: float, *, short: bool) -> None:
        if self._short_since_s is not None:
            self._limits.meters.limited_s += now_s - self._short_since_s
        self._short_since_s = now_s if short else None


class Pace:
    """How many messages were begun lately, to take leave for as many that will be. `ask_below`: when so little leave is
    left, more is asked for."""

    def __init__(self) -> None:
        self.spent, self.ask_below = 0, 0
        self._per_second = 0.0
        self._since_s = monotonic()

    def expected(self, now_s: float) -> int:
        """Within half of the time that leave is given for in advance."""
        if now_s - self._since_s > PACE_OVER_S:
            self._per_second = self.spent / (now_s - self._since_s)
            self.spent, self._since_s = 0, now_s
        return math.ceil(self._per_second * AHEAD_S / 2)


class Limits:
    """The limits of one run of a worker."""

    def __init__(
        self,
        *,
        pipes: Pipes,
        keys: Keys,
        group: str,
        settings: WorkerSettings,
        runners: Runners,
        outages: Outages,
        meters: GroupMeters,
    ) -> None:
        self.meters = meters
        self._pipes, self._keys, self._group, self._runners = pipes, keys, group, runners
        self._key_limit = settings.key_limit
        self._timeout_s, self._buffer = settings.lease_s, settings.buffer_messages
        self._outages = outages
        self._gates: dict[KeyGate, None] = {}
        limit = settings.limit
        self.limiter = GroupLimiter(self, limit, runners.demand, runners.wake) if limit is not None else None

    def start(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self.meters.limited = self.limited
        if self.limiter is not None:
            tasks.start_soon(self.limiter.run)

    def limited(self) -> dict[str, int]:
        """How many messages wait now, by the limit they wait for."""
        short = self.limiter is not None and not self.limiter.tokens.usable(monotonic())
        return {
            "limit": self._runners.waiting if short else 0,
            "key_limit": sum(gate.waiting for gate in list(self._gates)),
        }

    async def take(self, limit: Limit, wanted: int) -> Grant | None:
        """None when there was no answer."""
        what = f"{self._keys.queue}/{self._group}: {CANT_TAKE}"
        sent = monotonic()
        try:
            grant = await limits.take(
                self._pipes,
                self._keys,
                self._group,
                limit,
                wanted,
                timeout_s=self._timeout_s,
            )
        except (StoreError, CorruptData) as error:
            self._outages.failed(what, error)
            return None
        self._outages.well(what)
        self.look_at_delay(monotonic() - sent, grant.hold_us)
        return grant

    def look_at_delay(self, took_s: float, hold_us: int) -> None:
        """Leave that always lapses on its way would stop the work without a word."""
        what = f"{self._keys.queue}/{self._group}: {TOO_FAR}"
        if took_s > hold_us / 1e6:
            self._outages.failed(what, f"Redis took {took_s:.3g} s to answer, leave is good for {hold_us / 1e6:.3g} s")
        else:
            self._outages.well(what)

    # -- each key's limit ------------------------------------------------------------------------------------

    def guard(self, shard: OwnedShard) -> None:
        """From now on the shard's messages wait for their keys' limit before they are ready."""
        if self._key_limit is None:
            return
        changed = Signal()
        gate = KeyGate(self._runners.admit, shard.behind, monotonic, changed.set)
        shard.guard(gate, changed.set)
        self._gates[gate] = None
        self._tasks.start_soon(self._serve_gate, shard, gate, changed, self._key_limit)

    async def _serve_gate(self, shard: OwnedShard, gate: KeyGate, changed: Signal, limit: Limit) -> None:
        try:
            while not shard.lost:
                changed.clear()
                pause = gate.pass_due(monotonic())
                if self._runners.has_plenty:  # leave taken now would lapse before a runner comes to it
                    pause = min(pause, PLENTY_PAUSE_S)
                elif not shard.draining and (asked := gate.asks()):
                    await self._ask_keys(shard, gate, limit, asked)
                    continue
                await changed.wait(max(pause, SHORTEST_PAUSE_S))
        finally:
            gate.clear()
            del self._gates[gate]

    async def _ask_keys(
        self, shard: OwnedShard, gate: KeyGate, limit: Limit, asked: list[tuple[str, bytes, int]]
    ) -> None:
        what = f"{self._keys.queue}/{self._group}: {CANT_TAKE} for keys"
        sent = monotonic()
        try:
            grants = await limits.take_keys(
                self._pipes,
                shard.keys,
                self._group,
                limit,
                [(tag, count) for _, tag, count in asked],
                timeout_s=self._timeout_s,
            )
        except (StoreError, CorruptData) as error:
            self._outages.failed(what, error, shard.shard)
            gate.ask_again(lane for lane, _, _ in asked)
            await anyio.sleep(PAUSE_AFTER_ERROR_S * random.uniform(0.5, 1.0))
            return
        self._outages.well(what, shard.shard)
        received = monotonic()
        self.look_at_delay(received - sent, limit.hold_us)
        if shard.lost or shard.draining:
            return
        for (lane, _, count), grant in zip(asked, grants, strict=True):
            wait_s = gate.granted(lane, grant, sent, received)
            last_s = wait_s + (count - 1) * grant.step_us / 1e6
            crowded = shard.hand.outstanding > self._buffer / FULL_PART or shard.session.account.contended
            # One that was put back once waits there, or it would be among those that hold back others as suspects.
            if last_s > PUT_BACK_AFTER_S and (crowded or (gate.waits_again(lane) and not grant.given)):
                shard.postpone(gate.take_out(lane), wait_s)
