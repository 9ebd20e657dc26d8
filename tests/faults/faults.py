"""The table of faults: what each one is called, does, needs and may cost. Carries none out itself; each lives in the
faults_*.py of its kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.lab import Lab

Heal = Callable[[], None]


def _nothing(lab: Lab) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Fault:
    """
    what      one line for a person
    strike    carries it out, in a thread; returns what undoes it, which is always called once and returns when the
              cluster is whole again
    needs     why it can't be done in this lab, or None
    loses     the durabilities of acknowledged sends that it may lose messages of
    repeats   whether messages may be handled again because of it
    """

    name: str
    what: str
    strike: Callable[[Lab, random.Random], Heal]
    needs: Callable[[Lab], str | None] = _nothing
    loses: frozenset[str] = field(default=frozenset())
    repeats: bool = True


FAULTS: dict[str, Fault] = {}


def register(fault: Fault) -> None:
    """Each name once."""
    assert fault.name not in FAULTS, fault.name
    FAULTS[fault.name] = fault


# Each registers its own, which takes what is defined above.
from tests.faults import (  # noqa: E402
    faults_cluster,  # noqa: F401
    faults_network,  # noqa: F401
    faults_processes,  # noqa: F401
    faults_reshard,  # noqa: F401
    faults_server,  # noqa: F401
)
