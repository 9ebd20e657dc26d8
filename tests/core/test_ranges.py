"""Where a key hash lies: every way of finding it says the same, for any row of ranges."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.core.ranges import UNSURE, Ranges
from shardq.core.reshard import split, split_all
from shardq.core.routing import RoutingTable
from shardq.core.slots import HASH_SPACE

LAST = HASH_SPACE - 1
LOWS = st.sets(st.integers(1, LAST), max_size=40).map(lambda found: [0, *sorted(found)])


def quickly(ranges: Ranges, hash_: int) -> int:
    """As a producer finds it."""
    index = hash_ * ranges.equal >> 32 if ranges.equal else ranges.near[hash_ >> ranges.shift]
    return ranges.index_for(hash_) if index == UNSURE else index


@given(LOWS, st.lists(st.integers(0, LAST), max_size=20))
@example([0], [0, LAST])
@example([0, 1, 2, 3], [0, 1, 2, 3, LAST])
@example([0, 1 << 31], [(1 << 31) - 1, 1 << 31])
@example([0, LAST - 1, LAST], [LAST - 2, LAST - 1, LAST])
def test_every_way_finds_the_same_range(lows: list[int], hashes: list[int]) -> None:
    ranges = Ranges(lows)
    for hash_ in [*hashes, *lows, *(low - 1 for low in lows[1:])]:
        wanted = max(index for index, low in enumerate(lows) if low <= hash_)
        assert quickly(ranges, hash_) == ranges.index_for(hash_) == wanted


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 16384])
def test_an_equal_cut_needs_no_search(count: int) -> None:
    lows = [shard.low for shard in RoutingTable.equal(count).shards]
    ranges = Ranges(lows)
    assert ranges.equal == count
    assert [quickly(ranges, low) for low in lows] == list(range(count))
    assert [quickly(ranges, low - 1) for low in lows[1:]] == list(range(count - 1))


@pytest.mark.parametrize("count", [2, 3, 64, 1000, 16000])
def test_few_hashes_of_a_table_that_was_split_need_a_search(count: int) -> None:
    table = split(RoutingTable.equal(count), 1, 3).table
    if 2 * len(table.shards) <= 16384:
        table = split_all(table).table
    ranges = Ranges([shard.low for shard in table.shards])
    assert ranges.equal == 0
    assert ranges.near.count(UNSURE) * 5 < len(ranges.near)
    for shard in table.shards:
        assert table.shards[quickly(ranges, shard.low)] is shard
        assert table.shards[quickly(ranges, shard.high - 1)] is shard
