"""A queue that drops its oldest, whatever its two groups are doing: what it drops is what the model below says, each
group's backlog stays exact, and every message is either handled once or was dropped unread.
"""

from __future__ import annotations

import uuid

import anyio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from shardq.core.step import Put
from shardq.ops.local_cluster import LocalCluster
from tests.storage.rig import Rig, ids, messages_of_ours, one, rig

GROUPS = ("g", "h")
small = st.integers(0, 7)
group = st.sampled_from(GROUPS)
# What happens: messages are sent or become due, a group fetches entries, or does something with the pending entry or
# the waiting item of that number.
happening = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["delay", "promote", "foreign"]), small),
    st.tuples(st.sampled_from(["fetch", "finish", "part", "fail", "bury", "retry", "replay"]), group, small),
)


class Reader:
    """One group: its token, and what it has in hand: messages not finished of each pending entry."""

    def __init__(self, name: str, token: str) -> None:
        self.name, self.token = name, token
        self.pending: dict[str, int] = {}
        self.got: list[str] = []

    def pick(self, number: int) -> str:
        return list(self.pending)[number % len(self.pending)]


class Story:
    def __init__(self, shard: Rig, most: int) -> None:
        self.shard, self.most = shard, most
        self.sequence = 0
        self.readers: dict[str, Reader] = {}
        self.dropped: dict[str, int] = {}

    async def run(self, happenings: list[tuple[str, ...]]) -> None:
        for name in GROUPS:
            await self.shard.open_group(name)
            self.readers[name] = Reader(name, await self.shard.own(name, name))
        await self.shard.tune(max_backlog=self.most, overflow="drop-oldest")
        for what, *about in happenings:
            if len(about) == 2:
                await getattr(self, what)(self.readers[about[0]], about[1])
            else:
                await getattr(self, what)(*about)
            await self.check()
        await self.drain()

    async def check(self) -> None:
        state = await self.shard.inspect(*GROUPS)
        assert state.dropped == sum(self.dropped.values())
        for name, reader in self.readers.items():
            await self.shard.backlog(name)
            own = state.groups[name]
            missed = sum(count for entry, count in self.dropped.items() if entry not in reader.got)
            assert own.lost + own.skip == missed

    # -- sending ---------------------------------------------------------------------------------------------

    async def stored(self) -> dict[str, int]:
        """Messages of each entry, 0 for another client's."""
        found = await self.shard.command("XRANGE", self.shard.shard.stream, "-", "+")
        return {entry.decode(): messages_of_ours(fields) for entry, fields in found}

    async def expected_drops(self, count: int) -> dict[str, int]:
        """What has to go for `count` more: the oldest entries that a group with too much before it has not read, unless
        the other one has them between its first pending entry and its last one."""
        entries, delayed = await self.stored(), (await self.shard.inspect()).delayed
        backlog = {name: await self.shard.backlog(name) + delayed for name in GROUPS}
        order = {entry: place for place, entry in enumerate(entries)}
        if max(backlog.values()) == 0:
            return {}
        gone: dict[str, int] = {}
        for entry, size in entries.items():
            unread = [name for name in GROUPS if entry not in self.readers[name].got]
            held = False
            for name in GROUPS:
                reader = self.readers[name]
                first = min((order[pending] for pending in reader.pending), default=len(order))
                held = held or (name not in unread and order[entry] >= first)
            if size and not held and any(backlog[name] + count > self.most for name in unread):
                gone[entry] = size
                for name in unread:
                    backlog[name] -= size
        return gone

    async def send(self, count: int) -> None:
        before, expected = await self.stored(), await self.expected_drops(count)
        self.sequence += 1
        assert (await self.shard.append("p", self.sequence, *["v"] * count)).status == "OK"
        after = await self.stored()
        gone = {entry: size for entry, size in before.items() if entry not in after}
        assert gone == expected
        for reader in self.readers.values():
            assert not gone.keys() & reader.pending.keys()
        self.dropped |= gone
        event(f"dropped {min(len(gone), 3)}")

    async def delay(self, number: int) -> None:
        before, expected = await self.stored(), await self.expected_drops(1)
        self.sequence += 1
        item = one("v", when="in:60000" if number % 2 else "")
        assert (await self.shard.append_each("p", self.sequence, item)).status == "OK"
        after = await self.stored()
        gone = {entry: size for entry, size in before.items() if entry not in after}
        assert gone == expected
        self.dropped |= gone

    async def promote(self, number: int) -> None:
        names = await self.shard.command("ZRANGE", self.shard.shard.delayed, 0, number)
        for name in names:
            if name:
                await self.shard.command("ZADD", self.shard.shard.delayed, "XX", 1, name)
        await self.shard.promote(number)

    async def foreign(self, _number: int) -> None:
        await self.shard.command("XADD", self.shard.shard.stream, "*", "name", "Ann")

    # -- handling --------------------------------------------------------------------------------------------

    async def step(self, reader: Reader, **content: object) -> list[str]:
        return ids(await self.shard.step(reader.token, group=reader.name, **content))  # type: ignore[arg-type]

    async def fetch(self, reader: Reader, limit: int) -> None:
        stored = await self.stored()
        for entry in await self.step(reader, limit=limit):
            assert entry not in reader.got
            reader.got.append(entry)
            reader.pending[entry] = stored[entry] or 1

    async def finish(self, reader: Reader, number: int) -> None:
        if reader.pending:
            entry = reader.pick(number)
            await self.step(reader, acked=reader.pending.pop(entry), finished=[entry])

    async def part(self, reader: Reader, number: int) -> None:
        entry = reader.pick(number) if reader.pending else ""
        left = reader.pending.get(entry, 0)
        if left > 1:
            size = (await self.stored())[entry]
            done = (1 << (size - left + 1)) - 1
            reader.pending[entry] = left - 1
            await self.step(reader, acked=1, partial=[(entry, bytes([done]))])

    async def fail(self, reader: Reader, number: int) -> None:
        if reader.pending:
            entry = reader.pick(number)
            puts = [Put(0, 0, 0, b"", b"record")] * reader.pending.pop(entry)
            await self.step(reader, retried=1, finished=[entry], puts=puts)

    async def bury(self, reader: Reader, number: int) -> None:
        if reader.pending:
            entry = reader.pick(number)
            await self.step(reader, finished=[entry], dead=[(reader.pending.pop(entry), b"letter")])

    async def retry(self, reader: Reader, number: int) -> None:
        items = await self.shard.command("ZRANGE", self.shard.shard.later(reader.name), 1, -1)
        if items:
            item = int(items[number % len(items)].split(b":")[0])
            await self.step(reader, acked=1, drops=[item])

    async def replay(self, reader: Reader, number: int) -> None:
        letters = await self.shard.command("XRANGE", self.shard.shard.dead(reader.name), "-", "+")
        if letters:
            entry, (_, count, *_) = letters[number % len(letters)]
            items = [(b"", b"record")] * int(count)
            assert await self.shard.replay((entry.decode(), int(count), items), group=reader.name) == 1

    async def drain(self) -> None:
        stored = await self.stored()
        for reader in self.readers.values():
            await self.fetch(reader, 10_000)
            while reader.pending:
                await self.finish(reader, 0)
            while await self.shard.command("ZCARD", self.shard.shard.later(reader.name)) > 1:
                await self.retry(reader, 0)
            assert await self.shard.backlog(reader.name) == 0
            assert (await self.shard.counters(reader.name)).skip == 0
            assert stored.keys() <= {*reader.got}
            assert not {*stored} & {*self.dropped}
        await self.check()


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(happenings=st.lists(happening, min_size=5, max_size=50), most=st.integers(1, 12))
def test_what_is_dropped_and_what_is_counted(
    cluster: LocalCluster, happenings: list[tuple[str, ...]], most: int
) -> None:
    async def tell() -> None:
        async with rig(cluster.url, f"q-{uuid.uuid4().hex[:12]}") as shard:
            await Story(shard, most).run(happenings)

    anyio.run(tell)
