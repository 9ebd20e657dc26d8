"""Which of a row of ranges a key hash lies in, for whoever asks it for every message. Pure; knows no shards.

Three ways, the fastest that fits: equal ranges need a multiplication; else a table over the top bits of the hash says
it for all but the few of its rows that hold a bound; for those the bounds are searched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from shardq.core.slots import HASH_SPACE

UNSURE = -1
_LEAST_BITS, _MOST_BITS = 10, 17


class Ranges:
    """Ranges that cover [0, 2**32), by their lower bounds in order, the first of which is 0.

    equal   their number when they are an equal cut, else 0: then h lies in range h * equal >> 32
    near    by h >> shift, the number of the range that h lies in, or UNSURE: then `index_for` knows
    """

    __slots__ = ("_lows", "equal", "near", "shift")

    def __init__(self, lows: Sequence[int]) -> None:
        self._lows = list(lows)
        count = len(self._lows)
        self.equal = count if self._lows == [-(-index * HASH_SPACE // count) for index in range(count)] else 0
        bits = min(max(count.bit_length() + 4, _LEAST_BITS), _MOST_BITS)
        self.shift = 32 - bits
        self.near = [] if self.equal else self._make_near()

    def _make_near(self) -> list[int]:
        width, near = 1 << self.shift, [0] * (HASH_SPACE >> self.shift)
        for index, (low, high) in enumerate(zip(self._lows, [*self._lows[1:], HASH_SPACE], strict=True)):
            first, last = -(-low // width), high // width
            near[first:last] = [index] * max(last - first, 0)
            if low % width:
                near[low // width] = UNSURE
        return near

    def index_for(self, hash_: int) -> int:
        """The number of the range that the hash, 0..2**32-1, lies in."""
        if self.equal:
            return hash_ * self.equal >> 32
        return bisect_right(self._lows, hash_) - 1
