"""`python -m tests.faults.soak`, which `make soak` runs: steady load, a fault every few seconds, the memory of every
process and of Redis looked at all the time. Writes a table and a plot; exit status 0 when nothing wrong was found and
the memory is flat, 1 otherwise. The run and its verdict are the driver's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import shardq
from shardq.errors import ShardqError, UsageError
from shardq.ops.local_cluster import find_server
from tests.faults import final
from tests.faults.driver import QUEUE, Report, Settings, ask, run
from tests.faults.lab import Lab
from tests.faults.report import report_lines

MIB = 1024 * 1024
EVERY_S, KEYS_EVERY_S = 2.0, 10.0
SETTLED_S = 60.0  # imports, pools and buffers are there by then: what grows later goes on growing
MAY_GROW, MAY_GROW_BYTES = 0.15, 8 * MIB

Line = list[tuple[float, float]]  # seconds since the start, bytes


@dataclass
class Samples:
    """
    processes  resident bytes, by role and name
    servers    used bytes of each master and replica, by port
    keys       bytes of the shards' own keys in all: streams, groups, retries; not what the handlers keep
    """

    processes: dict[tuple[str, str], Line] = field(default_factory=lambda: defaultdict(list))
    servers: dict[int, Line] = field(default_factory=lambda: defaultdict(list))
    keys: Line = field(default_factory=list)


class Sampler:
    """Looks in a thread of its own, while the lab is there."""

    def __init__(self) -> None:
        self.samples = Samples()
        self._began_s: float | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def see(self, lab: Lab) -> None:
        """Called all the time while faults strike; the first call starts the watching."""
        if self._began_s is None:
            self._began_s = time.monotonic()
            watches = (self._watch_processes, self._watch_keys)
            self._threads = [threading.Thread(target=watch, args=(lab,), daemon=True) for watch in watches]
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _now(self) -> float:
        assert self._began_s is not None
        return time.monotonic() - self._began_s

    def _watch_processes(self, lab: Lab) -> None:
        while not self._stop.wait(EVERY_S):
            crowd = lab.crowd
            for member in list(crowd.members) if crowd is not None else []:
                if (size := resident_bytes(member.process.pid)) and member.alive:
                    self.samples.processes[member.role, member.name].append((self._now(), size))
            for server in lab.servers:
                if used := lab.info(server, "memory").get("used_memory"):
                    self.samples.servers[server.port].append((self._now(), float(used)))

    def _watch_keys(self, lab: Lab) -> None:
        async def total(client: shardq.Client) -> int:
            found = await final.memory(await client.queue(QUEUE))
            return sum(sum(sizes.values()) for sizes in found.values())

        while not self._stop.wait(KEYS_EVERY_S):
            try:
                self.samples.keys.append((self._now(), ask(total, lab.url)))
            except ShardqError:
                continue  # a fault is on; the next look will do


def resident_bytes(pid: int) -> int:
    """0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


@dataclass(frozen=True)
class Growth:
    """What a line did once it had settled: the medians of its first and last third. Pure."""

    what: str
    first: float
    last: float

    @property
    def flat(self) -> bool:
        return self.last - self.first <= max(MAY_GROW * self.first, MAY_GROW_BYTES)


def growth(what: str, line: Line, settled_s: float = SETTLED_S) -> Growth | None:
    """None for a line too short to say anything."""
    settled = [size for at, size in line if at >= line[0][0] + settled_s]
    third = len(settled) // 3
    if third < 2:
        return None
    return Growth(what, statistics.median(settled[:third]), statistics.median(settled[-third:]))


def growths(samples: Samples) -> list[Growth]:
    """Of every process that lived long enough, every server, and the keys."""
    found = [growth(name, line) for (_, name), line in samples.processes.items()]
    found += [growth(f"server {port}", line) for port, line in samples.servers.items()]
    found.append(growth("the shards' keys", samples.keys, 0.0) if samples.keys else None)
    return [each for each in found if each is not None]


def table(found: Sequence[Growth]) -> list[str]:
    rows = [
        f"| {each.what} | {each.first / MIB:,.1f} | {each.last / MIB:,.1f} | {'flat' if each.flat else 'GROWS'} |"
        for each in found
    ]
    head = ["| memory of | first third, MiB | last third, MiB | |", "| --- | ---: | ---: | --- |"]
    return [*head, *rows]


def plot(samples: Samples, report: Report, path: Path) -> None:
    """Memory over time, a thin line for each strike."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # only a soak needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasSVG(figure)
    processes, servers, keys = figure.subplots(3, 1, sharex=True)
    colours = {"producer": "tab:blue", "worker": "tab:orange", "coordinator": "tab:green"}
    for (role, _), line in samples.processes.items():
        processes.plot(*zip(*[(at, size / MIB) for at, size in line], strict=True), color=colours[role], lw=0.8)
    for line in samples.servers.values():
        servers.plot(*zip(*[(at, size / MIB) for at, size in line], strict=True), lw=0.8)
    if samples.keys:
        keys.plot(*zip(*[(at, size / MIB) for at, size in samples.keys], strict=True), lw=1)
    titles = ("client processes (resident)", "servers (used, with what the handlers keep)", "the shards' own keys")
    story = report.verdict.story
    for axes, title in zip((processes, servers, keys), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("MiB")
        axes.set_ylim(bottom=0)
        for fault in story.faults.values():
            axes.axvline((fault.strike_ns - story.began_ns) / 1e9, color="grey", lw=0.3)
    keys.set_xlabel("seconds; a thin line is a fault")
    figure.savefig(path)


def soak(settings: Settings, folder: Path) -> int:
    sampler = Sampler()
    report = run(replace(settings, samples=sampler.see), lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    sampler.stop()
    found = growths(sampler.samples)
    lines = ["# A soak", "", *(f"    {line}".rstrip() for line in report_lines(report)), "", *table(found), ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.md").write_text("\n".join([*lines, "![memory over time](soak.svg)", ""]), encoding="utf-8")
    plot(sampler.samples, report, folder / "soak.svg")
    print("\n".join(lines))
    print(f"written: {folder / 'soak.md'}, {folder / 'soak.svg'}")
    return 1 if report.verdict.findings or not found or not all(each.flat for each in found) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=None, help="repeats the schedule of a run")
    parser.add_argument("--server", help="the Redis or Valkey server to run")
    parser.add_argument("--to", type=Path, default=Path("soak"), help="the folder for the table and the plot")
    chosen = parser.parse_args(arguments)
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    try:
        server = find_server(chosen.server)
        return soak(Settings(length_s=chosen.minutes * 60, seed=seed, server=server), chosen.to)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
