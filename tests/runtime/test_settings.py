"""Queue settings on real clusters: declared, joined, changed by several at once; and batches compressed as they say."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import pytest

import shardq
from shardq.core import compression, records
from shardq.core.compression import Compression
from shardq.core.queue_settings import QueueSettings
from shardq.core.slots import key_slot
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from shardq.storage.keys import registry

pytestmark = pytest.mark.anyio

NAMES = ("max_backlog", "overflow", "retention_ms", "retention_bytes")


async def on_shards(queue: shardq.Queue) -> list[list[bytes | None]]:
    """What every shard knows of the settings, by NAMES."""
    return [
        await queue.client.pipes.command(keys.slot, pack_command("HMGET", keys.meta, *NAMES))
        for keys in queue.shards.values()
    ]


async def entries(queue: shardq.Queue) -> list[bytes]:
    """The record batches of every shard."""
    found: list[bytes] = []
    for keys in queue.shards.values():
        stored = await queue.client.pipes.command(keys.slot, pack_command("XRANGE", keys.stream, "-", "+"))
        found += [fields[3] for _, fields in stored]
    return found


# -- declared, joined, changed ----------------------------------------------------------------------------------------


async def test_settings_are_declared_once_and_joined(cluster: LocalCluster, queue_name: str) -> None:
    named: dict[str, Any] = {"retention": "7d", "max_backlog": 1000, "overflow": "reject"}
    async with shardq.connect(cluster.url) as client:
        declared = await client.queue(queue_name, shards=3, **named)
        expected = QueueSettings(retention_s=604800, max_backlog=1000, overflow="reject")
        assert declared.settings == expected
        assert await on_shards(declared) == [[b"334", b"reject", b"604800000", None]] * 3
    async with shardq.connect(cluster.url) as client:
        assert (await client.queue(queue_name)).settings == expected
        assert (await client.queue(queue_name, shards=3, **named)).settings == expected
        assert (await client.queue(queue_name, retention="168h", jobs=False)).settings == expected


async def test_a_queue_without_settings_has_the_defaults(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        assert queue.settings == QueueSettings()
        assert await on_shards(queue) == [[None] * 4] * 2


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"retention": "12h"}, "retention='7d', not '12h'"),
        ({"max_backlog": None}, "max_backlog=1000, not None"),
        ({"overflow": "reject"}, "overflow='block', not 'reject'"),
        ({"compression": "zstd"}, "compression=None, not 'zstd'"),
        ({"jobs": True}, "jobs=False, not True"),
        ({"shards": 3}, "has 2 shards, not 3"),
    ],
    ids=repr,
)
async def test_other_settings_are_a_mismatch(
    cluster: LocalCluster, queue_name: str, named: dict[str, Any], says: str
) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2, retention="7d", max_backlog=1000)
        with pytest.raises(shardq.QueueMismatch, match=says):
            await client.queue(queue_name, **named)
        assert (await client.queue(queue_name)).settings == queue.settings


@pytest.mark.parametrize(
    "named",
    [{"retention": "forever"}, {"max_backlog": 0}, {"overflow": "reject"}, {"compression": "gzip"}, {"limit": 5}],
    ids=repr,
)
async def test_wrong_settings_declare_and_change_nothing(
    cluster: LocalCluster, queue_name: str, named: dict[str, Any]
) -> None:
    async with shardq.connect(cluster.url) as client:
        with pytest.raises(shardq.UsageError):
            await client.queue(queue_name, shards=2, **named)
        with pytest.raises(shardq.UnknownQueue):
            await client.queue(queue_name)
        queue = await client.queue(queue_name, shards=2)
        with pytest.raises(shardq.UsageError):
            await queue.change(**named)
        assert queue.settings == (await client.queue(queue_name)).settings == QueueSettings()


async def test_a_change_reaches_every_shard_and_everybody(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=3, max_backlog=9, overflow="drop-oldest")
        changed = await queue.change(max_backlog=10, retention="9GB")
        assert changed == queue.settings == (await client.queue(queue_name)).settings
        assert changed == QueueSettings(retention_bytes=9 * 10**9, max_backlog=10, overflow="drop-oldest")
        assert await on_shards(queue) == [[b"4", b"drop-oldest", None, b"3000000000"]] * 3
        assert await queue.change(max_backlog=10, retention="9GB") == changed
        await queue.change(max_backlog=None, overflow="block", retention="done")
        assert await on_shards(queue) == [[None] * 4] * 3
        with pytest.raises(shardq.UsageError, match="needs max_backlog"):
            await queue.change(overflow="reject")


async def test_changes_side_by_side_all_hold(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=4)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(queue.change, max_backlog=400))
            tasks.start_soon(partial(queue.change, max_backlog=800))
            tasks.start_soon(partial(queue.change, retention="1h"))
            tasks.start_soon(partial(queue.change, compression="zlib"))
            tasks.start_soon(partial(queue.change, jobs=True))
        settled = (await client.queue(queue_name)).settings
        assert (settled.retention, settled.compression, settled.jobs) == ("1h", "zlib", True)
        assert settled.max_backlog in (400, 800)
        share = str(settled.max_backlog // 4).encode() if settled.max_backlog else b""
        assert await on_shards(queue) == [[share, b"block", b"3600000", None]] * 4


async def test_a_change_that_was_cut_short_is_completed(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2, max_backlog=10)
        await queue.change(max_backlog=20)
        # As if the call had ended before it came to shard 1.
        keys = queue.shards[1]
        await client.pipes.command(keys.slot, pack_command("HSET", keys.meta, "max_backlog", 5, "settings_version", 1))
        await client.queue(queue_name, shards=2)
        assert await on_shards(queue) == [[b"10", b"block", None, None]] * 2
        await client.pipes.command(keys.slot, pack_command("HDEL", keys.meta, "max_backlog", "settings_version"))
        await queue.change(max_backlog=20)
        assert await on_shards(queue) == [[b"10", b"block", None, None]] * 2


async def test_settings_that_nobody_wrote_are_corrupt(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        sound = queue.settings.to_bytes()

        async def store(settings: bytes) -> None:
            packed = pack_command("HSET", queue.keys.routing, "settings", settings)
            await client.pipes.command(queue.keys.control_slot, packed)

        try:
            for broken in (b"junk", b"\x01junk", b"\x02\x80"):
                await store(broken)
                with pytest.raises(shardq.CorruptData, match="upgrade"):
                    await client.queue(queue_name)
                with pytest.raises(shardq.CorruptData, match="upgrade"):
                    await queue.change(jobs=True)
        finally:
            await store(sound)  # other tests list every queue of the cluster


async def test_a_queue_that_is_gone_is_not_changed(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1)
        await client.pipes.command(queue.keys.control_slot, pack_command("DEL", queue.keys.routing))
        names = registry(client.prefix)  # other tests list every queue of the cluster
        await client.pipes.command(key_slot(names.encode()), pack_command("SREM", names, queue_name))
        with pytest.raises(shardq.UnknownQueue, match="declare it"):
            await queue.change(jobs=True)
        await client.queue(queue_name, shards=1)  # other tests list every queue of the cluster


# -- compression ------------------------------------------------------------------------------------------------------


async def test_producers_compress_as_the_queue_says(cluster: LocalCluster, queue_name: str) -> None:
    """Batches of every kind lie side by side in one stream, and one reader takes them all."""
    text = "an order of a user, "
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, compression="zstd")
        sent: list[str] = []
        kinds: list[tuple[Compression | None, int]] = [("zstd", 2), ("zlib", 1), (None, 0)]
        for kind, flag in kinds:
            if queue.settings.compression != kind:
                await queue.change(compression=kind)
            values = [f"{kind} {text}{number}" for number in range(100)]
            before = len(await entries(queue))
            async with queue.producer() as producer:
                await producer.send_many(("k", value) for value in values)
                await producer.send("small", key="k")
            new = (await entries(queue))[before:]
            assert [batch[1] for batch in new] == [flag] * (len(new) - 1) + [0], "a small one stays as it is"
            sent += [*values, "small"]
        assert [value for batch in await entries(queue) for value in records.decode(batch).values] == sent
        assert await handled(client, queue_name, len(sent)) == sent


async def test_single_messages_are_compressed_too(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, compression="zlib")
        async with queue.producer(max_message_bytes=2000) as producer:
            await producer.send("x" * 1000, key="k", dedupe_id="once")
            await producer.submit("y" * 1000, key="k")
            for value in ("x" * 3000, b"x" * 3000):
                with pytest.raises(shardq.MessageTooLarge):
                    await producer.send(value, key="k", dedupe_id="large")
                with pytest.raises(shardq.MessageTooLarge):
                    await producer.send(value, key="k")
        assert [batch[1] for batch in await entries(queue)] == [1, 1]
        assert await handled(client, queue_name, 2) == ["x" * 1000, "y" * 1000]


async def handled(client: shardq.Client, queue: str, count: int) -> list[Any]:
    """The values that a worker is given, until there are so many."""
    worker, got = shardq.Worker(queue, group="g", lease=1), []

    @worker.handler
    async def take(message: shardq.Message) -> None:
        got.append(message.value)
        if len(got) == count:
            worker.stop()

    with anyio.fail_after(30):
        await worker.run(client)
    return got


async def test_no_producer_without_the_library(
    cluster: LocalCluster, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("no zstd here")

    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=1, compression="zstd")
        monkeypatch.setattr(compression, "_zstd", missing)
        with pytest.raises(shardq.UsageError, match=r"pip install backports\.zstd"):
            queue.producer()
        await queue.change(compression="zlib")
        async with queue.producer() as producer:
            await producer.send(b"x" * 1000, key="k")
        assert [batch[1] for batch in await entries(queue)] == [1]
