"""How often a member of a group beats, and what travels with a heartbeat. The store's answers are made up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from shardq.runtime.member import JOINED, Member
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.table import BELL, TableFollower
from shardq.storage import control
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes

pytestmark = pytest.mark.anyio

SETTINGS = WorkerSettings()


class Rig:
    """A member whose store knows it and `others`; `rung` are the commands it sent beside heartbeats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: Sequence[str] = ()) -> None:
        self.others, self.rung, self.looked = others, list[bytes](), 0
        queue = SimpleNamespace(shards={}, table=SimpleNamespace(retired_by_id={}), name="q")
        self.member = Member(
            pipes=cast("Pipes", self),
            keys=Keys("shardq", "q"),
            group="g",
            table=cast("TableFollower", SimpleNamespace(queue=queue, look=self.look)),
            name="me",
            settings=SETTINGS,
            takes_shards=True,
            on_change=lambda: None,
        )
        monkeypatch.setattr(control, "beat", self.beat)
        monkeypatch.setattr(control, "control_call", self.control_call)
        monkeypatch.setattr(self.member.leadership._coordinator, "look", lambda *_: None)

    def look(self) -> None:
        self.looked += 1

    async def command(self, _slot: int, data: bytes, *, timeout_s: float) -> int:
        self.rung.append(data)
        return 1

    async def beat(self, *_: Any, worker: str, nonce: str, term: int, **__: Any) -> control.Beat:
        names = [worker, *self.others] if term else []
        members = {name: control.Member(nonce, 1, False, "") for name in names}
        return control.Beat(term, nonce if term else "", 1, 0, None, members)

    async def control_call(self, *_: Any, **__: Any) -> tuple[str, int]:
        return "OK", 7

    async def beats(self, count: int) -> None:
        for _ in range(count):
            await self.member._beat()
        self.member._nudged = False


async def test_a_leader_beats_seldom_only_while_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    assert rig.member._pace_s == SETTINGS.heartbeat_s
    await rig.beats(1)
    assert rig.member._pace_s == SETTINGS.heartbeat_s, "it has not seen who else is there"
    await rig.beats(1)
    assert rig.member._pace_s == SETTINGS.lone_heartbeat_s
    assert rig.member.leads
    rig.others = ("another",)
    await rig.beats(1)
    assert rig.member._pace_s == SETTINGS.heartbeat_s


@pytest.mark.parametrize("lease", [0.5, 5.0, 60.0])
def test_a_leader_that_is_alone_keeps_its_leadership(lease: float) -> None:
    settings = WorkerSettings(lease_s=lease, leader_lease_s=0.6 * lease)
    assert settings.heartbeat_s <= settings.lone_heartbeat_s < settings.leader_lease_s / 2


async def test_a_new_member_rings_once_and_only_one_that_is_alone_beats_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, others=("another",))
    await rig.beats(3)
    assert rig.rung == [pack_command("SPUBLISH", Keys("shardq", "q").control_bell("g"), JOINED)]
    rig.member.ring(JOINED)
    assert not rig.member._nudged
    rig.others = ()
    await rig.beats(1)
    rig.member.ring(JOINED)
    assert rig.member._nudged


@pytest.mark.parametrize(("payload", "beats", "looks"), [("plan", True, 0), ("", True, 1), (BELL, False, 1)])
async def test_any_other_bell_is_heard_by_all(
    monkeypatch: pytest.MonkeyPatch, payload: str, beats: bool, looks: int
) -> None:
    rig = Rig(monkeypatch, others=("another",))
    await rig.beats(2)
    rig.looked = 0
    rig.member.ring(payload)
    assert (rig.member._nudged, rig.looked) == (beats, looks)


async def test_what_waits_for_a_heartbeat_is_woken_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, woken = Rig(monkeypatch), list[float]()

    async def wait(seconds: float) -> None:
        await rig.member.until_beat(seconds)
        woken.append(seconds)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, 0.01)
        tasks.start_soon(wait, 3600.0)
        await anyio.lowlevel.checkpoint()
        await rig.beats(1)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        assert woken == [0.01]
        tasks.cancel_scope.cancel()
    assert not rig.member._riders


async def test_what_waits_for_a_heartbeat_that_does_not_come_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with anyio.fail_after(30):
        await Rig(monkeypatch).member.until_beat(0.01)
