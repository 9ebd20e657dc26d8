"""Plans: their bytes, and how shards that take no messages any more are kept apart."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.plan import Plan
from shardq.errors import CorruptData

MEMBERS = st.sets(st.sampled_from("abcdef"), min_size=1)


@given(st.sets(st.integers(0, 40)), st.data(), MEMBERS, MEMBERS)
def test_retired_shards_are_balanced_by_themselves(
    shards: set[int], data: st.DataObject, members: set[str], then: set[str]
) -> None:
    retired = data.draw(st.sets(st.sampled_from(sorted(shards)))) if shards else set[int]()
    first = Plan.make(shards, members, Plan())
    plan = Plan.make(shards, then, first, retired)
    assert plan.owners.keys() == shards
    for kind in (shards - retired, retired):
        held = Counter(plan.owners[shard] for shard in kind)
        counts = [held[member] for member in then]
        assert max(counts) - min(counts) <= 1
    assert Plan.make(shards, then, plan, retired) == plan, "nothing moves again"
    assert Plan.from_bytes(plan.to_bytes()) == plan


@given(st.sets(st.integers(0, 40), min_size=1), st.data(), st.sets(st.sampled_from("abcdef"), min_size=2))
def test_who_stands_by_is_who_the_next_plan_names(shards: set[int], data: st.DataObject, members: set[str]) -> None:
    retired = data.draw(st.sets(st.sampled_from(sorted(shards))))
    plan = Plan.make(shards, members, Plan(), retired)
    gone = data.draw(st.sampled_from(sorted(members)))
    after = Plan.make(shards, members - {gone}, plan, retired)
    for shard, owner in plan.owners.items():
        assert after.owners[shard] == (plan.standby[shard] if owner == gone else owner)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x90", b"\x92\x91\x92\xa1a\xa1b\x90"])
def test_bytes_that_are_no_plan(data: bytes) -> None:
    with pytest.raises(CorruptData):
        Plan.from_bytes(data)
