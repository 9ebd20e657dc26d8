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
from shardq.storage import limits
from shardq.storage.cluster import Confirm
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes

if TYPE_CHECKING:
    from shardq.runtime.runners import Runners
    from shardq.runtime.shard import OwnedShard

ASK_AGAIN_S = 5.0
PAUSE_AFTER_ERROR_S = 0.5
SHORTEST_PAUSE_S = 0.002
PUT_BACK_AFTER_S = 1.0
FULL_PART = 4  # a shard's buffer counts as full of waiting messages from this part of it on

CANT_TAKE = "can't ask what the rate limit allows"

_log = logging.getLogger("shardq")


class GroupLimiter:
    """The group's limit in one worker. `demand()` is how many messages could be begun now but for the limit."""

    def __init__(self, limits: Limits, limit: Limit, demand: Callable[[], int], wake: Callable[[int], None]) -> None:
        self.tokens = Tokens()
        self._limits, self._limit, self._demand, self._wake = limits, limit, demand, wake
        self._wanted = anyio.Event()
        self._again_s = 0.0
        self._spent = 0
        self._asked_s = monotonic()
        self._short_since_s: float | None = None

    def want(self) -> None:
        """A runner found a message and no leave."""
        self._wanted.set()

    def spend(self, now_s: float, most: int = 1) -> int:
        spent = self.tokens.spend(now_s, most)
        self._spent += spent
        return spent

    async def run(self) -> None:
        while True:
            self._wanted = anyio.Event()
            now = monotonic()
            demand, usable = self._demand(), self.tokens.count_usable(now)
            self._count_shortage(now, short=bool(demand) and not usable)
            if demand and usable:
                self._wake(min(demand, usable))
            if self._should_ask(now, demand):
                await self._ask(demand)
                continue
            pause = self._until_more(now) if demand and not usable else math.inf
            with anyio.move_on_after(pause):
                await self._wanted.wait()

    def _should_ask(self, now_s: float, demand: int) -> bool:
        """More could be begun than there is leave for, and what there is ends soon."""
        return now_s >= self._again_s and demand > len(self.tokens) and self.tokens.last_s() - now_s < AHEAD_S / 2

    def _until_more(self, now_s: float) -> float:
        due = self.tokens.next_s(now_s)
        return max((due if due < math.inf else self._again_s) - now_s, SHORTEST_PAUSE_S)

    async def _ask(self, demand: int) -> None:
        """As much as will be used: what could be begun at once, and what was begun lately in so long a time."""
        sent = monotonic()
        recent = math.ceil(self._spent / max(sent - self._asked_s, AHEAD_S / 2) * AHEAD_S / 2)
        self._asked_s, self._spent = sent, 0
        grant = await self._limits.take(self._limit, max(demand, recent) - len(self.tokens))
        received = monotonic()
        if grant is None:
            self._again_s = received + PAUSE_AFTER_ERROR_S * random.uniform(0.5, 1.0)
            return
        self.tokens.add(grant, sent, received)
        # Those who were told the same moment must not all come at once, the same one first each time.
        again_s = min(grant.again_us / 1e6, ASK_AGAIN_S)
        self._again_s = received + again_s + random.uniform(0, min(again_s / 4, grant.step_us / 4e6))

    def _count_shortage(self, now_s: float, *, short: bool) -> None:
        if self._short_since_s is not None:
            self._limits.meters.limited_s += now_s - self._short_since_s
        self._short_since_s = now_s if short else None


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
        confirm: Callable[[], Confirm | None],
        outages: Outages,
        meters: GroupMeters,
    ) -> None:
        self.meters = meters
        self._pipes, self._keys, self._group, self._runners = pipes, keys, group, runners
        self._key_limit, self._confirm = settings.key_limit, confirm
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
        try:
            grant = await limits.take(
                self._pipes,
                self._keys,
                self._group,
                limit,
                wanted,
                timeout_s=self._timeout_s,
                confirm=self._confirm(),
            )
        except (StoreError, CorruptData) as error:
            self._outages.failed(what, error)
            return None
        self._outages.well(what)
        return grant

    # -- each key's limit ------------------------------------------------------------------------------------

    def guard(self, shard: OwnedShard) -> None:
        """From now on the shard's messages wait for their keys' limit before they are ready."""
        if self._key_limit is None:
            return
        changed = _Signal()
        gate = KeyGate(self._runners.admit, shard.behind, monotonic, changed.set)
        shard.guard(gate, changed.set)
        self._gates[gate] = None
        self._tasks.start_soon(self._serve_gate, shard, gate, changed, self._key_limit)

    async def _serve_gate(self, shard: OwnedShard, gate: KeyGate, changed: _Signal, limit: Limit) -> None:
        try:
            while not shard.lost:
                changed.clear()
                pause = gate.pass_due(monotonic())
                if self._runners.has_plenty:  # leave taken now would lapse before a runner comes to it
                    await anyio.sleep(limit.hold_us / 4e6 if limit.hold_us < 200_000 else 0.05)
                elif not shard.draining and (asked := gate.asks()):
                    await self._ask_keys(shard, gate, limit, asked)
                else:
                    with anyio.move_on_after(max(pause, SHORTEST_PAUSE_S)):
                        await changed.wait()
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
                confirm=self._confirm(),
            )
        except (StoreError, CorruptData) as error:
            self._outages.failed(what, error, shard.shard)
            gate.ask_again(lane for lane, _, _ in asked)
            await anyio.sleep(PAUSE_AFTER_ERROR_S * random.uniform(0.5, 1.0))
            return
        self._outages.well(what, shard.shard)
        received = monotonic()
        if shard.lost or shard.draining:
            return
        for (lane, _, count), grant in zip(asked, grants, strict=True):
            wait_s = gate.granted(lane, grant, sent, received)
            crowded = shard.session.outstanding > self._buffer / FULL_PART
            # One that was put back once waits there, or it would be among those that hold back others as suspects.
            if grant.given < count and (crowded or (wait_s > PUT_BACK_AFTER_S and gate.waits_again(lane))):
                shard.postpone(gate.take_out(lane), wait_s)


class _Signal:
    """An event that can be cleared."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event = anyio.Event()

    async def wait(self) -> None:
        await self._event.wait()
