"""The routing table: every hash has one shard, the fast path is the slow one, damage is always CorruptData."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.core.routing import MAX_SHARD_ID, MAX_SHARDS, MAX_VERSION, RetiredShard, RoutingTable, Shard
from shardq.core.slots import SLOTS, key_slot
from shardq.errors import CorruptData, UsageError

SPACE = 2**32
HASHES = st.integers(0, SPACE - 1)
COUNTS = st.one_of(st.integers(1, 200), st.integers(1, MAX_SHARDS))


@st.composite
def tables(draw: st.DrawFn) -> RoutingTable:
    """Any valid table: random cuts, random ids, now and then an equal cut."""
    if draw(st.booleans()):
        return RoutingTable.equal(draw(st.integers(1, 64)), draw(st.integers(1, MAX_VERSION)))
    cuts = [0, *sorted(draw(st.sets(st.integers(1, SPACE - 1), max_size=20))), SPACE]
    ids = draw(st.permutations(range(len(cuts) - 1)))
    offset = draw(st.integers(0, MAX_SHARD_ID - len(ids)))
    shards = [Shard(i + offset, low, high) for i, (low, high) in zip(ids, pairwise(cuts), strict=True)]
    return RoutingTable(draw(st.integers(1, MAX_VERSION)), tuple(draw(st.permutations(shards))))


def scan(table: RoutingTable, hash_: int) -> Shard:
    """The shard of a hash by looking at all of them; fails unless there is exactly one."""
    [shard] = [shard for shard in table.shards if shard.low <= hash_ < shard.high]
    return shard


@given(tables(), HASHES)
def test_every_hash_has_exactly_one_shard(table: RoutingTable, hash_: int) -> None:
    assert table.shard_for(hash_) == scan(table, hash_)
    assert table.shards[table.index_for(hash_)] == scan(table, hash_)


@given(tables())
def test_bounds_belong_to_the_right_shard(table: RoutingTable) -> None:
    for shard in table.shards:
        assert table.shard_for(shard.low) == shard == table.shard_for(shard.high - 1)
        assert table.by_id[shard.id] == shard


@given(COUNTS, st.lists(HASHES))
@example(3, [0, SPACE - 1])
def test_equal_cut_is_the_multiplication(count: int, hashes: list[int]) -> None:
    table = RoutingTable.equal(count)
    assert [shard.id for shard in table.shards] == list(range(count))
    for hash_ in hashes:
        assert table.shard_for(hash_).id == hash_ * count >> 32


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 12345, MAX_SHARDS])
def test_fast_path_equals_bisect_on_both_sides_of_every_bound(count: int) -> None:
    fast = RoutingTable.equal(count)
    slow = RoutingTable.equal(count)
    object.__setattr__(slow, "_equal", 0)
    assert fast._equal == count
    for shard in fast.shards:
        for hash_ in (shard.low, shard.high - 1):
            assert fast.index_for(hash_) == slow.index_for(hash_) == shard.id


def test_ranges_of_an_equal_cut_differ_by_at_most_one() -> None:
    sizes = {shard.high - shard.low for shard in RoutingTable.equal(1000).shards}
    assert max(sizes) - min(sizes) <= 1


def test_fast_path_does_not_depend_on_ids() -> None:
    renamed = RoutingTable(
        2, tuple(Shard(shard.id + 100, shard.low, shard.high) for shard in RoutingTable.equal(8).shards)
    )
    assert renamed._equal == 8
    assert renamed.shard_for(SPACE - 1).id == 107


@given(COUNTS)
def test_shards_of_an_equal_cut_have_slots_of_their_own(count: int) -> None:
    slots = [shard.slot for shard in RoutingTable.equal(count).shards]
    assert len(set(slots)) == count
    assert slots == sorted(slots)


@given(st.integers(1, 500), st.integers(1, 50))
def test_shards_spread_over_masters_to_within_one(count: int, masters: int) -> None:
    bounds = [master * SLOTS // masters for master in range(masters + 1)]
    slots = [shard.slot for shard in RoutingTable.equal(count).shards]
    held = [sum(low <= slot < high for slot in slots) for low, high in pairwise(bounds)]
    assert max(held) - min(held) <= 1


@given(tables())
def test_tags_lead_to_the_slots(table: RoutingTable) -> None:
    for shard in table.shards:
        assert key_slot(f"a:{{{shard.tag}}}:b".encode()) == shard.slot


@given(tables())
def test_round_trip(table: RoutingTable) -> None:
    again = RoutingTable.from_bytes(table.to_bytes())
    assert again == table
    assert again.to_bytes() == table.to_bytes()
    assert again._equal == table._equal
    assert pickle.loads(pickle.dumps(table)) == table


def test_wire_format_is_what_it_was() -> None:
    golden = bytes.fromhex("01920792930000ce800000009301ce80000000cf0000000100000000")
    assert RoutingTable.equal(2, version=7).to_bytes() == golden


def test_the_largest_table_comes_back() -> None:
    table = RoutingTable.equal(MAX_SHARDS, MAX_VERSION)
    assert RoutingTable.from_bytes(table.to_bytes()) == table


@given(st.binary())
@example(b"")
@example(b"\x01")
@example(b"\x01\x92\x01\xdd\xff\xff\xff\xff")
def test_arbitrary_bytes_are_corrupt(data: bytes) -> None:
    for candidate in (data, b"\x01" + data, b"\x01\x92" + data, b"\x02" + data, b"\x02\x94" + data):
        with pytest.raises(CorruptData):
            RoutingTable.from_bytes(candidate)


@given(tables(), st.data())
def test_damaged_bytes_are_corrupt_or_another_valid_table(table: RoutingTable, data: st.DataObject) -> None:
    raw = bytearray(table.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        damaged = RoutingTable.from_bytes(bytes(raw))
    except CorruptData:
        return
    assert RoutingTable.from_bytes(damaged.to_bytes()) == damaged


@given(tables(), st.integers(0, 10**6), st.binary(min_size=1))
def test_cut_off_or_trailing_bytes_are_corrupt(table: RoutingTable, cut: int, more: bytes) -> None:
    raw = table.to_bytes()
    for candidate in (raw[: cut % len(raw)], raw + more):
        with pytest.raises(CorruptData):
            RoutingTable.from_bytes(candidate)


WHOLE = [[0, 0, SPACE]]
BAD = {
    "no shards": (1, []),
    "version 0": (0, WHOLE),
    "negative version": (-1, WHOLE),
    "huge version": (MAX_VERSION + 1, WHOLE),
    "text version": ("1", WHOLE),
    "bool version": (True, WHOLE),
    "float bound": (1, [[0, 0.0, SPACE]]),
    "gap": (1, [[0, 0, 10], [1, 11, SPACE]]),
    "overlap": (1, [[0, 0, 10], [1, 9, SPACE]]),
    "same twice": (1, [*WHOLE, *WHOLE]),
    "not from 0": (1, [[0, 1, SPACE]]),
    "not to the end": (1, [[0, 0, SPACE - 1]]),
    "beyond the end": (1, [[0, 0, SPACE + 1]]),
    "below 0": (1, [[0, -1, SPACE]]),
    "id twice": (1, [[5, 0, 10], [5, 10, SPACE]]),
    "empty range": (1, [[0, 0, 0], [1, 0, SPACE]]),
    "reversed range": (1, [[0, 10, 0], [1, 0, SPACE]]),
    "negative id": (1, [[-1, 0, SPACE]]),
    "huge id": (1, [[MAX_SHARD_ID + 1, 0, SPACE]]),
    "too many shards": (1, [[i, i, i + 1] for i in range(MAX_SHARDS)] + [[MAX_SHARDS, MAX_SHARDS, SPACE]]),
    "row too long": (1, [[0, 0, SPACE, 0]]),
    "row too short": (1, [[0, 0]]),
    "third field": (1, WHOLE, 0),
    "map": {"version": 1, "shards": WHOLE},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_wrong_content_is_corrupt(content: object) -> None:
    with pytest.raises(CorruptData):
        RoutingTable.from_bytes(b"\x01" + msgspec.msgpack.encode(content))


def test_an_unknown_format_says_to_upgrade() -> None:
    with pytest.raises(CorruptData, match="upgrade"):
        RoutingTable.from_bytes(b"\x03" + RoutingTable.equal(1).to_bytes()[1:])


@pytest.mark.parametrize("count", [0, -1, MAX_SHARDS + 1, 2**40])
def test_bad_counts_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="1 to 16384"):
        RoutingTable.equal(count)


@pytest.mark.parametrize("hash_", [-1, -SPACE, SPACE, SPACE * 2])
@pytest.mark.parametrize("table", [RoutingTable.equal(4), RoutingTable(1, (Shard(0, 0, 1), Shard(1, 1, SPACE)))])
def test_what_is_no_hash_is_refused(table: RoutingTable, hash_: int) -> None:
    with pytest.raises(UsageError, match="not a key hash"):
        table.shard_for(hash_)


def test_constructor_checks_too() -> None:
    with pytest.raises(UsageError, match="gap"):
        RoutingTable(1, (Shard(0, 0, 10), Shard(1, 11, SPACE)))
    with pytest.raises(UsageError, match="unique"):
        RoutingTable(1, (Shard(0, 0, 10), Shard(0, 10, SPACE)))
    with pytest.raises(UsageError, match="version"):
        RoutingTable(0, (Shard(0, 0, SPACE),))
    with pytest.raises(UsageError, match="low < high"):
        Shard(0, 5, 5)


def test_tables_are_immutable() -> None:
    table = RoutingTable.equal(2)
    for target, name in ((table, "version"), (table.shards[0], "low")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, 1)


# -- a queue that was resharded ----------------------------------------------------------------------------------------

HALF = SPACE // 2
SLOT = RoutingTable.equal(2).shards[0].slot
SPLIT = RoutingTable(
    8,
    (Shard(2, 0, HALF // 2, 0, SLOT), Shard(3, HALF // 2, HALF, 0, SLOT), Shard(1, HALF, SPACE)),
    (RetiredShard(Shard(0, 0, HALF), (2, 3)),),
)


def test_the_wire_format_of_a_resharded_queue_is_what_it_was() -> None:
    golden = (
        "029408939502 00 ce40000000 00 cd1000 9503 ce40000000 ce80000000 00 cd1000 9501 ce80000000 cf0000000100000000"
        " 01 cd3000 91 96 00 00 ce80000000 00 cd1000 92 02 03 90"
    )
    assert SPLIT.to_bytes() == bytes.fromhex(golden.replace(" ", ""))
    assert RoutingTable.from_bytes(SPLIT.to_bytes()) == SPLIT


def test_children_stay_in_the_slot_of_their_home() -> None:
    assert {shard.slot for shard in SPLIT.relatives(0)} == {SLOT}
    assert [shard.id for shard in SPLIT.relatives(3)] == [2, 3, 0]
    assert [shard.id for shard in SPLIT.ancestors(3)] == [0]
    assert [shard.id for shard in SPLIT.ancestors(1)] == []
    assert [shard.id for shard in SPLIT.holding(HALF - 1)] == [0, 3]
    assert SPLIT.generations == ((0, 1), (2, 3))
    assert SPLIT.next_id == 4


def test_a_removed_shard_is_known_by_its_home() -> None:
    after = SPLIT.without(0)
    assert after.version == 9
    assert after.home_of(0) == 0
    assert [shard.id for shard in after.relatives(0)] == [2, 3]
    assert (after.home_of(7), after.relatives(7)) == (None, ())
    assert RoutingTable.from_bytes(after.to_bytes()) == after
    with pytest.raises(UsageError, match="not retired"):
        SPLIT.without(1)


_ACTIVE = [[2, 0, HALF, 0, SLOT], [1, HALF, SPACE, 1, RoutingTable.equal(2).shards[1].slot]]
_PAST = [0, 0, HALF, 0, SLOT]
BAD_RESHARDED = {
    "no past": [1, _ACTIVE],
    "another slot": [1, [[2, 0, HALF, 0, SLOT + 1], _ACTIVE[1]], [[*_PAST, [2]]], []],
    "an original in another slot": [1, [_ACTIVE[0], [1, HALF, SPACE, 1, 5]], [], [[0, 0]]],
    "no such slot": [1, [[1, 0, SPACE, 0, 16384]], [], [[0, 0]]],
    "a home of a larger id": [1, [[2, 0, HALF, 3, SLOT], _ACTIVE[1]], [], []],
    "a home in two places": [
        1,
        [[2, 0, 10, 0, SLOT], [1, 10, HALF, 1, RoutingTable.equal(1).shards[0].slot], [3, HALF, SPACE, 0, SLOT]],
        [],
        [],
    ],
    "retired without children": [1, _ACTIVE, [[*_PAST, []]], []],
    "a child of another home": [1, _ACTIVE, [[*_PAST, [1]]], []],
    "a child that is not there": [1, _ACTIVE, [[*_PAST, [5]]], []],
    "a child twice": [1, _ACTIVE, [[*_PAST, [2, 2]]], []],
    "a child before its parent": [1, _ACTIVE, [[4, 0, HALF, 0, SLOT, [2]]], []],
    "a retired one that is active": [1, _ACTIVE, [[2, 0, HALF, 0, SLOT, [2]]], []],
    "a retired one beyond its home": [1, _ACTIVE, [[3, 0, SPACE, 0, SLOT, [2]]], []],
    "a removed one that is active": [1, _ACTIVE, [], [[2, 0]]],
    "a removed one of no home": [1, _ACTIVE, [], [[5, 4]]],
    "a removed one of no id": [1, _ACTIVE, [], [[MAX_SHARD_ID + 1, 0]]],
}


@pytest.mark.parametrize("content", BAD_RESHARDED.values(), ids=BAD_RESHARDED.keys())
def test_wrong_content_of_a_resharded_queue_is_corrupt(content: object) -> None:
    with pytest.raises(CorruptData):
        RoutingTable.from_bytes(b"\x02" + msgspec.msgpack.encode(content))
