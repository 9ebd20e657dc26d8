"""How heavy each shard is for the workers of a group: rates from counters sampled now and then, smoothed. Pure; the
time is an argument. Reads nothing and decides nothing (core/balance.py does).

The unit is a message a second. A shard's load is what its owner has to do from now on, not what it happens to get done
(that would make a slow worker's shards look light):

    messages stored a second + bytes stored a second / 10 KiB + backlog / 60 s

So big messages weigh more, a shard that falls behind weighs more than its arrivals (its messages take longer to handle,
or its owner is slow), and a backlog without arrivals is spread as well.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

BYTES_OF_A_MESSAGE = 10 * 1024
BACKLOG_IN_S = 60.0
HALF_LIFE_S = 30.0


@dataclass(frozen=True, slots=True)
class Counts:
    """A shard's counters at one moment: messages and bytes ever stored, and the messages that the group has not
    finished."""

    appended: int
    bytes: int
    backlog: int = 0


class Ewma:
    """A mean in which a value counts half as much for every `half_life_s` that it is old."""

    __slots__ = ("_half_life_s", "_value")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._value: float | None = None

    def see(self, value: float, over_s: float) -> float:
        """The mean with `value`, which held for the last `over_s` seconds."""
        if self._value is None:
            self._value = value
        else:
            self._value += (value - self._value) * (1 - 0.5 ** (over_s / self._half_life_s))
        return self._value

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self._value


class _Shard:
    """One shard's counters as they were last, and its means."""

    __slots__ = ("at_s", "backlog", "bytes", "counts", "messages", "since_s")

    def __init__(self, at_s: float, counts: Counts, half_life_s: float) -> None:
        self.at_s = self.since_s = at_s
        self.counts = counts
        self.messages, self.bytes, self.backlog = (Ewma(half_life_s) for _ in range(3))

    def see(self, at_s: float, counts: Counts) -> None:
        over_s = at_s - self.at_s
        if over_s <= 0:
            return
        last, self.at_s, self.counts = self.counts, at_s, counts
        self.backlog.see(max(0, counts.backlog), over_s)
        # A failover can take counters back, by what was not replicated: that says nothing about a rate.
        if counts.appended >= last.appended and counts.bytes >= last.bytes:
            self.messages.see((counts.appended - last.appended) / over_s, over_s)
            self.bytes.see((counts.bytes - last.bytes) / over_s, over_s)

    @property
    def load(self) -> float | None:
        if self.messages.value is None or self.bytes.value is None or self.backlog.value is None:
            return None
        return self.messages.value + self.bytes.value / BYTES_OF_A_MESSAGE + self.backlog.value / BACKLOG_IN_S


@dataclass(frozen=True, slots=True)
class Load:
    """One shard: its load, and the rates behind it (a second)."""

    load: float
    messages: float
    bytes: float
    backlog: float


class LoadMeter:
    """The loads of a group's shards. `half_life_s`: how fast they follow a change."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._shards: dict[int, _Shard] = {}

    def see(self, shard: int, at_s: float, counts: Counts) -> None:
        """Counters that were read at `at_s`, on any clock that never goes back."""
        known = self._shards.get(shard)
        if known is None:
            self._shards[shard] = _Shard(at_s, counts, self._half_life_s)
        else:
            known.see(at_s, counts)

    def keep(self, shards: Container[int]) -> None:
        """Forgets every shard but these."""
        self._shards = {shard: known for shard, known in self._shards.items() if shard in shards}

    def observed_s(self) -> float:
        """For how long half of the shards, those known longest, have been watched; 0 without any."""
        spans = sorted((known.at_s - known.since_s for known in self._shards.values()), reverse=True)
        return spans[(len(spans) - 1) // 2] if spans else 0.0

    def loads(self) -> dict[int, float]:
        """The load of each shard of which a rate is known, in messages a second."""
        return {shard: load for shard, known in sorted(self._shards.items()) if (load := known.load) is not None}

    def details(self) -> dict[int, Load]:
        """The same with what each load is made of."""
        return {
            shard: Load(load, known.messages.value or 0.0, known.bytes.value or 0.0, known.backlog.value or 0.0)
            for shard, known in sorted(self._shards.items())
            if (load := known.load) is not None
        }
