"""Functions of a reshard: the gate, sealing, moving delayed messages, retiring; each repeated does nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

import shardq
from shardq.core.reshard import Reshard, split
from shardq.core.routing import RoutingTable
from shardq.core.step import Put
from shardq.errors import UnknownGroup, UnknownQueue
from shardq.ops.local_cluster import LocalCluster
from shardq.storage import calls, groups, queues, reshard, schedules
from shardq.storage.bells import Subscription, Told
from shardq.storage.calls import Acquired
from shardq.storage.groups import Start
from shardq.storage.keys import ShardKeys
from tests.storage.rig import Rig, one, rig

pytestmark = pytest.mark.anyio


class Split(Rig):
    """Shard 0, the only one of its queue, with group "g"; and the children 1 and 2 of a split, open."""

    def __init__(self, client: shardq.Client, queue: str) -> None:
        self.plan = split(RoutingTable.equal(1), 0)
        super().__init__(client, queue, self.plan.table.by_id[0].slot)
        self.children = [self.keys.of(child) for child in self.plan.children]
        self.child = Rig(client, queue, self.shard.slot)
        self.child.shard = self.children[0]

    async def open(self) -> None:
        await calls.open_shard(self.pipes, self.shard)
        await self.open_group()
        for child in self.children:
            assert await reshard.open_child(self.pipes, child, [0], 0, {})
            await groups.open_group(self.pipes, child, "g", Start())

    async def seal(self) -> None:
        await reshard.seal(self.pipes, self.shard, self.children)

    async def gated(self, *parents: int, group: str = "g") -> Acquired:
        """Takes child 1, naming these of its parents."""
        named = {parent: self.keys.of(self.plan.table.by_id[parent]) for parent in parents}
        return await calls.acquire(
            self.pipes, self.children[0], group, "w", "m", 0, None, timeout_s=10, confirm=None, parents=named
        )

    async def retire(self, *, group: tuple[str, ...] = ("g",)) -> reshard.Retired:
        return await reshard.retire(self.pipes, 0, self.shard, group, self.children)

    async def finish(self, token: str) -> None:
        entries = await self.fetch(token)
        assert (await self.step(token, finished=entries, acked=len(entries))).status == "OK"

    async def forget_producers(self) -> None:
        """As an hour does."""
        fields = [field for field in await self.command("HKEYS", self.shard.meta) if field.startswith(b"p:")]
        await self.command("HDEL", self.shard.meta, "-", *fields)


@pytest.fixture
async def made(cluster: LocalCluster, queue_name: str) -> AsyncIterator[Split]:
    async with shardq.connect(cluster.url) as client:
        made = Split(client, queue_name)
        await made.open()
        yield made


# -- the gate ----------------------------------------------------------------------------------------------------------


async def test_nobody_owns_a_child_before_its_parent_is_finished(made: Split) -> None:
    token = await made.own()
    await made.stored("p", 1, "a")
    assert (await made.gated(0)).status == "GATED"  # not sealed
    await made.seal()
    assert await made.gated(0) == Acquired("GATED", parent=0, left=1)
    await made.fetch(token)
    assert (await made.gated(0)).left == 1  # pending
    assert (await made.step(token, finished=await made.entries(), acked=1)).status == "OK"
    assert (await made.gated(0)).status == "OK"


async def test_a_sealed_parent_without_messages_holds_nobody_up_and_an_open_one_does(made: Split) -> None:
    assert await made.gated(0) == Acquired("GATED", parent=0, left=0)
    await made.seal()
    assert (await made.gated(0)).status == "OK"


async def test_what_waits_for_a_retry_keeps_the_gate_shut(made: Split) -> None:
    token = await made.own()
    await made.stored("p", 1, "a")
    await made.seal()
    (entry,) = await made.fetch(token)
    put = Put(0, 60_000, 1, b"k", b"record")
    assert (await made.step(token, finished=[entry], puts=[put], retried=1)).status == "OK"
    assert (await made.gated(0)).left == 1
    assert (await made.step(token, drops=[1], acked=1)).status == "OK"
    assert (await made.gated(0)).status == "OK"


async def test_delayed_messages_keep_the_gate_shut_until_they_moved(made: Split) -> None:
    await made.append_each("p", 1, one("a", when="in:60000"))
    await made.seal()
    assert (await made.gated(0)).left == 1
    ((name, _),) = await reshard.delayed_batches(made.pipes, made.shard, 0)
    assert await reshard.move_delayed(made.pipes, made.shard, made.children, [(name, 1)], [made.shard.bell]) == 0
    assert (await made.gated(0)).status == "OK"


@pytest.mark.parametrize("named", [(), (1,)])
async def test_a_parent_that_the_taker_does_not_name_keeps_the_gate_shut(made: Split, named: tuple[int, ...]) -> None:
    """His routing table is old."""
    await made.seal()
    assert await made.gated(*named) == Acquired("GATED", parent=0)


async def test_an_older_build_that_names_no_keys_is_gated(made: Split) -> None:
    await made.seal()
    reply = await made.call("acquire", [made.children[0].group("g")], "w", "n", 0, "", "", "", made.shard.bell)
    assert reply == [b"GATED", b"", b"0"]


async def test_the_gate_opens_once_for_good_and_a_reset_shuts_it(made: Split) -> None:
    await made.stored("p", 1, "a")
    await made.seal()
    await made.finish(await made.own())
    assert (await made.gated(0)).status == "OK"
    assert await made.child.lease("release", f"{(await made.child.counters()).epoch}:m") == "OK"
    assert (await made.gated()).status == "OK"
    for shard in (made.shard, made.children[0]):
        done = await groups.reset_group(made.pipes, shard, "g", Start("earliest"), "r", force=True)
        assert done.status == "OK"
    assert (await made.gated()).status == "GATED"
    assert (await made.gated(0)).status == "OK"  # what was finished was trimmed


async def test_a_parent_that_is_gone_is_finished(made: Split) -> None:
    await made.stored("p", 1, "a")
    await made.seal()
    await made.command("DEL", made.shard.meta)
    assert (await made.gated(0)).status == "OK"


async def test_a_group_that_is_not_opened_on_the_parent_yet_waits(made: Split) -> None:
    await made.seal()
    await groups.open_group(made.pipes, made.children[0], "late", Start())
    assert (await made.gated(0, group="late")).left == 1
    await made.open_group("late")
    assert (await made.gated(0, group="late")).status == "OK"


async def test_whoever_finishes_the_parent_rings_at_the_gates(made: Split) -> None:
    token = await made.own()
    await made.stored("p", 1, "a")
    await made.stored("p", 2, "b")
    await made.seal()
    first, second = await made.fetch(token)
    async with listening(made) as heard:
        await made.step(token, finished=[first], acked=1)
        assert await heard() == []
        await made.step(token, finished=[second], acked=1)
        assert await heard() == [(child.bell, b"lease") for child in made.children]


async def test_moving_the_last_delayed_message_rings_at_the_gates(made: Split) -> None:
    names = (await made.append_each("p", 1, *[one("a", when="in:60000")] * 2)).entries
    await made.seal()
    bells = [child.bell for child in made.children]
    async with listening(made) as heard:
        await reshard.move_delayed(made.pipes, made.shard, made.children, [(names[0], 0)], bells)
        assert await heard() == []
        await made.command("HSET", made.children[1].meta, "waiting", "1")
        await reshard.move_delayed(made.pipes, made.shard, made.children, [(names[1], 1)], bells)
        assert await heard() == [(bells[1], b"message"), (bells[0], b"lease"), (bells[1], b"lease")]


@asynccontextmanager
async def listening(made: Split) -> AsyncIterator[Callable[[], Awaitable[list[tuple[str, bytes]]]]]:
    """Gives what tells the rings of the children's bells since the last time."""
    node = made.client.cluster.node_of(made.shard.slot)
    assert node is not None
    bells = [child.bell for child in made.children]
    told: asyncio.Queue[Told] = asyncio.Queue()
    rung: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
    async with Subscription(node) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(subscription.hear, told.put_nowait, lambda name, _, said: rung.put_nowait((name, said)))
        await subscription.subscribe(bells)
        for _ in bells:
            assert (await told.get()).kind == "stands"

        async def rings() -> list[tuple[str, bytes]]:
            await made.command("SPUBLISH", bells[0], "end")
            found = []
            while (ring := await rung.get())[1] != b"end":
                found.append(ring)
            return found

        yield rings
        tasks.cancel_scope.cancel()


# -- sealing -----------------------------------------------------------------------------------------------------------


async def test_a_sealed_shard_keeps_its_answers_and_takes_nothing_more(made: Split) -> None:
    before = await made.append("p", 1, "a")
    each = await made.append_each("q", 1, one("b"))
    await made.seal()
    assert await made.append("p", 1, "a") == before
    assert await made.append_each("q", 1, one("b")) == each
    assert (await made.append("p", 2, "c")).status == "SEALED"
    assert (await made.append("r", 1, "d")).status == "SEALED"
    assert (await made.append_each("q", 2, one("e"))).status == "SEALED"
    assert await made.values() == ["a", "b"]
    dump = await made.dumps()
    await made.seal()
    assert await made.dumps() == dump


async def test_a_dedupe_id_sent_before_the_split_is_known_after_it(made: Split) -> None:
    first = await made.append_each("p", 1, one("a", once="id", window_ms=60_000))
    await made.seal()
    again = await made.child.append_each("q", 1, one("a", once="id", window_ms=60_000))
    assert again.entries == (f"0/{first.entries[0]}",), "the entry is on the parent, whoever is asked"
    assert await made.child.values() == []


async def test_a_dedupe_id_names_the_shard_of_its_entry_to_all_but_that_shard(made: Split) -> None:
    await made.seal()
    sibling = Rig(made.client, made.keys.queue, made.shard.slot)
    sibling.shard = made.children[1]
    item = one("a", once="id", window_ms=60_000)
    first = await made.child.append_each("p", 1, item, item)
    assert first.entries == (first.entries[0],) * 2, "the second one of a call is the first one"
    assert "/" not in first.entries[0]
    assert (await made.child.append_each("p", 1, item, item)).entries == first.entries
    assert (await made.child.append_each("q", 1, item)).entries == first.entries[:1]
    told = await sibling.append_each("p", 1, item)
    assert told.entries == (f"1/{first.entries[0]}",)
    assert (await sibling.append_each("p", 1, item)).entries == told.entries, "a repeated call has the same answer"
    assert await sibling.values() == []


async def test_delayed_messages_have_names_of_their_own_in_the_whole_home(made: Split) -> None:
    await made.command("HSET", made.shard.meta, "delayed_next", 41)  # by an older build
    first = await made.append_each("p", 1, one("a", when="in:60000"))
    await made.seal()
    second = await made.child.append_each("p", 1, one("b", when="in:60000"))
    assert (first.entries, second.entries) == (("d1000000000000042",), ("d1000000000000043",))


async def test_ticks_of_a_schedule_are_known_on_the_children(made: Split) -> None:
    assert await schedules.append_tick(made.pipes, made.shard, "s", 60, batch(), None) == "OK"
    await schedules.open_ticks(made.pipes, made.shard, "moved", 30, None)
    assert await schedules.close_ticks(made.pipes, made.shard, "moved", 500, None) == 30
    await made.seal()
    for child in made.children:
        assert await schedules.last_tick(made.pipes, child, "s") == (60, False)
        assert await schedules.last_tick(made.pipes, child, "moved") == (500, True)
        assert await schedules.append_tick(made.pipes, child, "s", 60, batch(), None) == "OK"
        assert await made.command("XLEN", child.stream) == 0
        assert await schedules.append_tick(made.pipes, child, "s", 120, batch(), None) == "OK"
    await made.seal()
    assert await schedules.last_tick(made.pipes, made.children[0], "s") == (120, False)


@pytest.mark.parametrize("first", [0, 1])
async def test_a_merge_takes_the_later_ticks_and_an_open_schedule_before_a_closed_one(made: Split, first: int) -> None:
    left, right = made.children
    await schedules.open_ticks(made.pipes, left, "s", 60, None)
    await schedules.close_ticks(made.pipes, left, "s", 500, None)
    await schedules.open_ticks(made.pipes, right, "s", 90, None)
    for shard, tick in ((left, 10), (right, 20)):
        await schedules.open_ticks(made.pipes, shard, "t", tick, None)
    merged = made.keys.shard(3, made.plan.table.by_id[0].tag, 0)
    await reshard.open_child(made.pipes, merged, [0, 1, 2], 0, {})
    for parent in (made.children[first], made.children[1 - first]):
        await reshard.seal(made.pipes, parent, [merged])
    assert await schedules.last_tick(made.pipes, merged, "s") == (90, False)
    assert await schedules.last_tick(made.pipes, merged, "t") == (20, False)


async def test_a_sealed_shard_says_so_to_who_moves_a_schedule(made: Split) -> None:
    await made.seal()
    assert await made.call("open_ticks", [made.shard.meta], "cron/s", 1) == [b"SEALED"]
    assert await made.call("close_ticks", [made.shard.meta], "cron/s", 1) == [b"SEALED"]


async def test_a_shard_that_is_gone_can_not_be_sealed(made: Split) -> None:
    await made.command("DEL", made.shard.meta)
    with pytest.raises(UnknownQueue, match="is gone"):
        await made.seal()


def batch() -> bytes:
    return one("tick").batch


# -- children ----------------------------------------------------------------------------------------------------------


async def test_a_child_that_exists_is_left_alone(made: Split) -> None:
    await made.child.stored("p", 1, "a")
    await made.command("HSET", made.children[0].meta, "parents", "")
    assert not await reshard.open_child(made.pipes, made.children[0], [0], 9, {"max_backlog": 1})
    assert await made.child.meta("parents") == ""
    assert await made.child.meta("max_backlog") is None


# -- delayed messages --------------------------------------------------------------------------------------------------


async def test_delayed_messages_move_with_their_time(made: Split) -> None:
    items = [one(value, when=f"at:{10**13 + n}") for n, value in enumerate("abc")]
    names = (await made.append_each("p", 1, *items)).entries
    await made.seal()
    moves = [(names[0], 0), (names[1], 1)]
    for _ in range(2):
        assert await reshard.move_delayed(made.pipes, made.shard, made.children, moves, []) == 1
        for child, at, name in zip(made.children, (10**13, 10**13 + 1), names, strict=False):
            assert await made.command("ZRANGE", child.delayed, 0, -1) == [name.encode(), b""]
            assert await made.command("HMGET", child.meta, "delayed", "due") == [b"1", str(at).encode()]
    assert await made.command("HMGET", made.shard.meta, "delayed", "due") == [b"1", str(10**13 + 2).encode()]
    assert [name for name, _ in await reshard.delayed_batches(made.pipes, made.shard, 0)] == [names[2]]
    assert await reshard.move_delayed(made.pipes, made.shard, made.children, [(names[2], 0)], []) == 0
    assert await made.command("HMGET", made.shard.meta, "delayed", "due") == [b"0", None]
    assert await reshard.delayed_batches(made.pipes, made.shard, 0) == []


async def test_a_moved_message_comes_out_of_the_child_when_it_is_due(made: Split) -> None:
    ((name,),) = [(await made.append_each("p", 1, one("a", when="in:100"))).entries]
    await made.seal()
    await reshard.move_delayed(made.pipes, made.shard, made.children, [(name, 0)], [])
    assert await made.promote() == (0, None)
    while (await made.child.promote())[0] == 0:
        pass
    assert await made.child.values() == ["a"]


@pytest.mark.parametrize("gone", ["parent", "child"])
async def test_nothing_moves_from_or_to_a_shard_that_is_gone(made: Split, gone: str) -> None:
    (name,) = (await made.append_each("p", 1, one("a", when="in:60000"))).entries
    await made.command("DEL", made.shard.meta if gone == "parent" else made.children[1].meta)
    with pytest.raises(UnknownQueue):
        await reshard.move_delayed(made.pipes, made.shard, made.children, [(name, 0)], [])
    assert await made.command("ZCARD", made.shard.delayed) == 2


# -- retiring ----------------------------------------------------------------------------------------------------------


async def test_a_shard_is_retired_when_nobody_needs_it(made: Split) -> None:
    token = await made.own()
    assert await made.retire() == reshard.Retired("BUSY", "open")
    await made.stored("p", 1, "a", "b")
    (name,) = (await made.append_each("q", 1, one("c", when="in:60000"))).entries
    await made.seal()
    assert await made.retire(group=()) == reshard.Retired("CHANGED")
    assert await made.retire() == reshard.Retired("BUSY", "backlog", "g", 3)
    (entry,) = await made.fetch(token)
    await made.step(token, finished=[entry], acked=1, dead=[(1, b"record")])
    assert (await made.retire()).why == "backlog"
    await reshard.move_delayed(made.pipes, made.shard, made.children, [(name, 0)], [])
    assert await made.retire() == reshard.Retired("BUSY", "dead", "g", 1)
    await made.command("DEL", made.shard.dead("g"))
    assert await made.retire() == reshard.Retired("BUSY", "producers")
    assert await made.meta("state") == "sealed"
    assert await reshard.remove_retired(made.pipes, made.shard, ["g"], unused=False) == "BUSY"
    await made.forget_producers()
    for _ in range(2):
        assert await made.retire() == reshard.Retired("OK")
    assert [await made.command("HGET", child.meta, "parents") for child in made.children] == [b"", b""]
    assert (await made.gated()).status == "OK"
    for status in ("CHANGED", "OK", "ABSENT"):
        named = [] if status == "CHANGED" else ["g"]
        assert await reshard.remove_retired(made.pipes, made.shard, named, unused=False) == status
    assert await made.retire() == reshard.Retired("MISSING")
    assert await made.command("EXISTS", made.shard.timed, made.shard.expiring) == 2


async def test_what_is_stored_or_delayed_without_a_group_stays(made: Split) -> None:
    await groups.delete_group(made.pipes, made.shard, "g", force=False)
    await made.stored("p", 1, "a")
    await made.append_each("q", 1, one("b", when="in:60000"))
    await made.seal()
    assert await made.retire(group=()) == reshard.Retired("BUSY", "delayed", "", 1)
    await made.command("ZREMRANGEBYSCORE", made.shard.delayed, 0, 10**15)
    assert await made.retire(group=()) == reshard.Retired("BUSY", "stored", "", 1)
    await made.tune(retention_ms=1)
    while (await made.retire(group=())).why == "stored":
        pass
    assert (await made.retire(group=())).why == "producers"


async def test_a_message_whose_bytes_are_to_go_keeps_the_shard(made: Split) -> None:
    await made.seal()
    await made.command("HSET", made.shard.meta, "deleted", "1-1/0")
    assert (await made.retire()).why == "deleted"


async def test_nothing_begins_on_a_shard_that_is_about_to_go(made: Split) -> None:
    await made.seal()
    assert (await made.retire()).status == "OK"
    with pytest.raises(UnknownQueue):
        await made.open_group("late")
    with pytest.raises(UnknownQueue):
        await groups.reset_group(made.pipes, made.shard, "g", Start(), "r", force=True)
    with pytest.raises(UnknownGroup):
        await made.replay(("1-1", 1, [(b"k", b"record")]))
    assert (await made.append("p", 1, "a")).status == "SEALED"


async def test_a_child_of_a_plan_that_was_given_up_goes_while_it_is_unused(made: Split) -> None:
    await made.child.stored("p", 1, "a")
    assert await reshard.remove_retired(made.pipes, made.children[0], ["g"], unused=True) == "BUSY"
    assert await reshard.remove_retired(made.pipes, made.children[1], ["g"], unused=False) == "BUSY"
    assert await reshard.remove_retired(made.pipes, made.children[1], ["g"], unused=True) == "OK"


# -- the routing hash --------------------------------------------------------------------------------------------------


async def declared(made: Split) -> Reshard:
    await queues.declare(made.pipes, made.keys, 1, RoutingTable.equal(1).to_bytes(), b"")
    return made.plan


async def test_one_plan_at_a_time(made: Split) -> None:
    assert (await reshard.begin(made.pipes, made.keys, made.plan))[0] == "MISSING"
    plan = await declared(made)
    other = split(RoutingTable.equal(1), 0, into=3)
    for _ in range(2):
        assert await reshard.begin(made.pipes, made.keys, plan) == ("OK", b"")
    assert await reshard.begin(made.pipes, made.keys, other) == ("BUSY", plan.to_bytes())
    stored = await queues.stored_queue(made.pipes, made.keys)
    assert stored is not None
    assert stored.reshard == plan.to_bytes()
    for _ in range(2):
        assert await reshard.commit(made.pipes, made.keys, plan.to_bytes())
    for _ in range(2):
        assert await reshard.end(made.pipes, made.keys, plan.to_bytes(), plan.table) == "OK"
    assert await reshard.begin(made.pipes, made.keys, other) == ("CHANGED", b"")
    assert not await reshard.commit(made.pipes, made.keys, plan.to_bytes())
    assert await reshard.end(made.pipes, made.keys, plan.to_bytes(), other.given_up()) == "GONE"
    stored = await queues.stored_queue(made.pipes, made.keys)
    assert stored is not None
    assert (stored.reshard, stored.table) == (b"", plan.table.to_bytes())


async def test_a_plan_is_given_up_only_before_it_is_committed(made: Split) -> None:
    plan = await declared(made)
    await reshard.begin(made.pipes, made.keys, plan)
    await reshard.commit(made.pipes, made.keys, plan.to_bytes())
    after = plan.given_up()

    async def give_up() -> str:
        return await reshard.end(made.pipes, made.keys, plan.to_bytes(), after, given_up=True, leaving=[1, 2])

    assert await give_up() == "HELD"
    await made.pipes.command(made.keys.control_slot, b"*3\r\n$4\r\nHDEL\r\n" + bulk(made.keys.routing, "committed"))
    for _ in range(2):
        assert await give_up() == "OK"
    assert await reshard.leaving(made.pipes, made.keys) == [1, 2]
    await reshard.left(made.pipes, made.keys, 1)
    assert await reshard.leaving(made.pipes, made.keys) == [2]


def bulk(*parts: str) -> bytes:
    return b"".join(f"${len(part)}\r\n{part}\r\n".encode() for part in parts)


async def test_a_retired_shard_is_forgotten_from_the_table_that_was_read(made: Split) -> None:
    plan = await declared(made)
    await reshard.begin(made.pipes, made.keys, plan)
    await reshard.commit(made.pipes, made.keys, plan.to_bytes())
    await reshard.end(made.pipes, made.keys, plan.to_bytes(), plan.table)
    after = plan.table.without(0)
    newer = RoutingTable(5, after.shards, after.retired, after.removed)
    assert not await reshard.forget_shard(made.pipes, made.keys, after, newer, 0)
    other = split(plan.table, 1)
    await reshard.begin(made.pipes, made.keys, other)
    assert not await reshard.forget_shard(made.pipes, made.keys, plan.table, after, 0)
    assert await reshard.end(made.pipes, made.keys, other.to_bytes(), other.given_up(), given_up=True) == "OK"
    now = other.given_up()
    for _ in range(2):
        assert await reshard.forget_shard(made.pipes, made.keys, now, now.without(0), 0)
    assert await reshard.leaving(made.pipes, made.keys) == [0]


@pytest.mark.parametrize(
    ("function", "keys", "args"),
    [
        ("begin_reshard", 1, ["", 1]),
        ("begin_reshard", 1, ["plan", "x"]),
        ("commit_reshard", 1, []),
        ("end_reshard", 1, ["plan", "", "x", "table", ""]),
        ("forget_shard", 1, [1, 2, "table", "x"]),
        ("open_child", 5, ["x", 0]),
        ("open_child", 5, ["0"]),
        ("seal", 1, []),
        ("move_delayed", 4, ["", "bell", "name", 1]),
        ("move_delayed", 4, ["", "bell", "d1", 2]),
        ("move_delayed", 4, ["", "bell", "d1"]),
        ("retire", 3, ["0", 1, "g"]),
        ("retire", 3, ["x", 0]),
        ("remove_retired", 3, ["", "bell", "g"]),
        ("acquire", 2, ["w", "n", 0, "", "", "", "bell"]),
    ],
)
async def test_bad_arguments_are_misuse(made: Split, function: str, keys: int, args: list[str | int]) -> None:
    named = [f"{made.shard.meta}:{n}" for n in range(keys)]
    with pytest.raises(shardq.errors.StoreRefused, match="SHARDQ_MISUSE"):
        await made.call(function, named, *args)


async def test_shards_of_a_home_share_what_waits_for_its_time(cluster: LocalCluster, queue_name: str) -> None:
    async with rig(cluster.url, queue_name) as made:
        child: ShardKeys = made.keys.shard(5, "0", 0)
        home = made.keys.shard(0, "0")
        assert (child.timed, child.expiring, child.data("x")) == (home.timed, home.expiring, home.data("x"))
        own = {child.stream, child.meta, child.delayed, child.bell, *child.of_group("g")}
        assert not own & {home.stream, home.meta, home.delayed, home.bell, *home.of_group("g")}
        assert (child.is_child, home.is_child) == (True, False)
