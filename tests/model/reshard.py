"""The protocol of a reshard as a machine with few states: producers, those who carry out plans, groups, failovers, each
of whom may stop between any two steps. What it promises is checked at every step (`Broken`). Knows nothing of Redis.

Each step stands for one call of shardq, which is atomic, and is written beside its name. Of time there is nothing: what
waits for a time may happen at any time. All shards are of one home, as no reshard touches two: they lie on one master.
`Model.without` leaves out single rules of the protocol, to show what they are there for.
"""

from __future__ import annotations

from tests.model.explore import Broken
from tests.model.handling import Handling
from tests.model.planning import Planning
from tests.model.sending import Sending
from tests.model.states import (
    ABSENT,
    GONE,
    NO_GROUP,
    OPEN,
    OWNED,
    SEALED,
    Control,
    Home,
    Producer,
    Shard,
    State,
    Steps,
    bits,
    put,
)


class Model(Sending, Handling, Planning):
    """`steps`, `first` and `goal` for `explore`."""

    @property
    def first(self) -> State:
        own = self.own
        there = [OWNED] * own.groups + [NO_GROUP] * own.late
        nothing = (0,) * self.groups
        answers = (-1,) * len(own.sends)
        shards = tuple(
            Shard(OPEN, (), (), answers, tuple(there), nothing)
            if number in own.first
            else Shard(ABSENT, (), (), answers, (NO_GROUP,) * self.groups, nothing)
            for number in range(own.shards)
        )
        home = Home(shards, nothing, nothing, 0)
        producer = Producer(0, (), ((),) * own.shards, None, 0)
        producers = tuple(producer._replace(route=own.first) if not n else producer for n in range(len(own.sends)))
        control = Control(0, -1, False, 0)
        before = (0,) * len(self.keys)
        late = None if own.late else ()
        return State(control, home, home, producers, (), 0, before, late, (), own.failovers, own.resets, own.retries)

    def goal(self, state: State) -> bool:
        """All was sent and handled, every plan is done, the groups are everywhere. Raises Broken."""
        everything = (1 << len(self.keys)) - 1
        self._check_stored(state)
        return (
            state.control.plan < 0
            and not state.executors
            and not self._applicable(state)
            and state.acknowledged == everything
            and all(done | state.home.removed == everything for done in state.home.done)
            and state.opening == ()
            and not state.resetting
            and self._complete(state)
        )

    def _complete(self, state: State) -> bool:
        for number, shard in enumerate(state.home.shards):
            if number in self.tables[state.control.table] and NO_GROUP in shard.gates:
                raise Broken("groups", f"a group is not on shard {number}, and nobody would open it any more")
        return True

    def _check_stored(self, state: State) -> None:
        seen = state.home.removed
        for shard in state.home.shards:
            for message in (*shard.log, *shard.delayed):
                if seen >> message & 1:
                    raise Broken("once", f"message {message} is stored twice")
                seen |= 1 << message
        if state.acknowledged & ~seen:
            raise Broken("lost", f"of the acknowledged {state.acknowledged:b} there are {seen:b}")

    def steps(self, state: State) -> Steps:
        self._check_stored(state)
        yield from self.producer_steps(state)
        yield from self.group_steps(state)
        yield from self.plan_steps(state)
        yield from self.operator_steps(state)
        if state.failovers:
            yield from self.failover_steps(state)

    # -- operators and leaders ---------------------------------------------------------------------------------------

    def _applicable(self, state: State) -> int | None:
        """The next plan that can be begun."""
        active = self.tables[state.control.table]
        for number in range(state.control.begun, len(self.own.plans)):
            if set(self.own.plans[number].parents) <= set(active):
                return number + 1
        return None

    def operator_steps(self, state: State) -> Steps:
        control = state.control
        if control.plan < 0 and (plan := self._applicable(state)) is not None:
            yield "begin_reshard", state._replace(control=control._replace(plan=plan - 1, begun=plan))
        if self.own.gives_up and control.plan >= 0 and not control.committed:
            yield from self._give_up(state)
        yield from self._open_late(state)
        yield from self._reset(state)
        if self.own.removes or self.delayed:
            yield from self._look_after(state)

    def _give_up(self, state: State) -> Steps:
        """give_up: end_reshard and remove_retired"""
        home, plan = state.home, self.own.plans[state.control.plan]
        for child in plan.children:
            if home.shards[child].log or home.shards[child].delayed:
                raise Broken("lost", f"shard {child} is deleted with messages")
            home = self.with_shard(home, child, state=GONE)
        if any(home.shards[parent].state == SEALED for parent in plan.parents):
            raise Broken("given up", "a sealed shard has no children")
        yield "give_up", self.changed(state, home, control=state.control._replace(plan=-1))

    def _tables_shards(self, state: State) -> tuple[int, ...]:
        """Every shard that a table names, oldest first; retired ones that are gone need nothing."""
        active = set(self.tables[state.control.table])
        oldest = {p for plan in self.own.plans[: state.control.table] for p in plan.parents}
        return tuple(sorted(active | oldest))

    def _open_late(self, state: State) -> Steps:
        """Queue.open_group: over the shards of the table, until the table stays the same, then on a plan's children"""
        if state.opening is None:
            todo = (*self._tables_shards(state), -1 - state.control.table)
            yield "open_group begins", state._replace(opening=todo)
        elif state.opening:
            number, rest, group = state.opening[0], state.opening[1:], self.groups - 1
            if number >= 0:
                home = self._open_group(state.home, number, group)
                after = self.changed(state, home, opening=rest) if home != state.home else state._replace(opening=rest)
                yield f"open_group on {number}", after
            elif -1 - number != state.control.table:
                todo = (*self._tables_shards(state), -1 - state.control.table)
                yield "open_group sees another table", state._replace(opening=todo)
            else:
                sees = state.control.plan >= 0 and "who opens a group sees the plan" not in self.without
                coming = self.own.plans[state.control.plan].children if sees else ()
                yield "open_group sees the plan", state._replace(opening=coming)

    def _reset(self, state: State) -> Steps:
        """Groups.reset of group 0 to the first message: old shards first"""
        if state.resets and not state.resetting:
            yield "reset begins", state._replace(resetting=self._tables_shards(state), resets=state.resets - 1)
        elif state.resetting:
            number, rest, home = state.resetting[0], state.resetting[1:], state.home
            shard = home.shards[number]
            if shard.state in (OPEN, SEALED) and shard.gates[0] != NO_GROUP:
                gate = shard.gates[0] if "a reset shuts the gate" in self.without else self._gate(home, number)
                resets = put(shard.resets, 0, shard.resets[0] + 1)
                home = self.with_shard(home, number, gates=put(shard.gates, 0, gate), resets=resets)
                back = bits(shard.log)
                home = home._replace(
                    done=put(home.done, 0, home.done[0] & ~back),
                    waiting=put(home.waiting, 0, home.waiting[0] & ~back),
                )
            yield f"reset_group on {number}", self.changed(state, home, resetting=rest)

    def _look_after(self, state: State) -> Steps:
        """look_after: what is delayed goes to those that have its key now; what nobody needs goes"""
        table = self.tables[state.control.table]
        for number in self._tables_shards(state):
            shard = state.home.shards[number]
            if number in table or shard.state != SEALED:
                continue
            if shard.delayed and (home := self._move(state, number, table)) != state.home:
                yield f"look_after moves from {number}", self.changed(state, home)
            if self.own.removes and self._needed(state, number) is None:
                yield f"retire {number}", self._retired(state, number)

    def _needed(self, state: State, number: int) -> str | None:
        """retire_needed"""
        there = [group for group in range(self.groups) if state.home.shards[number].gates[group] != NO_GROUP]
        if "what is unhandled stays" not in self.without and any(self._left(state.home, number, g) for g in there):
            return "backlog"
        asked = any(own.flight is not None and own.flight[0] == number for own in state.producers)
        return "producers" if asked and "producers may ask again" not in self.without else None

    def _retired(self, state: State, number: int) -> State:
        shard = state.home.shards[number]
        for group, gate in enumerate(shard.gates):
            if gate != NO_GROUP and bits(shard.log) & ~state.home.done[group]:
                raise Broken("trimmed", f"shard {number} goes with messages that group {group} has not handled")
        home = self.with_shard(state.home, number, state=GONE, log=())
        return self.changed(state, home._replace(removed=home.removed | bits(shard.log)))

    # -- failovers ---------------------------------------------------------------------------------------------------

    def failover_steps(self, state: State) -> Steps:
        if state.behind != state.home:
            yield "replicated", state._replace(behind=state.home)
            # A call that waited for the replica does not know its outcome, and is made again; so is an append.
            again = tuple(own._replace(confirms=False) for own in state.executors)
            producers = tuple(
                own._replace(flight=(*own.flight[:3], "")) if own.flight is not None and own.flight[3] == "ok" else own
                for own in state.producers
            )
            left = state.failovers - 1
            back = state._replace(home=state.behind, producers=producers, failovers=left)
            yield "failover", self._with_executors(back, again)
