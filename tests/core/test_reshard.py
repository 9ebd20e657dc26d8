"""Plans of reshards: the space stays covered, homes stay what they are, what can't be is refused with its reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.reshard import Reshard, merge, scale, split, split_all
from shardq.core.routing import MAX_SHARDS, RetiredShard, RoutingTable, Shard
from shardq.errors import CorruptData, UsageError

SPACE = 2**32


@st.composite
def tables(draw: st.DrawFn) -> RoutingTable:
    """A queue after any series of reshards and removals."""
    table = RoutingTable.equal(draw(st.integers(1, 6)))
    for _ in range(draw(st.integers(0, 5))):
        removes: bool = draw(st.booleans())
        if table.retired and removes:
            gone: RetiredShard = draw(st.sampled_from(table.retired))
            table = table.without(gone.shard.id)
        else:
            plan = draw(plans(table))
            table = plan.table if plan is not None else table
    return table


@st.composite
def plans(draw: st.DrawFn, table: RoutingTable) -> Reshard | None:
    """Any plan for the table; None where a scale has nothing to do."""
    groups = [shards for shards in table.homes.values() if len(shards) > 1]
    match draw(st.sampled_from(["split", "all", "scale", *["merge"] * bool(groups)])):
        case "split":
            return split(table, draw(st.sampled_from(table.shards)).id, draw(st.integers(2, 5)))
        case "all":
            return split_all(table)
        case "merge":
            shards = draw(st.sampled_from(groups))
            first = draw(st.integers(0, len(shards) - 2))
            return merge(table, [each.id for each in shards[first : draw(st.integers(first + 2, len(shards)))]])
        case _:
            return scale(table, draw(st.integers(len(table.homes), 4 * len(table.homes))))


def spans(table: RoutingTable) -> dict[int, tuple[int, int, int]]:
    """What each home covers, and its slot."""
    return {home: (own[0].low, own[-1].high, own[0].slot) for home, own in table.homes.items()}


@given(tables(), st.data())
def test_a_plan_keeps_what_it_does_not_name(table: RoutingTable, data: st.DataObject) -> None:
    plan = data.draw(plans(table))
    if plan is None:
        return
    after = plan.table
    assert after.version == table.version + 1 == plan.version + 1
    assert spans(after) == spans(table)
    old, new = {shard.id: shard for shard in table.shards}, {shard.id: shard for shard in after.shards}
    assert {id_: new[id_] for id_ in old.keys() & new.keys()} == {
        id_: shard for id_, shard in old.items() if id_ not in plan.parents
    }
    assert set(plan.parents) == old.keys() - new.keys()
    assert {child.id for child in plan.children} == new.keys() - old.keys()
    assert min(child.id for child in plan.children) == table.next_id
    assert after.removed == table.removed
    assert {each.shard.id for each in after.retired} == {each.shard.id for each in table.retired} | set(plan.parents)


@given(tables(), st.data())
def test_children_take_over_exactly_what_their_parents_had(table: RoutingTable, data: st.DataObject) -> None:
    plan = data.draw(plans(table))
    if plan is None:
        return
    for parent in plan.parents:
        own, children = table.by_id[parent], [plan.table.by_id[child] for child in plan.children_of(parent)]
        assert {child.home_id for child in children} == {own.home_id}
        covered = sorted((max(child.low, own.low), min(child.high, own.high)) for child in children)
        assert covered[0][0] == own.low
        assert covered[-1][1] == own.high
        assert all(left[1] == right[0] for left, right in pairwise(covered))
        assert [child.slot for child in children] == [own.slot] * len(children)
        for child in children:
            assert parent in plan.parents_of(child.id)
            assert own in plan.table.ancestors(child.id)


@given(tables(), st.integers(0, SPACE - 1))
def test_whoever_held_a_key_is_found(table: RoutingTable, hash_: int) -> None:
    *before, now = table.holding(hash_)
    assert now == table.shard_for(hash_)
    assert {each.id for each in before} == {
        each.shard.id for each in table.retired if each.shard.low <= hash_ < each.shard.high
    }
    row_of = {shard: row for row, shards in enumerate(table.generations) for shard in shards}
    assert row_of.keys() == table.by_id.keys()
    for shard in table.by_id:
        assert all(row_of[each.id] < row_of[shard] for each in table.ancestors(shard))


@given(tables(), st.integers(1, 40))
def test_scale_gives_the_number(table: RoutingTable, more: int) -> None:
    count = len(table.homes) + more - 1
    plan = scale(table, count)
    after = plan.table if plan is not None else table
    assert len(after.shards) == count
    sizes = [len(shards) for shards in after.homes.values()]
    assert max(sizes) - min(sizes) <= 1
    for shards in after.homes.values():
        widths = {shard.high - shard.low for shard in shards}
        assert max(widths) - min(widths) <= 1
    assert scale(after, count) is None


@given(tables())
def test_scaled_down_to_the_declared_number_the_ranges_are_those_declared(table: RoutingTable) -> None:
    plan = scale(table, len(table.homes))
    after = plan.table if plan is not None else table
    declared = RoutingTable.equal(len(table.homes))
    assert [(shard.low, shard.high, shard.slot) for shard in after.shards] == [
        (shard.low, shard.high, shard.slot) for shard in declared.shards
    ]
    assert after.equal_shards == len(table.homes)


@given(tables(), st.data())
def test_round_trip(table: RoutingTable, data: st.DataObject) -> None:
    assert RoutingTable.from_bytes(table.to_bytes()) == table
    plan = data.draw(plans(table))
    if plan is not None:
        assert Reshard.from_bytes(plan.to_bytes()) == plan


@given(tables(), st.data())
def test_a_plan_that_is_given_up_leaves_the_shards_and_burns_the_ids(table: RoutingTable, data: st.DataObject) -> None:
    plan = data.draw(plans(table))
    if plan is None:
        return
    after = plan.given_up()
    assert (after.shards, after.retired, after.version) == (table.shards, table.retired, table.version + 1)
    assert after.next_id == plan.table.next_id


@given(tables(), st.data())
def test_damaged_bytes_are_corrupt_or_another_valid_plan(table: RoutingTable, data: st.DataObject) -> None:
    raw = bytearray(split_all(table).to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        damaged = Reshard.from_bytes(bytes(raw))
    except CorruptData:
        return
    assert Reshard.from_bytes(damaged.to_bytes()) == damaged
    assert damaged.given_up().version == damaged.table.version


@given(st.binary())
def test_arbitrary_bytes_are_corrupt(data: bytes) -> None:
    for candidate in (data, b"\x01" + data, b"\x01\x92" + data):
        with pytest.raises(CorruptData):
            Reshard.from_bytes(candidate)


SPLIT = split(RoutingTable.equal(4), 1).table


def with_other_bound() -> bytes:
    """The table of a plan that splits shard 2, but for where the new shard 5 ends and its neighbour begins, which
    descends from the same shard."""
    table = split(split(RoutingTable.equal(2), 0).table, 2).table
    five, three = table.by_id[5], table.by_id[3]
    moved = {5: replace(five, high=five.high - 1000), 3: replace(three, low=three.low - 1000)}
    return replace(table, shards=tuple(moved.get(shard.id, shard) for shard in table.shards)).to_bytes()


@pytest.mark.parametrize(
    "content",
    [
        [[], SPLIT.to_bytes()],
        [[1, 1], SPLIT.to_bytes()],
        [[0], SPLIT.to_bytes()],
        [[1], split(SPLIT, 4).table.to_bytes()],
        [[1], RoutingTable.equal(4).to_bytes()],
        [[2], with_other_bound()],
        [[1], b"\x09"],
        [[1]],
    ],
    ids=[
        "no parent",
        "twice",
        "not retired",
        "a child that is retired",
        "no retired",
        "children beside their parent",
        "no table",
        "short",
    ],
)
def test_wrong_content_is_corrupt(content: object) -> None:
    with pytest.raises(CorruptData):
        Reshard.from_bytes(b"\x01" + msgspec.msgpack.encode(content))


def test_the_wire_format_is_what_it_was() -> None:
    plan = split(RoutingTable.equal(1), 0)
    table = plan.table.to_bytes()
    assert plan.to_bytes() == b"\x01\x92\x91\x00\xc4" + bytes([len(table)]) + table


@pytest.mark.parametrize(
    ("shards", "why"),
    [
        ([4], "two or more"),
        ([4, 4], "two or more"),
        ([0, 4], "different hash slots"),
        ([4, 5, 2], "different hash slots"),
        ([4, 6], "do not touch"),
        ([1, 4], "retired already"),
        ([4, 99], "there is no shard 99"),
    ],
)
def test_merges_that_can_not_be_are_refused(shards: list[int], why: str) -> None:
    table = split(RoutingTable.equal(4), 1, into=3).table
    with pytest.raises(UsageError, match=why):
        merge(table, shards)


@pytest.mark.parametrize("count", [-1, 0, 3, MAX_SHARDS + 1])
def test_a_number_below_the_homes_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="declared with 4"):
        scale(SPLIT, count)


@pytest.mark.parametrize("into", [-1, 0, 1])
def test_a_split_into_one_is_refused(into: int) -> None:
    with pytest.raises(UsageError, match="2 or more"):
        split(SPLIT, 0, into)
    with pytest.raises(UsageError, match="2 or more"):
        split_all(SPLIT, into)


def test_a_range_of_one_hash_can_not_be_cut() -> None:
    with pytest.raises(UsageError, match="can't be cut"):
        split(RoutingTable(1, (Shard(0, 0, 1), Shard(1, 1, SPACE))), 0)


def test_more_shards_than_a_queue_can_have_are_refused() -> None:
    with pytest.raises(UsageError, match="1 to 16384"):
        split_all(RoutingTable.equal(MAX_SHARDS // 2 + 1))
