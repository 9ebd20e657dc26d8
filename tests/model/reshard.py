"""The protocol of a reshard as a machine with few states: producers, those who carry out plans, groups, failovers, each
of whom may stop between any two steps. What it promises is checked at every step (`Broken`). Knows nothing of Redis.

Each step stands for one call of shardq, which is atomic, and is written beside its name. Of time there is nothing: what
waits for a time may happen at any time. All shards are of one home, as no reshard touches two: they lie on one master.
`Model.without` leaves out single rules of the protocol, to show what they are there for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

from tests.model.explore import Broken

Item = TypeVar("Item")

ABSENT, OPEN, SEALED, GONE = range(4)
NO_GROUP, SHUT, OWNED = range(3)

Table = tuple[int, ...]  # of each key, the shard it goes to


@dataclass(frozen=True)
class Plan:
    """core/reshard.py's Reshard: the parents, the children and the table that follows."""

    parents: tuple[int, ...]
    children: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Scenario:
    """
    first       the table before any plan, and how many shards there are ever
    plans       in the order in which they are begun; one whose parents are not active any more is left out
    sends       the keys of the messages of each producer, in order; negative: of key -1 - it, and delayed
    groups      how many there are at the start; `late`: one more is opened at some time
    executors   who may carry out a plan at one time
    failovers   how many there may be; a replica may lack the last step that was done on its master
    """

    first: Table
    shards: int
    plans: tuple[Plan, ...]
    sends: tuple[tuple[int, ...], ...]
    groups: int = 1
    late: bool = False
    executors: int = 1
    failovers: int = 0
    resets: int = 0
    retries: int = 0
    gives_up: bool = False
    removes: bool = False

    @property
    def keys(self) -> tuple[int, ...]:
        """The key of each message."""
        return tuple(key if key >= 0 else -1 - key for own in self.sends for key in own)

    @property
    def delayed(self) -> frozenset[int]:
        return frozenset(number for number, key in enumerate(key for own in self.sends for key in own) if key < 0)


class Shard(NamedTuple):
    """
    log      its messages; `delayed`: those that are not due yet
    answers  number of the newest batch of each producer that it has stored
    gates    of each group; `resets`: how often each was put back to the first message
    """

    state: int
    log: tuple[int, ...]
    delayed: tuple[int, ...]
    answers: tuple[int, ...]
    gates: tuple[int, ...]
    resets: tuple[int, ...]


class Home(NamedTuple):
    """One master's data. `done` and `waiting`: messages that each group has handled, and that wait for a retry (bits).
    `removed`: messages that went with their shards."""

    shards: tuple[Shard, ...]
    done: tuple[int, ...]
    waiting: tuple[int, ...]
    removed: int


class Control(NamedTuple):
    """The routing hash. `table` counts the plans: 0 is the first, n + 1 that of plan n. `plan` is -1 for none."""

    table: int
    plan: int
    committed: bool
    begun: int


class Producer(NamedTuple):
    """
    sent     how many of its messages its application has sent
    route    of each key the shard it goes to; empty before it has connected
    buffers  of each shard, messages to be stored, in order
    flight   shard, messages, number of the batch, answer ("" for none yet)
    """

    sent: int
    route: Table
    buffers: tuple[tuple[int, ...], ...]
    flight: tuple[int, tuple[int, ...], int, str] | None
    batch: int


class Executor(NamedTuple):
    """Who carries out a plan: the step it is at, and what is left of it. `confirms`: waits for a replica."""

    plan: int
    step: int
    todo: tuple[tuple[int, ...], ...]
    confirms: bool = False


class State(NamedTuple):
    """`behind`: the home as its replica has it. `before`: of each message, those of its key that were acknowledged when
    it was sent (bits). `opening`, `resetting`: shards of an operation on a group under way; None when there is none."""

    control: Control
    home: Home
    behind: Home
    producers: tuple[Producer, ...]
    executors: tuple[Executor, ...]
    acknowledged: int
    before: tuple[int, ...]
    opening: tuple[int, ...] | None
    resetting: tuple[int, ...] | None
    failovers: int
    resets: int
    retries: int


Steps = Iterator[tuple[str, State]]

# runtime/reshard.py: STEPS, each with what it is done to; `look` reads, the others change.
ORDER = ("open_child", "look", "open_groups", "commit", "seal", "look", "open_groups", "publish", "move")
TOO_EARLY = ("open_child", "look", "open_groups", "commit", "publish", "seal", "look", "open_groups", "move")


def bits(messages: tuple[int, ...]) -> int:
    return sum(1 << message for message in messages)


class Model:
    """`steps`, `first` and `goal` for `explore`."""

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

    # -- shared ------------------------------------------------------------------------------------------------------

    def changed(self, state: State, home: Home, **more: object) -> State:
        """With the home changed by one step. The replica lacks that step alone, where there are failovers at all."""
        behind = state.home if state.failovers else home
        return state._replace(home=home, behind=behind, **more)  # type: ignore[arg-type] # fields of any type

    def with_shard(self, home: Home, number: int, **new: object) -> Home:
        shards = list(home.shards)
        shards[number] = shards[number]._replace(**new)  # type: ignore[arg-type] # fields of any type
        return home._replace(shards=tuple(shards))

    # -- the producer (runtime/producer.py) --------------------------------------------------------------------------

    def producer_steps(self, state: State) -> Steps:
        for number, own in enumerate(state.producers):
            for name, after, changes in self._producer(state, number, own):
                producers = (*state.producers[:number], after, *state.producers[number + 1 :])
                yield f"producer {number}: {name}", changes._replace(producers=producers)

    def _producer(self, state: State, number: int, own: Producer) -> Iterator[tuple[str, Producer, State]]:
        table = self.tables[state.control.table]
        if not own.route:
            yield "connects", own._replace(route=table), state
            return
        if own.sent < len(self.sends[number]):
            yield self._send(state, number, own)
        if own.flight is None:
            for shard, buffer in enumerate(own.buffers):
                if buffer:
                    flight = (shard, buffer, own.batch, "")
                    buffers = _put(own.buffers, shard, ())
                    yield "calls", own._replace(flight=flight, buffers=buffers, batch=own.batch + 1), state
        elif not own.flight[3]:
            yield self._append(state, number, own)
        else:
            yield "loses the answer", own._replace(flight=(*own.flight[:3], "")), state
            yield from self._answered(state, own, table)
        if "a range leaves with its SEALED" in self.without and own.route != table:
            yield "reads the table", own._replace(route=table), state

    def _send(self, state: State, number: int, own: Producer) -> tuple[str, Producer, State]:
        """Producer.send"""
        message = self.sends[number][own.sent]
        key = self.keys[message]
        same = sum(1 << other for other, its in enumerate(self.keys) if its == key)
        shard = own.route[key]
        buffers = _put(own.buffers, shard, (*own.buffers[shard], message))
        before = _put(state.before, message, state.acknowledged & same)
        return f"sends {message}", own._replace(sent=own.sent + 1, buffers=buffers), state._replace(before=before)

    def _append(self, state: State, number: int, own: Producer) -> tuple[str, Producer, State]:
        """scripts/append.lua"""
        assert own.flight is not None
        at, messages, batch, _ = own.flight
        shard = state.home.shards[at]
        known = shard.answers[number] >= batch and "a stored batch keeps its answer" not in self.without
        if shard.state in (OPEN, SEALED) and known:
            return f"batch of {at} is known", own._replace(flight=(at, messages, batch, "ok")), state
        if shard.state != OPEN:
            return f"{at} is sealed", own._replace(flight=(at, messages, batch, "sealed")), state
        home = self.with_shard(
            state.home,
            at,
            log=(*shard.log, *(m for m in messages if m not in self.delayed)),
            delayed=(*shard.delayed, *(m for m in messages if m in self.delayed)),
            answers=_put(shard.answers, number, batch),
        )
        return f"{at} stores {messages}", own._replace(flight=(at, messages, batch, "ok")), self.changed(state, home)

    def _answered(self, state: State, own: Producer, table: Table) -> Iterator[tuple[str, Producer, State]]:
        assert own.flight is not None
        at, messages, _, answer = own.flight
        if answer == "ok":
            if state.behind == state.home:  # durability "replica"
                acknowledged = state.acknowledged | bits(messages)
                yield "is answered", own._replace(flight=None), state._replace(acknowledged=acknowledged)
        elif at not in table:  # else it reads the table again, or carries out the plan itself
            yield "goes to the children", self._rerouted(own, at, messages, table), state

    def _rerouted(self, own: Producer, at: int, refused: tuple[int, ...], table: Table) -> Producer:
        """All that is unstored of the shard's buffer, in order, before anything newer of its keys."""
        buffers = list(own.buffers)
        waiting = (*refused, *buffers[at])
        if "older messages first" in self.without:
            waiting = (*buffers[at], *refused)
        buffers[at] = ()
        for message in waiting:
            target = table[self.keys[message]]
            buffers[target] = (*buffers[target], message)
        route = tuple(table[key] if shard == at else shard for key, shard in enumerate(own.route))
        return own._replace(route=route, buffers=tuple(buffers), flight=None)

    # -- groups (scripts/lease.lua, step.lua, timed.lua) -------------------------------------------------------------

    def group_steps(self, state: State) -> Steps:
        home = state.home
        for number, shard in enumerate(home.shards):
            if shard.state not in (OPEN, SEALED):
                continue
            for message in shard.delayed:
                rest = tuple(other for other in shard.delayed if other != message)
                due = self.with_shard(home, number, log=(*shard.log, message), delayed=rest)
                yield f"{message} is due on {number}", self.changed(state, due)
            for group in range(self.groups):
                if shard.gates[group] == SHUT and self._may_own(home, number, group):
                    self._check_gate(home, number, group)
                    opened = self.with_shard(home, number, gates=_put(shard.gates, group, OWNED))
                    yield f"group {group} acquires {number}", self.changed(state, opened)
                elif shard.gates[group] == OWNED:
                    yield from self._handle(state, number, shard, group)

    def _may_own(self, home: Home, number: int, group: int) -> bool:
        """lease_gated: asks reshard_left of every parent."""
        return not any(self._left(home, parent, group) for parent in self.parents[number])

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

    def _check_gate(self, home: Home, number: int, group: int) -> None:
        for other in self._all_ancestors(number):
            shard = home.shards[other]
            if bits(shard.log) & ~home.done[group] or (shard.state == OPEN):
                raise Broken("gate", f"group {group} owns {number} before it has finished {other}")

    def _all_ancestors(self, shard: int) -> set[int]:
        keys = [key for table in self.tables for key, own in enumerate(table) if own == shard]
        return {other for other in range(shard) if any(self._had(other, key) for key in keys)}

    def _handle(self, state: State, number: int, shard: Shard, group: int) -> Steps:
        """step: the first message of each key that is not done; it may fail once, and waits then"""
        home, seen = state.home, set[int]()
        for message in shard.log:
            key = self.keys[message]
            if home.done[group] >> message & 1 or key in seen:
                continue
            seen.add(key)
            self._check_order(state, number, message, group)
            bit = 1 << message
            waits = home.waiting[group] & bit
            done = home._replace(
                done=_put(home.done, group, home.done[group] | bit),
                waiting=_put(home.waiting, group, home.waiting[group] & ~bit),
            )
            yield f"group {group} handles {message} of {number}", self.changed(state, done)
            if state.retries and not waits:
                later = home._replace(waiting=_put(home.waiting, group, home.waiting[group] | bit))
                yield f"{message} waits for a retry", self.changed(state, later, retries=state.retries - 1)

    def _check_order(self, state: State, number: int, message: int, group: int) -> None:
        """What was acknowledged when it was sent, and what its producer sent before, is done. Only between two steps of
        a reset, which takes parents first, a child may be ahead."""
        if message in self.delayed:
            return
        wanted = state.before[message]
        for own in self.sends:
            if message in own:
                wanted |= sum(1 << other for other in own if other < message and self.keys[other] == self.keys[message])
        missing = wanted & ~(state.home.done[group] | state.home.removed)
        mine = state.home.shards[number].resets[group]
        for other in range(len(self.keys)):
            if missing >> other & 1 and other not in self.delayed:
                places = [shard for shard in state.home.shards if other in shard.log]
                if not any(shard.resets[group] > mine for shard in places):
                    raise Broken("order", f"group {group} handles {message} before {other}")

    # -- plans (runtime/reshard.py) ----------------------------------------------------------------------------------

    def plan_steps(self, state: State) -> Steps:
        if state.control.plan >= 0 and len(state.executors) < self.own.executors:
            start = Executor(state.control.plan, -1, ())
            yield "somebody finds the plan", self._with_executors(state, (*state.executors, self._next(state, start)))
        for index, own in enumerate(state.executors):
            others = (*state.executors[:index], *state.executors[index + 1 :])
            yield f"executor stops at {self.order[own.step]}", self._with_executors(state, others)
            if own.confirms:
                if state.behind == state.home:
                    rest = own._replace(todo=own.todo[1:], confirms=False)
                    yield "a replica has the step", self._with_executors(state, (*others, *self._go_on(state, rest)))
                continue
            for name, after, left in self._execute(state, own):
                yield name, self._with_executors(after, (*others, *left))

    def _with_executors(self, state: State, executors: tuple[Executor, ...]) -> State:
        return state._replace(executors=tuple(sorted(executors)))

    def _go_on(self, state: State, own: Executor) -> tuple[Executor, ...]:
        if own.todo:
            return (own,)
        return (self._next(state, own),) if own.step + 1 < len(self.order) else ()

    def _next(self, state: State, own: Executor) -> Executor:
        """At the next step that has something to do."""
        plan, step = self.own.plans[own.plan], own.step
        todo: tuple[tuple[int, ...], ...] = ()
        while not todo:
            step += 1
            match self.order[step]:
                case "open_child":
                    todo = tuple((child,) for child in plan.children)
                case "seal" | "move":
                    todo = tuple((parent,) for parent in plan.parents)
                case "open_groups":
                    todo = own.todo
                    break
                case _:
                    todo = ((0,),)
        return Executor(own.plan, step, todo)

    def _execute(self, state: State, own: Executor) -> Iterator[tuple[str, State, tuple[Executor, ...]]]:
        step, plan = self.order[own.step], self.own.plans[own.plan]
        match step:
            case "look":
                yield "executor looks at the groups", state, (self._looked(state, own, plan),)
            case "commit" | "publish":
                yield self._on_control(state, own, step)
            case "seal":
                for chosen in own.todo:  # side by side
                    rest = tuple(todo for todo in own.todo if todo != chosen)
                    yield self._on_home(state, own._replace(todo=(chosen, *rest)), self._seal(state, chosen[0]))
            case "open_child":
                yield self._on_home(state, own, self._open_child(state, own.todo[0][0]))
            case "open_groups":
                yield self._on_home(state, own, self._open_group(state.home, *own.todo[0]))
            case "move":
                yield self._on_home(state, own, self._move(state, own.todo[0][0], plan.table))

    def _on_home(self, state: State, own: Executor, home: Home) -> tuple[str, State, tuple[Executor, ...]]:
        name = f"executor: {self.order[own.step]} {own.todo[0]}"
        after = self.changed(state, home) if home != state.home else state
        if state.failovers and "steps wait for a replica" not in self.without:
            return name, after, (own._replace(confirms=True),)
        return name, after, self._go_on(after, own._replace(todo=own.todo[1:]))

    def _looked(self, state: State, own: Executor, plan: Plan) -> Executor:
        """open_groups looks at the parents"""
        groups = [g for g in range(self.groups) if any(state.home.shards[p].gates[g] for p in plan.parents)]
        after = Executor(own.plan, own.step + 1, tuple((c, g) for c in plan.children for g in groups))
        return after if after.todo else self._next(state, after)

    def _on_control(self, state: State, own: Executor, step: str) -> tuple[str, State, tuple[Executor, ...]]:
        """commit_reshard, end_reshard: for this plan only"""
        control, going = state.control, self._go_on(state, own._replace(todo=()))
        if control.plan != own.plan:
            return f"executor: {step} too late", state, ()
        if step == "commit":
            committed = "a plan is committed" not in self.without
            return "executor: commit", state._replace(control=control._replace(committed=committed)), going
        published = control._replace(table=own.plan + 1, plan=-1, committed=False)
        return "executor: publish", state._replace(control=published), going

    def _open_child(self, state: State, child: int) -> Home:
        """open_child; those of a child that has gone would come back empty, and in no table"""
        if state.home.shards[child].state != ABSENT:
            return state.home
        home = self.with_shard(state.home, child, state=OPEN)
        for group in () if self.own.late else range(self.groups):
            home = self._open_group(home, child, group)
        return home

    def _open_group(self, home: Home, number: int, group: int) -> Home:
        """open_group: earliest, with its gate shut where the shard has parents"""
        shard = home.shards[number]
        if shard.state not in (OPEN, SEALED) or shard.gates[group] != NO_GROUP:
            return home
        return self.with_shard(home, number, gates=_put(shard.gates, group, self._gate(home, number)))

    def _gate(self, home: Home, number: int) -> int:
        return SHUT if any(home.shards[p].state != GONE for p in self.parents[number]) else OWNED

    def _seal(self, state: State, parent: int) -> Home:
        if state.home.shards[parent].state != OPEN:
            return state.home
        return self.with_shard(state.home, parent, state=SEALED)

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
                resets = _put(shard.resets, 0, shard.resets[0] + 1)
                home = self.with_shard(home, number, gates=_put(shard.gates, 0, gate), resets=resets)
                back = bits(shard.log)
                home = home._replace(
                    done=_put(home.done, 0, home.done[0] & ~back),
                    waiting=_put(home.waiting, 0, home.waiting[0] & ~back),
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


def _put(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    return (*items[:index], item, *items[index + 1 :])
