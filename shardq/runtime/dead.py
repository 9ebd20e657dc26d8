"""A group's dead letters over all shards: read, replay, purge. Handles no message: a replayed one is its group's
again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from shardq.core.dead import DeadFilter, DeadLetter, in_order, job_again, kept_again, open_letter, parse_dead_id
from shardq.core.records import Key
from shardq.errors import CorruptData, UnknownGroup, UsageError
from shardq.storage import dead
from shardq.storage.commands import pack_command
from shardq.storage.keys import ShardKeys, check_name
from shardq.storage.pipes import Pipes

PAGE = 100
AT_ONCE = 50
PAGE_PURGE = 1000


class DeadLetters:
    """The dead letters of one group. Get it from `queue.dead_letters(group)`.

    Filters are those of `find`: key, error (a part of its text), older_than and newer_than (seconds since it failed).
    Iterating gives all, shard by shard, oldest first in each.
    """

    def __init__(self, pipes: Pipes, shards: Mapping[int, ShardKeys], group: str) -> None:
        self._pipes, self._shards, self._group = pipes, shards, check_name("group", group)
        self.on_progress: Callable[[int, int], None] | None = None
        """Told by replay and purge how many are done, and of how many."""

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        return self.find()

    async def find(
        self, *, key: Key = None, error: str = "", older_than: float | None = None, newer_than: float | None = None
    ) -> AsyncIterator[DeadLetter]:
        """Those that fit everything given. Raises UnknownGroup."""
        wanted = DeadFilter(key, error, older_than, newer_than)
        await self._check_group()
        for shard in sorted(self._shards):
            async for letter in self._of_shard(shard):
                if wanted.takes(letter, _now_ms()):
                    yield letter

    async def get(self, dead_id: str) -> DeadLetter:
        """One by its id. Raises UsageError when there is none."""
        letter = await self._read(dead_id)
        if letter is None:
            msg = f"group {self._group!r} has no dead letter {dead_id}: it was replayed or purged, or never there"
            raise UsageError(msg)
        return letter

    async def _read(self, dead_id: str) -> DeadLetter | None:
        shard, entry = parse_dead_id(dead_id)
        if shard in self._shards:
            keys = self._shards[shard]
            for found, fields in await dead.read_one(self._pipes, keys, self._group, entry):
                return open_letter(shard, found, fields)
        return None

    async def replay(
        self,
        ids: Iterable[str] | None = None,
        *,
        key: Key = None,
        error: str = "",
        older_than: float | None = None,
        newer_than: float | None = None,
    ) -> int:
        """Hands dead letters back to their group, which handles them like retries, tries counted anew; returns how
        many.

        Either those of `ids`, or all that fit the filters. Each is in the dead letters or with its group, never in
        both or in neither, and repeating a call is harmless. Those of one key are handled in the order they were sent,
        one at a time, before what comes later for that key. Their jobs are `retrying` from then on. Those that still
        can't be read stay: CorruptData is raised for them at the end.
        """
        chosen = await self._choose(ids, DeadFilter(key, error, older_than, newer_than))
        handed, broken = 0, []
        for shard, letters in chosen.items():
            ready: list[tuple[str, int, Sequence[dead.Item]]] = []
            jobs: dict[str, dead.JobRecord] = {}
            for letter in in_order(letters):
                entry = letter.id.partition("/")[2]
                if (job := job_again(letter, self._group, _now_ms())) is not None:
                    jobs[entry] = job
                try:
                    ready.append((entry, letter.messages, kept_again(letter)))
                except CorruptData as problem:
                    broken.append(problem)
            for start in range(0, len(ready), AT_ONCE):
                part = ready[start : start + AT_ONCE]
                handed += await dead.replay(self._pipes, self._shards[shard], self._group, part, jobs)
                self._tell(handed, chosen)
        if broken:
            msg = f"{len(broken)} dead letters stay, they can't be handled; {handed} were replayed. First: {broken[0]}"
            raise CorruptData(msg) from broken[0]
        return handed

    async def purge(
        self,
        ids: Iterable[str] | None = None,
        *,
        key: Key = None,
        error: str = "",
        older_than: float | None = None,
        newer_than: float | None = None,
    ) -> int:
        """Forgets those of `ids`, or all that fit the filters, for good; returns how many."""
        chosen = await self._choose(ids, DeadFilter(key, error, older_than, newer_than))
        purged = 0
        for shard, letters in chosen.items():
            entries = [letter.id.partition("/")[2] for letter in letters]
            for start in range(0, len(entries), PAGE_PURGE):
                part = entries[start : start + PAGE_PURGE]
                purged += await dead.purge(self._pipes, self._shards[shard], self._group, part)
                self._tell(purged, chosen)
        return purged

    def _tell(self, done: int, chosen: Mapping[int, Sequence[DeadLetter]]) -> None:
        if self.on_progress is not None:
            self.on_progress(done, sum(map(len, chosen.values())))

    async def _choose(self, ids: Iterable[str] | None, wanted: DeadFilter) -> dict[int, list[DeadLetter]]:
        await self._check_group()
        chosen: dict[int, list[DeadLetter]] = {}
        if ids is not None:
            if wanted != DeadFilter():
                msg = "give ids or filters, not both"
                raise UsageError(msg)
            for dead_id in dict.fromkeys(ids):
                letter = await self._read(dead_id)
                if letter is not None:
                    chosen.setdefault(letter.shard, []).append(letter)
            return chosen
        for shard in sorted(self._shards):
            fitting = [letter async for letter in self._of_shard(shard) if wanted.takes(letter, _now_ms())]
            if fitting:
                chosen[shard] = fitting
        return chosen

    async def _of_shard(self, shard: int) -> AsyncIterator[DeadLetter]:
        after = "-"
        while True:
            page = await dead.read_dead(self._pipes, self._shards[shard], self._group, after, PAGE)
            for entry, fields in page:
                yield open_letter(shard, entry, fields)
            if len(page) < PAGE:
                return
            after = page[-1][0]

    async def _check_group(self) -> None:
        keys = next(iter(self._shards.values()))
        if not await self._pipes.command(keys.slot, pack_command("EXISTS", keys.group(self._group))):
            msg = f"there is no group {self._group!r}: `shardq group list` names those there are"
            raise UnknownGroup(msg)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
