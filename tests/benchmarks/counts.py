"""What the tests of the budgets count with: commands and bytes as Redis counts them, Python's function calls, and a
store that answers at once. Judges nothing."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any

import anyio

import shardq
from shardq.core.routing import RoutingTable
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.producer import Producer
from shardq.storage.keys import Keys
from shardq.storage.nodes import node_command
from shardq.storage.requests import Request

HOST = "127.0.0.1"

Counts = dict[str, float]


@contextmanager
def commands(cluster: LocalCluster, messages: int) -> Iterator[Counts]:
    """Fills the dict with the commands that all masters carried out inside the block, those inside functions included,
    for 1,000 messages by name, and as 'all commands'; with how many those were for each call of a function; with the
    bytes that the masters were sent, and sent, for one message. Some function must have been called."""
    found: Counts = {}
    before, sizes_before = _commands(cluster), _bytes(cluster)
    yield found
    sizes, after = _bytes(cluster), _commands(cluster)
    calls = {name: count - before[name] for name, count in after.items() if name != "info"}
    found |= {name: count * 1000 / messages for name, count in calls.items()}
    found["all commands"] = sum(calls.values()) * 1000 / messages
    found["commands for a call"] = sum(calls.values()) / calls["fcall"]
    found |= {name: (size - sizes_before[name]) / messages for name, size in sizes.items()}


def _commands(cluster: LocalCluster) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, value in _info(cluster, "commandstats"):
        found[name.removeprefix("cmdstat_")] += int(value.split("calls=")[1].split(",")[0])
    return found


def _bytes(cluster: LocalCluster) -> Counter[str]:
    names = {"total_net_input_bytes": "bytes to Redis", "total_net_output_bytes": "bytes from Redis"}
    found: Counter[str] = Counter()
    for name, value in _info(cluster, "stats"):
        if name in names:
            found[names[name]] += int(value)
    return found


def _info(cluster: LocalCluster, section: str) -> Iterator[tuple[str, str]]:
    for port in cluster.ports:
        for line in node_command(HOST, port, "INFO", section).splitlines():
            name, colon, value = line.partition(":")
            if colon:
                yield name, value


@contextmanager
def function_calls(messages: int) -> Iterator[Counts]:
    """Fills the dict with the functions that this thread called inside the block, for 1,000 messages: those written in
    Python, and those written in C that Python code called."""
    found: Counts = {}
    calls = {"call": 0, "c_call": 0}

    def count(_frame: FrameType, event: str, _what: Any) -> None:
        if event in calls:
            calls[event] += 1

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # others, hypothesis among them, have functions of theirs called at each collection
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    found["Python calls"] = calls["call"] * 1000 / messages
    found["C calls"] = calls["c_call"] * 1000 / messages


def stream_bytes(cluster: LocalCluster, queue: str) -> int:
    """What the streams of all its shards take in Redis."""
    total = 0
    for port in cluster.ports:
        for key in node_command(HOST, port, "KEYS", f"*:{queue}:*:stream"):
            total += int(node_command(HOST, port, "MEMORY", "USAGE", key, "SAMPLES", 0))
    return total


# -- a store that answers at once ----------------------------------------------------------------------------


class InstantStore:
    """In place of a producer's pipes: carries out what was submitted as soon as the loop has its turn. No store can be
    faster, so nothing gathers while a call is under way: the smallest batches there can be."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0

    def submit(self, request: Request) -> None:
        asyncio.get_running_loop().call_soon(self._carry_out, request)

    def _carry_out(self, request: Request) -> None:
        self.calls += 1
        self.bytes += len(request.pack().data)
        request.settle([b"OK", b"%d-0" % self.calls])


class ThreeMasters:
    """In place of a producer's cluster: each has a third of the slots."""

    def __init__(self) -> None:
        self._nodes = [SimpleNamespace(name=f"master-{number}") for number in range(3)]

    def node_of(self, slot: int) -> SimpleNamespace:
        return self._nodes[slot * 3 // 16384]


@dataclass(frozen=True, slots=True)
class Rig:
    producer: Producer
    store: InstantStore


def instant_producer(shards: int) -> Rig:
    """A producer with its defaults (queue.py), and no Redis anywhere. Made inside the event loop."""
    table = RoutingTable.equal(shards)
    keys = {shard.id: Keys("shardq", "q").shard(shard.id, shard.tag) for shard in table.shards}
    nothing: Any = None
    cluster: Any = ThreeMasters()
    producer = Producer(
        cluster,
        table,
        keys,
        None,
        1000,
        256 * 1024,
        1024 * 1024,
        32 * 1024 * 1024,
        60.0,
        queue="q",
        client_pipes=nothing,
    )
    store: Any = InstantStore()
    producer._pipes = store
    producer.loop = asyncio.get_running_loop()
    producer.woken = producer.loop.create_future()
    producer.woken.set_result(None)
    return Rig(producer, store)


# -- what is counted -----------------------------------------------------------------------------------------


async def handle(client: shardq.Client, queue: str, group: str, messages: int, *, lists: bool) -> None:
    """A worker from its start until it has handled so many messages and stopped gracefully."""
    worker = shardq.Worker(queue, group=group)
    complete = anyio.Event()
    handled = 0

    def add(count: int) -> None:
        nonlocal handled
        handled += count
        if handled >= messages:
            complete.set()

    async def handle_list(batch: Sequence[shardq.Message]) -> None:
        add(len(batch))

    async def handle_one(_message: shardq.Message) -> None:
        add(1)

    if lists:
        worker.batch_handler(handle_list)
    else:
        worker.handler(handle_one)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, client)
        await complete.wait()
        worker.stop()
