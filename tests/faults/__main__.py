"""`python -m tests.faults`: real clients of one queue on a cluster of their own, faults that strike them and it, and a
verdict. Exit status 0: nothing wrong was found, 1: something was, 2: it can't be run like this.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from shardq.errors import UsageError
from shardq.ops.local_cluster import find_server
from tests.faults.driver import Report, Settings, run
from tests.faults.faults import FAULTS
from tests.faults.report import NUMBERS, SPANS, command_of, report_lines, schedule_lines

__all__ = ["Report", "Settings", "run"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    made.add_argument("--minutes", type=float, default=2.0, help="how long faults strike (default: %(default)g)")
    made.add_argument("--seed", type=int, help="repeats the schedule of a run")
    made.add_argument("--faults", help="names with commas between them (default: all that can be carried out here)")
    made.add_argument("--server", help="the Redis or Valkey server to run")
    made.add_argument("--durability", choices=["leader", "replica", "fsync"], help="of the sends (default: replica)")
    made.add_argument("--keep", type=Path, help="an empty folder for the histories and logs")
    made.add_argument("--list", action="store_true", help="say what faults there are")
    defaults = Settings(0, 0)
    for option, name in NUMBERS.items():
        value = getattr(defaults, name)
        made.add_argument(option, type=type(value), default=value, dest=name, help="(default: %(default)s)")
    for option, name in SPANS.items():
        span, words = getattr(defaults, name), ("AT_LEAST", "AT_MOST")
        made.add_argument(
            option, type=float, nargs=2, default=span, dest=name, metavar=words, help="seconds (default: %(default)s)"
        )
    return made


def settings_of(arguments: Sequence[str] | None) -> Settings | None:
    """What is to be run; None when only the faults are to be listed. Raises UsageError."""
    chosen = parser().parse_args(arguments)
    if chosen.list:
        return None
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    numbers = {name: getattr(chosen, name) for name in NUMBERS.values()}
    numbers |= {name: tuple(getattr(chosen, name)) for name in SPANS.values()}
    if wrong := [option for option, name in SPANS.items() if not 0 <= numbers[name][0] <= numbers[name][1]]:
        raise UsageError(f"{', '.join(wrong)} must be two numbers, 0 or more, the smaller first.")
    if wrong := [option for option, name in NUMBERS.items() if numbers[name] < 0]:
        raise UsageError(f"{', '.join(wrong)} must be 0 or more.")
    if chosen.minutes <= 0 or not all(numbers[name] for name in ("masters", "shards", "keys", "producers", "workers")):
        raise UsageError("--minutes, --masters, --shards, --keys, --producers and --workers must be above 0.")
    return Settings(
        length_s=chosen.minutes * 60,
        seed=seed,
        faults=tuple(chosen.faults.split(",")) if chosen.faults else None,
        server=find_server(chosen.server),
        durability=chosen.durability,
        folder=chosen.keep,
        **numbers,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        settings = settings_of(arguments)
        if settings is None:
            for name, fault in sorted(FAULTS.items()):
                print(f"{name:28} {fault.what}")
            return 0
        print(command_of(settings), flush=True)
        report = run(settings, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in [*schedule_lines(report.schedule), "", *report_lines(report)]:
        print(line)
    return 1 if report.verdict.findings else 0


if __name__ == "__main__":
    sys.exit(main())
