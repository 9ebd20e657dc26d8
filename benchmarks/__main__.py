"""`python -m benchmarks [CASE ...]`: measures and saves results/CASE-SERVER.json; README.md is written from those.

Never judges: a goal that is missed is saved as missed, and the command still ends well.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from time import perf_counter
from typing import Protocol, cast

import anyio

from benchmarks import cases, harness
from benchmarks.harness import Options, Result, Say
from shardq.errors import UsageError
from shardq.ops.local_cluster import find_server


class Case(Protocol):
    """A module of `cases`. Its name is the case's name; its docstring's first line is what --list shows."""

    __doc__: str

    async def measure(self, options: Options, say: Say) -> Result: ...


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


def load(name: str) -> Case:
    return cast("Case", importlib.import_module(f"benchmarks.cases.{name}"))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(name: str, options: Options) -> None:
    before = harness.machine()
    say(f"{name}:")
    started = perf_counter()
    result = anyio.run(load(name).measure, options, say)
    path = harness.save(name, result, options, before, perf_counter() - started)
    for goal in result.goals:
        say(f"  {'reached' if goal.reached else 'MISSED'}: {goal.what}: {goal.value:.3g} {goal.sense} {goal.bound}")
    say(f"  saved {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all of them unless some are named")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--server", help="the server binary to start (the one that `shardq up` would start)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every count, to try a case out")
    given = parser.parse_args(arguments)
    if given.list:
        for name in names():
            print(f"{name:<14}{(load(name).__doc__ or '').splitlines()[0]}")
        return 0
    unknown = set(given.cases) - set(names())
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    try:
        server = given.server or str(find_server(None))
    except UsageError:
        parser.error("there is no Redis or Valkey server here: name its binary with --server PATH")
    for name in given.cases or names():
        run(name, Options(server, given.rounds, given.scale))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
