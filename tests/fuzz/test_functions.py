"""The functions of the library on broken keys and arguments: each answers as its header says, or refuses without having
changed anything, with an error that the client has a ShardqError for. Never a Lua error, never half of its writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardq.errors import CorruptData, ShardqError
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.trouble import classify
from tests.fuzz.lua import BELL, TYPES, Bench, FunctionCall, batch

EXAMPLES = {"redis7": 1500, "redis8": 300, "valkey9": 300}
STATUS = {
    *(
        "OK",
        "CREATED",
        "EXISTS",
        "CHANGED",
        "MISSING",
        "NEWER",
        "SEALED",
        "FULL",
        "STALE",
        "REPEAT",
        "FENCED",
        "EFFECT",
    ),
    *("UNFINISHED", "GONE", "HELD", "ABSENT", "OLDPLAN", "FREE", "OWNED", "NOHEIR", "REPLACED", "DEPOSED"),
    *("BUSY", "GATED"),
}
VALUES = [
    *("", "-1", "x", "nan", "-nan", "inf", "-inf", "1e400", "9007199254740993", "99999999999999999999", "1.5", " 5"),
    *("0x10", "1e3", "0-0", "1-", "-", "*", "+", "$", "18446744073709551615-18446744073709551615", "0", "5", "g h i"),
    *("99999999999999999999-1", "5:1-1:0", "5|1-0|x", "a:b:c", "7:", "|", "p" * 300, "1-1:0:1:kx", "9" * 400, "1\0"),
    b"\xff\xfe\x00",
]
FIELDS = [
    *(
        "p:p",
        "p:q",
        "x:1-1",
        "floor:g",
        "last:g",
        "fin:g",
        "skip:g",
        "o:again",
        "waiting",
        "retention_ms",
        "due",
        "groups",
    ),
    *(
        "retention_bytes",
        "deleted",
        "dropped",
        "erased",
        "refused",
        "max_backlog",
        "reset",
        "later_next",
        "marks",
        "base",
    ),
    *("delivered", "delayed", "delayed_next", "bytes", "appended", "epoch", "token", "step", "version", "m:w", "term"),
    *("rebalances", "plan_version", "settings_version", "p:cron/nightly", "1", "2", ""),
]
MEMBERS = ["x", "1:2:3:kx", "1:-1:x:kx", "d1", "1:99999999999999999999:99999999999999999999:", ""]
SCORES = [0.0, 1.0, 2.0, -5.0, 1e300, float("inf"), float("-inf"), 1.5, float((1 << 53) + 2)]
ENTRIES = [
    {"a": b"b"},
    {"at": b"x", "batch": b"y"},
    {"at": b"-5", "batch": batch()},
    {"at": b"99999999999999999", "batch": batch()},
    {"at": b"1", "batch": batch(7)},
    {"at": b"nan", "batch": batch()},
    {"at": b"1", "foo": b"x", "batch": b""},
    {"count": b"x", "record": b"\xc1"},
]
IDS = ["*", "99999999999999-5", "18446744073709551615-18446744073709551615"]


class Break(NamedTuple):
    """One thing that is wrong: `at` picks which key or argument, `how` what becomes of it."""

    where: str
    at: int
    how: int
    value: str | bytes


BREAKS = st.lists(
    st.builds(
        Break,
        st.sampled_from(["type", "gone", "content", "content", "argument", "argument", "arguments", "keys"]),
        st.integers(0, 60),
        st.integers(0, 1 << 16),
        st.sampled_from(VALUES),
    ),
    min_size=1,
    max_size=3,
)


def break_content(bench: Bench, key: str, one: Break) -> None:
    """Puts into the key what its type can hold and shardq would not write."""
    full, kind = bench.keys[key], TYPES[key]
    if kind == "hash":
        bench.node.hset(full, FIELDS[one.how % len(FIELDS)], one.value)
    elif kind == "zset":
        bench.node.zadd(full, {MEMBERS[one.how % len(MEMBERS)]: SCORES[one.how // 8 % len(SCORES)]})
    elif kind == "stream":
        fields = ENTRIES[one.how % len(ENTRIES)]
        bench.node.execute_command(
            "XADD", full, IDS[one.how // 8 % 3], *(part for pair in fields.items() for part in pair)
        )
    else:
        bench.node.set(full, one.value)


def broken(bench: Bench, call: FunctionCall, breaks: list[Break]) -> FunctionCall:
    keys, args = list(call.keys), list(call.args)
    for one in breaks:
        key = keys[one.at % len(keys)] if keys else ""
        if one.where == "type" and key:
            bench.node.delete(bench.keys[key])
            bench.node.rpush(bench.keys[key], one.value)
        elif one.where == "gone" and key:
            bench.node.delete(bench.keys[key])
        elif one.where == "content" and key:
            try:
                break_content(bench, key, one)
            except redis.ResponseError:
                pass  # the key was broken in another way before
        elif one.where == "argument" and args and args[one.at % len(args)] != BELL:
            args[one.at % len(args)] = one.value
        elif one.where == "arguments":
            args = args[: one.at] if one.how % 2 else [*args, one.value]
        elif one.where == "keys" and keys:
            keys = keys[: one.at % len(keys)] if one.how % 2 else [*keys, key]
    return FunctionCall(call.function, keys, args)


@pytest.fixture
def bench(cluster: LocalCluster, queue_name: str) -> Iterator[Bench]:
    made = Bench("127.0.0.1", cluster.ports[0], queue_name)
    yield made
    made.close()


def judge(bench: Bench, call: FunctionCall) -> ShardqError | None:
    """Calls; returns what it was refused with. Fails for what no function may do."""
    before = bench.dump()
    reply = answer_of(bench, call)
    if not isinstance(reply, redis.ResponseError):
        assert isinstance(reply, int) or reply[0].decode() in STATUS
        return None
    # A channel of another slot (in the place of the bell): Redis says so only when it is rung.
    if "non local key" in str(reply) or "the same slot" in str(reply):
        return None
    assert not re.search(r"^user_function|attempt to|bad argument|BUSY", str(reply)), reply
    assert bench.dump() == before, f"refused, and yet changed: {reply}"
    return classify(reply, "a:1").error


def answer_of(bench: Bench, call: FunctionCall) -> Any:
    try:
        return bench.run(call.function, call.keys, *call.args)
    except redis.ResponseError as error:
        return error


def test_every_function_is_called(bench: Bench) -> None:
    scripts = (path.read_text(encoding="utf-8") for path in Path(str(files("shardq.storage"))).glob("**/*.lua"))
    registered = {name for text in scripts for name in re.findall(r"shardq_1_(\w+)'", text)}
    assert {call.function for call in bench.calls} == registered
    for call in bench.calls:
        bench.restore(bench.sound)
        assert judge(bench, call) is None


def test_a_broken_call_is_refused_whole(bench: Bench, server_kind: str) -> None:
    @settings(max_examples=EXAMPLES[server_kind], suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(bench.calls), BREAKS)
    def check(call: FunctionCall, breaks: list[Break]) -> None:
        bench.restore(bench.sound)
        error = judge(bench, broken(bench, call, breaks))
        assert error is None or isinstance(error, ShardqError)

    check()


def call_named(bench: Bench, function: str, nth: int = 0) -> FunctionCall:
    return [call for call in bench.calls if call.function == function][nth]


@pytest.mark.parametrize(
    ("function", "nth", "key"),
    [
        *(("step", 2, key) for key in ("stream", "meta", "dead", "later", "kept", "expiring", "timed")),
        *(("append_each", 0, key) for key in ("delayed", "expiring", "timed")),
        *(("open_shard", 0, key) for key in ("meta", "expiring", "timed")),
        ("tidy", 0, "stream"),
        ("forget", 0, "timed"),
        ("delete_group", 0, "meta"),
    ],
)
def test_a_key_of_another_type_is_said_to_be_corrupt(bench: Bench, function: str, nth: int, key: str) -> None:
    """Redis would refuse only the command that meets it, when others have run."""
    bench.node.delete(bench.keys[key])
    bench.node.set(bench.keys[key], "x")
    error = judge(bench, call_named(bench, function, nth))
    assert isinstance(error, CorruptData)
    assert bench.keys[key] in str(error)


@pytest.mark.parametrize(
    ("function", "nth", "key", "field"),
    [
        ("append", 0, "meta", "p:p"),
        ("append_each", 0, "meta", "p:q"),
    ],
)
def test_a_broken_sequence_refuses_its_producer(bench: Bench, function: str, nth: int, key: str, field: str) -> None:
    bench.node.hset(bench.keys[key], field, "x")
    assert isinstance(judge(bench, call_named(bench, function, nth)), CorruptData)


@pytest.mark.parametrize("floor", ["nan", "-", "5:1-1:0", "99999999999999999999-1", ""])
def test_nothing_is_trimmed_by_a_floor_that_is_no_entry(bench: Bench, floor: str) -> None:
    bench.node.hset(bench.keys["meta"], mapping={"floor:g": floor, "retention_ms": "1"})
    before = bench.node.xlen(bench.keys["stream"])
    for function in ("trim", "tidy"):
        assert judge(bench, call_named(bench, function)) is None
    assert bench.node.xlen(bench.keys["stream"]) == before


def test_a_count_that_is_no_number_counts_as_none(bench: Bench) -> None:
    """What HINCRBY would refuse when the messages are stored already."""
    bench.node.hset(bench.keys["meta"], mapping={"delayed": "inf", "delayed_next": "x", "marks": "nan"})
    assert judge(bench, call_named(bench, "append_each")) is None
    assert judge(bench, call_named(bench, "mark")) is None
    assert bench.node.hmget(bench.keys["meta"], "delayed", "delayed_next", "marks") == [b"1", b"3", b"1"]


def test_a_step_without_its_group_carries_out_no_effect(bench: Bench) -> None:
    bench.node.delete(bench.keys["stream"])
    assert isinstance(judge(bench, call_named(bench, "step", 4)), CorruptData)
    assert bench.node.get(bench.keys["data"]) == b"5"


@pytest.mark.parametrize("nth", [2, 4])
def test_a_step_that_a_stream_has_no_id_for_is_refused_whole(bench: Bench, nth: int) -> None:
    """Dead letters, or messages to another queue, behind somebody's entry of the last id there is."""
    for key in ("dead", "other_stream"):
        bench.node.execute_command("XADD", bench.keys[key], IDS[2], "a", "b")
    error = judge(bench, call_named(bench, "step", nth))
    assert (nth == 2) == isinstance(error, CorruptData)
    assert bench.node.get(bench.keys["data"]) == b"5"
