"""The protocol of a reshard keeps its promises in every order of its steps, and can always be completed; without any of
its rules it does not.
"""

from __future__ import annotations

import pytest

from tests.model.explore import Explored, explore
from tests.model.reshard import Model
from tests.model.states import Plan, Scenario, State

SPLIT = Plan((0,), (1, 2), (1, 2))
MERGE = Plan((1, 2), (3,), (3, 3))
# One of its children has both keys, and is split again.
UNEVEN = Plan((0,), (1, 2), (1, 1))
AGAIN = Plan((1,), (3, 4), (3, 4))
INSTEAD = Plan((0,), (3, 4), (3, 4))

ONE = (0, 0)  # both keys on shard 0

SCENARIOS = {
    "two producers": Scenario(ONE, 3, (SPLIT,), ((0,), (0,))),
    "two keys": Scenario(ONE, 3, (SPLIT,), ((0, 1, 0),)),
    "two executors": Scenario(ONE, 3, (SPLIT,), ((0, 0),), executors=2),
    "split, then merged": Scenario(ONE, 4, (SPLIT, MERGE), ((0, 0),)),
    "split again": Scenario(ONE, 5, (UNEVEN, AGAIN), ((0, 0),), retries=1),
    "reset": Scenario(ONE, 3, (SPLIT,), ((0, 0),), resets=1),
    "group opened meanwhile": Scenario(ONE, 3, (SPLIT,), ((0,),), late=True),
    "given up": Scenario(ONE, 5, (SPLIT, INSTEAD), ((0,),), gives_up=True, executors=2),
    "failover": Scenario(ONE, 3, (SPLIT,), ((0,), (0,)), failovers=1),
    "retired shards go": Scenario(ONE, 4, (SPLIT, MERGE), ((0,),), removes=True),
    "delayed": Scenario(ONE, 4, (SPLIT, MERGE), ((-1,),)),
}

# What is left out of the protocol, where that shows, and the promise it breaks.
LEFT_OUT = [
    ("sealed before published", "two producers", "order"),
    ("gates of every generation", "split, then merged", "gate"),
    ("gates of every generation", "split again", "gate"),
    ("older messages first", "two executors", "order"),
    ("a reset shuts the gate", "reset", "order"),
    ("a range leaves with its SEALED", "two executors", "order"),
    ("retries keep a gate shut", "split again", "gate"),
    ("a stored batch keeps its answer", "two executors", "once"),
    ("producers may ask again", "retired shards go", "once"),
    ("what is unhandled stays", "retired shards go", "trimmed"),
    ("who opens a group sees the plan", "group opened meanwhile", "groups"),
    ("a plan is committed", "given up", "given up"),
    ("steps wait for a replica", "failover", "order"),
]


def explored(scenario: str, *without: str) -> Explored[State]:
    model = Model(SCENARIOS[scenario], frozenset(without))
    return explore(model.first, model.steps, model.goal)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_order_of_steps_keeps_the_promises(scenario: str) -> None:
    found = explored(scenario)
    assert found.broken is None, (str(found.broken), *found.way)
    assert found.stuck is None, ("it can't be completed any more after", *found.stuck)
    assert found.states > 1000


@pytest.mark.parametrize(("rule", "scenario", "promise"), LEFT_OUT)
def test_without_a_rule_a_promise_breaks(rule: str, scenario: str, promise: str) -> None:
    found = explored(scenario, rule)
    assert found.broken is not None, f"{found.states} states, and nothing broke"
    assert found.broken.promise == promise, (str(found.broken), *found.way)
    assert found.way


def test_what_can_not_be_completed_is_found() -> None:
    """A table that nobody may publish: producers have nowhere to go with what a sealed shard refuses."""
    model = Model(SCENARIOS["two executors"])
    model.order = tuple(step for step in model.order if step != "publish")
    found = explore(model.first, model.steps, model.goal)
    assert found.stuck is not None
