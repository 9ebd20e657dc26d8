"""What every case shares: sides that take turns, the median of their rounds, goals, and the file a result is saved in.

A case measures one thing. It returns a `Result`: the samples of each side, in the order they were taken, and the goals
that these reach or miss. The harness computes medians and ratios; no case writes a figure that it did not measure, and
nothing here knows what a case is about.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from shardq.ops.local_cluster import LocalCluster

RESULTS = Path(__file__).parent / "results"
# A rewrite of the append-only file would slow down whichever side it falls to.
SERVER_SETTINGS = {"auto-aof-rewrite-percentage": "0"}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a case is run. `server` is the path of a server binary; `scale` shrinks every count (a try-out uses 0.02)."""

    server: str
    rounds: int = 5
    scale: float = 1.0

    def count(self, full: int, least: int = 1) -> int:
        """`full`, scaled."""
        return max(least, round(full * self.scale))


@dataclass(frozen=True, slots=True)
class Side:
    """One of those compared: `run` returns one sample in the case's unit; `prepare` is not timed."""

    name: str
    command: str
    run: Callable[[], Awaitable[float]]
    prepare: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What the measured figure is held to: `value` `sense` `bound`, such as 2.6 >= 2.5."""

    what: str
    value: float
    sense: Literal[">=", "<="]
    bound: float
    against: str = ""

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound


@dataclass(frozen=True, slots=True)
class Curve:
    """How a figure grows: for each named line its (x, y) points, y being the median of the rounds."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = True
    log_y: bool = False


@dataclass(slots=True)
class Result:
    """What a case found. `samples` are of one `unit`, a list a side; `commands` say what each side ran."""

    title: str
    unit: str
    samples: dict[str, list[float]]
    commands: dict[str, str]
    goals: list[Goal] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Plain sentences for the reader: what differs between the sides, what was left out and why."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Whatever else was measured, by name (CPU a message, percentiles)."""

    def median(self, name: str) -> float:
        return median(self.samples[name])


async def alternate(sides: Sequence[Side], rounds: int, say: Say, warm_up: bool = True) -> dict[str, list[float]]:
    """Every side once for each round, the order reversed in every other one; one round to warm up is not counted."""
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(0 if warm_up else 1, rounds + 1):
        for side in sides if number % 2 else tuple(reversed(sides)):
            if side.prepare is not None:
                await side.prepare()
            gc.collect()  # not the garbage of the side before
            sample = await side.run()
            if number:
                samples[side.name].append(sample)
            say(f"  round {number or 'for warming up'}: {side.name} {sample:,.2f}")
    return samples


@contextmanager
def cluster(options: Options, masters: int = 3, replicas: int = 0) -> Iterator[LocalCluster]:
    """A cluster of its own for a case, with persistence on as a user would have it."""
    with LocalCluster(
        masters, replicas=replicas, port=None, server=Path(options.server), settings=SERVER_SETTINGS
    ) as one:
        yield one


def server_version(binary: str) -> str:
    """Such as 'Redis 7.0.15'."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    number = said.split("v=")[1].split()[0]
    return f"{'Valkey' if 'valkey' in said.lower() else 'Redis'} {number}"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpus": os.cpu_count(),
        "cpu": model,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def save(case: str, result: Result, options: Options, before: Mapping[str, Any], seconds: float | None = None) -> Path:
    """Writes results/CASE-SERVER.json and returns its path; `before` is what machine() said before the case ran, which
    took `seconds`."""
    server = server_version(options.server)
    versions = {"server": server, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("shardq", "redis", "hiredis")}
    goals = [{**asdict(goal), "reached": goal.reached} for goal in result.goals]
    data = {
        "case": case,
        **asdict(result),
        "goals": goals,
        "medians": {name: median(ones) for name, ones in result.samples.items() if ones},
        "rounds": options.rounds,
        "scale": options.scale,
        "seconds": None if seconds is None else round(seconds, 1),
        "machine": dict(before),
        "versions": versions | result.versions,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{case}-{server.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
