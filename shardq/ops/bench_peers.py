"""What shardq is measured against: redis-py's own cluster clients and redis-benchmark, used as their users would.

It never touches a key outside the prefix it was given, and never makes a peer do more than shardq does: peers send the
value alone, shardq a key beside it.
"""

from __future__ import annotations

import asyncio
import csv
import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from shardq.core.slots import HASH_SPACE, slot_of_range, tag_for_slot
from shardq.errors import CorruptData, StoreRefused, StoreUnavailable

GROUP = "bench"
DEPTH = 500  # commands in one pipeline, and entries in one read
READERS = 12  # each takes a connection, of which redis-py allows a limited number
CLIENTS, THREADS = (3, 6, 12, 50), (1, 2, 3)  # what redis-benchmark may choose from
_FILL_ENTRIES = 5000
_FILL = "for _ = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', 'v', ARGV[2]) end"

Value = bytes
PEER_ERRORS = (RedisError, RedisClusterException)


@dataclass(frozen=True, slots=True)
class Counted:
    """`messages` as counted in Redis afterwards, and the seconds they took."""

    messages: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Setting:
    """How redis-benchmark is run; `streams` is how many it writes to on each master."""

    clients: int
    threads: int
    streams: int = 1


class Peers:
    """One cluster as the peers use it, all their keys under `prefix`; also this benchmark's view of the servers."""

    def __init__(self, url: str, prefix: str, shards: int) -> None:
        self._url, self._prefix = url, prefix
        # The slots shardq's own shards would have: every side has its streams on the same nodes.
        slots = [
            slot_of_range(HASH_SPACE * at // shards, HASH_SPACE * (at + 1) // shards)
            for at in range(min(shards, 16384))
        ]
        self.streams = [f"{prefix}:peer:{{{tag_for_slot(slot)}}}:{at}" for at, slot in enumerate(slots)]
        try:
            self.redis: RedisCluster = RedisCluster.from_url(url)
        except (RedisError, RedisClusterException, OSError) as error:
            msg = f"no cluster node answers at the URL: is it up, and the address right? ({error})"
            raise StoreUnavailable(msg) from error

    def close(self) -> None:
        self.clean()
        self.redis.close()

    def clean(self) -> None:
        """Deletes every key under the prefix, shardq's included."""
        for key in self.redis.scan_iter(match=f"{self._prefix}:*", count=1000):
            self.redis.delete(key)  # at once: memory that UNLINK frees later would be freed in the next side's time

    def servers_cpu_s(self) -> float:
        """CPU seconds that all masters have used so far."""
        found: dict[str, dict[str, float]] = self.redis.info("cpu", target_nodes=RedisCluster.PRIMARIES)
        return sum(cpu["used_cpu_user"] + cpu["used_cpu_sys"] for cpu in found.values())

    def server_version(self) -> str:
        info = self.redis.info("server", target_nodes=self.redis.get_default_node())
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version']}"
        return f"Redis {info['redis_version']}"

    # -- redis-py ------------------------------------------------------------------------------------------------

    def produce(self, values: Sequence[Value]) -> Counted:
        """redis-py's cluster pipeline, DEPTH XADDs at a time, the streams in turn."""
        streams, count = self.streams, len(self.streams)
        with RedisCluster.from_url(self._url) as redis:
            redis.ping()
            started = perf_counter()
            for first in range(0, len(values), DEPTH):
                pipeline = redis.pipeline()
                for at, value in enumerate(values[first : first + DEPTH], first):
                    pipeline.xadd(streams[at % count], {"v": value})
                pipeline.execute()
            seconds = perf_counter() - started
        return Counted(self._stored(), seconds)

    async def produce_asyncio(self, values: Sequence[Value]) -> Counted:
        """The same with redis-py's asyncio client."""
        streams, count = self.streams, len(self.streams)
        async with AsyncRedisCluster.from_url(self._url) as redis:
            await redis.ping()
            started = perf_counter()
            for first in range(0, len(values), DEPTH):
                pipeline = redis.pipeline()
                for at, value in enumerate(values[first : first + DEPTH], first):
                    pipeline.xadd(streams[at % count], {"v": value})
                await pipeline.execute()
            seconds = perf_counter() - started
        return Counted(self._stored(), seconds)

    def fill(self, messages: int, value: Value) -> None:
        """Streams full of single entries, the quickest way there is, and a group on each."""
        for at, stream in enumerate(self.streams):
            left = messages // len(self.streams) + (at < messages % len(self.streams))
            self.redis.xgroup_create(stream, GROUP, "0", mkstream=True)
            while left > 0:
                self.redis.eval(_FILL, 1, stream, min(left, _FILL_ENTRIES), value)
                left -= _FILL_ENTRIES

    def consume(self) -> Counted:
        """redis-py's XREADGROUP and XACK, DEPTH entries at a time, one stream after the other."""
        acked, started = 0, 0.0
        with RedisCluster.from_url(self._url) as redis:
            redis.ping()
            for stream in self.streams:
                while reply := redis.xreadgroup(GROUP, "bench", {stream: ">"}, count=DEPTH):
                    started = started or perf_counter()
                    acked += redis.xack(stream, GROUP, *[entry_id for entry_id, _ in entries_of(reply)])
            seconds = perf_counter() - started
            redis.disconnect_connection_pools()  # its close() leaves that to the garbage collector
        self._check_nothing_pending()
        return Counted(acked, seconds)

    async def consume_asyncio(self) -> Counted:
        """The same with redis-py's asyncio client, READERS streams side by side."""
        acked: list[int] = []
        started: list[float] = []
        async with AsyncRedisCluster.from_url(self._url) as redis:
            await redis.ping()

            async def read(streams: Iterator[str]) -> None:
                for stream in streams:
                    while reply := await redis.xreadgroup(GROUP, "bench", {stream: ">"}, count=DEPTH):
                        started.append(perf_counter())
                        acked.append(await redis.xack(stream, GROUP, *[entry_id for entry_id, _ in entries_of(reply)]))

            shared = iter(self.streams)
            await asyncio.gather(*(read(shared) for _ in range(READERS)))
            seconds = perf_counter() - started[0]
        self._check_nothing_pending()
        return Counted(sum(acked), seconds)

    def _stored(self) -> int:
        return sum(self.redis.xlen(stream) for stream in self.streams)

    def _check_nothing_pending(self) -> None:
        pending = sum(self.redis.xpending(stream, GROUP)["pending"] for stream in self.streams)
        if pending:
            msg = f"redis-py left {pending} entries pending that it acknowledged: run the benchmark again"
            raise CorruptData(msg)

    # -- redis-benchmark -----------------------------------------------------------------------------------------

    def benchmark_command(self, setting: Setting, messages: int, value_bytes: int, *, shown: bool = False) -> list[str]:
        """redis-benchmark's own cluster mode: `{tag}` becomes a slot of the node a connection goes to, so that each
        master gets `setting.streams` and, with clients in multiples of three, an even share."""
        where = ["-h", "HOST", "-p", "PORT"] if shown else ["-u", self._url]
        value = "x" * value_bytes if not shown else f"<{value_bytes} bytes>"
        key = "bench:{tag}" if shown else f"{self._prefix}:peer:{{tag}}"
        sizes = ["-n", str(messages), "-c", str(setting.clients), "-P", str(DEPTH), "--threads", str(setting.threads)]
        if setting.streams > 1:
            key, sizes = f"{key}:__rand_int__", [*sizes, "-r", str(setting.streams)]
        return ["redis-benchmark", "--cluster", *where, *sizes, "--csv", "XADD", key, "*", "v", value]

    def benchmark(self, setting: Setting, messages: int, value_bytes: int) -> Counted:
        """One run; the seconds are those of redis-benchmark's own rate, its start-up not among them."""
        command = self.benchmark_command(setting, messages, value_bytes)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        rows = [row for row in csv.reader(done.stdout.splitlines()) if row and row[0].startswith("XADD")]
        if done.returncode != 0 or not rows:
            said = " ".join(done.stderr.split())[-300:]
            msg = f"redis-benchmark ended with status {done.returncode} and no rate: {said}"
            raise StoreRefused(msg)
        stored = sum(self.redis.xlen(key) for key in self.redis.scan_iter(match=f"{self._prefix}:peer:*", count=1000))
        # It sends whole pipelines, so it may store up to one pipeline for each client more than it was asked for.
        if not messages <= stored < messages + setting.clients * DEPTH:
            msg = f"redis-benchmark stored {stored} messages, not {messages}: is something else writing there?"
            raise CorruptData(msg)
        return Counted(messages, messages / float(rows[0][1]))

    def best_setting(self, messages: int, value_bytes: int, say: Callable[[str], None], streams: int = 1) -> Setting:
        """The fastest of redis-benchmark's settings here and now, over so many streams on each master."""
        rates: dict[Setting, float] = {}
        for setting in [Setting(clients, threads, streams) for threads in THREADS for clients in CLIENTS]:
            counted = self.benchmark(setting, messages, value_bytes)
            rates[setting] = counted.messages / counted.seconds
            say(f"redis-benchmark -c {setting.clients} --threads {setting.threads}: {rates[setting]:,.0f}/s")
            self.clean()
        return max(rates, key=lambda setting: rates[setting])


def has_redis_benchmark() -> bool:
    return shutil.which("redis-benchmark") is not None


def versions() -> dict[str, str]:
    """Of what the peers are; the server's is asked from the server."""
    found = {"redis-py": importlib.metadata.version("redis"), "hiredis": importlib.metadata.version("hiredis")}
    if has_redis_benchmark():
        said = subprocess.run(["redis-benchmark", "--version"], capture_output=True, text=True, check=False).stdout
        found["redis-benchmark"] = said.split()[1] if len(said.split()) > 1 else said.strip()
    return found


def entries_of(reply: Any) -> Any:
    """The entries in a reply of XREADGROUP for one stream, in either of redis-py's shapes."""
    if isinstance(reply, dict):
        return next(iter(reply.values()))[0]
    return reply[0][1]
