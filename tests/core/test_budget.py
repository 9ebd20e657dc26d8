"""The bytes that a worker's shards share: never more than there are, everybody has a turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.budget import Account, Budget
from shardq.core.step import STEP_BYTES

KIB = 1024


class Shard:
    """What a session does with its account."""

    def __init__(self, budget: Budget) -> None:
        self.held = self.turns = 0
        self.account = Account(budget, self.on_room)

    def on_room(self) -> None:
        assert self.account.pledge
        self.turns += 1

    def fetch(self, needs: int, came: int | None = None) -> int:
        """Bytes that came of a fetch; 0 when the shard is in line."""
        pledge = self.account.ask(needs, 1)
        if pledge:
            self.came(min(needs, pledge) if came is None else came)
        return pledge

    def came(self, size: int) -> None:
        self.held += size
        self.account.settle(self.held)

    def finish(self) -> None:
        self.held = 0
        self.account.settle(0)


def shards(budget: Budget, count: int) -> list[Shard]:
    budget.shards = count
    return [Shard(budget) for _ in range(count)]


def test_each_of_many_shards_has_its_part() -> None:
    budget = Budget(64 * KIB)
    for shard in shards(budget, 64):
        assert shard.fetch(KIB) == KIB
    assert (budget.used, budget.free) == (64 * KIB, 0)


def test_one_that_wants_much_leaves_as_much_for_others() -> None:
    budget = Budget(1000)
    one, other = shards(budget, 2)
    budget.shards = 4
    assert one.fetch(900) == 500
    assert other.fetch(900) == 250


def test_who_finds_no_room_is_called_when_there_is_some_first_come_first_served() -> None:
    budget = Budget(100)
    one, two, three, late = shards(budget, 4)
    assert one.fetch(100, came=100)
    assert not two.fetch(80)
    assert not three.fetch(30)
    one.held = 50
    one.account.settle(50)
    assert (two.turns, three.turns) == (1, 1), "its share is enough for a start"
    two.came(25)
    three.came(25)
    assert not late.fetch(10)
    one.finish()
    assert late.turns == 1


def test_nobody_overtakes_a_large_entry() -> None:
    budget = Budget(100)
    one, large, small = shards(budget, 3)
    budget.shards = 100
    assert one.fetch(90, came=90)
    assert large.account.ask(80, 80) == 0
    assert small.account.ask(1, 1) == 0, "there is room for it, but others wait"
    one.finish()
    assert (large.turns, small.turns) == (1, 1)
    assert large.account.pledge == 80


def test_an_entry_larger_than_all_there_is_comes_when_nothing_else_is_held() -> None:
    budget = Budget(100)
    one, other = shards(budget, 2)
    assert one.account.ask(500, 500) == 500
    assert other.account.ask(500, 500) == 0
    one.came(500)
    assert budget.free < 0
    assert other.turns == 0
    one.finish()
    assert other.account.pledge == 500


@pytest.mark.parametrize("how", ["withdraw", "close"])
def test_who_wants_no_more_holds_up_nobody(how: str) -> None:
    budget = Budget(100)
    one, two, three = shards(budget, 3)
    assert one.fetch(100, came=100)
    assert not two.account.ask(100, 100)
    assert not three.account.ask(10, 10)
    getattr(two.account, how)()
    assert not two.account.waits
    one.account.close()
    assert (two.turns, three.turns) == (0, 1)
    getattr(three.account, how)()
    assert (budget.used, budget.pledged, budget.contended) == (0, 0, False)


def test_what_did_not_come_is_there_for_others() -> None:
    budget = Budget(100)
    one, other = shards(budget, 2)
    assert one.account.ask(100, 100) == 100
    assert not other.fetch(40)
    one.came(0)
    assert other.account.pledge == 40


def test_a_shard_should_hold_what_a_step_brings_or_its_part() -> None:
    budget = Budget(100 * STEP_BYTES)
    (one, *_) = shards(budget, 10)
    assert one.account.most == 10 * STEP_BYTES
    budget.shards = 1000
    assert one.account.most == STEP_BYTES


def test_what_one_shard_holds_for_ever_leaves_each_other_half_its_part() -> None:
    """Whatever it asks for, and though all others are as greedy."""
    budget = Budget(1000)
    them = shards(budget, 10)
    budget.first_entry_bytes = 10.0
    for _ in range(20):
        for shard in them:
            shard.fetch(400)
    assert all(shard.held >= 50 for shard in them)
    assert 900 <= budget.used <= 1000


def test_with_entries_as_large_as_that_half_of_the_room_is_for_shards_that_hold_nothing() -> None:
    budget = Budget(1000)
    one, *others = shards(budget, 100)
    budget.first_entry_bytes = 100.0
    while one.fetch(1000):
        pass
    assert one.held == 500
    assert [other.account.ask(100, 100) for other in others[:6]] == [100] * 5 + [0]


def test_who_holds_nothing_comes_before_those_that_hold_something() -> None:
    budget = Budget(100)
    full, one, empty = shards(budget, 3)
    assert full.fetch(60, came=60)
    assert one.fetch(40, came=40)
    assert not one.fetch(20)
    assert not empty.fetch(20)
    assert budget.contended
    full.held = 40
    full.account.settle(40)
    assert (one.turns, empty.turns) == (0, 1)
    empty.came(0)
    one.finish()
    assert one.turns == 1, "it holds nothing any more"
    full.account.close()
    empty.account.close()
    one.account.close()
    assert (budget.used, budget.pledged, budget.contended) == (0, 0, False)


def test_who_does_not_know_its_entries_waits_for_what_they_are_taken_for_when_its_turn_has_come() -> None:
    budget = Budget(100)
    one, other = shards(budget, 2)
    budget.shards = 100
    assert one.fetch(100, came=100)
    assert other.account.ask(90, 0) == 0
    budget.first_entry_bytes = 60.0
    one.came(-50)
    assert other.turns == 0
    budget.first_entry_bytes = 50.0
    one.came(-1)
    assert other.account.pledge == 50


@given(
    most=st.integers(1, 2000),
    count=st.integers(1, 12),
    moves=st.lists(
        st.tuples(st.integers(0, 11), st.sampled_from(["ask", "came", "finish", "withdraw"]), st.integers(1, 400))
    ),
)
def test_never_more_than_there_is_and_everybody_has_a_turn(
    most: int, count: int, moves: list[tuple[int, str, int]]
) -> None:
    budget = Budget(most)
    them = shards(budget, count)
    for number, move, size in moves:
        shard = them[number % count]
        if move == "ask":
            shard.account.ask(size, min(size, most))
        elif move == "came" and shard.account.pledge:
            shard.came(min(size, shard.account.pledge))
        elif move == "finish":
            shard.finish()
        elif move == "withdraw":
            shard.account.withdraw()
        assert budget.used == sum(each.held for each in them)
        assert budget.pledged == sum(each.account.pledge for each in them)
        assert budget.used + budget.pledged <= most
    waiting = [shard for shard in them if shard.account.waits]
    for _ in them:
        for shard in them:
            shard.came(0) if shard.account.pledge else None
            shard.finish()
    assert all(shard.turns for shard in waiting)
    assert (budget.used, budget.pledged, budget.contended) == (0, 0, False)
