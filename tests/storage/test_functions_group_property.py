"""Whatever a group went through, opening it or putting it anywhere leaves the counters exact: the backlog is what lies
behind the position, each of these messages comes once and in order, and no exported total ever falls.
"""

from __future__ import annotations

import uuid

import anyio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from shardq.core.intake import unpack_progress
from shardq.core.step import FIRST
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.groups import Start
from tests.storage.group_rig import GroupRig, Item, Owner, group_rig

small, place = st.integers(0, 7), st.integers(0, 200)
# What happens to a shard: ("append", messages), ("foreign", _), ("fetch", entries), then what becomes of the pending
# entry of that number: ("finish", n), ("part", n), ("bury", n), ("fail", n); ("retry", n) of what waits; ("elsewhere",
# entries) are finished by another group; ("replay", n) of the dead letters; ("reset", place).
happening = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["append", "append", "fetch"]), st.integers(1, 5)),
    st.tuples(
        st.sampled_from(["foreign", "fetch", "finish", "part", "bury", "fail", "retry", "elsewhere", "replay"]), small
    ),
    st.tuples(st.just("reset"), place),
)


class Story:
    """One group "g", its owner, and what it has in hand; "others" holds up trimming."""

    def __init__(self, shard: GroupRig) -> None:
        self.shard = shard
        self.owner: Owner | None = None
        self.others: Owner | None = None
        self.pending: dict[str, list[int]] = {}
        self.totals: dict[str, int] = {}

    async def run(self, happenings: list[tuple[str, int]], *, drops: bool, retains: bool) -> None:
        await self.shard.open("others")
        self.others = await self.shard.own("others", "o")
        if drops:
            await self.shard.command("HSET", self.shard.shard.meta, "max_backlog", 15, "overflow", "drop-oldest")
        if retains:
            await self.shard.command("HSET", self.shard.shard.meta, "retention_ms", 3_600_000)
        for what, number in happenings:
            await getattr(self, what)(number)
            await self.check()
        await self.drain(await self.all_unfinished())

    async def check(self) -> None:
        if self.owner is None:
            return
        await self.shard.backlog()
        totals = await self.shard.totals()
        assert all(totals[name] >= self.totals.get(name, 0) for name in totals), (self.totals, totals)
        self.totals = totals

    # -- messages --------------------------------------------------------------------------------------------

    async def append(self, count: int) -> None:
        await self.shard.append(count)

    async def foreign(self, _number: int) -> None:
        await self.shard.foreign()

    async def fetch(self, limit: int) -> None:
        if self.owner is not None and limit:
            for entry, count in await self.shard.fetch(self.owner, limit):
                self.pending[entry] = list(range(count))

    def pick(self, number: int) -> tuple[Owner, str, list[int]] | None:
        if self.owner is None or not self.pending:
            return None
        entry = list(self.pending)[number % len(self.pending)]
        return self.owner, entry, self.pending[entry]

    async def finish(self, number: int) -> None:
        if picked := self.pick(number):
            owner, entry, left = picked
            del self.pending[entry]
            await self.shard.step(owner, "done", 1, entry, acked=len(left))

    async def part(self, number: int) -> None:
        picked = self.pick(number)
        if picked and len(picked[2]) > 1:
            owner, entry, left = picked
            del left[number % len(left)]
            bits = sum(1 << index for index in range(12) if index not in left).to_bytes(2, "little")
            ((_, fields),) = await self.shard.command("XRANGE", self.shard.shard.stream, entry, entry)
            count = int.from_bytes(fields[3][2:4], "big")
            await self.shard.step(owner, "part", 1, entry, bits[: (count + 7) // 8], acked=1)

    async def bury(self, number: int) -> None:
        if picked := self.pick(number):
            owner, entry, left = picked
            del self.pending[entry]
            letters = [part for _ in left for part in (1, b"letter")]
            await self.shard.step(owner, "done", 1, entry, "dead", len(left), *letters)

    async def fail(self, number: int) -> None:
        if picked := self.pick(number):
            owner, entry, left = picked
            del self.pending[entry]
            items = [part for _ in left for part in (0, 5, 0, "tag", b"record")]
            await self.shard.step(owner, "done", 1, entry, "put", len(left), *items)

    async def retry(self, number: int) -> None:
        items = await self.shard.command("ZRANGE", self.shard.shard.later("g"), 1, -1)
        if self.owner is not None and items:
            item = items[number % len(items)].split(b":")[0]
            await self.shard.step(self.owner, "drop", 1, item, acked=1)

    async def replay(self, number: int) -> None:
        letters = await self.shard.command("XRANGE", self.shard.shard.dead("g"), "-", "+")
        if letters:
            await self.shard.replay(letters[number % len(letters)][0].decode(), 1)

    async def elsewhere(self, limit: int) -> None:
        assert self.others is not None
        if limit:
            got = await self.shard.fetch(self.others, limit)
            await self.shard.finish(self.others, got)

    # -- positions -------------------------------------------------------------------------------------------

    async def place(self, number: int) -> tuple[Start, list[Item]]:
        """A place out of `number`, and the messages of ours from there on."""
        entries = await self.shard.entries()
        if number % 7 == 0 or not entries:
            return Start(), await self.shard.ours_from("-")
        if number % 7 == 1:
            return Start("latest"), []
        entry, count, _ = entries[number % len(entries)]
        if number % 7 == 2:
            ms = entry.split("-")[0]
            return Start(f"{ms}-0"), await self.shard.ours_from(f"{ms}-0")
        index = number % (count + 2)
        return Start(entry, index), await self.shard.ours_from(entry, index)

    async def open(self, number: int) -> None:
        start, behind = await self.place(number)
        done = await self.shard.open("g", start)
        assert (done.status, done.backlog) == ("CREATED", len(behind))
        await self.arrived(behind)

    async def reset(self, number: int) -> None:
        if self.owner is None:
            return
        start, behind = await self.place(number)
        done = await self.shard.reset(start, force=True)
        assert (done.status, done.backlog) == ("OK", len(behind))
        await self.arrived(behind)
        event("reset to " + ("the end" if not behind else "the middle of a batch" if start.index else "an entry"))

    async def arrived(self, behind: list[Item]) -> None:
        assert await self.shard.backlog() == len(behind)
        if (await self.shard.counters()).skip:
            event("put before dropped messages")
        self.owner = await self.shard.own("g", "n")
        self.pending = {}
        reply = await self.shard.step(self.owner, limit=10, cursor=FIRST)
        for (entry, fields), progress in zip(reply[2], reply[3], strict=True):
            count = int.from_bytes(fields[3][2:4], "big")
            done = unpack_progress(progress.partition(b":")[2], count)
            self.pending[entry.decode()] = [index for index in range(count) if not done[index]]
        assert self.items() + await self.unread() == behind

    def items(self) -> list[Item]:
        return [(entry, index) for entry, left in self.pending.items() for index in left]

    async def unread(self) -> list[Item]:
        return await self.shard.ours_from(f"({await self.shard.field('last')}")

    async def all_unfinished(self) -> list[Item]:
        return self.items() + await self.unread()

    async def drain(self, expected: list[Item]) -> None:
        """Finishes all there is: what comes is what was expected, in order, once."""
        assert self.owner is not None
        strangers = {entry for entry, _, ours in await self.shard.entries() if not ours}
        await self.fetch(10_000)
        got = [item for item in self.items() if item[0] not in strangers]
        assert got == [item for item in expected if item[0] not in strangers]
        while self.pending:
            await self.finish(0)
        while await self.shard.command("ZCARD", self.shard.shard.later("g")) > 1:
            await self.retry(0)
        await self.check()
        assert await self.shard.backlog() == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=st.lists(happening, max_size=10),
    opened=place,
    then=st.lists(happening, min_size=5, max_size=40),
    drops=st.booleans(),
    retains=st.booleans(),
)
def test_the_counters_are_exact_wherever_a_group_is_put(
    cluster: LocalCluster,
    before: list[tuple[str, int]],
    opened: int,
    then: list[tuple[str, int]],
    drops: bool,
    retains: bool,
) -> None:
    async def tell() -> None:
        async with group_rig(cluster.url, f"q-{uuid.uuid4().hex[:12]}") as shard:
            await Story(shard).run([*before, ("open", opened), *then], drops=drops, retains=retains)

    anyio.run(tell)
