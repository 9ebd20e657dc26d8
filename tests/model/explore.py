"""Looks at every state that a model can get into, breadth first: a broken promise comes with the shortest way to it.
Knows nothing of what is modelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)
Steps = Callable[[State], Iterable[tuple[str, State]]]


class Broken(Exception):
    """A promise that a step breaks, or a state."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise


@dataclass(frozen=True, slots=True)
class Explored(Generic[State]):
    """
    states   that there are, of those that were looked at before a promise broke
    steps    between them
    broken   the promise, None when all were kept; `way` are the names of the steps to it
    stuck    the way to a state from which no goal can be reached any more
    """

    states: int
    steps: int
    broken: Broken | None = None
    way: tuple[str, ...] = ()
    stuck: tuple[str, ...] | None = None


def explore(first: State, steps: Steps[State], goal: Callable[[State], bool], most: int = 1_000_000) -> Explored[State]:
    """Every state that can follow; `steps` and `goal` raise Broken. AssertionError when there are more than `most`."""
    came: dict[State, tuple[State, str] | None] = {first: None}
    before: dict[State, list[State]] = {first: []}
    waiting = deque([first])
    goals: list[State] = []
    walked = 0
    while waiting:
        state = waiting.popleft()
        try:
            if goal(state):
                goals.append(state)
            for name, after in steps(state):
                walked += 1
                if after not in came:
                    came[after] = (state, name)
                    before[after] = []
                    waiting.append(after)
                before[after].append(state)
        except Broken as broken:
            return Explored(len(came), walked, broken, _way(came, state))
        assert len(came) <= most, f"more than {most} states"
    leading = _leading(goals, before)
    lost = next((state for state in came if state not in leading), None)
    return Explored(len(came), walked, stuck=None if lost is None else _way(came, lost))


def _leading(goals: list[State], before: dict[State, list[State]]) -> set[State]:
    """The states from which a goal can be reached."""
    found, waiting = set(goals), list(goals)
    while waiting:
        for state in before[waiting.pop()]:
            if state not in found:
                found.add(state)
                waiting.append(state)
    return found


def _way(came: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    names = []
    at = came[state]
    while at is not None:
        names.append(at[1])
        at = came[at[0]]
    return tuple(reversed(names))
