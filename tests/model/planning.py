"""Those who carry out plans in the model of a reshard (runtime/reshard.py). Each may stop after any step."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.shards import Shards
from tests.model.states import ABSENT, OPEN, SEALED, Executor, Home, Plan, State, Steps


class Planning(Shards):
    """Their steps."""

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

    def _seal(self, state: State, parent: int) -> Home:
        if state.home.shards[parent].state != OPEN:
            return state.home
        return self.with_shard(state.home, parent, state=SEALED)
