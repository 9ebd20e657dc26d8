"""Assignment: balance, fewest moves (against all quotas and all assignments), determinism, heirs by definition."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardq.core.assignment import assign, standby

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMES = [f"w{i}" for i in range(12)]
MEMBERS = st.lists(st.sampled_from(NAMES), unique=True)
SOME_MEMBERS = st.lists(st.sampled_from(NAMES), unique=True, min_size=1)
SHARDS = st.lists(st.integers(0, 60), unique=True, max_size=50)
# Few names and many shards make heavily skewed maps; names beyond the members make orphans.
CURRENT = st.dictionaries(st.integers(0, 60), st.sampled_from(NAMES[:6]) | st.sampled_from(NAMES), max_size=50)


def moved(before: Mapping[int, str], after: Mapping[int, str]) -> set[int]:
    """The shards of `after` whose owner is another than before, or had none."""
    return {shard for shard, owner in after.items() if before.get(shard) != owner}


def loads(wanted: Mapping[int, str], members: Iterable[str]) -> list[int]:
    counts = Counter(wanted.values())
    return [counts[member] for member in members]


def least_moves(shards: list[int], members: list[str], current: Mapping[int, str]) -> int:
    """Orphans, plus what must leave live owners under the best choice of who gets one shard more."""
    owned = Counter(current.get(shard) for shard in shards)
    orphans = sum(count for owner, count in owned.items() if owner not in members)
    floor, bonuses = divmod(len(shards), len(members))
    # Each subset of size `bonuses` is a choice; by exchange only how many of the overfull are in it matters,
    # but here all are tried.
    return orphans + min(
        sum(max(0, owned[member] - floor - (member in chosen)) for member in members)
        for chosen in combinations(members, bonuses)
    )


@given(SHARDS, MEMBERS, CURRENT)
def test_every_shard_has_an_owner_and_loads_differ_by_at_most_one(
    shards: list[int], members: list[str], current: dict[int, str]
) -> None:
    wanted = assign(shards, members, current)
    assert list(wanted) == (sorted(shards) if members else [])
    assert set(wanted.values()) <= set(members)
    if members:
        assert max(loads(wanted, members)) - min(loads(wanted, members)) <= 1


@given(SHARDS, SOME_MEMBERS, CURRENT)
def test_moves_are_the_lower_bound(shards: list[int], members: list[str], current: dict[int, str]) -> None:
    assert len(moved(current, assign(shards, members, current))) == least_moves(shards, members, current)


@given(st.integers(0, 5), st.integers(1, 3), st.data())
def test_no_balanced_assignment_at_all_moves_less(count: int, size: int, data: st.DataObject) -> None:
    shards, members = list(range(count)), NAMES[:size]
    current = data.draw(st.dictionaries(st.sampled_from(range(6)), st.sampled_from(NAMES[:4])))
    balanced = [
        candidate
        for owners in product(members, repeat=count)
        if max(loads(candidate := dict(enumerate(owners)), members)) - min(loads(candidate, members)) <= 1
    ]
    fewest = min(len(moved(current, candidate)) for candidate in balanced)
    assert len(moved(current, assign(shards, members, current))) == fewest


@given(SHARDS, MEMBERS, CURRENT, st.data())
def test_order_and_repetition_of_the_input_do_not_matter(
    shards: list[int], members: list[str], current: dict[int, str], data: st.DataObject
) -> None:
    mixed_shards = data.draw(st.permutations(shards + shards[:3]))
    mixed_members = data.draw(st.permutations(members + members[:2]))
    mixed_current = dict(data.draw(st.permutations(list(current.items()))))
    assert assign(mixed_shards, mixed_members, mixed_current) == assign(shards, members, current)
    assert standby(mixed_current, mixed_members) == standby(current, members)


@given(SHARDS, SOME_MEMBERS, CURRENT)
def test_done_once_is_done(shards: list[int], members: list[str], current: dict[int, str]) -> None:
    wanted = assign(shards, members, current)
    assert assign(shards, members, wanted) == wanted


EVENTS = st.lists(st.tuples(st.sampled_from(["join", "leave", "crash"]), st.integers(0, 11)), max_size=30)


@given(st.integers(0, 80), EVENTS)
def test_members_come_and_go(count: int, events: list[tuple[str, int]]) -> None:
    members: set[str] = set()
    wanted: dict[int, str] = {}
    for kind, number in events:
        name, before, heirs = NAMES[number], wanted, standby(wanted, members)
        members = members | {name} if kind == "join" else members - {name}
        # After a crash the leases of the dead are free; after leaving, the leaver still holds its own.
        held = {s: o for s, o in before.items() if kind != "crash" or o != name}
        wanted = assign(range(count), members, held)
        if not members or not before:
            continue
        changed = moved(before, wanted)
        if kind == "join":
            assert {wanted[shard] for shard in changed} <= {name}
        else:
            assert changed == {shard for shard, owner in before.items() if owner == name}
            assert all(wanted[shard] == heirs[shard] for shard in changed)


@given(st.one_of(CURRENT, st.builds(assign, SHARDS, SOME_MEMBERS, CURRENT)), MEMBERS)
@example({}, [])
@example({0: "w0"}, ["w0"])
@example({0: "gone"}, ["w0"])
@example({0: "gone"}, [])
@example(dict.fromkeys(range(9), "w1"), ["w0", "w1", "w2"])
def test_standby_is_assign_without_the_owner(owners: dict[int, str], members: list[str]) -> None:
    expected: dict[int, str] = {}
    for shard in sorted(owners):
        without = assign(owners, set(members) - {owners[shard]}, owners)
        if without:
            expected[shard] = without[shard]
    assert standby(owners, members) == expected
    assert list(standby(owners, reversed(members))) == list(expected)


def test_the_one_more_stays_with_those_who_own_most() -> None:
    # Handing it out by order of name instead would move a shard from b to a although nothing is out of balance.
    assert assign(range(3), ["a", "b"], {0: "a", 1: "b", 2: "b"}) == {0: "a", 1: "b", 2: "b"}


def test_highest_ids_leave_and_the_least_loaded_is_served_first() -> None:
    wanted = assign(range(7), ["a", "b", "c"], {0: "a", 1: "a", 2: "a", 3: "a", 4: "b"})
    assert wanted == {0: "a", 1: "a", 2: "a", 3: "c", 4: "b", 5: "b", 6: "c"}


@pytest.mark.parametrize("odd", ["", "é", "{x}", "a b", "\x00"])
def test_any_name_will_do(odd: str) -> None:
    assert assign([1, 2], [odd], {}) == {1: odd, 2: odd}
    assert assign([1], [odd, "z"], {1: odd}) == {1: odd}


def test_large_maps_are_balanced_and_have_heirs() -> None:
    members = [f"worker-{i}" for i in range(1000)]
    wanted = assign(range(16384), members, {})
    assert max(loads(wanted, members)) - min(loads(wanted, members)) <= 1
    heirs = standby(wanted, members)
    assert heirs.keys() == wanted.keys()
    assert not any(heirs[shard] == owner for shard, owner in wanted.items())
