"""Made-up runs for the tests of the checker: `World` is a small queue that keeps every promise of shardq, through
crashes, pauses, failovers, splits and merges, on a clock of its own. Starts nothing, touches no server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from tests.faults.checker import Promises
from tests.faults.history import Change, Event, Handle, Lease, Process, Send, Strike, in_order
from tests.faults.story import Dead, Effect, FinalState, Name, ShardState

SHARDS, KEYS, PRODUCERS, WORKERS = 2, 4, 2, 2
PROMISES = Promises(losing=frozenset({"lossy"}), repeating=frozenset({"crash", "pause", "failover", "lossy"}))


@dataclass(eq=False)
class Message:
    """`late`: of unknown outcome, and still on its way."""

    name: Name
    key: str
    fails: bool
    id: str = ""
    attempt: int = 1
    acknowledged: bool = False


@dataclass(eq=False)
class Shard:
    """`keys`: that it has, or had when it was sealed; `log`: what is not finished; `done`: handled and not committed;
    `commits`: how many."""

    number: int
    home: int
    keys: list[str]
    sealed: bool = False
    epoch: int = 0
    owner: str = ""
    entries: int = 0
    appended: int = 0
    log: list[Message] = field(default_factory=list)
    running: list[Message] = field(default_factory=list)
    done: list[Message] = field(default_factory=list)
    acked: int = 0
    dead: int = 0


class World:
    """`run` lets so many random things happen, then drains."""

    def __init__(self, chance: Random) -> None:
        self.chance, self.at_ns = chance, 10**9
        self.events: list[Event] = []
        keys = [f"key-{index}" for index in range(KEYS)]
        self.shards = [Shard(number, number, keys[number::SHARDS]) for number in range(SHARDS)]
        # Of each home, in order: which shard, and what it left. A failover takes back the last ones.
        self.commits: list[list[tuple[Shard, Message, Effect | None]]] = [[] for _ in range(SHARDS)]
        self.flights: dict[tuple[str, str], Message] = {}
        self.late: list[Message] = []
        self.sleepers: dict[str, list[tuple[Shard, int, Message]]] = {}
        self.workers = [f"worker-{number}" for number in range(WORKERS)]
        self._numbers = self._names = WORKERS
        self._faults = 0

    def run(self, steps: int) -> tuple[list[Event], FinalState]:
        often: list[Callable[[], None]] = [self.send, self.store, self.answer, self.arrive, self.take, self.commit]
        often += [self.start, self.start, self.end, self.end]
        seldom = [self.crash, self.pause, self.wake, self.hand_over, self.failover, self.split, self.merge]
        for _ in range(steps):
            self.chance.choice(seldom if self.chance.random() < 0.06 else often)()
        self.drain()
        return in_order(self.events), self.final()

    def tick(self) -> int:
        self.at_ns += self.chance.randrange(1, 20_000_000)
        return self.at_ns

    def shard_of(self, key: str) -> Shard:
        return next(shard for shard in self.shards if key in shard.keys and not shard.sealed)

    def before(self, shard: Shard) -> list[Shard]:
        """Those that had its keys before, of every generation."""
        older = self.shards[: shard.number]
        return [other for other in older if other.sealed and not set(other.keys).isdisjoint(shard.keys)]

    # -- sending -----------------------------------------------------------------------------------------------------

    def send(self) -> None:
        place = f"producer-{self.chance.randrange(PRODUCERS)}", f"key-{self.chance.randrange(KEYS)}"
        if place not in self.flights:
            self._numbers += 1
            message = Message((place[0], self._numbers), place[1], self.chance.random() < 0.1)
            self.flights[place] = message
            self._send("invoke", message)

    def _send(self, what: Literal["invoke", "ok", "fail", "unknown"], message: Message) -> None:
        process, number = message.name
        id_ = message.id if what == "ok" else ""
        self.events.append(Send(what, self.tick(), process, message.key, number, message.fails, id_))

    def store(self) -> None:
        waiting = [message for message in self.flights.values() if not message.id]
        if waiting:
            self._append(self.chance.choice(waiting))

    def _append(self, message: Message) -> None:
        shard = self.shard_of(message.key)
        shard.entries, shard.appended = shard.entries + 1, shard.appended + 1
        message.id = f"{shard.number}/{shard.entries}-0/0"
        shard.log.append(message)

    def answer(self) -> None:
        if self.flights:
            place = self.chance.choice(sorted(self.flights))
            message = self.flights.pop(place)
            lost = self.chance.random() < 0.1
            if message.id and not lost:
                message.acknowledged = True
                self._send("ok", message)
            elif lost:
                self._send("unknown", message)
                self.late += [] if message.id else [message]
            else:
                self._send("fail", message)

    def arrive(self) -> None:
        """What was given up may be stored all the same."""
        if self.late and self.chance.random() < 0.3:
            self._append(self.late.pop())

    # -- handling ----------------------------------------------------------------------------------------------------

    def take(self) -> None:
        for shard in self.shards:
            gated = any(other.log for other in self.before(shard))
            if not shard.owner and self.workers and not gated:
                shard.owner = self.chance.choice(self.workers)
                shard.epoch += 1
                self.events.append(Lease("taken", self.tick(), shard.owner, shard.number, shard.epoch))

    def start(self) -> None:
        shard = self.chance.choice(self.shards)
        busy = {message.key for message in shard.running}
        ready: dict[str, Message] = {}
        for message in shard.log:
            if message not in shard.done:
                ready.setdefault(message.key, message)
        ready = {key: message for key, message in ready.items() if key not in busy}
        if shard.owner and ready:
            message = ready[self.chance.choice(sorted(ready))]
            shard.running.append(message)
            self._handle("start", shard.owner, shard, shard.epoch, message)

    def end(self) -> None:
        shard = self.chance.choice(self.shards)
        if shard.running:
            message = shard.running.pop(self.chance.randrange(len(shard.running)))
            failed = message.fails or self.chance.random() < 0.1
            self._handle("end", shard.owner, shard, shard.epoch, message, "failed" if failed else "ok")
            if failed and not message.fails:
                message.attempt += 1
            else:
                shard.done.append(message)

    def _handle(
        self,
        what: Literal["start", "end"],
        process: str,
        shard: Shard,
        epoch: int,
        message: Message,
        how: Literal["", "ok", "failed", "cancelled"] = "",
    ) -> None:
        place = process, shard.number, epoch, message.id, message.key, *message.name, message.attempt
        self.events.append(Handle(what, self.tick(), *place, how))

    def commit(self) -> None:
        shard = self.chance.choice(self.shards)
        for message in shard.done:
            effect = None if message.fails else Effect(message.name, shard.epoch, shard.owner, message.id)
            self.commits[shard.home].append((shard, message, effect))
            shard.acked, shard.dead = shard.acked + (effect is not None), shard.dead + (effect is None)
            shard.log.remove(message)
        shard.done.clear()

    # -- faults ------------------------------------------------------------------------------------------------------

    def _fault(self, name: str) -> None:
        self._faults += 1
        self.events.append(Strike("strike", self.tick(), self._faults, name))
        self.events.append(Strike("healed", self.at_ns + 10**9, self._faults, name))

    def _process(self, what: Literal["killed", "paused", "resumed"], name: str) -> None:
        self.events.append(Process(what, self.tick(), name))

    def _leave(self, worker: str) -> list[tuple[Shard, int, Message]]:
        """The worker has no shard any more; returns what it was in the middle of."""
        left = []
        for shard in self.shards:
            if shard.owner == worker:
                left += [(shard, shard.epoch, message) for message in shard.running]
                shard.owner = ""
                shard.running, shard.done = [], []
        return left

    def crash(self) -> None:
        if self.workers:
            worker = self.workers.pop(self.chance.randrange(len(self.workers)))
            self._fault("crash")
            self._process("killed", worker)
            self._leave(worker)
            self._names += 1
            self.workers.append(f"worker-{self._names}")

    def pause(self) -> None:
        if len(self.workers) > 1:
            worker = self.workers.pop(self.chance.randrange(len(self.workers)))
            self._fault("pause")
            self._process("paused", worker)
            self.sleepers[worker] = self._leave(worker)

    def wake(self) -> None:
        """It ends what it was in the middle of; nobody takes its commits."""
        if self.sleepers:
            worker, handling = self.sleepers.popitem()
            self._process("resumed", worker)
            for shard, epoch, message in handling:
                self._handle("end", worker, shard, epoch, message, "cancelled" if message.fails else "ok")
            self.workers.append(worker)

    def hand_over(self) -> None:
        shard = self.chance.choice(self.shards)
        if not shard.running and not shard.done:
            shard.owner = ""

    def failover(self) -> None:
        """The last commits of a home are taken back, and with "lossy" the last messages; the owners have to take the
        leases anew."""
        home, lossy = self.chance.randrange(SHARDS), self.chance.random() < 0.5
        self._fault("lossy" if lossy else "failover")
        for shard in self.shards:
            if shard.home == home:
                self._cut(shard)
        for _ in range(self.chance.randrange(3)):
            if self.commits[home]:
                shard, message, effect = self.commits[home].pop()
                shard.acked, shard.dead = shard.acked - (effect is not None), shard.dead - (effect is None)
                shard.log.insert(0, message)
        shard = self.chance.choice([shard for shard in self.shards if shard.home == home])
        for _ in range(self.chance.randrange(3) if lossy else 0):
            if shard.log and shard.log[-1] not in self.flights.values():
                shard.log.pop()
                shard.appended -= 1

    def _cut(self, shard: Shard) -> None:
        for message in shard.running:
            self._handle("end", shard.owner, shard, shard.epoch, message, "cancelled")
        shard.owner, shard.running, shard.done = "", [], []

    # -- changes of the number of shards -----------------------------------------------------------------------------

    def _reshard(self, parents: list[Shard], keys: list[list[str]]) -> None:
        """What is under way is stored on the new ones; the old ones go on until they are empty."""
        self.events.append(Change("begun", self.tick(), "operator", f"{[parent.number for parent in parents]}"))
        for parent in parents:
            parent.sealed = True
        for own in keys:
            self.shards.append(Shard(len(self.shards), parents[0].home, own))

    def split(self) -> None:
        found = [shard for shard in self.shards if not shard.sealed and len(shard.keys) > 1]
        if found:
            shard = self.chance.choice(found)
            self._reshard([shard], [shard.keys[:1], shard.keys[1:]])

    def merge(self) -> None:
        active = [[s for s in self.shards if not s.sealed and s.home == home] for home in range(SHARDS)]
        found = [shards for shards in active if len(shards) > 1]
        if found:
            shards = self.chance.choice(found)
            self._reshard(shards, [[key for shard in shards for key in shard.keys]])

    # -- the end -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        while self.flights:
            self.store()
            self.answer()
        while self.sleepers:
            self.wake()
        while any(shard.log for shard in self.shards):
            self.take()
            self.start()
            self.end()
            self.commit()

    def final(self) -> FinalState:
        effects: dict[str, list[Effect]] = {f"key-{index}": [] for index in range(KEYS)}
        dead = []
        for commits in self.commits:
            for _, message, effect in commits:
                if effect is not None:
                    effects[message.key].append(effect)
                else:
                    dead.append(Dead(message.name, message.key, message.id, "it fails"))
        stay = {shard.number: "producers, which may ask for an answer" for shard in self.shards if shard.sealed}
        return FinalState(
            effects, dead, list(map(self._state, self.shards)), phase="retired" if stay else "", stay=stay
        )

    def _state(self, shard: Shard) -> ShardState:
        dead = shard.dead
        counts = {"appended": shard.appended, "acked": shard.acked, "dead": dead}
        memory = {"stream": 500, "meta": 200}
        rest = {"delivered": shard.appended, "backlog": 0, "pending": 0, "waiting": 0, "dead_letters": dead}
        return ShardState(shard.number, **counts, **rest, memory_before=memory, memory_after=dict(memory))
