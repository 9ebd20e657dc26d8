"""The control functions on real servers: heartbeats, leadership and plans of one group."""

from __future__ import annotations

import pytest

from shardq.errors import StoreRefused
from shardq.storage import control
from shardq.storage.commands import pack_command
from shardq.storage.control import Beat, Member, Refusal
from tests.storage.rig import TIMEOUT_S, Rig

pytestmark = pytest.mark.anyio


async def beat(
    shard: Rig,
    nonce: str,
    beats: int,
    *,
    worker: str = "",
    term: int = 0,
    plan: int = 0,
    watch: tuple[str, ...] = ("*",),
) -> Beat | Refusal:
    return await control.beat(
        shard.pipes,
        shard.keys,
        "g",
        worker=worker or f"worker-{nonce}",
        nonce=nonce,
        beats=beats,
        leaving=False,
        term=term,
        plan_version=plan,
        watch=watch,
        timeout_s=TIMEOUT_S,
    )


async def seen(shard: Rig, nonce: str, beats: int, *, term: int = 0, plan: int = 0) -> Beat:
    told = await beat(shard, nonce, beats, term=term, plan=plan)
    assert isinstance(told, Beat)
    return told


async def command(shard: Rig, function: str, *args: str | bytes | int) -> tuple[str, int]:
    return await control.control_call(shard.pipes, shard.keys, "g", function, args, timeout_s=TIMEOUT_S)


async def lead(shard: Rig, nonce: str, term: int = 0, beats: int = 0) -> tuple[str, int]:
    """As a member, which it becomes."""
    await seen(shard, nonce, 1)
    return await command(shard, "lead", f"worker-{nonce}", nonce, term, beats)


async def plan(shard: Rig, nonce: str, term: int, text: bytes, *remove: str) -> tuple[str, int]:
    return await command(shard, "plan", nonce, term, text, shard.keys.control_bell("g"), *remove)


async def test_heartbeats_show_who_is_there(shard: Rig) -> None:
    first = await seen(shard, "a", 1)
    assert (first.term, first.leader_nonce, first.plan_version, first.plan) == (0, "", 0, None)
    both = await seen(shard, "b", 1)
    assert {name: member.value for name, member in both.members.items()} == {
        "worker-a": "a:1:active",
        "worker-b": "b:1:active",
    }
    some = await beat(shard, "b", 2, watch=("worker-a", "worker-nobody"))
    assert isinstance(some, Beat)
    assert list(some.members) == ["worker-a"]


async def test_another_incarnation_replaces_the_one_before(shard: Rig) -> None:
    await seen(shard, "old", 1)
    assert isinstance(await beat(shard, "new", 1, worker="worker-old"), Beat)
    assert await beat(shard, "old", 2) == "REPLACED"
    told = await beat(shard, "new", 2, worker="worker-old")
    assert isinstance(told, Beat)
    assert told.members["worker-old"].nonce == "new"


async def test_a_member_that_was_taken_for_dead_comes_back(shard: Rig) -> None:
    await seen(shard, "a", 1)
    told = await seen(shard, "a", 5)
    (_, term) = await lead(shard, "b")
    await plan(shard, "b", term, b"p", "worker-a", told.members["worker-a"].value)
    assert "worker-a" not in (await seen(shard, "b", 1)).members
    assert "worker-a" in (await seen(shard, "a", 6)).members


async def test_the_first_to_ask_leads(shard: Rig) -> None:
    status, term = await lead(shard, "a")
    assert status == "OK"
    assert await lead(shard, "a") == ("OK", term)
    assert await lead(shard, "b") == ("HELD", term)
    assert (await seen(shard, "b", 1)).leader_nonce == "a"


async def test_a_leader_that_stands_still_is_deposed(shard: Rig) -> None:
    _, term = await lead(shard, "a")
    looked = await seen(shard, "b", 1)
    assert await lead(shard, "b", term, looked.leader_beats + 1) == ("HELD", term)
    assert await lead(shard, "b", term + 1, looked.leader_beats) == ("HELD", term)
    status, newer = await lead(shard, "b", term, looked.leader_beats)
    assert status == "OK"
    assert newer > term
    assert await plan(shard, "a", term, b"of the old one") == ("DEPOSED", 0)
    assert await command(shard, "resign", "a", term, shard.keys.control_bell("g")) == ("DEPOSED", 0)
    assert (await seen(shard, "a", 2, term=term)).leader_beats == 0, "the old leader's beats renew nothing"
    assert (await seen(shard, "b", 3)).leader_nonce == "b"


async def test_a_leader_that_beats_stays(shard: Rig) -> None:
    _, term = await lead(shard, "a")
    looked = await seen(shard, "b", 1)
    assert (await seen(shard, "a", 1, term=term)).leader_beats == looked.leader_beats + 1
    assert await lead(shard, "b", term, looked.leader_beats) == ("HELD", term)


async def test_who_resigns_is_followed_at_once(shard: Rig) -> None:
    _, term = await lead(shard, "a")
    assert await command(shard, "resign", "b", term, shard.keys.control_bell("g")) == ("DEPOSED", 0)
    assert await command(shard, "resign", "a", term, shard.keys.control_bell("g")) == ("OK", 0)
    status, newer = await lead(shard, "b")
    assert status == "OK"
    assert newer > term


async def test_plans_have_rising_versions(shard: Rig) -> None:
    _, term = await lead(shard, "a")
    status, first = await plan(shard, "a", term, b"one")
    assert status == "OK"
    assert await plan(shard, "a", term, b"one") == ("OK", first), "an equal plan is no new one"
    _, second = await plan(shard, "a", term, b"two")
    assert second > first
    told = await seen(shard, "b", 1, plan=first)
    assert (told.plan_version, told.plan) == (second, b"two")
    assert (await seen(shard, "b", 2, plan=second)).plan is None


async def test_only_the_leader_of_this_term_plans(shard: Rig) -> None:
    _, term = await lead(shard, "a")
    assert await plan(shard, "b", term, b"usurper") == ("DEPOSED", 0)
    assert await plan(shard, "a", term + 1, b"from the future") == ("DEPOSED", 0)
    assert (await seen(shard, "a", 1)).plan_version == 0


async def test_a_member_that_moved_since_is_not_removed(shard: Rig) -> None:
    for nonce in ("still", "moving"):
        await seen(shard, nonce, 1)
    await seen(shard, "still", 3)
    moving = (await seen(shard, "moving", 3)).members["worker-moving"].value
    await seen(shard, "moving", 4)
    _, term = await lead(shard, "a")
    await plan(shard, "a", term, b"p", "worker-moving", moving, "worker-still", "still:3:active")
    assert set((await seen(shard, "a", 1)).members) == {"worker-a", "worker-moving"}


async def test_who_leaves_is_gone_but_not_its_successor(shard: Rig) -> None:
    await seen(shard, "a", 1)
    await seen(shard, "b", 1)
    assert await command(shard, "leave", "worker-a", "b", shard.keys.control_bell("g")) == ("OK", 2)
    assert "worker-a" in (await seen(shard, "b", 2)).members
    assert await command(shard, "leave", "worker-a", "a", shard.keys.control_bell("g")) == ("OK", 1)
    assert await command(shard, "leave", "worker-a", "a", shard.keys.control_bell("g")) == ("OK", 1)
    assert list((await seen(shard, "b", 3)).members) == ["worker-b"]


async def is_there(shard: Rig) -> bool:
    packed = pack_command("EXISTS", shard.keys.control("g"))
    return bool(await shard.pipes.command(shard.keys.control_slot, packed))


async def test_what_was_deleted_under_a_member_it_does_not_make_again_but_by_joining(shard: Rig) -> None:
    _, term = await lead(shard, "a")
    await seen(shard, "b", 1)
    await shard.pipes.command(shard.keys.control_slot, pack_command("DEL", shard.keys.control("g")))
    assert await beat(shard, "a", 2, term=term) == "GONE"
    assert await command(shard, "lead", "worker-b", "b", 0, 0) == ("ABSENT", 0)
    assert await plan(shard, "a", term, b"p") == ("DEPOSED", 0)
    assert await command(shard, "resign", "a", term, shard.keys.control_bell("g")) == ("DEPOSED", 0)
    assert await command(shard, "leave", "worker-a", "a", shard.keys.control_bell("g"), "1") == ("OK", 0)
    assert not await is_there(shard)
    await seen(shard, "b", 1)
    assert await beat(shard, "a", 3, term=term) == "GONE", "others joined, and it has not yet"
    assert list((await seen(shard, "b", 2)).members) == ["worker-b"]


async def test_the_last_member_of_a_group_that_is_not_there_takes_the_hash_along(shard: Rig) -> None:
    bell = shard.keys.control_bell("g")
    _, term = await lead(shard, "a")
    await plan(shard, "a", term, b"p")
    await seen(shard, "b", 1)
    assert await command(shard, "leave", "worker-a", "a", bell, "1") == ("OK", 1)
    assert (await seen(shard, "b", 2)).plan == b"p", "somebody is there"
    assert await command(shard, "leave", "worker-b", "b", bell) == ("OK", 0)
    assert await is_there(shard), "the group is"
    assert await command(shard, "pause", "1", bell) == ("OK", 0)
    assert await command(shard, "leave", "worker-b", "b", bell, "1") == ("OK", 0)
    assert await is_there(shard), "somebody opened it anew and paused it"
    assert await command(shard, "pause", "", bell) == ("OK", 0)
    assert await command(shard, "leave", "worker-b", "b", bell, "1") == ("OK", 0)
    assert not await is_there(shard)


async def test_a_pause_is_seen_by_every_heartbeat_until_it_ends(shard: Rig) -> None:
    assert not (await seen(shard, "a", 1)).paused
    for paused in ("1", "1", "", "", "1"):
        assert await command(shard, "pause", paused, shard.keys.control_bell("g")) == ("OK", 0)
        assert (await seen(shard, "a", 2)).paused == bool(paused)


@pytest.mark.parametrize("function", ["beat", "lead", "resign", "plan", "leave", "pause"])
async def test_misuse_is_refused(shard: Rig, function: str) -> None:
    with pytest.raises(StoreRefused, match="report it"):
        await command(shard, function, "x")


async def test_members_declare_balance_and_capacity_and_older_builds_read_them_as_active(shard: Rig) -> None:
    async def declared(leaving: bool, beats: int) -> Member:
        told = await control.beat(
            shard.pipes,
            shard.keys,
            "g",
            worker="w",
            nonce="n",
            beats=beats,
            leaving=leaving,
            term=0,
            plan_version=0,
            watch=("*",),
            timeout_s=TIMEOUT_S,
            balance="load",
            capacity=2.5,
        )
        assert isinstance(told, Beat)
        return told.members["w"]

    assert await declared(False, 1) == Member("n", 1, False, "n:1:active:load:2.5", "load", 2.5)
    assert await declared(True, 2) == Member("n", 2, True, "n:2:leaving")
    assert (await seen(shard, "b", 1)).members["worker-b"].value == "b:1:active", "as it always was"


@pytest.mark.parametrize(
    ("stored", "balance", "capacity"),
    [
        ("n:1:active", "count", 1.0),
        ("n:1:active:load:4", "load", 4.0),
        ("n:1:active:count:0.5", "count", 0.5),
        ("n:1:active:load", "load", 1.0),
        ("n:1:active:load:nan", "load", 1.0),
        ("n:1:active:load:inf", "load", 1.0),
        ("n:1:active:load:-1", "load", 1.0),
        ("n:1:active:load:0", "load", 1.0),
        ("n:1:active:load:x:y", "load", 1.0),
        ("n:1:active:other:2:more", "count", 1.0),
    ],
)
def test_what_a_member_declares_is_read_whatever_it_is(stored: str, balance: str, capacity: float) -> None:
    assert Member.parse(stored.encode()) == Member("n", 1, False, stored, balance, capacity)
