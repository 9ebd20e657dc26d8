"""Changes of the number of shards as faults: splits and merges under traffic, by an operator's process that may be cut
off half way. What it began then is left to the leaders.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

from tests.faults.crowd import Crowd
from tests.faults.faults import Fault, Heal, register
from tests.faults.faults_processes import crowd_of, needs_crowd
from tests.faults.lab import Lab

_ENDS_WITHIN_S = 120.0
# Of each action about as many calls as it makes at least, so that most are really cut off.
ACTIONS = {"split": 10, "split-all": 40, "merge": 8, "scale": 12}

Strike = Callable[[Lab, random.Random], Heal]


def _nothing() -> None:
    return None


def reshard(action: str) -> Strike:
    def strike(lab: Lab, chance: random.Random) -> Heal:
        _operate(crowd_of(lab), action, chance.randrange(10**9), 0)
        return _nothing

    return strike


def cut_off(lab: Lab, chance: random.Random) -> Heal:
    """Nobody repeats it."""
    action = chance.choice(list(ACTIONS))
    _operate(crowd_of(lab), action, chance.randrange(10**9), chance.randint(2, ACTIONS[action]))
    return _nothing


def _operate(crowd: Crowd, action: str, seed: int, calls: int) -> None:
    status, log = crowd.run_aside("tests.faults.operator", "operator", [action, str(seed), str(calls)], _ENDS_WITHIN_S)
    expected = (0, -signal.SIGKILL) if calls else (0,)
    assert status in expected, f"the operator ended with status {status}: {log}"


for fault in (
    Fault("shard-split", "one shard is split", reshard("split"), needs_crowd, repeats=False),
    Fault("shards-split", "every shard is split", reshard("split-all"), needs_crowd, repeats=False),
    Fault("shards-merged", "two shards become one", reshard("merge"), needs_crowd, repeats=False),
    Fault("shards-scaled", "another number of shards", reshard("scale"), needs_crowd, repeats=False),
    Fault("reshard-cut-off", "SIGKILL of who splits or merges, half way", cut_off, needs_crowd, repeats=False),
):
    register(fault)
