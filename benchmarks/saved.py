"""The saved results, as harness.save() wrote them: read, checked for their form, put in order. Judges nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

# The order of the sections; a case that is not named here comes after these.
CASES = (
    "produce", "consume", "send", "latency", "durability", "processes", "shards", "backlog", "growth", "servers_cpu",
    "bytes", "idle", "takeover", "reshard", "reshard_workers", "assignment", "pipeline",
)  # fmt: skip


class BadResult(ValueError):
    """A file in results/ is not what harness.save() writes: measure its case again, or delete it."""


class SavedGoal(msgspec.Struct, frozen=True):
    """harness.Goal, with whether it was reached when it was measured (`value` is rounded)."""

    what: str
    value: float
    sense: Literal[">=", "<="]
    bound: float
    against: str
    reached: bool


class SavedCurve(msgspec.Struct, frozen=True):
    """harness.Curve."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool
    log_y: bool


class Saved(msgspec.Struct, frozen=True):
    """harness.Result and what it was measured with. Medians are taken from `samples`, not from the file."""

    case: str
    title: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    commands: Mapping[str, str]
    goals: Sequence[SavedGoal]
    curves: Sequence[SavedCurve]
    sizes: Mapping[str, Any]
    notes: Sequence[str]
    figures: Mapping[str, Any]
    rounds: int
    scale: float
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float | None = None

    @property
    def server(self) -> str:
        """Such as 'Redis 7.0.15'; a try-out says that it is one wherever its server is named."""
        name = self.versions["server"]
        return name if self.scale == 1 else f"{name} (a try-out at {self.scale:g} of the size)"

    @property
    def sides(self) -> dict[str, list[float]]:
        """The sides that have samples."""
        return {name: list(ones) for name, ones in self.samples.items() if ones}


def load(folder: Path) -> list[Saved]:
    """Every saved result, by case and server. Raises BadResult."""
    found = [_read(path) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: (_place(one.case), one.case, one.server))


def _place(case: str) -> int:
    return CASES.index(case) if case in CASES else len(CASES)


def _read(path: Path) -> Saved:
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=Saved)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        msg = f"{path.name} is no result that `python -m benchmarks` saved ({error}): measure its case again"
        raise BadResult(msg) from error
    if "server" not in saved.versions:
        msg = f"{path.name} does not say which server was measured: measure its case again"
        raise BadResult(msg)
    return saved


def by_case(results: Sequence[Saved]) -> dict[str, list[Saved]]:
    """The results of each case, in their order: one for each server."""
    cases: dict[str, list[Saved]] = {}
    for result in results:
        cases.setdefault(result.case, []).append(result)
    return cases


def base_of(name: str, sides: Mapping[str, Any]) -> str | None:
    """The side of shardq that this one is compared with: 'shardq p99' for 'redis-py p99', 'shardq' for
    'shardq-handler'; None where there is none."""
    base = re.sub(r"^[\w.-]+", "shardq", name)
    return base if base != name and base in sides else None


def figure(value: float) -> str:
    """A number as the tables and charts write it: three digits at least, none that rounding made up."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.2e}"


def apart(value: float, bound: float) -> str:
    """`value`, with as many digits as it takes to tell it from `bound`: a miss must not look like a hit."""
    if value == bound or figure(value) != figure(bound):
        return figure(value)
    return next((text for n in range(4, 17) if float(text := f"{value:.{n}g}") != bound), repr(value))
