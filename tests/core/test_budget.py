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


def stuck_beyond(budget: Budget, size: int = 10_000) -> Shard:
    """One more shard, with an entry that came though there was no room, and stays."""
    budget.shards += 1
    shard = Shard(budget)
    free = budget.free
    assert shard.account.ask(size, size) == size
    shard.came(size)
    assert budget.free == free, "it takes nothing of what others have"
    return shard


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
    stuck_beyond(budget)
    budget.shards = 4
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


def test_nobody_overtakes_one_that_waits_for_more() -> None:
    budget = Budget(100)
    one, two, small = shards(budget, 3)
    assert one.fetch(90, came=90)
    stuck_beyond(budget)
    budget.shards = 3
    assert two.account.ask(25, 25) == 0
    assert small.account.ask(1, 1) == 0, "there is room for it, but others wait"
    one.finish()
    assert (two.turns, small.turns) == (1, 1)
    assert two.account.pledge == 25


def test_one_larger_than_what_is_left_comes_beyond_the_bound_and_takes_nothing_of_it() -> None:
    """What is left to it by others may be all that it will ever find, for their handlers may never end."""
    budget = Budget(100)
    stuck, large, small, next_large = shards(budget, 4)
    budget.first_entry_bytes = 1.0
    assert stuck.fetch(100) == 50
    assert large.account.ask(80, 80) == 80
    large.came(80)
    assert (budget.used, budget.free) == (130, 50)
    assert small.fetch(10) == 10, "others go on beside it"
    assert next_large.account.ask(70, 70) == 0, "one at a time"
    assert large.account.ask(80, 80) == 0
    small.finish()
    assert small.fetch(10) == 10, "nor do they wait for the next one"
    assert (large.turns, next_large.turns) == (0, 0)
    large.finish()
    assert next_large.account.pledge == 70
    assert budget.used + budget.pledged == 130
    next_large.came(70)
    next_large.finish()
    assert large.account.pledge == 80, "it holds nothing again"


def test_who_waits_until_its_entry_is_large_among_others_holds_up_nobody() -> None:
    budget = Budget(100)
    one, turned_large, small = shards(budget, 3)
    budget.shards = 10
    budget.first_entry_bytes = 40.0
    stuck_beyond(budget)
    assert one.fetch(100, came=100)
    assert not turned_large.account.ask(40, 40)
    assert not small.account.ask(10, 10)
    budget.first_entry_bytes = 10.0
    one.held = 70
    one.account.settle(70)
    assert (turned_large.turns, small.turns) == (0, 1)


def test_nothing_comes_beyond_the_bound_before_anything_came_at_all() -> None:
    """Until then an entry counts as large, and those that would wait for room need not."""
    budget = Budget(100)
    one, other, third = shards(budget, 3)
    budget.first_entry_bytes = 60.0
    assert one.account.ask(80, 0) == 60
    assert other.account.ask(80, 0) == third.account.ask(80, 0) == 0
    assert budget.pledged == 60
    one.account.learn(1, 70)
    one.came(70)
    assert other.account.pledge == 70, "it may be that this is never through"
    assert not third.account.pledge


def one_beyond() -> tuple[Budget, Shard, Shard, Shard]:
    """Of 100 bytes the first shard holds 60; the second holds as many, beyond the bound; the third holds nothing."""
    budget = Budget(100)
    one, beyond, empty = shards(budget, 3)
    budget.first_entry_bytes = 1.0
    assert one.fetch(60, came=60)
    assert beyond.account.ask(60, 60) == 60
    beyond.came(60)
    return budget, one, beyond, empty


def test_it_is_given_more_once_all_that_is_held_fits() -> None:
    budget, one, other, third = one_beyond()
    assert not other.fetch(5)
    assert third.fetch(10), "what waits for that holds up nobody"
    assert third.fetch(2)
    one.finish()
    assert other.account.pledge == 5
    assert budget.free == 100 - 60 - 12 - 5


def test_what_fits_again_makes_place_for_the_next_though_it_has_no_room_for_more() -> None:
    _, one, other, large = one_beyond()
    assert not other.account.ask(50, 50)
    assert not large.account.ask(70, 70)
    one.finish()
    assert (other.turns, large.turns, large.account.pledge) == (0, 1, 70)


def test_of_the_place_beyond_the_bound_large_entries_are_first() -> None:
    """Small ones are first of the room, and would take both."""
    budget = Budget(100)
    full, small, large = shards(budget, 3)
    budget.first_entry_bytes = 1.0
    assert full.fetch(100, came=100)
    beyond = stuck_beyond(budget)
    assert not small.account.ask(10, 10)
    assert not large.account.ask(60, 60)
    beyond.finish()
    assert (small.turns, large.turns) == (0, 1)


def test_those_that_hold_something_do_not_wait_for_large_entries() -> None:
    budget = Budget(100)
    one, two, large = shards(budget, 3)
    budget.first_entry_bytes = 1.0
    assert one.fetch(50, came=50)
    assert two.fetch(45, came=45)
    stuck_beyond(budget)
    budget.shards = 3
    assert not two.account.ask(20, 20)
    assert not large.account.ask(60, 60)
    one.held = 10
    one.account.settle(10)
    assert two.account.pledge == 20
    assert large.turns == 0


def test_an_entry_larger_than_all_there_is_comes_but_only_one() -> None:
    budget = Budget(100)
    one, other, small = shards(budget, 3)
    assert one.account.ask(500, 500) == 500
    assert other.account.ask(500, 500) == 0
    one.came(500)
    assert (budget.used, budget.free) == (500, 100)
    assert small.fetch(10) == 10
    assert other.turns == 0
    one.finish()
    assert other.account.pledge == 500


@pytest.mark.parametrize("how", ["withdraw", "close"])
def test_who_wants_no_more_holds_up_nobody(how: str) -> None:
    budget = Budget(100)
    one, two, three = shards(budget, 3)
    assert one.fetch(100, came=100)
    beyond = stuck_beyond(budget)
    assert not two.account.ask(25, 25)
    assert not three.account.ask(10, 10)
    getattr(two.account, how)()
    assert not two.account.waits
    one.account.close()
    beyond.account.close()
    assert (two.turns, three.turns) == (0, 1)
    getattr(three.account, how)()
    assert (budget.used, budget.pledged, budget.contended) == (0, 0, False)


def test_what_did_not_come_is_there_for_others() -> None:
    budget = Budget(100)
    one, other = shards(budget, 2)
    budget.shards = 1
    assert one.account.ask(100, 100) == 100
    stuck_beyond(budget)
    budget.shards = 2
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
    assert [other.account.ask(100, 100) for other in others[:7]] == [100] * 6 + [0]
    assert budget.used + budget.pledged == 1100, "and one more beyond the bound"


def test_who_holds_nothing_comes_before_those_that_hold_something() -> None:
    budget = Budget(100)
    full, one, empty = shards(budget, 3)
    assert full.fetch(60, came=60)
    assert one.fetch(40, came=40)
    beyond = stuck_beyond(budget)
    budget.shards = 3
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
    beyond.account.close()
    assert (budget.used, budget.pledged, budget.contended) == (0, 0, False)


def test_who_does_not_know_its_entries_waits_for_what_they_are_taken_for_when_its_turn_has_come() -> None:
    budget = Budget(100)
    one, other = shards(budget, 2)
    budget.shards = 100
    assert one.fetch(100, came=100)
    stuck_beyond(budget)
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
    first=st.integers(1, 1000),
    moves=st.lists(
        st.tuples(
            st.integers(0, 11),
            st.sampled_from(["ask", "came", "finish", "withdraw"]),
            st.integers(1, 400),
            st.sampled_from([1, 20, 400, 3000]),
        )
    ),
)
def test_never_more_than_there_is_and_one_fetch_and_everybody_has_a_turn(
    most: int, count: int, first: int, moves: list[tuple[int, str, int, int]]
) -> None:
    budget = Budget(most)
    them = shards(budget, count)
    budget.first_entry_bytes = float(first)
    for number, move, size, entry in moves:
        shard = them[number % count]
        if move == "ask":
            shard.account.ask(max(size, entry), entry)
        elif move == "came" and shard.account.pledge:
            shard.account.learn(entry, size)  # what is known of entries changes, and with it what is left to each
            shard.came(min(size, shard.account.pledge))
        elif move == "finish":
            shard.finish()
        elif move == "withdraw":
            shard.account.withdraw()
        check_bound(budget, them)
    for _ in range(2 * count + 1):
        for shard in them:
            if shard.account.pledge:
                shard.came(0)
            shard.finish()
    assert not any(shard.account.waits for shard in them), "each had a turn once it held nothing"
    assert (budget.used, budget.pledged, budget.free, budget.contended) == (0, 0, most, False)


def is_beyond(budget: Budget, shard: Shard) -> bool:
    return shard.account is budget._beyond


def check_bound(budget: Budget, them: list[Shard]) -> None:
    """One fetch at most is beyond the bound, and of a shard that held nothing."""
    assert budget.used == sum(each.held for each in them)
    assert budget.pledged == sum(each.account.pledge for each in them)
    sizes = [each.held + each.account.pledge for each in them]
    over = sum(sizes) - budget._most
    beyond = [each for each in them if is_beyond(budget, each)]
    assert over <= sum(each.held + each.account.pledge for each in beyond)
    assert not any(each.held and each.account.pledge for each in beyond)
    for each in them:
        if each.account.waits and not each.held:
            assert beyond, "nobody that holds nothing waits while that place is free"


@given(
    count=st.integers(2, 12),
    entries=st.lists(st.integers(1, 3000), min_size=12, max_size=12),
    stuck=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), max_size=40),
    first=st.integers(1, 1000),
)
def test_whatever_is_stuck_all_others_go_on(
    count: int, entries: list[int], stuck: list[tuple[int, int]], first: int
) -> None:
    """Handlers of half of the shards never end, and hold all that they are given: each other shard has turn after turn,
    with entries of any size, but that two that come beyond the bound wait for each other."""
    budget = Budget(1000)
    them = shards(budget, count)
    budget.first_entry_bytes = float(first)
    for number, (needs, entry) in enumerate(stuck):
        shard = them[number % (count // 2)]
        pledge = shard.account.ask(max(needs, entry), entry)
        if is_beyond(budget, shard):
            shard.account.withdraw()  # what is stuck is so within the bound
        elif pledge:
            shard.came(pledge)
        check_bound(budget, them)
    others = them[count // 2 :]
    for _ in range(3):
        for shard, entry in zip(others, entries, strict=False):
            shard.account.ask(entry, entry)
            check_bound(budget, them)
        for _ in others:
            for shard in others:
                if shard.account.pledge:
                    shard.came(shard.account.pledge)
                    check_bound(budget, them)
                    shard.finish()
                    check_bound(budget, them)
        assert not any(shard.account.waits or shard.held for shard in others)


@given(
    stuck=st.integers(1000, 5000),
    count=st.integers(1, 12),
    held=st.integers(0, 60),
    entries=st.lists(st.integers(1, 40), min_size=12, max_size=12),
)
def test_one_stuck_beyond_the_bound_holds_up_no_small_entries(
    stuck: int, count: int, held: int, entries: list[int]
) -> None:
    """Nor does one that waits for that place behind it."""
    budget = Budget(1000)
    them = shards(budget, count)
    budget.first_entry_bytes = 40.0
    stuck_beyond(budget, stuck)
    large = Shard(budget)
    budget.shards += 1
    assert large.account.ask(stuck, stuck) == 0
    for _ in range(held):
        them[0].fetch(400)
    for shard, entry in zip(them[1:], entries, strict=False):
        assert shard.account.ask(entry, entry) == entry
    assert budget.used + budget.pledged <= 1000 + stuck
