"""What each durability loses when a master fails: `python -m tests.faults.durability [--server PATH]... [--repeat N]`.

Prints a Markdown table: of how many acknowledged messages how many are gone afterwards. Real producers of each
durability send side by side while one fault strikes one master and heals; then every message stored is listed and
compared. Needs root, for a network of its own. It measures and judges nothing; only the tests do.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TypedDict

import anyio

import shardq
from shardq.errors import StoreError
from shardq.ops.local_cluster import find_server, server_version
from shardq.runtime.queue import Durability
from tests.faults.faults import FAULTS, Fault
from tests.faults.lab import Lab, open_lab
from tests.faults.network import why_no_network
from tests.runtime.harness import until


class Promise(TypedDict, total=False):
    durability: Durability
    replicas: int


PROMISES: Mapping[str, Promise] = {
    "leader": {"durability": "leader"},
    "replica": {"durability": "replica"},
    "replica, replicas=2": {"durability": "replica", "replicas": 2},
    "fsync": {"durability": "fsync"},
    "fsync, replicas=0": {"durability": "fsync", "replicas": 0},
}
STRUCK_BY = (
    "master-cut-off",
    "master-frozen",
    "failover-forced",
    "master-killed",
    "master-killed-behind",
    "master-restarted",
)
SHARDS, TASKS, PAUSE_S = 6, 100, 0.02
_BEFORE, _AFTER = 200, 100  # acknowledged before the strike, and after the heal


@dataclass
class Count:
    """Messages of one or more runs: acknowledged, of those not there any more, and stored more than once."""

    runs: int = 0
    acknowledged: int = 0
    lost: int = 0
    twice: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.runs + other.runs,
            self.acknowledged + other.acknowledged,
            self.lost + other.lost,
            self.twice + other.twice,
        )


@dataclass
class Sending:
    """Many tasks that send on one producer, each its own numbers one after the other."""

    queue: shardq.Queue
    producer: shardq.Producer
    acknowledged: set[tuple[int, int]] = field(default_factory=set)
    stopping: bool = False

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for task in range(TASKS):
                tasks.start_soon(self._send, task)

    async def _send(self, task: int) -> None:
        number = 0
        while not self.stopping:
            number += 1
            try:
                await self.producer.send([task, number], key=f"key-{task}")
            except StoreError:
                continue  # it may be stored or not: nothing was promised
            self.acknowledged.add((task, number))
            await anyio.sleep(PAUSE_S)

    async def more(self, messages: int) -> None:
        """Returns when so many more were acknowledged."""
        wanted = len(self.acknowledged) + messages
        await until(lambda: len(self.acknowledged) >= wanted, 60, f"{messages} more to be acknowledged")

    async def count(self) -> Count:
        stored = Counter([(record.value[0], record.value[1]) async for record in self.queue.history()])
        twice = sum(times > 1 for times in stored.values())
        return Count(1, len(self.acknowledged), len(self.acknowledged - stored.keys()), twice)


def promises_of(lab: Lab) -> list[str]:
    """Those that this server and its replicas can keep: `fsync` needs WAITAOF."""
    known = bool(lab.command(lab.servers[0], "COMMAND", "INFO", "WAITAOF")[0])
    replicas = (len(lab.servers) - lab.shares) // lab.shares
    able = {name: promise for name, promise in PROMISES.items() if promise.get("replicas", 0) <= replicas}
    return [name for name, promise in able.items() if known or promise["durability"] != "fsync"]


async def measure(lab: Lab, fault: Fault, seed: int, promises: Sequence[str]) -> dict[str, Count]:
    """One strike under traffic of every promise at once."""
    await anyio.to_thread.run_sync(lab.wait_until_whole)
    async with shardq.connect(lab.url) as client, AsyncExitStack() as producers:
        sendings: dict[str, Sending] = {}
        for index, name in enumerate(promises):
            queue = await client.queue(f"durability-{index}-{seed}", shards=SHARDS, retention="1d")
            producer = await producers.enter_async_context(queue.producer(**PROMISES[name]))
            sendings[name] = Sending(queue, producer)
        async with anyio.create_task_group() as tasks:
            for sending in sendings.values():
                tasks.start_soon(sending.run)
            await _strike_once(lab, fault, seed, sendings.values())
            for sending in sendings.values():
                sending.stopping = True
        counts = {name: await sending.count() for name, sending in sendings.items()}
        for sending in sendings.values():
            await sending.queue.delete()
        return counts


async def _strike_once(lab: Lab, fault: Fault, seed: int, sendings: Iterable[Sending]) -> None:
    for sending in sendings:
        await sending.more(_BEFORE)
    heal = await anyio.to_thread.run_sync(fault.strike, lab, random.Random(seed))
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(heal)
    for sending in sendings:
        await sending.more(_AFTER)


async def measure_all(
    lab: Lab, faults: Sequence[str], repeat: int, seed: int, tell: Callable[[str], None]
) -> dict[str, dict[str, Count]]:
    """By fault and promise. The runs of a fault take turns with those of the others."""
    promises = promises_of(lab)
    found = {fault: {name: Count() for name in promises} for fault in faults}
    for run in range(repeat):
        for fault in faults:
            counts = await measure(lab, FAULTS[fault], seed + run, promises)
            for name, count in counts.items():
                found[fault][name] += count
            tell(f"{run + 1}/{repeat} {fault}: " + "; ".join(f"{name} {cell(count)}" for name, count in counts.items()))
    return found


def cell(count: Count | None) -> str:
    if count is None:
        return "-"
    twice = f", {count.twice:,} twice" if count.twice else ""
    return f"{count.lost:,} of {count.acknowledged:,}{twice}"


def table(found: Mapping[str, Mapping[str, Count]]) -> str:
    names = [name for name in PROMISES if any(name in counts for counts in found.values())]
    lines = [["fault", *names], ["---", *("---:" for _ in names)]]
    lines += [[FAULTS[fault].what, *(cell(counts.get(name)) for name in names)] for fault, counts in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    system = f"{platform.system()} {platform.release()}"
    return f"one machine, {os.cpu_count()} cores, {system}, Python {platform.python_version()}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.durability", description=__doc__)
    parser.add_argument("--server", action="append", help="a server binary; may be given several times")
    parser.add_argument("--replicas", type=int, default=1, help="replicas of each master (default: 1)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each fault (default: 3)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--faults", default=",".join(STRUCK_BY), help="names, with commas between them")
    chosen = parser.parse_args(arguments)
    faults = chosen.faults.split(",")
    if unknown := [name for name in faults if name not in FAULTS]:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    if chosen.repeat < 1 or chosen.replicas < 1:
        parser.error("--repeat and --replicas must be 1 or more")
    if why := why_no_network():
        parser.error(why)
    print("# What each durability loses\n")
    sizes = f"--repeat {chosen.repeat} --replicas {chosen.replicas} --seed {chosen.seed}"
    print(f"`python -m tests.faults.durability {sizes} --server ...`")
    print(f"\nMessages lost of those acknowledged, in {chosen.repeat} runs of each fault. Three masters with")
    print(f"{chosen.replicas} replica(s) each; {machine()}.")
    for server in chosen.server or [None]:
        binary = find_server(server)
        print(f"\n## {server_version(binary)}\n", flush=True)
        with open_lab(binary, network=True, replicas=chosen.replicas) as lab:
            found = anyio.run(measure_all, lab, faults, chosen.repeat, chosen.seed, _tell)
        print(table(found), flush=True)
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
