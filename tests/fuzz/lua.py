"""Every function of the library called on a sound shard: what the fuzzing of the functions starts from. Judges nothing.

A Bench holds the keys of one shard, and of a queue's control, as they were when all was sound; `restore` puts them
back. `CALLS` are calls that do something there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis

from shardq.core import records
from shardq.core.slots import tag_for_slot
from shardq.storage.functions import function_name, library_source

Arg = str | bytes
OWN = ("stream", "meta", "delayed", "expiring", "timed")
GROUP = ("group", "dead", "later", "kept")
OLD = ("old_stream", "old_meta", "old_delayed", "expiring", "timed")
NEW = ("new_stream", "new_meta", "new_delayed", "expiring", "timed")
OLD_GROUP = ("old_group", "old_dead", "old_later", "old_kept")
BELL = f"bell:{{{tag_for_slot(0)}}}"  # never broken: the client makes it, and a channel of another slot can't be rung
TYPES = {
    **dict.fromkeys(("stream", "dead", "other_stream", "old_stream", "old_dead"), "stream"),
    **dict.fromkeys(("delayed", "expiring", "later", "limits", "old_delayed", "old_later", "new_delayed"), "zset"),
    **dict.fromkeys(("meta", "timed", "group", "kept", "other_meta", "routing", "control", "schedules"), "hash"),
    **dict.fromkeys(("old_meta", "old_group", "old_kept", "new_meta"), "hash"),
    **dict.fromkeys(("new_stream", "fresh_stream"), "stream"),
    "fresh_meta": "hash",
    "fresh_delayed": "zset",
    **dict.fromkeys(("scratch", "data"), ""),
}


GATED = ("group", "new_meta", "old_meta", "old_group", "old_later")
MOVED = (BELL, BELL, "d1000000000000001", "1", "d1000000000000002", "1")


class FunctionCall(NamedTuple):
    function: str
    keys: Sequence[str]
    args: Sequence[Arg]


def batch(count: int = 1) -> bytes:
    return records.encode(records.RecordBatch(7, None, ["k"] * count, [b"v"] * count, None))


class Bench:
    """A shard with a group that has pending entries, retries, dead letters, delayed messages, jobs and marks."""

    def __init__(self, host: str, port: int, name: str) -> None:
        self.node = redis.Redis(host=host, port=port, protocol=2)
        self.node.execute_command("FUNCTION", "LOAD", "REPLACE", library_source())
        self.keys = {key: f"shardq:{name}:{{{tag_for_slot(0)}}}:{key}" for key in TYPES}
        self.restore({})
        self.token, self.entries = self._fill()
        self.sound = self.dump()
        self.calls = _calls(self.token, self.entries)

    def close(self) -> None:
        self.restore({})
        self.node.close()

    def run(self, function: str, keys: Sequence[str], *args: Arg) -> Any:
        named = [self.keys.get(key, key) for key in keys]
        return self.node.execute_command("FCALL", function_name(function), len(keys), *named, *args)

    def dump(self) -> dict[str, bytes | None]:
        pipe = self.node.pipeline(transaction=False)
        for key in self.keys.values():
            pipe.dump(key)
        return dict(zip(self.keys, pipe.execute(), strict=True))

    def restore(self, dumps: Mapping[str, bytes | None]) -> None:
        pipe = self.node.pipeline(transaction=False)
        pipe.delete(*self.keys.values())
        for key, stored in dumps.items():
            if stored is not None:
                pipe.restore(self.keys[key], 0, stored)
        pipe.execute()

    def _fill(self) -> tuple[str, list[str]]:
        shard, group = [*OWN], ["stream", "meta", *GROUP]
        self.run("open_shard", shard, "1", "max_backlog", "100", "overflow", "drop-oldest")
        self.run("open_shard", ["other_stream", "other_meta", "delayed", "expiring", "timed"], "1")
        self.run("open_group", group, "g")
        entries = [
            self.run("append", ["stream", "meta"], "p", str(number), "2", batch(2), BELL)[1].decode()
            for number in (1, 2, 3, 4)
        ]
        each: list[Arg] = ["in:100000", "once", "1000", "", "0", "", batch()]
        self.run("append_each", shard, "q", "1", BELL, *each, "", "", "0", "job", "5000", b"\x80", batch())
        _, epoch, _ = self.run("acquire", ["group"], "w", "n", "1", "", "", "", BELL)
        token = f"{epoch.decode()}:n"
        head = ["g", token]
        self.run("step", ["stream", "meta", "group"], *head, "1", "0", ">", "3", "0", "0", "0", "0")
        put: list[Arg] = ["put", "2", "0", "0", "1", "kx", b"\x98", "0", "50000", "0", "", b"\x98"]
        done: list[Arg] = ["done", "1", entries[0], "part", "1", entries[1], b"\x01", "dead", "1", "1", b"\x80"]
        full: list[Arg] = [
            *head,
            "2",
            "1",
            "0-0",
            "0",
            "0",
            "2",
            "1",
            "0",
            *done,
            *put,
            "job",
            "1",
            "job",
            "5000",
            b"\x80",
        ]
        self.run("step", [*group, "expiring", "timed"], *full)
        self.run("mark", ["stream", "meta", "dead", "kept"], "0", entries[2], "0", BELL)
        self.run("declare", ["routing"], "1", b"\x01", b"\x01")
        self.run("beat", ["control"], "w", "n", "1", "active", "0", "0", "*")
        self.run("lead", ["control"], "w", "n", "0", "0")
        self.run("take", ["control"], "50", "1000000", "5", "150000", "4", "250000")
        self.run("take_keys", ["limits"], "5", "1000000", "1", "1000000", "kx", "2")
        self.run("swap_schedule", ["schedules"], "nightly", "", b"\x80")
        self.run("open_ticks", ["meta"], "cron/nightly", "60")
        self._split()
        self.node.set(self.keys["data"], "5")
        return token, entries

    def _split(self) -> None:
        """A sealed shard that its group has finished, with a delayed message; and its child, the shard "new"."""
        self.run("open_shard", OLD, "1")
        self.run("open_group", ["old_stream", "old_meta", *OLD_GROUP], "g")
        self.run("append_each", OLD, "cron/a", "5", BELL, "in:100000", "", "0", "", "0", "", batch())
        self.run("open_child", NEW, "0", "1")
        self.run("seal", ["old_meta", "new_meta"], BELL)
        self.run("begin_reshard", ["routing"], b"plan", "1")


def _calls(token: str, entries: Sequence[str]) -> list[FunctionCall]:
    shard, group, small = [*OWN], ["stream", "meta", *GROUP], ["stream", "meta", "group"]
    full = [*group, "expiring", "timed"]
    head = ["g", token, "3", "1", ">", "10", "1", "1", "1", "0"]
    pending = ["g", token, "3", "0", "0-0", "10", "0", "0", "0", "0"]
    one: list[Arg] = ["", "again", "1000", "job2", "5000", b"\x80", batch()]
    later: list[Arg] = ["in:5", "", "0", "", "0", "", batch()]
    effect: list[Arg] = ["effect", "2", "9", "INCRBY", "1", "2", "10", "SEND", "3", BELL, "1", batch()]
    sections: list[Arg] = [
        "dead",
        "1",
        "1",
        b"\x80",
        "put",
        "2",
        "0",
        "5",
        "0",
        "kx",
        b"\x98",
        "1",
        "5",
        "0",
        "kx",
        b"\x98",
    ]
    ends: list[Arg] = ["done", "1", entries[1], "drop", "1", "2", "job", "1", "job", "5", b"\x80", "seen", "1", "1"]
    undone: list[Arg] = ["untouched", "1", entries[1], "unget", "1", "1", "get", "2", "1", "2"]
    return [
        FunctionCall("declare", ["routing"], ["2", b"\x01", b"\x01"]),
        FunctionCall("settings", ["routing"], ["1", b"\x02"]),
        FunctionCall("open_shard", shard, ["2", "max_backlog", "7"]),
        FunctionCall("tune", ["meta"], ["2", "retention_ms", "7"]),
        FunctionCall("append", ["stream", "meta"], ["p", "5", "2", batch(2), BELL]),
        FunctionCall("append", ["stream", "meta"], ["p", "4", "2", batch(2), BELL]),
        FunctionCall("append_each", shard, ["q", "2", BELL, *one, *later]),
        FunctionCall("append_each", shard, ["q", "1", BELL, *one]),
        FunctionCall("step", small, [*head, "done", "1", entries[1]]),
        FunctionCall("step", small, [*pending, "part", "1", entries[2], b"\x01"]),
        FunctionCall("step", full, [*head, *sections, *ends]),
        FunctionCall("step", full, [*pending, *undone]),
        FunctionCall("step", [*full, "data", "other_stream", "other_meta"], [*head, *effect]),
        FunctionCall("promote", ["stream", "meta", "delayed", "timed"], [BELL, "10"]),
        FunctionCall("tidy", ["stream", "meta", "expiring", "timed"], []),
        FunctionCall("trim", ["stream", "meta"], [entries[2]]),
        FunctionCall("replay", ["meta", "group", "dead", "later", "kept"], ["g", BELL, "1-1", "1", "1", "kx", b"\x98"]),
        FunctionCall("purge", ["dead"], ["1-1", "2-1"]),
        FunctionCall("mark", ["stream", "meta", "dead", "kept"], ["0", entries[1], "1", BELL]),
        FunctionCall("redact", ["stream", "meta", "scratch"], [entries[0], batch(2)]),
        FunctionCall("redact", ["stream", "meta", "scratch"], [entries[0], ""]),
        FunctionCall("forget", ["meta", "delayed", "timed"], ["d1000000000000001"]),
        FunctionCall("open_group", group, ["h", entries[1], "1"]),
        FunctionCall(
            "reset_group", ["stream", "meta", "group", "later", "kept"], ["g", "r", "1", entries[1], "1", BELL]
        ),
        FunctionCall("delete_group", group, ["g", "1", BELL]),
        FunctionCall("remove_shard", [*OWN, *GROUP], ["1", BELL, "g"]),
        FunctionCall("acquire", ["group"], ["w", "n", "1", "", "", "", BELL]),
        FunctionCall("acquire", ["group"], ["v", "m", "2", "5", "0", "", BELL]),
        FunctionCall("release", ["group"], [token, BELL]),
        FunctionCall("offer", ["group"], ["2", "v", "m", BELL]),
        FunctionCall("ready", ["group"], ["m", BELL]),
        FunctionCall("transfer", ["group"], [token, BELL]),
        FunctionCall("beat", ["control"], ["w", "n", "2", "active", "1", "0", "*"]),
        FunctionCall("beat", ["control"], ["w", "n", "2", "leaving", "1", "0", "w", "v"]),
        FunctionCall("lead", ["control"], ["v", "m", "1", "0"]),
        FunctionCall("lead", ["control"], ["w", "n", "1", "0"]),
        FunctionCall("resign", ["control"], ["n", "1", BELL]),
        FunctionCall("plan", ["control"], ["n", "1", b"\x92", BELL, "w", "n:1:active"]),
        FunctionCall("leave", ["control"], ["w", "n", BELL]),
        FunctionCall("leave", ["control"], ["w", "n", BELL, "1"]),
        FunctionCall("pause", ["control"], ["1", BELL]),
        FunctionCall("pause", ["control"], ["", BELL]),
        FunctionCall("take", ["control"], ["100", "1000000", "5", "150000", "10", "250000"]),
        FunctionCall("take", ["control"], ["9", "60000000", "1", "150000", "10", "250000"]),
        FunctionCall("take_keys", ["limits"], ["5", "1000000", "1", "1000000", "kx", "3", "ky", "1"]),
        FunctionCall("swap_schedule", ["schedules"], ["nightly", b"\x80", b"\x81"]),
        FunctionCall("close_ticks", ["meta"], ["cron/nightly", "120"]),
        FunctionCall("open_ticks", ["meta"], ["cron/nightly", "120"]),
        FunctionCall("inspect", ["stream", "meta", "group", "dead", "later", "kept"], ["g"]),
        FunctionCall("build", [], []),
        FunctionCall("acquire", GATED, ["w", "n", "1", "", "", "", BELL, "g", "0"]),
        FunctionCall("begin_reshard", ["routing"], [b"plan", "1"]),
        FunctionCall("begin_reshard", ["routing"], [b"other", "1"]),
        FunctionCall("commit_reshard", ["routing"], [b"plan"]),
        FunctionCall("end_reshard", ["routing"], [b"plan", "0", "2", b"\x02", "7", BELL]),
        FunctionCall("end_reshard", ["routing"], [b"plan", "1", "2", b"\x02", "7 8"]),
        FunctionCall("forget_shard", ["routing"], ["1", "2", b"\x02", "7"]),
        FunctionCall("open_child", NEW, ["0 1", "1", "max_backlog", "7"]),
        FunctionCall("open_child", ["fresh_stream", "fresh_meta", "fresh_delayed", "expiring", "timed"], ["0", "1"]),
        FunctionCall("seal", ["meta", "new_meta"], [BELL]),
        FunctionCall("move_delayed", ["meta", "delayed", "new_meta", "new_delayed"], MOVED),
        FunctionCall("move_delayed", ["old_meta", "old_delayed", "new_meta", "new_delayed"], MOVED),
        FunctionCall("retire", [*OLD[:3], *OLD_GROUP[:3], "new_meta"], ["0", "1", "g"]),
        FunctionCall("retire", ["stream", "meta", "delayed", *GROUP[:3], "new_meta"], ["0", "1", "g"]),
        FunctionCall("remove_retired", [*NEW[:3]], ["1", BELL]),
        FunctionCall("remove_retired", [*OLD[:3], *OLD_GROUP], ["0", BELL, "g"]),
    ]
