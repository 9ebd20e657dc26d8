"""Messages a second, from two looks at a queue. Pure: reads nothing and knows no clock but the nodes' own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardq.core.hot import LEAST_BYTES_PER_S, hot_shards
from shardq.ops.inspect import GroupView, QueueView, ShardView


@dataclass(frozen=True, slots=True)
class Look:
    """A queue now, and some time before (None: it was looked at once only).

    Rates are per second, by the clock of each shard's own node; None where they are not known. They are never negative:
    a counter that a failover took back counts as standing still.
    """

    before: QueueView | None
    view: QueueView

    def stored(self, shard: ShardView) -> float | None:
        """Stored on this shard."""
        earlier = self._earlier(shard)
        return None if earlier is None else _rate(earlier, shard, earlier.appended, shard.appended)

    def handled(self, shard: ShardView, group: str) -> float | None:
        """Finished by the group on this shard, dead letters included."""
        earlier = self._earlier(shard)
        return None if earlier is None else _rate(earlier, shard, _done(earlier, group), _done(shard, group))

    def stored_total(self) -> float | None:
        """Over all shards whose rate is known."""
        return _sum(map(self.stored, self.view.shards.values()))

    def handled_total(self, group: str) -> float | None:
        """Over all shards whose rate is known."""
        return _sum(self.handled(shard, group) for shard in self.view.shards.values())

    def hot(self) -> frozenset[int]:
        """Shards that got far more messages or bytes than the others between the two looks."""
        takes = [shard for shard in self.view.shards.values() if shard.state == "open"]
        pairs = [(earlier, now) for now in takes if (earlier := self._earlier(now)) is not None]
        messages = {now.shard: _rate(then, now, then.appended, now.appended) for then, now in pairs}
        sizes = {now.shard: _rate(then, now, then.bytes, now.bytes) for then, now in pairs}
        return frozenset(hot_shards(messages)) | frozenset(hot_shards(sizes, least=LEAST_BYTES_PER_S))

    def _earlier(self, shard: ShardView) -> ShardView | None:
        earlier = self.before.shards.get(shard.shard) if self.before is not None else None
        return earlier if earlier is not None and shard.time_ms > earlier.time_ms else None


def hottest(look: Look, shards: Iterable[int]) -> int | None:
    """Of these shards, the one that stored most messages a second; None when none is known to have stored any."""
    rates = {shard: look.stored(look.view.shards[shard]) or 0.0 for shard in shards if shard in look.view.shards}
    best = max(rates, key=lambda shard: rates[shard], default=None)
    return best if best is not None and rates[best] > 0 else None


def shown_groups(view: QueueView) -> list[str]:
    """The queue's groups; a queue without one is shown under the name ''."""
    return sorted({group for shard in view.shards.values() for group in shard.groups}) or [""]


def lease_word(view: GroupView) -> str:
    """A lease in a word: free, held, or moving (held, and promised to another worker)."""
    return ("moving" if view.moving else "held") if view.held else "free"


def _done(shard: ShardView, group: str) -> int:
    view = shard.groups.get(group)
    return view.acked + view.dead if view is not None else 0


def _rate(earlier: ShardView, now: ShardView, before: int, after: int) -> float:
    return max(0, after - before) * 1000 / (now.time_ms - earlier.time_ms)


def _sum(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None
