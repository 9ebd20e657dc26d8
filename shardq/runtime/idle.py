"""Polls of a worker's idle shards: they renew the lease and cover lost bells, and nearly always nothing has come. Such
a poll wakes no task: it is packed but for its number, its answer is compared with that of a shard where nothing came,
and only another answer goes to the shard's loop (runtime/serving.py), which reads it as that of any step.

Invariants:
- One poll of a shard is under way at a time, and no other step of it: the loop waits for its answer before the next.
- Trust runs from the moment at which an answered poll was handed in, which is before it was written.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from shardq.core.meters import GroupMeters
from shardq.core.step import Step
from shardq.errors import ShardqError
from shardq.runtime.shard import OwnedShard
from shardq.runtime.waker import Waker
from shardq.storage import calls
from shardq.storage.commands import Packed
from shardq.storage.pipes import Pipes
from shardq.storage.requests import Sending

TURNS = 4  # moments of a period in which idle shards can be polled: those of one share a write to each node
TOGETHER = 128  # so many are polled in one moment before another one is used: a write costs more than a poll


class IdlePoll:
    """The polls of one shard while it is idle. When something came, or went wrong, its loop is woken and finds the
    answer in `reply`, or why there is none in `error`; `sent_monotonic_s` is when that poll was handed in.
    `awaited`: the loop waits for the answer of the poll that is under way, whatever it is."""

    __slots__ = (
        "_after",
        "_before",
        "_expected",
        "_meters",
        "_sending",
        "_timeout_s",
        "awaited",
        "content",
        "deadline",
        "error",
        "held",
        "reply",
        "sent_monotonic_s",
        "slot",
        "turn",
        "under_way",
    )

    def __init__(self, held: OwnedShard, content: Step, timeout_s: float, meters: GroupMeters) -> None:
        self.held, self.content, self.slot = held, content, held.keys.slot
        self._before, self._after = calls.pack_idle_step(held.keys, held.group, held.token, content)
        self._expected = calls.idle_reply(held.session.later.next_item, held.session.marks_version)
        self._timeout_s, self._meters = timeout_s, meters
        self._sending: Sending | None = None
        self.deadline = self.sent_monotonic_s = 0.0
        self.under_way = self.awaited = False
        self.turn = 0
        self.reply: Any = None
        self.error: ShardqError | None = None

    @property
    def ended(self) -> bool:
        """Whether its loop has an answer to read, or an error to mend."""
        return self.reply is not None or self.error is not None

    def send(self, pipes: Pipes, now_s: float) -> None:
        """Hands in the next poll, unless one is under way or the loop has to look first."""
        if self.under_way or self.ended:
            return
        self.held.session.count_on(self.content)
        self.under_way = True
        self.sent_monotonic_s, self.deadline = now_s, now_s + self._timeout_s
        self._sending = pipes.submit(self)

    def give_up(self) -> None:
        """Nobody waits for the poll that is under way any more."""
        assert self._sending is not None
        self.under_way = False
        self._sending.leave()
        self.error = self._sending.given_up()

    # -- as a request ----------------------------------------------------------------------------------------

    def pack(self) -> Packed:
        number = b"%d" % self.content.number
        return Packed(b"%b$%d\r\n%b\r\n%b" % (self._before, len(number), number, self._after))

    def settle(self, reply: Any) -> None:
        if not self.under_way:
            return
        self.under_way = False
        self._meters.steps.observe(monotonic() - self.sent_monotonic_s)
        if reply == self._expected:
            self.held.renewed(self.sent_monotonic_s)  # no message can have waited for that: none is in hand
        else:
            self.reply = reply
        if self.ended or self.awaited:
            self.held.wake()

    def fail(self, error: ShardqError) -> None:
        if self.under_way:
            self.under_way, self.error = False, error
            self.held.wake()


class IdlePolls:
    """Sends the polls of one worker, each once in `period_s`, as many as may be together.
    `phase` (0 to 1) keeps the workers of a group apart."""

    def __init__(self, pipes: Pipes, period_s: float, phase: float) -> None:
        self._pipes = pipes
        self._tick_s = period_s / TURNS
        self._phase = phase
        self._turns: list[dict[IdlePoll, None]] = [{} for _ in range(TURNS)]
        self._more = Waker()

    def _number_at(self, moment_s: float) -> int:
        """Moments are counted on and on; each turn has every TURNS-th."""
        return int(moment_s / self._tick_s + self._phase)

    def _moment_of(self, number: int) -> float:
        return (number - self._phase) * self._tick_s

    def add(self, poll: IdlePoll, due_s: float) -> None:
        """Polls from now on, the first time at `due_s` or earlier."""
        poll.turn = self._turn_with_room()
        now = monotonic()
        if self._moment_of(self._next(poll.turn, self._number_at(now))) > due_s:
            poll.send(self._pipes, now)
        self._turns[poll.turn][poll] = None
        if len(self._turns[poll.turn]) == 1:
            self._more.set()  # its moment may come before that of the others

    def _turn_with_room(self) -> int:
        """As few moments as can be: the first that has room, or that with the fewest polls."""
        sizes = [len(polls) for polls in self._turns]
        return next((turn for turn, size in enumerate(sizes) if size < TOGETHER), sizes.index(min(sizes)))

    @staticmethod
    def _next(turn: int, number: int) -> int:
        """The first moment of the turn after this one."""
        return number + 1 + (turn - number - 1) % TURNS

    def drop(self, poll: IdlePoll) -> None:
        """No further poll is sent; one may be under way."""
        del self._turns[poll.turn][poll]

    async def run(self) -> None:
        """Until it is cancelled."""
        over = self._number_at(monotonic())
        while True:
            next_ones = [self._next(turn, over) for turn, polls in enumerate(self._turns) if polls]
            await self._more.wait(self._moment_of(min(next_ones)) - monotonic() if next_ones else float("inf"))
            now = monotonic()
            reached = self._number_at(now)
            for number in range(max(over + 1, reached + 1 - TURNS), reached + 1):  # a process may have stood still
                for poll in self._turns[number % TURNS]:
                    poll.send(self._pipes, now)
            over = max(over, reached)
