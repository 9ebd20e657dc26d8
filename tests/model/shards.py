"""What is known of shards in the model of a reshard, and what others do to them: which had a key before, what a group
has left to do on one, how a group is opened.
"""

from __future__ import annotations

from itertools import pairwise

from tests.model.states import (
    ABSENT,
    GONE,
    NO_GROUP,
    OPEN,
    ORDER,
    OWNED,
    SEALED,
    SHUT,
    TOO_EARLY,
    Home,
    Scenario,
    State,
    Table,
    bits,
    put,
)


class Shards:
    """`without` leaves out single rules of the protocol, to show what they are there for."""

    def __init__(self, scenario: Scenario, without: frozenset[str] = frozenset()) -> None:
        self.own, self.without = scenario, without
        self.keys, self.delayed = scenario.keys, scenario.delayed
        self.groups = scenario.groups + scenario.late
        self.tables = (scenario.first, *(plan.table for plan in scenario.plans))
        starts = [sum(map(len, scenario.sends[:number])) for number in range(len(scenario.sends) + 1)]
        self.sends = [range(low, high) for low, high in pairwise(starts)]
        order = TOO_EARLY if "sealed before published" in without else ORDER
        # Groups that are never opened later need no looks: each child gets them as it is opened.
        self.order = tuple(
            step
            for step in order
            if (self.delayed or step != "move") and (scenario.late or step not in ("look", "open_groups"))
        )
        self.parents = {child: self._ancestors(child) for child in range(scenario.shards)}

    def _ancestors(self, shard: int) -> tuple[int, ...]:
        """RoutingTable.ancestors: of every generation."""
        found: set[int] = set()
        for plan in self.own.plans:
            if shard in plan.children:
                ranges = {key for key, own in enumerate(plan.table) if own == shard}
                direct = {p for p in plan.parents if any(self._had(p, key) for key in ranges)}
                found |= direct
                if "gates of every generation" not in self.without:
                    for parent in direct:
                        found.update(self._ancestors(parent))
        return tuple(sorted(found))

    def _had(self, shard: int, key: int) -> bool:
        return any(table[key] == shard for table in self.tables)

    def _all_ancestors(self, shard: int) -> set[int]:
        keys = [key for table in self.tables for key, own in enumerate(table) if own == shard]
        return {other for other in range(shard) if any(self._had(other, key) for key in keys)}

    def changed(self, state: State, home: Home, **more: object) -> State:
        """With the home changed by one step. The replica lacks that step alone, where there are failovers at all."""
        behind = state.home if state.failovers else home
        return state._replace(home=home, behind=behind, **more)  # type: ignore[arg-type] # fields of any type

    def with_shard(self, home: Home, number: int, **new: object) -> Home:
        shards = list(home.shards)
        shards[number] = shards[number]._replace(**new)  # type: ignore[arg-type] # fields of any type
        return home._replace(shards=tuple(shards))

    def _left(self, home: Home, number: int, group: int) -> bool:
        """reshard_left: whether the group has something to do on a retired shard, or may get it"""
        shard = home.shards[number]
        if shard.state in (ABSENT, GONE):
            return False
        if shard.gates[group] == NO_GROUP or shard.state == OPEN or shard.delayed:
            return True
        finished = home.done[group]
        if "retries keep a gate shut" in self.without:
            finished |= home.waiting[group]
        return bool(bits(shard.log) & ~finished)

    def _open_group(self, home: Home, number: int, group: int) -> Home:
        """open_group: earliest, with its gate shut where the shard has parents"""
        shard = home.shards[number]
        if shard.state not in (OPEN, SEALED) or shard.gates[group] != NO_GROUP:
            return home
        return self.with_shard(home, number, gates=put(shard.gates, group, self._gate(home, number)))

    def _gate(self, home: Home, number: int) -> int:
        return SHUT if any(home.shards[p].state != GONE for p in self.parents[number]) else OWNED

    def _move(self, state: State, parent: int, table: Table) -> Home:
        """move_delayed: to the shards that have the keys in the table of who moves"""
        home = state.home
        waiting = home.shards[parent].delayed
        targets = {table[self.keys[message]] for message in waiting}
        if any(home.shards[target].state not in (OPEN, SEALED) for target in targets):
            return home  # MISSING
        for message in waiting:
            target = table[self.keys[message]]
            home = self.with_shard(home, target, delayed=tuple(sorted((*home.shards[target].delayed, message))))
        return self.with_shard(home, parent, delayed=())
