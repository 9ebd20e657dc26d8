"""Splits hot shards by itself, in a coordinator that was asked to (`shardq coordinator --autosplit N`) and while it
leads. What is hot, when and whether a split helps is core/hot.py's and core/autosplit.py's; how a shard is split is the
queue's own `split`. It splits one shard at a time and never merges.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio

from shardq.core.autosplit import AutoSplit, HotWatch, candidate, why_not
from shardq.core.hot import ENOUGH, SAMPLE, KeySample, hot_of
from shardq.core.load import Load
from shardq.core.records import Key
from shardq.errors import ShardqError

if TYPE_CHECKING:
    from shardq.runtime.queue import Queue

_log = logging.getLogger("shardq")

Split = Callable[[int], Awaitable[Any]]
KEYS_WITHIN_S, KEYS_TIMEOUT_S = 5.0, 10.0
LOOK_EVERY_S = 0.02
PAUSES = 4  # looks are made a fifth of the time at most
LOOK_AGAIN_S = 60.0


class AutoSplitter:
    """`run` it beside a member that samples loads.

    loads    the loads of all shards, a new mapping after each look
    ranges   the hashes, (low, high), of each shard that takes messages
    keys     the keys of a shard's newest messages
    split    splits a shard

    A shard that a split would not help is looked into again after `look_again_s`, if it is hot still; others come first
    in the meantime.
    """

    def __init__(
        self,
        bounds: AutoSplit,
        queue: str,
        *,
        loads: Callable[[], Mapping[int, Load]],
        ranges: Callable[[], Mapping[int, tuple[int, int]]],
        keys: Callable[[int], Awaitable[Sequence[Key]]],
        split: Split,
        look_again_s: float = LOOK_AGAIN_S,
    ) -> None:
        self._bounds, self._queue = bounds, queue
        self._loads, self._ranges, self._keys, self._split = loads, ranges, keys, split
        self._look_again_s = look_again_s
        self._watch = HotWatch()
        self._seen: Mapping[int, Load] | None = None
        self._last_s: float | None = None
        self._refused_s: dict[int, float] = {}

    async def run(self, every_s: float) -> None:
        """Until it is cancelled; looks at new loads every `every_s` seconds."""
        while True:
            await self.look()
            await anyio.sleep(every_s)

    async def look(self) -> None:
        """One round; without loads (this process does not lead) there is nothing to see."""
        loads = self._loads()
        if loads is self._seen:
            return
        self._seen = loads
        ranges, now = self._ranges(), monotonic()
        active = {shard: load for shard, load in loads.items() if shard in ranges}
        hot = {shard: active[shard].load for shard in hot_of(active)}
        since = self._watch.see(now, hot)
        self._refused_s = {shard: at for shard, at in self._refused_s.items() if shard in hot}
        hot = {shard: load for shard, load in hot.items() if self._is_due(shard, now)}
        shard = candidate(self._bounds, now, shards=len(ranges), hot=hot, since_s=since, last_s=self._last_s)
        if shard is None:
            return
        try:
            await self._split_if_it_helps(shard, ranges[shard])
        except ShardqError as error:
            self._last_s = now
            _log.warning(
                "%s: hot shard %d was not split: %s; tried again in %g s",
                self._queue,
                shard,
                error,
                self._bounds.every_s,
            )

    def _is_due(self, shard: int, now: float) -> bool:
        return shard not in self._refused_s or now - self._refused_s[shard] >= self._look_again_s

    async def _split_if_it_helps(self, shard: int, hashes: tuple[int, int]) -> None:
        sample: Sequence[Key] = ()
        with anyio.move_on_after(KEYS_TIMEOUT_S):
            sample = await self._keys(shard)
        if shard not in self._loads() or shard not in self._ranges():
            return  # another one leads by now, or somebody else split it
        reason = why_not(KeySample.of(sample, *hashes))
        if reason:
            if shard not in self._refused_s:
                _log.warning("%s: hot shard %d is not split: %s", self._queue, shard, reason)
            self._refused_s[shard] = monotonic()
            return
        self._last_s = monotonic()
        _log.info("%s: shard %d has been hot for %g s: it is split", self._queue, shard, self._bounds.hot_for_s)
        await self._split(shard)
        self._last_s = monotonic()


async def newest_keys(queue: Queue, shard: int, within_s: float) -> Sequence[Key]:
    """The keys of a shard's newest messages. Raises StoreError.

    Where nothing is retained and workers keep up, the shard is empty at most moments. So where it holds but a few it is
    looked at again and again, for at most `within_s` seconds: what comes by stays for the few ms that handling takes.
    Looks at large messages take their time, and the pauses between them as much more as keeps this cheap.
    """
    found: dict[str, Key] = {}
    started = monotonic()
    while True:
        look_s = monotonic()
        found |= {record.id: record.key for record in await queue.peek(SAMPLE, reverse=True, shards=[shard])}
        now = monotonic()
        pause_s = max(LOOK_EVERY_S, PAUSES * (now - look_s))
        if len(found) >= ENOUGH or now + pause_s - started > within_s:
            return list(found.values())[-SAMPLE:]
        await anyio.sleep(pause_s)
