"""Bytes in Redis for each message, plain and compressed, beside one XADD a message; and those of the AOF."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from redis.asyncio.cluster import RedisCluster

import shardq
from benchmarks import harness
from benchmarks.harness import Curve, Goal, Options, Result, Say
from shardq.core.compression import Compression
from shardq.core.hashing import key_hash
from shardq.core.slots import tag_for_slot
from shardq.runtime.client import Client

MESSAGES, CURVE_MESSAGES, SHARDS, PIPELINE = 50_000, 6_000, 12, 500
CURVE_SIZES = (1, 10, 100, 1000)
FULL = 1000
COMPRESSIONS: Mapping[str, Compression | None] = {"shardq": None, "shardq, zlib": "zlib", "shardq, zstd": "zstd"}
COMMANDS = {
    "XADD": f"redis.asyncio.RedisCluster.pipeline(): XADD stream * k <key> v <JSON>, over {SHARDS} streams",
    **{
        name: f"client.queue(name, shards={SHARDS}, compression={kind!r}); await producer.send_many(pairs)"
        for name, kind in COMPRESSIONS.items()
    },
}
PLAIN_BOUND, COMPRESSED_BOUND = 0.9, 0.25

Pairs = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes a message: `stream` is MEMORY USAGE of the streams, `used` what the data set grew, `aof` the file."""

    stream: float
    used: float
    aof: float
    entries: int


async def measure(options: Options, say: Say) -> Result:
    pairs = make_pairs(options.count(MESSAGES, SHARDS * 10))
    few = pairs[: options.count(CURVE_MESSAGES, SHARDS * 10)]
    rounds: dict[str, list[Stored]] = {name: [] for name in COMMANDS}
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with harness.cluster(options) as servers:
        async with RedisCluster.from_url(servers.url) as redis, shardq.connect(servers.url) as client:
            stores = Stores(redis, client)
            await stores.put("shardq", pairs[:1], 1)  # loads the functions, which are no message's
            for number in range(options.rounds):
                for name, found in rounds.items():
                    found.append(await stores.put(name, pairs, FULL))
                    say(f"  round {number + 1}: {name} {found[-1].stream:.1f} bytes a message")
            for name, points in lines.items():
                for size in CURVE_SIZES:
                    points.append((size, (await stores.put(name, few, size)).stream))
    return result(rounds, lines, pairs, len(few))


class Stores:
    """Puts messages under names that are new each time, measures, and deletes them."""

    def __init__(self, redis: RedisCluster, client: Client) -> None:
        self._redis, self._client, self._names = redis, client, 0

    async def put(self, name: str, pairs: Pairs, batch: int) -> Stored:
        self._names += 1
        used, aof = await self._used(), await self._aof()
        if name == "XADD":
            streams = await self._add_each(pairs)
        else:
            streams = await self._send_many(pairs, batch, COMPRESSIONS[name])
        used, aof = await self._used() - used, await self._aof() - aof
        usage = [int(await self._redis.memory_usage(stream, samples=0) or 0) for stream in streams]
        entries = sum([await self._redis.xlen(stream) for stream in streams])
        await self._clean()
        return Stored(sum(usage) / len(pairs), used / len(pairs), aof / len(pairs), entries)

    async def _add_each(self, pairs: Pairs) -> list[str]:
        streams = [f"peer-{self._names}:{{{tag_for_slot((2 * at + 1) * 8192 // SHARDS)}}}:{at}" for at in range(SHARDS)]
        for first in range(0, len(pairs), PIPELINE):
            pipeline = self._redis.pipeline()
            for at, (key, value) in enumerate(pairs[first : first + PIPELINE], first):
                pipeline.xadd(streams[at % SHARDS], {"k": key, "v": value})
            await pipeline.execute()
        assert sum([await self._redis.xlen(stream) for stream in streams]) == len(pairs)
        return streams

    async def _send_many(self, pairs: Pairs, batch: int, compression: Compression | None) -> list[str]:
        """So that batches are full, the messages of each shard are sent in runs of `batch`."""
        queue = await self._client.queue(f"bytes-{self._names}", shards=SHARDS, compression=compression)
        by_shard: dict[int, list[tuple[str, bytes]]] = {}
        for key, value in pairs:
            by_shard.setdefault(queue.table.shard_for(key_hash(key)).id, []).append((key, value))
        async with queue.producer(max_batch_messages=batch) as producer:
            for ones in by_shard.values():
                for first in range(0, len(ones), batch):
                    await producer.send_many(ones[first : first + batch])
        counters = await queue.counters(())
        assert sum(shard.appended for shard in counters.values()) == len(pairs)
        return [keys.stream for keys in queue.shards.values()]

    async def _used(self) -> int:
        infos = await self._redis.info("memory", target_nodes=RedisCluster.PRIMARIES)
        return sum(int(info["used_memory_dataset"]) for info in infos.values())

    async def _aof(self) -> int:
        infos = await self._redis.info("persistence", target_nodes=RedisCluster.PRIMARIES)
        return sum(int(info["aof_current_size"]) for info in infos.values())

    async def _clean(self) -> None:
        await self._redis.flushall(target_nodes=RedisCluster.PRIMARIES)


# -- the messages --------------------------------------------------------------------------------------------


def make_pairs(count: int) -> list[tuple[str, bytes]]:
    """Orders as a shop would send them, about 100 bytes of JSON each, every one different; the same in every run."""
    chance = random.Random(1)
    names = [f"{chance.choice('abcdefgh')}{chance.randrange(10_000):04}" for _ in range(2_000)]
    pairs = []
    for number in range(count):
        user = chance.randrange(10_000)
        order = {
            "order": 48_000_000 + number * 3 + chance.randrange(3),
            "user": user,
            "sku": chance.choice(names),
            "qty": min(9, 1 + int(chance.expovariate(1.2))),
            "cents": chance.randrange(199, 25_000),
            "state": chance.choices(("paid", "open", "sent", "void"), (70, 15, 12, 3))[0],
            "at": 1_760_000_000_000 + number * 37 + chance.randrange(37),
        }
        pairs.append((f"user:{user}", json.dumps(order, separators=(",", ":")).encode()))
    return pairs


# -- the result ----------------------------------------------------------------------------------------------


def result(
    rounds: dict[str, list[Stored]], lines: dict[str, list[tuple[float, float]]], pairs: Pairs, few: int
) -> Result:
    samples = {name: [one.stream for one in ones] for name, ones in rounds.items()}
    plain = median(samples["XADD"])
    bounds = {"shardq": PLAIN_BOUND, "shardq, zlib": COMPRESSED_BOUND, "shardq, zstd": COMPRESSED_BOUND}
    goals = [
        Goal(f"{name}: bytes a message, times XADD's", median(samples[name]) / plain, "<=", bound, "XADD")
        for name, bound in bounds.items()
    ]
    parts = ("stream", "used", "aof", "entries")
    return Result(
        title="Bytes a message in Redis",
        unit="bytes",
        samples=samples,
        commands=COMMANDS,
        goals=goals,
        curves=[Curve("Bytes a message by messages in a batch", "messages in a batch", "bytes a message", lines)],
        sizes={
            "messages": len(pairs),
            "messages of each point of the curve": few,
            "shards": SHARDS,
            "value bytes": round(sum(len(value) for _, value in pairs) / len(pairs), 1),
            "key bytes": round(sum(len(key) for key, _ in pairs) / len(pairs), 1),
            "messages in a batch": FULL,
        },
        notes=[
            "MEMORY USAGE with SAMPLES 0 of all streams, divided by the messages: what shardq keeps beside a stream (a "
            "hash for each shard) is not in it, but is in what the data set of all masters grew, which is a figure.",
            "The messages of a shard are sent in runs that fill a batch. XADD knows no batches: its line is level.",
        ],
        figures={
            f"{part}, {name}": round(median(getattr(one, part) for one in ones), 2)
            for name, ones in rounds.items()
            for part in parts
        },
    )
