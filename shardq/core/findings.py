"""What a check says: one line of what is, one of what to do, and how bad it is. Pure; checks nothing itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["problem", "warning", "unknown", "advice", "ok"]

LEVELS: tuple[Level, ...] = ("problem", "warning", "unknown", "advice", "ok")
"""The worst first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    level     problem: something does not work, or messages are lost sooner or later; warning: it works, and somebody
              should look; unknown: could not be asked; advice: would be better otherwise; ok: nothing to say
    id        stable, `<check>.<what>`, for programs
    subject   the node, queue, group or shard it is about
    what, do  one line each; `do` is '' where nothing is to be done
    """

    level: Level
    id: str
    subject: str
    what: str
    do: str = ""


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, equal ones beside each other."""
    return sorted(findings, key=lambda each: (LEVELS.index(each.level), each.id, each.what, each.do, each.subject))


def is_fine(findings: Iterable[Finding]) -> bool:
    """Whether nothing is a warning or a problem."""
    return not any(each.level in ("problem", "warning") for each in findings)
