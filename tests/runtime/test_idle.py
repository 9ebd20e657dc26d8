"""Polls of idle shards: what they send, when, and whom an answer wakes. No server."""

from __future__ import annotations

from time import monotonic
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from shardq.core.lease import Trust
from shardq.core.meters import GroupMeters
from shardq.core.step import NEW
from shardq.errors import StoreTimeout
from shardq.runtime.idle import TOGETHER, TURNS, IdlePoll, IdlePolls
from shardq.runtime.shard import OwnedShard
from shardq.storage import calls
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from shardq.storage.requests import Request, Sending
from tests.runtime.harness import until

pytestmark = pytest.mark.anyio


class Rig:
    """One idle shard; `sent` are the requests that were handed in. Nothing is answered by itself."""

    def __init__(self) -> None:
        self.sent: list[Request] = []
        self.keys = Keys("shardq", "q").shard(0, "tag")
        self.shard = OwnedShard(
            "q", "g", 0, 1, "n", keys=self.keys, step=7, trust=Trust(5.0, 0.0), ready=None, by_key=True
        )
        self.shard.session.cursor = NEW
        self.poll = IdlePoll(self.shard, self.shard.session.idle_step(16, 100), 5.0, GroupMeters())
        self.pipes = cast("Pipes", self)

    def submit(self, request: Request) -> Sending:
        self.sent.append(request)
        return Sending(request)

    def nothing(self) -> list[Any]:
        return calls.idle_reply(1, b"")


def content_of(poll: IdlePoll) -> bytes:
    return poll.pack().data


async def test_a_poll_is_the_step_that_the_loop_would_send() -> None:
    rig = Rig()
    rig.poll.send(rig.pipes, 10.0)
    step = rig.shard.session.idle_step(16, 100)
    step.number = 8
    whole = calls._pack_step(rig.keys, "g", rig.shard.token, step, 8, renew=True, wait=True)
    assert content_of(rig.poll) == whole


async def test_nothing_came_renews_from_when_it_was_sent_and_wakes_nobody() -> None:
    rig = Rig()
    for number in (8, 9, 10):
        rig.poll.send(rig.pipes, float(number))
        rig.poll.send(rig.pipes, float(number))  # one is under way
        assert len(rig.sent) == number - 7
        rig.poll.settle(rig.nothing())
        assert rig.poll.content.number == rig.shard.session.number == number
        assert rig.shard.trust.renewed_monotonic_s == number
    assert not rig.poll.ended


@pytest.mark.parametrize(
    ("place", "other"),
    [(0, b"FENCED"), (1, b"heir"), (2, [[b"1-0", [b"a", b"b"]]]), (4, b"2"), (5, b"90"), (6, b"m"), (10, b"new")],
)
async def test_any_other_answer_is_for_the_loop_and_renews_nothing(place: int, other: Any) -> None:
    rig = Rig()
    reply = rig.nothing()
    reply[place] = other
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.shard.awake.wait)
        await anyio.lowlevel.checkpoint()
        rig.poll.send(rig.pipes, 9.0)
        rig.poll.settle(reply)
    assert rig.poll.ended
    assert rig.poll.reply == reply
    assert rig.shard.trust.renewed_monotonic_s == 0.0
    rig.poll.send(rig.pipes, 10.0)
    assert len(rig.sent) == 1  # until the loop has looked


async def test_a_poll_that_failed_or_was_given_up_is_told_once() -> None:
    failed, given_up = Rig(), Rig()
    failed.poll.send(failed.pipes, 9.0)
    failed.poll.fail(StoreTimeout("no answer"))
    failed.poll.settle(failed.nothing())
    assert isinstance(failed.poll.error, StoreTimeout)
    given_up.poll.send(given_up.pipes, 9.0)
    given_up.poll.give_up()
    given_up.poll.settle(given_up.nothing())  # too late: the loop sends the step again
    assert given_up.poll.error is not None
    assert failed.shard.trust.renewed_monotonic_s == given_up.shard.trust.renewed_monotonic_s == 0.0


async def test_each_shard_is_polled_once_in_a_period_and_those_due_together_at_once() -> None:
    rig, others = Rig(), [Rig() for _ in range(3)]
    polls = IdlePolls(rig.pipes, 0.2, 0.3)
    for one in (rig, *others):
        polls.add(one.poll, monotonic() + 0.2)
    assert rig.sent == []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(polls.run)
        for _ in range(3):
            await until(lambda: len(rig.sent) == 4, 10, "a poll of each")
            polled = [cast("IdlePoll", request) for request in rig.sent]
            assert {id(poll) for poll in polled} == {id(one.poll) for one in (rig, *others)}
            rig.sent.clear()
            for poll in polled:
                poll.settle(rig.nothing())
        polls.drop(others[0].poll)
        rig.sent.clear()
        await until(lambda: len(rig.sent) == 3, 10, "a poll of the others")
        assert others[0].poll not in rig.sent
        tasks.cancel_scope.cancel()


async def test_polls_share_moments_as_long_as_these_have_room() -> None:
    polls = IdlePolls(Rig().pipes, 100.0, 0.5)
    rigs = [Rig() for _ in range(TURNS * TOGETHER + TURNS)]
    for number, rig in enumerate(rigs):
        polls.add(rig.poll, monotonic() + number % 100)
    turns = [rig.poll.turn for rig in rigs]
    assert turns[: TURNS * TOGETHER] == sorted(turns[: TURNS * TOGETHER])
    assert {turns.count(turn) for turn in range(TURNS)} == {TOGETHER + 1}
    polls.drop(rigs[0].poll)
    late = Rig()
    polls.add(late.poll, monotonic() + 100)
    assert late.poll.turn == 0


async def test_a_poll_is_never_later_than_it_is_due() -> None:
    for due_s in (0.1, 30.0, 99.0):
        rig = Rig()
        polls = IdlePolls(rig.pipes, 100.0, 0.5)
        polls.add(rig.poll, monotonic() + due_s)
        next_s = polls._moment_of(polls._next(rig.poll.turn, polls._number_at(monotonic()))) - monotonic()
        assert rig.sent == ([] if next_s <= due_s else [rig.poll])


async def test_a_shard_that_is_due_already_is_polled_when_it_is_added() -> None:
    rig = Rig()
    IdlePolls(rig.pipes, 1.0, 0.5).add(rig.poll, monotonic() - 1)
    assert rig.sent == [rig.poll]
