"""Replies of functions and commands, by what reads them: a reader is given any reply, as Redis might have sent it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import anyio

from shardq.core.later import Later
from shardq.core.limits import parse_limit
from shardq.core.message import Ownership
from shardq.core.reshard import split
from shardq.core.routing import RoutingTable
from shardq.core.servers import parse_info
from shardq.core.session import Session
from shardq.core.slots import tag_for_slot
from shardq.core.step import NEW, Step
from shardq.errors import CorruptData, LeaseLost, ShardqError, UnknownGroup, UnknownQueue, UnsafeStore
from shardq.runtime import delete
from shardq.runtime.dead import DeadLetters
from shardq.runtime.history import Pager
from shardq.storage import appends, calls, control, counters, dead, groups, limits, queues, removal, reshard, schedules
from shardq.storage.bells import _told
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from shardq.storage.safety import check_info

KEYS = Keys("shardq", "orders")
SHARD = KEYS.shard(3, tag_for_slot(0))
LIMIT = parse_limit("limit", "100/s")
PLAN = split(RoutingTable.equal(1), 0)


class _Answer:
    """In the place of Pipes: answers everything with one reply."""

    cluster = SimpleNamespace(least_replicas=lambda: 0)

    def __init__(self, reply: Any) -> None:
        self._reply = reply

    async def call(self, *_: Any, **__: Any) -> Any:
        return self._reply

    async def taken(self, _slot: int, _data: bytes, take: Callable[[Any], Any], **_: Any) -> Any:
        return take(self._reply)

    async def command(self, *_: Any, **__: Any) -> Any:
        return self._reply

    async def commands(self, commands: Sequence[object], **_: Any) -> list[Any]:
        return [self._reply for _ in commands]


def as_reply(value: Any) -> Any:
    """What RESP can carry of a msgpack value: bytes, ints, nil and lists of these."""
    if isinstance(value, str):
        return value.encode(errors="replace")
    if isinstance(value, (list, tuple)):
        return [as_reply(item) for item in value]
    if isinstance(value, dict):
        return [as_reply(part) for pair in value.items() for part in pair]
    return value if isinstance(value, (bytes, int)) and not isinstance(value, bool) else None


Ask = Callable[[Pipes], Coroutine[Any, Any, object]]


def run(ask: Ask, reply: Any) -> object:
    """The coroutine's result: it waits for nothing but the reply."""
    coroutine = ask(cast("Pipes", _Answer(reply)))
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    except anyio.NoEventLoopError:
        return None  # it would ask again after a pause
    finally:
        coroutine.close()
    raise AssertionError("it waits for something else")


@dataclass(frozen=True)
class Reply:
    """`ask` reads a reply or raises one of `errors`; `seeds` are replies that it takes."""

    ask: Ask
    seeds: Sequence[Any]
    errors: tuple[type[ShardqError], ...] = (CorruptData, UnknownQueue, UnknownGroup)

    def read(self, reply: Any) -> object:
        return run(self.ask, reply)


def _content() -> Step:
    return Step(1, NEW, 10, 0, True, 0, 0, [], [], [], gets=[1, 2])


async def _step(pipes: Pipes) -> None:
    """The reply, and what a session makes of it."""
    content = _content()
    stepped = await calls.step(pipes, SHARD, "g", "1:n", content, renew=False, wait=False, timeout_s=1.0)
    if stepped.status != "OK":
        return
    for cursor in (NEW, "0-0"):
        content.cursor = cursor
        later = Later(by_key=True, lane_busy=lambda _: False)
        session = Session(Ownership("orders", "g", 3, 1, "n"), 1, later, lambda *_: b"")
        later.learn([b"1:0:0:ka", b"2:0:0:"], 3, 0, 0.0)
        later.take_due(0.0, 2, lambda: True)
        session.receive(content, stepped.fetched, 0.0)


async def _dead_letter(pipes: Pipes) -> None:
    letters = DeadLetters.__new__(DeadLetters)
    letters._pipes, letters._shards, letters._group = pipes, {3: SHARD}, "g"
    await letters._read("3/1-1")


async def _page(pipes: Pipes) -> None:
    await Pager(pipes, SHARD, "-", "+", 1000, timeout_s=1.0).page()


async def _told_of(pipes: Pipes) -> None:
    _told(await pipes.command(0, b""))


async def _info(pipes: Pipes) -> None:
    reply = await pipes.command(0, b"")
    info = parse_info(reply.decode(errors="replace")) if isinstance(reply, bytes) else {}
    check_info("node", info)


async def _append(pipes: Pipes) -> None:
    appends.read_append(await pipes.command(0, b""))


async def _append_each(pipes: Pipes) -> None:
    appends.read_append(await pipes.command(0, b""), each=2)


async def _beat(pipes: Pipes) -> None:
    watch = ["*"]
    found = await control.beat(
        pipes,
        KEYS,
        "g",
        worker="w",
        nonce="n",
        beats=1,
        leaving=False,
        term=0,
        plan_version=0,
        watch=watch,
        timeout_s=1.0,
    )
    if isinstance(found, control.Beat):
        sorted(found.members)


def _batch() -> bytes:
    return bytes((1, 0, 0, 1)) + b"\x95\x00\xc0\x91\xc0\x91\xc0\xc0"


_ENTRIES = [[b"1-1", [b"at", b"0", b"batch", _batch()]], [b"1-2", [b"name", b"value"]]]
_STEP = [b"OK", b"", _ENTRIES, [], b"3", b"", b"", b"1795231414661", [b"1:2:0:ka"], [b"", b"x"]]
_PENDING = [b"OK", b"n", _ENTRIES, [b"1:", b"2:\x01"], b"3", b"5", b"7", b"1", [], [b"", b""]]
_GROUP = [[b"w", b"5", b"5:n", b"1", b"", b"0", *[b"1"] * 6, b"1-1", b"0", b"0", b"0"], 2, b"1-1", b"", 0, 3, 0, b"1-1"]
_META = [b"open", b"7", b"900", b"g", b"", b""]

REPLIES: dict[str, Reply] = {
    "step": Reply(
        _step,
        [_STEP, _PENDING, [b"REPEAT", b""], [b"EFFECT", b"1", b"WRONGTYPE x"], [b"FULL", b"1"]],
        (CorruptData, LeaseLost),
    ),
    "append": Reply(_append, [[b"OK", b"1-1", b"0"], [b"SEALED"], [b"FULL", b"block"], [b"STALE", b"7"]]),
    "append_each": Reply(_append_each, [[b"OK", b"1-1", b"d1"], [b"MISSING"]]),
    "open_shard": Reply(lambda pipes: calls.open_shard(pipes, SHARD), [[b"CREATED"], [b"EXISTS"]]),
    "promote": Reply(
        lambda pipes: calls.promote(pipes, SHARD, most=1, timeout_s=1.0), [[b"OK", 1, b"5"], [b"MISSING"]]
    ),
    "trim": Reply(lambda pipes: calls.trim(pipes, SHARD, "1-1"), [[b"OK", 3], [b"MISSING"]]),
    "tidy": Reply(lambda pipes: calls.tidy(pipes, SHARD, timeout_s=1.0), [[b"OK", b"1"]]),
    "acquire": Reply(
        lambda pipes: calls.acquire(pipes, SHARD, "g", "w", "n", 0, None, timeout_s=1.0, confirm=None),
        [
            [b"OK", b"5", b"0"],
            [b"HELD", b"5", b"1", b"w", b"", b"abc"],
            [b"OLDPLAN", b"9"],
            [b"GATED", b"3", b"7"],
            [b"GATED", b"", b"0"],
        ],
    ),
    "lease": Reply(
        lambda pipes: calls.lease_call(pipes, SHARD, "g", "release", ["1:n"], timeout_s=1.0),
        [[b"OK"], [b"FENCED", b"7"]],
    ),
    "inspect": Reply(
        lambda pipes: counters.inspect(pipes, SHARD, ["g"]), [[b"OK", b"1", 2, b"1-1", _META, _GROUP], [b"MISSING"]]
    ),
    "stored queue": Reply(
        lambda pipes: queues.stored_queue(pipes, KEYS),
        [[b"\x01", b"\x01", b"5", None, None], [b"\x01", b"\x01", b"5", b"\x01", b"1"], [None] * 5],
    ),
    "begin_reshard": Reply(lambda pipes: reshard.begin(pipes, KEYS, PLAN), [[b"OK"], [b"BUSY", b"\x01"], [b"MISSING"]]),
    "commit_reshard": Reply(lambda pipes: reshard.commit(pipes, KEYS, b"\x01"), [[b"OK"], [b"GONE"]]),
    "end_reshard": Reply(lambda pipes: reshard.end(pipes, KEYS, b"\x01", PLAN.table), [[b"OK"], [b"GONE"], [b"HELD"]]),
    "forget_shard": Reply(
        lambda pipes: reshard.forget_shard(pipes, KEYS, PLAN.table, PLAN.table.without(0), 0),
        [[b"OK"], [b"CHANGED", b"3"]],
    ),
    "open_child": Reply(lambda pipes: reshard.open_child(pipes, SHARD, [0], 1, {}), [[b"CREATED"], [b"EXISTS"]]),
    "seal": Reply(lambda pipes: reshard.seal(pipes, SHARD, [SHARD]), [[b"OK"], [b"MISSING"]]),
    "groups_of": Reply(lambda pipes: reshard.groups_of(pipes, SHARD), [[b"open", b"g h"], [None, None]]),
    "delayed_batches": Reply(lambda pipes: reshard.delayed_batches(pipes, SHARD, 0), [[b"", b"d1"], []]),
    "move_delayed": Reply(
        lambda pipes: reshard.move_delayed(pipes, SHARD, [SHARD], [("d1", 0)], []), [[b"OK", 1, 2], [b"MISSING"]]
    ),
    "retire": Reply(
        lambda pipes: reshard.retire(pipes, 3, SHARD, ["g"], []),
        [[b"OK"], [b"BUSY", b"dead", b"g", b"5"], [b"MISSING"], [b"CHANGED"]],
    ),
    "remove_retired": Reply(lambda pipes: reshard.remove_retired(pipes, SHARD, [], unused=True), [[b"OK"], [b"BUSY"]]),
    "leaving": Reply(lambda pipes: reshard.leaving(pipes, KEYS), [[b"version", b"leaving:7"]]),
    "declare": Reply(
        lambda pipes: queues.declare(pipes, KEYS, 1, b"", b""), [[b"CREATED", b"1", b"\x01", b"\x01", b"5"]]
    ),
    "settings": Reply(lambda pipes: queues.put_settings(pipes, KEYS, 1, b""), [[b"OK", b"5"], [b"CHANGED"]]),
    "tune": Reply(lambda pipes: queues.tune(pipes, SHARD, 1, {}), [[b"OK"], [b"MISSING"]]),
    "schedules version": Reply(lambda pipes: schedules.version(pipes, KEYS), [b"5", None]),
    "schedules": Reply(lambda pipes: schedules.read_all(pipes, KEYS), [[b"", b"5", b"a", b"\x80"]]),
    "schedule": Reply(lambda pipes: schedules.read_one(pipes, KEYS, "a"), [b"\x80", None]),
    "swap_schedule": Reply(lambda pipes: schedules.swap(pipes, KEYS, "a", b"", b"x", None), [[b"OK"], [b"CHANGED"]]),
    "close_ticks": Reply(lambda pipes: schedules.close_ticks(pipes, SHARD, "a", 5, None), [[b"OK", b"5"]]),
    "open_ticks": Reply(lambda pipes: schedules.open_ticks(pipes, SHARD, "a", 5, None), [[b"OK"], [b"MISSING"]]),
    "last tick": Reply(lambda pipes: schedules.last_tick(pipes, SHARD, "a"), [b"60:1-1:0", b"60|1-0|60", None]),
    "append_tick": Reply(
        lambda pipes: schedules.append_tick(pipes, SHARD, "a", 60, b"", None), [[b"OK", b"1-1", b"0"]]
    ),
    "beat": Reply(_beat, [[b"OK", b"1", b"n", b"5", b"2", b"", [b"w", b"n:5:active"]], [b"REPLACED"], [b"GONE"]]),
    "control": Reply(
        lambda pipes: control.control_call(pipes, KEYS, "g", "lead", [], timeout_s=1.0), [[b"OK", b"7"], [b"DEPOSED"]]
    ),
    "control state": Reply(
        lambda pipes: control.control_state(pipes, KEYS, "g"),
        [[b"m:w", b"n:5:leaving", b"term", b"5", b"leader", b"w"]],
    ),
    "take": Reply(
        lambda pipes: limits.take(pipes, KEYS, "g", LIMIT, 5, timeout_s=1.0),
        [[b"OK", b"3", b"-5", b"100", b"1000000", b"150000", b"0"], [b"OK", b"0", b"5", b"1", b"1", b"0", b"7"]],
    ),
    "take_keys": Reply(
        lambda pipes: limits.take_keys(pipes, SHARD, "g", LIMIT, [(b"ka", 2), (b"kb", 1)], timeout_s=1.0),
        [[b"OK", b"2", b"-5", b"0", b"0", b"5", b"7"]],
    ),
    "dead letters": Reply(lambda pipes: dead.read_dead(pipes, SHARD, "g", "-", 10), [[[b"1-1", [b"count", b"1"]]]]),
    "dead letter": Reply(_dead_letter, [[[b"1-1", [b"count", b"1", b"record", b"\x80"]]], []]),
    "replay": Reply(lambda pipes: dead.replay(pipes, SHARD, "g", []), [[b"OK", 1], [b"MISSING"]]),
    "purge": Reply(lambda pipes: dead.purge(pipes, SHARD, "g", ["1-1"]), [[b"OK", 1]]),
    "open_group": Reply(
        lambda pipes: groups.open_group(pipes, SHARD, "g", groups.Start()), [[b"CREATED", b"5"], [b"EXISTS"]]
    ),
    "reset_group": Reply(
        lambda pipes: groups.reset_group(pipes, SHARD, "g", groups.Start(), "r", force=True),
        [[b"HELD", b"w"], [b"OK", b"5"]],
    ),
    "delete_group": Reply(lambda pipes: groups.delete_group(pipes, SHARD, "g", force=True), [[b"OK"], [b"ABSENT"]]),
    "group standing": Reply(
        lambda pipes: groups.group_standing(pipes, SHARD, "g"),
        [[b"open", b"g h", b"5"], [b"open", None, None], [None] * 3],
    ),
    "remove_shard": Reply(
        lambda pipes: removal.remove_shard(pipes, SHARD, ["g"], force=True), [[b"OK"], [b"HELD", b"w", b"g"]]
    ),
    "marked groups": Reply(lambda pipes: removal.marked_groups(pipes, KEYS), [[b"1", b"a b"], [None, None]]),
    "marks": Reply(lambda pipes: delete.read_marks(pipes, SHARD), [[b"7", b"1-1/0 1-2/5"], [None, None]]),
    "redact": Reply(lambda pipes: delete.redact_marked(pipes, SHARD, [("1-1", 0)]), [_ENTRIES, [b"OK"]]),
    "groups": Reply(lambda pipes: delete._groups(pipes, SHARD), [[b"open", b"a b"]]),
    "seen marks": Reply(lambda pipes: delete._wait_for_owner(pipes, SHARD, "g", 0), [[b"", None], [b"1:n", b"5"]]),
    "page": Reply(_page, [_ENTRIES, []]),
    "push": Reply(_told_of, [[b"smessage", b"c", b"x"], [b"ssubscribe", b"c", 1], [b"pmessage", b"p", b"c", b"x"]]),
    "info": Reply(
        _info, [b"redis_version:7.0.15\r\ncluster_enabled:1\r\nmaxmemory_policy:noeviction\r\n"], (UnsafeStore,)
    ),
}
