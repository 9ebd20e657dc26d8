"""What the tests of groups share: one shard, its functions called as they are, and what its counters must add up to.

Only words of the scripts' headers are used here, nothing of the session above them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import shardq
from shardq.core import records
from shardq.core.intake import unpack_progress
from shardq.core.slots import tag_for_slot
from shardq.storage import calls, counters, groups
from shardq.storage.commands import pack_command
from shardq.storage.counters import GroupCounters
from shardq.storage.groups import Done, Start
from shardq.storage.keys import Keys

TIMEOUT_S = 10.0
Item = tuple[str, int]


class Owner:
    """A token with its step numbers."""

    def __init__(self, group: str, token: str) -> None:
        self.group, self.token, self.steps = group, token, 0


class GroupRig:
    """Shard 0 of a queue of its own, opened, without groups."""

    def __init__(self, client: shardq.Client, queue: str) -> None:
        self.client, self.pipes, self.keys = client, client.pipes, Keys("shardq", queue)
        self.shard = self.keys.shard(0, tag_for_slot(0))
        self.sequence = 0

    async def command(self, *args: str | bytes | int) -> Any:
        return await self.pipes.command(self.shard.slot, pack_command(*args))

    async def call(self, function: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        return await self.pipes.call(self.shard.slot, function, keys, args)

    # -- messages --------------------------------------------------------------------------------------------

    async def append(self, count: int = 1) -> str:
        """One batch; returns its entry id."""
        self.sequence += 1
        batch = records.encode(records.RecordBatch(7, None, [None] * count, ["v"] * count, None))
        keys = [self.shard.stream, self.shard.meta]
        reply = await self.call("append", keys, "p", self.sequence, count, batch, self.shard.bell)
        assert reply[0] == b"OK"
        return str(reply[1].decode())

    async def foreign(self, *fields: str) -> str:
        """Another client's entry."""
        return str((await self.command("XADD", self.shard.stream, "*", *(fields or ("name", "Ann")))).decode())

    async def entries(self) -> list[tuple[str, int, bool]]:
        """(id, messages, whether it is ours) of all that is stored."""
        found = await self.command("XRANGE", self.shard.stream, "-", "+")
        return [(entry.decode(), count_of(fields), fields[0] == b"at") for entry, fields in found]

    async def ours_from(self, start: str, index: int = 0) -> list[Item]:
        """Messages of ours that are stored from a place on, by entry and index."""
        found = await self.command("XRANGE", self.shard.stream, start, "+")
        items = [
            (entry.decode(), at)
            for entry, fields in found
            if fields[0] == b"at"
            for at in range(records.count_of(fields[3]))
        ]
        return [item for item in items if item[0] != start or item[1] >= index]

    # -- groups ----------------------------------------------------------------------------------------------

    async def open(self, group: str = "g", start: Start | None = None) -> Done:
        return await groups.open_group(self.pipes, self.shard, group, start or Start())

    async def reset(self, start: Start, group: str = "g", *, force: bool = False, request: str = "") -> Done:
        self.sequence += 1
        name = request or f"request-{self.sequence}"
        return await groups.reset_group(self.pipes, self.shard, group, start, name, force=force)

    async def delete(self, group: str = "g", *, force: bool = False) -> Done:
        return await groups.delete_group(self.pipes, self.shard, group, force=force)

    async def own(self, group: str = "g", nonce: str = "n") -> Owner:
        """Takes the lease, which must be free or this nonce's own."""
        got = await calls.acquire(
            self.pipes, self.shard, group, f"worker-{nonce}", nonce, 0, None, timeout_s=TIMEOUT_S, confirm=None
        )
        assert got.status == "OK"
        return Owner(group, f"{got.epoch}:{nonce}")

    async def own_new(self, group: str) -> Owner:
        """Opens a group and takes its lease."""
        await self.open(group)
        return await self.own(group)

    async def step(
        self,
        owner: Owner,
        *sections: str | bytes | int,
        limit: int = 0,
        cursor: str = ">",
        acked: int = 0,
        wait: bool = False,
    ) -> Any:
        """One step with these sections, its reply as it is."""
        owner.steps += 1
        shard = self.shard
        keys = [shard.stream, shard.meta, *shard.of_group(owner.group), shard.expiring, shard.timed]
        args: list[str | bytes | int] = [
            owner.group,
            owner.token,
            owner.steps,
            0,
            cursor,
            limit,
            int(wait),
            acked,
            0,
            0,
            *sections,
        ]
        return await self.call("step", keys, *args)

    async def fetch(self, owner: Owner, limit: int = 100, cursor: str = ">") -> list[tuple[str, int]]:
        """(id, messages) of what a step without content brings."""
        reply = await self.step(owner, limit=limit, cursor=cursor)
        assert reply[0] == b"OK"
        return [(entry.decode(), count_of(fields)) for entry, fields in reply[2]]

    async def finish(self, owner: Owner, entries: Sequence[tuple[str, int]]) -> None:
        """Commits entries that were handled whole."""
        reply = await self.step(
            owner, "done", len(entries), *(entry for entry, _ in entries), acked=sum(count for _, count in entries)
        )
        assert reply[0] == b"OK"

    async def put_later(self, owner: Owner, entry: str, due_ms: int = 60_000) -> None:
        """Moves a whole entry of one message to what is handled later, as after a failure."""
        assert (await self.step(owner, "done", 1, entry, "put", 1, 0, due_ms, 0, "tag", b"record"))[0] == b"OK"

    async def replay(self, letter: str, messages: int, group: str = "g") -> None:
        keys = [
            self.shard.meta,
            self.shard.group(group),
            self.shard.dead(group),
            self.shard.later(group),
            self.shard.kept(group),
        ]
        items: list[str | bytes] = ["tag", b"record"] * messages
        reply = await self.call("replay", keys, group, self.shard.bell, letter, messages, messages, *items)
        assert reply == [b"OK", 1]

    # -- counters --------------------------------------------------------------------------------------------

    async def field(self, name: str, group: str = "g") -> str:
        return ((await self.command("HGET", self.shard.group(group), name)) or b"").decode()

    async def fields(self, group: str = "g") -> dict[str, str]:
        return pairs(await self.command("HGETALL", self.shard.group(group)))

    async def meta(self) -> dict[str, str]:
        return pairs(await self.command("HGETALL", self.shard.meta))

    async def counters(self, group: str = "g") -> GroupCounters:
        return (await counters.inspect(self.pipes, self.shard, [group])).groups[group]

    async def totals(self, group: str = "g") -> dict[str, int]:
        """What is exported as counters: must never fall."""
        own = await self.counters(group)
        delivered = own.delivered + int(await self.field("given_up", group))
        return {
            "delivered": delivered,
            "acked": own.acked,
            "retried": own.retried,
            "dead": own.dead,
            "replayed": own.replayed,
            "lost": own.lost + own.skip,
            "epoch": own.epoch,
        }

    async def backlog(self, group: str = "g") -> int:
        """By the counters, checked against what the shard really holds unfinished."""
        shard = await counters.inspect(self.pipes, self.shard, [group])
        own = shard.groups[group]
        backlog = shard.appended + own.foreign - own.base - own.acked - own.dead + own.replayed - own.skip
        unfinished = await self._unfinished(group)
        assert backlog == unfinished, f"the counters say {backlog}, it is {unfinished}: {shard}"
        in_hand = own.delivered - own.acked - own.dead + own.replayed
        assert in_hand == unfinished - len(await self._unread(group)), f"in hand: {shard}"
        return backlog

    async def _unread(self, group: str) -> list[Item]:
        infos = [
            dict(zip(item[::2], item[1::2], strict=True))
            for item in await self.command("XINFO", "GROUPS", self.shard.stream)
        ]
        (last,) = [info[b"last-delivered-id"].decode() for info in infos if info[b"name"] == group.encode()]
        return await self.ours_from(f"({last}")

    async def _unfinished(self, group: str) -> int:
        """Pending messages without progress, those in `later`, and those of ours that are not delivered."""
        pending = await self.command("XPENDING", self.shard.stream, group, "-", "+", 10000)
        stream = dict(await self.command("XRANGE", self.shard.stream, "-", "+"))
        left = await self.command("ZCARD", self.shard.later(group)) - 1
        for entry, *_ in pending:
            count = count_of(stream[entry])
            progress = await self.command("HGET", self.shard.group(group), b"x:" + entry) or b""
            left += unpack_progress(progress, count).count(0)
        return int(left) + len(await self._unread(group))


def count_of(fields: Sequence[bytes]) -> int:
    return records.count_of(fields[3]) if fields[0] == b"at" and len(fields) == 4 else 1


def pairs(flat: Sequence[bytes]) -> dict[str, str]:
    return {name.decode(): value.decode(errors="replace") for name, value in zip(flat[::2], flat[1::2], strict=True)}


@asynccontextmanager
async def group_rig(url: str, queue: str) -> AsyncIterator[GroupRig]:
    async with shardq.connect(url) as client:
        made = GroupRig(client, queue)
        assert await calls.open_shard(made.pipes, made.shard)
        yield made


@asynccontextmanager
async def checked_rig(url: str, queue: str) -> AsyncIterator[GroupRig]:
    """The same; whatever was done to it, the counters of each group must add up in the end."""
    async with group_rig(url, queue) as made:
        yield made
        for group in (await made.meta())["groups"].split():
            await made.backlog(group)
