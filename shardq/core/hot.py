"""Hot shards: which shards get far more than the others, and whether a split would help. Pure; reads nothing.

A split gives each half of a shard's keys to a shard of its own. Where one key has most of the messages it helps little:
all messages of a key stay on one shard, for their order. So the two are told apart by the keys of the newest messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from shardq.core.hashing import key_hash
from shardq.core.load import Load

FACTOR = 5.0
LEAST_PER_S, LEAST_BYTES_PER_S = 100.0, 1024.0 * 1024
KEY_SHARE = 0.5
SAMPLE = 500
ENOUGH = 100  # messages to tell a hot key by
LEAST = 10


@dataclass(frozen=True, slots=True)
class Hot:
    """A hot shard's rate, and that of the median shard."""

    rate: float
    median: float


def hot_shards(rates: Mapping[int, float], *, factor: float = FACTOR, least: float = LEAST_PER_S) -> dict[int, Hot]:
    """The shards of one queue that get over `factor` times what the median shard gets, and at least `least`. With
    fewer than three shards none is hot: there is no median to speak of."""
    if len(rates) < 3:
        return {}
    middle = median(rates.values())
    return {
        shard: Hot(rate, middle) for shard, rate in sorted(rates.items()) if rate >= least and rate > factor * middle
    }


def hot_of(loads: Mapping[int, Load]) -> frozenset[int]:
    """Those that are hot by messages or by bytes."""
    by_messages = hot_shards({shard: load.messages for shard, load in loads.items()})
    by_bytes = hot_shards({shard: load.bytes for shard, load in loads.items()}, least=LEAST_BYTES_PER_S)
    return frozenset(by_messages) | frozenset(by_bytes)


@dataclass(frozen=True, slots=True)
class KeySample:
    """The keys of a shard's newest messages.

    messages   how many were looked at
    key        the one that most of them have; None when none has a key
    share      its part of the messages, 0 to 1
    halves     the parts that would go to the lower and the upper half of the shard's range
    """

    messages: int
    key: str | bytes | None
    share: float
    halves: tuple[float, float]

    @classmethod
    def of(cls, keys: Iterable[str | bytes | None], low: int, high: int) -> KeySample:
        """Of a shard that has the hashes from `low` to below `high`. A message without a key goes to any shard."""
        counts = Counter(keys)
        total, keyless = counts.total(), counts.pop(None, 0)
        if not total:
            return cls(0, None, 0.0, (0.5, 0.5))
        middle = (low + high) // 2
        upper = sum(count for key, count in counts.items() if key is not None and key_hash(key) >= middle)
        part = (upper + keyless / 2) / total
        # The same key for equal counts, whichever came first.
        key, most = min(counts.items(), key=lambda each: (-each[1], repr(each[0])), default=(None, 0))
        return cls(total, key, most / total, (1 - part, part))

    @property
    def one_key(self) -> bool:
        """Whether one key has most of the messages, so that no split helps."""
        return self.share > KEY_SHARE
