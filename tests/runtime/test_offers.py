"""How often a leader offers shards: until their owner has them, and ever more rarely those that nobody holds, as when
a group may not begin on new shards yet. Redis is answered for, and so is the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from shardq.core.plan import Plan
from shardq.runtime import coordinator
from shardq.runtime.coordinator import Coordinator
from shardq.runtime.outages import Outages
from shardq.runtime.settings import WorkerSettings
from shardq.storage import control, offers
from shardq.storage.control import Beat, Member
from shardq.storage.keys import Keys, ShardKeys

pytestmark = pytest.mark.anyio

BEAT_S = 0.25
NONE: Callable[..., object] = lambda *_: None  # noqa: E731 - it stands for pipes, which are not used


class Leader:
    """A coordinator that leads one worker with these shards; `answers` says what an offer of each is answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[int, str]) -> None:
        self.now_s, self.answers, self.stored_version = 1000.0, answers, 1
        self.offered: list[tuple[float, int]] = []
        keys = Keys("shardq", "q")
        self._shards = {shard: keys.shard(shard, "a") for shard in answers}
        monkeypatch.setattr(coordinator, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(offers, "offer_all", self._offer_all)
        self._plan = Plan.make(self._shards, ["w"], Plan())
        self._coordinator = Coordinator(
            pipes=NONE,  # type: ignore[arg-type]  # see there
            keys=keys,
            group="g",
            shards=self._shards,
            settings=WorkerSettings(),
            outages=Outages(),
            loads=lambda: None,
        )
        self._coordinator.begin(1)

    async def _offer_all(
        self, _pipes: object, _group: str, offers: Sequence[tuple[ShardKeys, int, str, str]], **_more: float
    ) -> list[str]:
        shards = [next(shard for shard, keys in self._shards.items() if keys == offer[0]) for offer in offers]
        self.offered += [(self.now_s, shard) for shard in shards]
        return [self.answers[shard] for shard in shards]

    async def beat(self, count: int) -> list[int]:
        """So many heartbeats; returns what was offered."""
        before = len(self.offered)
        for number in range(count):
            beat = Beat(1, "n", number, self.stored_version, None, {"w": Member("n", int(self.now_s * 4), False, "")})
            if (round_ := self._coordinator.look(beat, self._plan)) is not None:
                assert await self._coordinator.perform("n", round_)
            self.now_s += BEAT_S
        return [shard for _, shard in self.offered[before:]]


async def test_what_its_owner_has_is_not_offered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch, {0: "OWNED", 1: "OWNED"})
    assert await leader.beat(1) == [0, 1]
    assert await leader.beat(50) == []


async def test_what_another_one_has_is_offered_at_every_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch, {0: "OK"})
    assert await leader.beat(40) == [0] * 40


async def test_a_plan_that_was_lost_is_stored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, stored = Leader(monkeypatch, {0: "OWNED"}), list[str]()

    async def control_call(_pipes: object, _keys: Keys, _group: str, function: str, *_args: object, **_: float) -> Any:
        stored.append(function)
        return "OK", 2

    monkeypatch.setattr(control, "control_call", control_call)
    await leader.beat(3)
    assert stored == []
    leader.stored_version = 0
    await leader.beat(1)
    assert stored == ["plan"]
    leader.stored_version = 2
    await leader.beat(3)
    assert stored == ["plan"]


async def test_what_nobody_holds_is_offered_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(monkeypatch, {0: "FREE", 1: "OWNED"})
    offered = await leader.beat(4 * 60)
    assert offered.count(0) == 12, "after 0, 0.25, 0.75, 1.75, 3.75, 7.75, 15.75 s and then every 8 s"
    leader.answers[0] = "OWNED"
    assert (await leader.beat(32)).count(0) == 1
    assert 0 not in await leader.beat(16)


async def test_one_that_was_free_and_is_held_by_another_is_offered_at_every_beat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leader = Leader(monkeypatch, {0: "FREE"})
    await leader.beat(4 * 60)
    leader.answers[0] = "OK"
    assert len(await leader.beat(4 * 8 + 10)) >= 10
