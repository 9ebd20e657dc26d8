"""When which fault strikes: the same for the same seed, length and names. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FIRST_AT_S, GAP_S, LASTS_S = 1.0, (1.0, 5.0), (0.5, 6.0)
AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Planned:
    """
    number    its place in the schedule
    at_s      seconds after the faults begin
    length_s  from when it has struck until it is healed
    seed      of the chance that chooses its target
    """

    number: int
    at_s: float
    name: str
    length_s: float
    seed: int

    @property
    def until_s(self) -> float:
        return round(self.at_s + self.length_s, 2)


def make_schedule(
    seed: int,
    length_s: float,
    names: Sequence[str],
    *,
    gap_s: tuple[float, float] = GAP_S,
    lasts_s: tuple[float, float] = LASTS_S,
) -> list[Planned]:
    """Faults until `length_s`: every name before any comes a second time, at most AT_ONCE at a time, and the last one
    ends within the time. They may last longer than planned when a cluster takes its time.

    gap_s, lasts_s   at least and at most between two strikes, and from a strike to its heal
    """
    chance = random.Random(seed)
    planned: list[Planned] = []
    at_s = FIRST_AT_S
    for name in _names(chance, sorted(names)):
        length = round(chance.uniform(*lasts_s), 2)
        # The earliest moment at which there is room for one more.
        at_s = (
            max(at_s, *sorted(other.until_s for other in planned)[-AT_ONCE:][:1]) if len(planned) >= AT_ONCE else at_s
        )
        at_s = round(at_s, 2)
        if round(at_s + length, 2) > length_s:
            break
        planned.append(Planned(len(planned), at_s, name, length, chance.randrange(10**9)))
        at_s += chance.uniform(*gap_s)
    return planned


def _names(chance: random.Random, names: list[str]) -> Iterator[str]:
    """All in some order, then all again in another, without end; nothing without names."""
    while names:
        yield from chance.sample(names, len(names))
