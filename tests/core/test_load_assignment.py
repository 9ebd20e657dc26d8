"""Assignment by load: everybody's share, what may move and what must not, that it ends, and heirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.load_assignment import Band, assign_by_load, standby_by_load

NAMES = [f"w{i}" for i in range(8)]
WEIGHTS = st.dictionaries(st.integers(0, 60), st.floats(0.1, 1000), max_size=40)
CAPACITIES = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.5, 1.0, 1.0, 2.0, 8.0]), max_size=8)
CURRENT = st.dictionaries(st.integers(0, 60), st.sampled_from(NAMES), max_size=50)


def loads(owners: Mapping[int, str], weights: Mapping[int, float], members: Mapping[str, float]) -> dict[str, float]:
    found = dict.fromkeys(members, 0.0)
    for shard, owner in owners.items():
        found[owner] += weights[shard]
    return found


def unevenness(owners: Mapping[int, str], weights: Mapping[int, float], members: Mapping[str, float]) -> float:
    return sum(load**2 / members[name] for name, load in loads(owners, weights, members).items())


def left(before: Mapping[int, str], after: Mapping[int, str], members: Mapping[str, float]) -> set[int]:
    """The shards that left an owner who is there."""
    return {shard for shard, owner in after.items() if before.get(shard, owner) != owner and before[shard] in members}


@given(WEIGHTS, CAPACITIES, CURRENT, st.integers(0, 50))
def test_every_shard_has_an_owner_and_moves_are_bounded(
    weights: dict[int, float], members: dict[str, float], current: dict[int, str], most: int
) -> None:
    owners = assign_by_load(weights, members, current, most_moves=most)
    assert list(owners) == (sorted(weights) if members else [])
    assert set(owners.values()) <= members.keys()
    assert len(left(current, owners, members)) <= most


@given(WEIGHTS, CAPACITIES, CURRENT, st.data())
def test_order_does_not_matter(
    weights: dict[int, float], members: dict[str, float], current: dict[int, str], data: st.DataObject
) -> None:
    mixed = [dict(data.draw(st.permutations(list(each.items())))) for each in (weights, members, current)]
    expected = assign_by_load(weights, members, current, most_moves=9)
    assert assign_by_load(mixed[0], mixed[1], mixed[2], most_moves=9) == expected  # type: ignore[arg-type]  # drawn
    assert standby_by_load(expected, mixed[0], mixed[1]) == standby_by_load(expected, weights, members)  # type: ignore[arg-type]  # drawn


@given(WEIGHTS, CAPACITIES, CURRENT)
def test_it_gets_more_even_with_every_round_and_ends(
    weights: dict[int, float], members: dict[str, float], current: dict[int, str]
) -> None:
    owners = assign_by_load(weights, members, current)
    for _ in range(100):
        after = assign_by_load(weights, members, owners, most_moves=len(weights))
        if after == owners:
            break
        assert unevenness(after, weights, members) < unevenness(owners, weights, members)
        owners = after
    else:
        pytest.fail("a hundred rounds and still moving")


@given(st.dictionaries(st.integers(0, 60), st.floats(0.1, 1000), min_size=1, max_size=40), st.integers(2, 8), CURRENT)
def test_nobody_is_far_over_while_a_shard_would_fit_elsewhere(
    weights: dict[int, float], count: int, current: dict[int, str]
) -> None:
    members = dict.fromkeys(NAMES[:count], 1.0)
    owners = current
    for _ in range(8):
        owners = assign_by_load(weights, members, owners, most_moves=len(weights))
    carried = loads(owners, weights, members)
    least = min(carried.values())
    fair = sum(weights.values()) / count
    for name, load in carried.items():
        own = [weights[shard] for shard, owner in owners.items() if owner == name]
        if load > 1.2 * max([fair, *own]):
            assert load - least < 1.35 * min(own) * (1 + 1e-9)


@given(WEIGHTS, CAPACITIES, CURRENT, st.sets(st.integers(0, 60)))
def test_resting_shards_stay(
    weights: dict[int, float], members: dict[str, float], current: dict[int, str], resting: set[int]
) -> None:
    owners = assign_by_load(weights, members, current, resting=resting, most_moves=99)
    assert not left(current, owners, members) & resting


def test_equal_weights_are_balanced_by_count() -> None:
    owners = assign_by_load(dict.fromkeys(range(17), 1.0), dict.fromkeys("abcde", 1.0), {})
    assert sorted(Counter(owners.values()).values()) == [3, 3, 3, 4, 4]


def test_twice_the_capacity_gets_twice_the_load() -> None:
    owners = assign_by_load(dict.fromkeys(range(30), 1.0), {"large": 2.0, "small": 1.0}, {})
    assert Counter(owners.values()) == {"large": 20, "small": 10}


def test_a_heavy_shard_fills_its_owner_and_the_others_share_the_rest() -> None:
    weights = {0: 90.0} | dict.fromkeys(range(1, 10), 1.0)
    current = dict.fromkeys(range(4), "a") | dict.fromkeys(range(4, 7), "b") | dict.fromkeys(range(7, 10), "c")
    owners = assign_by_load(weights, dict.fromkeys("abc", 1.0), current, most_moves=9)
    assert owners[0] == "a", "no move helps the shard itself"
    assert Counter(owners.values()) == {"a": 1, "b": 5, "c": 4}


def test_what_is_within_the_band_stays() -> None:
    weights = dict.fromkeys(range(22), 1.0)
    current = {shard: "a" if shard < 12 else "b" for shard in weights}
    assert assign_by_load(weights, {"a": 1.0, "b": 1.0}, current, most_moves=9) == current
    moved = assign_by_load(weights, {"a": 1.0, "b": 1.0}, current, most_moves=9, band=Band(start=0.05, settle=0.0))
    assert Counter(moved.values()) == {"a": 11, "b": 11}


def test_equal_shards_that_do_not_divide_stay_although_somebody_has_twice_as_much() -> None:
    current = {0: "a", 1: "a", 2: "b", 3: "c"}
    for noise in (0.8, 1.0, 1.2):
        weights = {0: noise, 1: 1.0, 2: 1.0, 3: 1.0}
        assert assign_by_load(weights, dict.fromkeys("abc", 1.0), current, most_moves=9) == current


def test_an_orphan_goes_to_its_heir_unless_that_has_too_much() -> None:
    weights = dict.fromkeys(range(10), 1.0)
    current = {shard: "ab"[shard % 2] for shard in range(8)}
    members = {"a": 1.0, "b": 1.0}
    assert assign_by_load(weights, members, current, heirs={8: "b", 9: "b"})[8] == "b"
    assert assign_by_load(weights, members, current, heirs={8: "gone", 9: "gone"}).keys() == weights.keys()
    heavy = weights | {8: 20.0}
    assert assign_by_load(heavy, members, dict.fromkeys(range(8), "a"), heirs={8: "a"})[8] == "b"


def test_a_newcomer_gets_its_share_from_all() -> None:
    weights = {shard: 1.0 + shard % 3 for shard in range(160)}
    ten = {f"w{i}": 1.0 for i in range(10)}
    before = assign_by_load(weights, ten, {})
    eleven = ten | {"new": 1.0}
    after = assign_by_load(weights, eleven, before, most_moves=160)
    moved = left(before, after, eleven)
    assert {after[shard] for shard in moved} == {"new"}
    carried = loads(after, weights, eleven)
    assert carried["new"] > 0.9 * sum(weights.values()) / 11
    assert max(carried.values()) < 1.2 * sum(weights.values()) / 11


@given(WEIGHTS, CAPACITIES, CURRENT)
def test_everything_has_a_standby_that_is_somebody_else(
    weights: dict[int, float], members: dict[str, float], current: dict[int, str]
) -> None:
    owners = assign_by_load(weights, members, current)
    heirs = standby_by_load(owners, weights, members)
    assert list(heirs) == (list(owners) if len(members) > 1 else [])
    assert all(heir in members and heir != owners[shard] for shard, heir in heirs.items())


def test_the_shards_of_one_owner_have_several_standbys() -> None:
    members = {f"w{i}": 1.0 for i in range(5)}
    weights = dict.fromkeys(range(40), 1.0)
    owners = assign_by_load(weights, members, {})
    heirs = standby_by_load(owners, weights, members)
    of_one = Counter(heirs[shard] for shard, owner in owners.items() if owner == "w0")
    assert sorted(of_one.values()) == [2, 2, 2, 2]


def test_shards_of_an_owner_who_is_gone_have_standbys_too() -> None:
    assert standby_by_load({0: "gone", 1: "a"}, {0: 1.0, 1: 1.0}, {"a": 1.0, "b": 1.0}).keys() == {0, 1}
    assert standby_by_load({0: "gone"}, {0: 1.0}, {}) == {}
