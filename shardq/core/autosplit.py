"""When a hot shard is split by itself. Pure: `Decision` says which shard and why not another; splitting is
runtime/autosplit.py's. Never merges.

A split is cheap to begin and not free to have: each shard costs polls, leases and keys. So it takes bounds: no more
shards than `max_shards`, so much time between two splits, only what has been hot without a break for so long, and never
where one key makes the shard hot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardq.core.hot import LEAST, KeySample
from shardq.errors import UsageError


@dataclass(frozen=True, slots=True)
class AutoSplit:
    """The bounds. `max_shards` counts shards that take messages."""

    max_shards: int
    every_s: float = 600.0
    hot_for_s: float = 300.0

    def __post_init__(self) -> None:
        if type(self.max_shards) is not int or not 2 <= self.max_shards <= 16384:
            raise UsageError(f"autosplit's max_shards is a number from 2 to 16384, not {self.max_shards!r}")
        for name in ("every_s", "hot_for_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"autosplit's {name} is a number of seconds from 0 on, not {getattr(self, name)!r}")


class HotWatch:
    """Since when each shard has been hot."""

    def __init__(self) -> None:
        self._since_s: dict[int, float] = {}

    def see(self, now_s: float, hot: Mapping[int, float]) -> Mapping[int, float]:
        """Takes what is hot now; returns since when, of each of them."""
        self._since_s = {shard: self._since_s.get(shard, now_s) for shard in hot}
        return self._since_s


def candidate(
    bounds: AutoSplit,
    now_s: float,
    *,
    shards: int,
    hot: Mapping[int, float],
    since_s: Mapping[int, float],
    last_s: float | None,
) -> int | None:
    """The shard to look into: the busiest of those hot for long enough, or None.

    shards    how many take messages now
    hot       the load of each hot shard
    since_s   since when each has been hot
    last_s    when the last split was, or was tried; None: never
    """
    if shards >= bounds.max_shards or (last_s is not None and now_s - last_s < bounds.every_s):
        return None
    ripe = [shard for shard in hot if now_s - since_s.get(shard, now_s) >= bounds.hot_for_s]
    return min(ripe, key=lambda shard: (-hot[shard], shard), default=None)


def why_not(keys: KeySample) -> str:
    """Why splitting the shard of these keys would not help; '' when it would. Names no key: this goes into logs."""
    if keys.messages < LEAST:
        return f"only {keys.messages} of its messages could be looked at"
    if keys.one_key:
        return f"one key has {keys.share:.0%} of its newest {keys.messages} messages"
    return ""
