"""Rate limits: what "100/s" means, and the leave to handle messages that a worker has taken in advance. Pure: times are
arguments. The bucket itself lies in Redis (scripts/limit.lua).

The bucket is kept as GCRA keeps it: one time per limit, the one at which it will be full again. It takes one number to
store, an idle one need not be stored at all, and leave can be given for a moment that is still to come, so that nobody
has to ask again and again until a token is there.

Invariants (tests/core/test_limits.py):
- In any t seconds at most count / period * t + burst messages are begun, over all workers. A quarter of the burst is
  the bucket; the rest pays for the time between leave and use: what is not used `hold` after its moment lapses. So what
  a worker took and did not use, because it was slow, stopped or dead, never comes on top.
- The moment leave begins is reckoned from the answer's arrival and its end from the question's sending: however long
  the call was under way, it is not used early and not late.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from shardq.errors import UsageError

AHEAD_S = 0.25  # leave of a group is given for so long in advance
KEY_AHEAD_S = 0.5  # of a key: all of its messages are with one worker
MAX_COUNT = 1_000_000
_PERIODS_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}
_FORM = re.compile(r"([1-9][0-9]{0,6})/([smh])(?: burst ([1-9][0-9]{0,6}))?")


@dataclass(frozen=True, slots=True)
class Limit:
    """`count` messages every `period_us`, and at most `burst` of them more in any length of time."""

    count: int
    period_us: int
    burst: int

    @property
    def per_second(self) -> float:
        return self.count * 1e6 / self.period_us

    @property
    def capacity(self) -> int:
        """Tokens of the full bucket."""
        return max(1, self.burst // 4)

    @property
    def hold_us(self) -> int:
        """How long leave is good for."""
        return (self.burst - self.capacity) * self.period_us // self.count


def parse_limit(name: str, text: object) -> Limit:
    """The limit that "100/s", "90/m" or "1000/h burst 50" states. Raises UsageError, naming `name`, for what is none.

    The burst is a fifth of a second's messages unless it is given, at least 2; one below a tenth of a second's could
    not be used up: leave would lapse on its way from Redis.
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[1]) > MAX_COUNT:
        msg = (
            f'{name} is "N/s", "N/m" or "N/h" with N from 1 to {MAX_COUNT}, and a burst if you like, as in "100/s" or '
            f'"100/s burst 50"; not {text!r:.80}'
        )
        raise UsageError(msg)
    count, period_us = int(found[1]), _PERIODS_US[found[2]]
    least = max(2, -(-count * 100_000 // period_us))
    burst = int(found[3]) if found[3] else max(2, -(-count * 200_000 // period_us))
    if not least <= burst <= MAX_COUNT:
        msg = f"{name}: the burst of {found[1]}/{found[2]} is {least} to {MAX_COUNT} messages, not {burst}"
        raise UsageError(msg)
    return Limit(count, period_us, burst)


class Grant(NamedTuple):
    """What Redis answered: leave for `given` messages, the first `first_us` after the answer, each `step_us` after the
    one before, good for `hold_us`. Without any, asking again makes sense in `again_us`."""

    given: int
    first_us: int
    step_us: float
    hold_us: int
    again_us: int


class Tokens:
    """Leave that one worker holds, oldest first. Times are seconds of its monotonic clock."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: deque[tuple[float, float]] = deque()

    def add(self, grant: Grant, sent_s: float, received_s: float) -> None:
        for number in range(grant.given):
            after_s = max(grant.first_us + number * grant.step_us, 0.0) / 1e6
            self._held.append((received_s + after_s, sent_s + after_s + grant.hold_us / 1e6))

    def usable(self, now_s: float) -> bool:
        """Whether a message may be begun now."""
        held = self._held
        while held and held[0][1] < now_s:
            held.popleft()
        return bool(held) and held[0][0] <= now_s

    def spend(self, now_s: float, most: int = 1) -> int:
        """Uses up leave for at most `most` messages that are begun now; returns for how many there was some."""
        spent = 0
        while spent < most and self.usable(now_s):
            self._held.popleft()
            spent += 1
        return spent

    def count_usable(self, now_s: float) -> int:
        return sum(begin <= now_s <= end for begin, end in self._held)

    def next_s(self, now_s: float) -> float:
        """When the first that has not lapsed may be used; infinite without one."""
        self.usable(now_s)
        return self._held[0][0] if self._held else float("inf")

    def last_s(self) -> float:
        """When the last of them may be used; minus infinity without one."""
        return self._held[-1][0] if self._held else float("-inf")

    def end_s(self) -> float:
        """When the last of them lapses; minus infinity without one."""
        return self._held[-1][1] if self._held else float("-inf")

    def __len__(self) -> int:
        """Those that may lapse or have."""
        return len(self._held)
