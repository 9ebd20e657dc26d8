"""The whole system with the users that `shardq acl` prints and no other, and what each of them is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import redis

import shardq
from shardq.core.reshard import split
from shardq.errors import FunctionsMissing, StoreRefused
from shardq.ops.exporter import QueueReader
from shardq.runtime.reshard import begin, carry_on, look_after
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.standalone import coordinate
from shardq.storage.acl import Role, Wanted
from shardq.storage.keys import Keys
from tests.runtime.harness import drained, running, until
from tests.security.users import Users, users

pytestmark = pytest.mark.anyio

GROUP = "g"
ORDERS, PARCELS, BOUNDED = "orders", "parcels", "bounded"
GONE = "gone"
SPLIT = "split"
ALL = (ORDERS, PARCELS, BOUNDED)
WORKER = Wanted("worker", [ORDERS], group=GROUP, sends_to=[PARCELS])


@pytest.fixture(scope="module")
def known(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    with users(server_binary, tmp_path_factory.mktemp("acl")) as found:
        found.add("operator", Wanted("operator", [*ALL, GONE, SPLIT]))
        found.add("leader", Wanted("coordinator", [SPLIT], group=GROUP, reshards=True))
        found.add("follower", Wanted("worker", [SPLIT]))
        found.add("producer", Wanted("producer", [ORDERS]))
        found.add("bounded", Wanted("producer", [BOUNDED], bounded=True))
        found.add("worker", WORKER)
        found.add("parcels", Wanted("worker", [PARCELS, BOUNDED]))
        found.add("coordinator", Wanted("coordinator", [ORDERS], group=GROUP))
        found.add("exporter", Wanted("exporter"))
        found.add("caster", Wanted("exporter", [ORDERS], broadcast=True, listen=["news:*"]))
        found.add("blind", Wanted("producer", [ORDERS]), "-info")
        found.add("lost", Wanted("producer", [ORDERS]), "-cluster|slots")
        found.add("silent", Wanted("producer", [ORDERS]), "-xadd")
        found.load()
        yield found


@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
async def declared(known: Users, anyio_backend: str) -> None:
    """The functions are not there yet: nobody but the operator may bring them."""
    with pytest.raises(FunctionsMissing, match="shardq install"):
        async with shardq.connect(known.url("worker")):
            pass
    async with shardq.connect(known.url("operator")) as client:
        await client.queue(ORDERS, shards=3)
        await client.queue(PARCELS, shards=3)
        await client.queue(BOUNDED, shards=3, max_backlog=9, overflow="drop-oldest")
    known.refused()


def make_worker(parcels: shardq.Queue) -> shardq.Worker:
    retry = shardq.Retry(attempts=2, base=0.05)
    worker = shardq.Worker(ORDERS, group=GROUP, lease=1.5, retry=retry, limit="100000/s", key_limit="100000/s")
    tried: set[str] = set()

    @worker.handler
    async def handle(message: shardq.Message) -> object:
        if message.value == "dead":
            raise shardq.Reject("no")
        if message.value == "retry" and message.id not in tried:
            tried.add(message.id)
            raise ValueError
        own = message.local_key
        async with message.atomic() as tx:
            tx.hset(own("hash"), {"a": 1})
            tx.hset(own("hash"), {"a": 2})
            tx.sadd(own("set"), "a")
            tx.zadd(own("zset"), {"m": 1})
            tx.lpush(own("list"), "x")
            tx.set(own("text"), "x", ttl=100)
            tx.set(own("text"), "y")
            tx.delete(own("hash"))
            tx.expire(own("set"), 100)
            tx.incrby(own("count"), 1)
            tx.send(parcels, message.value, key=message.key)
        return "done"

    return worker


async def test_each_does_its_part(known: Users, declared: None) -> None:
    """Send (also late, once, as jobs, from a thread), handle, fail, die, write and send in a commit, coordinate, tick,
    export. Nobody is refused anything on the way."""
    async with (
        shardq.connect(known.url("operator")) as operator,
        shardq.connect(known.url("producer")) as sender,
        shardq.connect(known.url("worker")) as handler,
        shardq.connect(known.url("coordinator")) as leader,
        shardq.connect(known.url("exporter")) as watcher,
    ):
        await operator.schedule(ORDERS, "tick", "* * * * * *", value="tick", key="clock")
        worker = make_worker(await handler.queue(PARCELS))
        orders, watched = await sender.queue(ORDERS), await operator.queue(ORDERS)
        stop = anyio.Event()
        settings = WorkerSettings(lease_s=1.5, leader_lease_s=0.9, balance="load", load_sample_s=0.2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(coordinate, leader, ORDERS, GROUP, settings, stop)
            async with running(handler, worker):
                async with orders.producer() as producer:
                    for key, value in enumerate(("dead", "dead", "retry", "plain")):
                        await producer.send(value, key=f"key:{key}")
                    await producer.send("later", key="a", delay=0.2)
                    await producer.send("once", key="a", dedupe_id="x")
                    await producer.send("once", key="a", dedupe_id="x")
                    job = await producer.submit("job", key="b")
                    assert await job.wait(20) == "done"
                await anyio.to_thread.run_sync(send_from_a_thread, known.url("producer"))
                sent_on = await operator.queue(PARCELS)
                await until(lambda: ticked(sent_on), 20, "a tick that was handled and sent on")
                assert await operator.unschedule(ORDERS, "tick")
                await until(lambda: drained(watched, GROUP), 20, "an empty backlog")
                snapshot = await QueueReader(watcher, 1.0).snapshot()
            stop.set()
        assert snapshot.errors == 0
        assert set(snapshot.whole) == set(ALL)
        await operate(watched)
    assert {entry for entry in known.refused() if "hpexpire" not in entry[1]} == set()


def send_from_a_thread(url: str) -> None:
    with shardq.SyncProducer(url, ORDERS) as producer:
        producer.send("from a thread", key="t")


async def ticked(parcels: shardq.Queue) -> bool:
    values = [record.value async for record in parcels.history()]
    return {"tick", "retry", "plain", "later", "once", "job", "from a thread"} <= set(values)


async def operate(orders: shardq.Queue) -> None:
    """What an operator does beside declaring."""
    letters = orders.dead_letters(GROUP)
    first, second = [letter async for letter in letters.find()]
    assert await letters.replay([first.id]) == 1
    assert await letters.purge([second.id]) == 1
    assert [group.name for group in await orders.groups()] == [GROUP]
    await orders.reset_group(GROUP, "latest", force=True)
    await orders.open_group("other", "latest")
    await orders.delete_group("other")
    await orders.change(retention="1h")
    async with orders.producer() as producer:
        kept = await producer.send("kept", key="z")
        late = await producer.send("late", key="z", delay=1000)
    assert [record.value for record in await orders.peek(1, reverse=True)] == ["kept"]
    assert await orders.delete_message(late)
    await orders.delete_message(kept)
    await orders.trim("latest")
    gone = await orders.client.queue(GONE, shards=2)
    await gone.open_group(GROUP)
    await gone.delete()


async def test_a_bounded_queue_drops_what_is_too_much(known: Users, declared: None) -> None:
    async with shardq.connect(known.url("bounded")) as client:
        queue = await client.queue(BOUNDED)
        async with queue.producer() as producer:
            for number in range(20):
                await producer.send(number, key="one")
    assert known.refused() == set()


async def test_broadcasts_are_for_who_may(known: Users, declared: None) -> None:
    async with shardq.connect(known.url("caster")) as client:
        async with client.listen("tea", patterns=["news:*"]) as notices:
            await client.broadcast("tea", 1)
            await client.broadcast("news:x", 2)
            got = [await anext(notices) for _ in range(2)]
        assert sorted(notice.value for notice in got if isinstance(notice, shardq.Notice)) == [1, 2]
        assert known.refused() == set()
        with pytest.raises(StoreRefused, match="shardq acl ROLE"):
            async with client.listen(patterns=["other:*"]):
                pass
    async with shardq.connect(known.url("producer")) as client:
        with pytest.raises(StoreRefused, match=r"does not let this user run PUBLISH|channel"):
            await client.broadcast("tea", 1)
        with pytest.raises(StoreRefused, match=r"does not let this user run SSUBSCRIBE|channel"):
            async with client.listen("tea"):
                pass


async def test_a_reshard_is_the_operators_and_a_leader_who_may_carries_it_on(known: Users, declared: None) -> None:
    async with shardq.connect(known.url("operator")) as client:
        queue = await client.queue(SPLIT, shards=1)
        for group in (GROUP, "other"):
            await queue.open_group(group)
        assert await queue.split(0) == [1, 2]
        await begin(client.pipes, queue.keys, split(queue.table, 1))
        known.refused()
    for user in ("follower", "leader"):
        async with shardq.connect(known.url(user)) as client:
            if user == "follower":
                with pytest.raises(StoreRefused, match="shardq acl ROLE"):
                    await carry_on(client.pipes, queue.keys)
                continue
            known.refused()
            assert await carry_on(client.pipes, queue.keys)
            assert await look_after(client.pipes, queue.keys) == {}
            assert known.refused() == set()
    async with shardq.connect(known.url("operator")) as client:
        queue = await client.queue(SPLIT)
        assert list(queue.shards) == [3, 4, 2]
        assert await queue.reshard() is None
        await queue.delete()
    assert known.refused() == set()


# -- refusals ---------------------------------------------------------------------------------------------------------

STREAM = Keys("shardq", ORDERS).shard(0, "a").stream
META = Keys("shardq", ORDERS).shard(0, "a").meta
OTHER = Keys("shardq", "theirs").shard(0, "a").stream
ROUTING = Keys("shardq", ORDERS).routing
EVERYBODY = (
    ("EVAL", "return 1", "0"), ("EVALSHA", "abc", "0"), ("SCRIPT", "LOAD", "return 1"), ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "0"), ("KEYS", "*"), ("SCAN", "0"), ("FLUSHALL",), ("FLUSHDB",),
    ("FUNCTION", "FLUSH"),
    ("FUNCTION", "DELETE", "shardq_1"), ("MONITOR",), ("SHUTDOWN",), ("ACL", "LIST"),
    ("ACL", "SETUSER", "x"), ("CLIENT", "LIST"), ("CLUSTER", "RESET"), ("MIGRATE", "h", "1", "k", "0", "1"),
    ("XRANGE", OTHER, "-", "+"), ("XADD", OTHER, "*", "a", "b"), ("GET", "somebodys"), ("SPUBLISH", "somebodys", "x"),
)  # fmt: skip
LOAD = ("FUNCTION", "LOAD", "#!lua name=x\nredis.register_function('x', function() end)")
WRITES = (
    ("XADD", STREAM, "*", "a", "b"), ("HSET", META, "a", "b"), ("DEL", STREAM), ("XTRIM", STREAM, "MAXLEN", "0"),
    ("UNLINK", STREAM), ("SET", STREAM, "x"), ("XACK", STREAM, GROUP, "1-1"), ("EXPIRE", STREAM, "1"),
    ("FCALL", "shardq_1_append", "2", STREAM, META),
)  # fmt: skip
NOT_OPERATORS = (
    LOAD,
    ("DEL", ROUTING),
    ("HSET", ROUTING, "a", "b"),
    ("SADD", "shardq:queues", "x"),
    ("SREM", "shardq:queues", ORDERS),
)
READS = (("XRANGE", STREAM, "-", "+"), ("XREVRANGE", STREAM, "+", "-"), ("XREAD", "STREAMS", STREAM, "0"))
TAKES = (
    ("XREADGROUP", "GROUP", GROUP, "c", "STREAMS", STREAM, ">"), ("XACK", STREAM, GROUP, "1-1"),
    ("XCLAIM", STREAM, GROUP, "c", "0", "1-1"), ("XGROUP", "DESTROY", STREAM, GROUP),
)  # fmt: skip
REFUSED: dict[str, tuple[tuple[str, ...], ...]] = {
    "operator": (*EVERYBODY, ("FUNCTION", "RESTORE", "x")),
    "producer": (*EVERYBODY, *NOT_OPERATORS, *READS, *TAKES, ("DEL", STREAM), ("HGETALL", ROUTING + "x")),
    "worker": (*EVERYBODY, *NOT_OPERATORS, ("HGETALL", Keys("shardq", ORDERS).control("other")), ("UNLINK", STREAM)),
    "coordinator": (*EVERYBODY, *NOT_OPERATORS, *TAKES, ("DEL", STREAM)),
    "exporter": (*EVERYBODY[:-4], *NOT_OPERATORS, *WRITES, *TAKES, ("SPUBLISH", f"shardq:{{{ORDERS}}}:bell:g", "x")),
}


@pytest.mark.parametrize("role", REFUSED)
async def test_a_role_is_refused_what_it_does_not_need(known: Users, declared: None, role: Role) -> None:
    for command in REFUSED[role]:
        reply = known.ask(role, *command)
        assert isinstance(reply, redis.exceptions.NoPermissionError), f"{role} may {' '.join(command)}: {reply!r}"


async def test_a_refusal_is_one_line_that_says_what_to_do(known: Users, declared: None) -> None:
    async with shardq.connect(known.url("worker")) as client:
        for name in ("mine", ORDERS):
            with pytest.raises(
                StoreRefused, match=r"^[^\n]* does not let this user [^\n]*`shardq acl ROLE`"
            ) as refused:
                await client.queue(name, shards=3)
            assert "worker" not in str(refused.value.__cause__), "the user's name is nobody's business"
        joined = await client.queue(ORDERS)
        with pytest.raises(StoreRefused, match="shardq acl ROLE"):
            await joined.delete(force=True)
    async with shardq.connect(known.url("producer")) as client:
        queue = await client.queue(ORDERS)
        with pytest.raises(StoreRefused, match=r"run (XRANGE|XREVRANGE|TIME)"):
            await queue.peek()
        with pytest.raises(StoreRefused, match="shardq acl ROLE"):
            await queue.open_group("mine")
        with pytest.raises(StoreRefused, match="run SMEMBERS"):
            await client.queue_names()
    async with shardq.connect(known.url("silent")) as client:
        queue = await client.queue(ORDERS)
        with pytest.raises(
            StoreRefused, match=r"does not let this user run (XADD|a command that shardq_1_append runs)"
        ):
            async with queue.producer() as producer:
                await producer.send("x")


async def test_who_may_not_ask_for_info_is_warned_and_goes_on(
    known: Users, declared: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shardq"):
        async with shardq.connect(known.url("blind")) as client:
            queue = await client.queue(ORDERS)
            async with queue.producer() as producer:
                await producer.send("x", key="k")
    said = {record.getMessage().partition(" ")[2] for record in caplog.records}
    assert said == {
        "does not allow INFO to this user: its settings were not checked, nor can late confirmations of replicas be "
        "(`shardq acl ROLE` grants it)"
    }


async def test_who_may_not_ask_for_the_slots_is_told_so(known: Users, declared: None) -> None:
    with pytest.raises(StoreRefused, match=r"does not let this user run CLUSTER\|SLOTS .*shardq acl ROLE"):
        async with shardq.connect(known.url("lost")):
            pass


async def test_a_command_says_it_too(known: Users, declared: None, capfd: pytest.CaptureFixture[str]) -> None:
    from shardq.cli.app import run

    url = known.url("producer")
    assert await anyio.to_thread.run_sync(run, ["queue", "create", "mine", "--shards", "1", "--url", url]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "shardq acl ROLE" in err
