"""What the model of a reshard consists of: plans, shards, producers, those who carry plans out. Does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")

ABSENT, OPEN, SEALED, GONE = range(4)
NO_GROUP, SHUT, OWNED = range(3)

Table = tuple[int, ...]  # of each key, the shard it goes to


@dataclass(frozen=True)
class Plan:
    """core/reshard.py's Reshard: the parents, the children and the table that follows."""

    parents: tuple[int, ...]
    children: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Scenario:
    """
    first       the table before any plan, and how many shards there are ever
    plans       in the order in which they are begun; one whose parents are not active any more is left out
    sends       the keys of the messages of each producer, in order; negative: of key -1 - it, and delayed
    groups      how many there are at the start; `late`: one more is opened at some time
    executors   who may carry out a plan at one time
    failovers   how many there may be; a replica may lack the last step that was done on its master
    """

    first: Table
    shards: int
    plans: tuple[Plan, ...]
    sends: tuple[tuple[int, ...], ...]
    groups: int = 1
    late: bool = False
    executors: int = 1
    failovers: int = 0
    resets: int = 0
    retries: int = 0
    gives_up: bool = False
    removes: bool = False

    @property
    def keys(self) -> tuple[int, ...]:
        """The key of each message."""
        return tuple(key if key >= 0 else -1 - key for own in self.sends for key in own)

    @property
    def delayed(self) -> frozenset[int]:
        return frozenset(number for number, key in enumerate(key for own in self.sends for key in own) if key < 0)


class Shard(NamedTuple):
    """
    log      its messages; `delayed`: those that are not due yet
    answers  number of the newest batch of each producer that it has stored
    gates    of each group; `resets`: how often each was put back to the first message
    """

    state: int
    log: tuple[int, ...]
    delayed: tuple[int, ...]
    answers: tuple[int, ...]
    gates: tuple[int, ...]
    resets: tuple[int, ...]


class Home(NamedTuple):
    """One master's data. `done` and `waiting`: messages that each group has handled, and that wait for a retry (bits).
    `removed`: messages that went with their shards."""

    shards: tuple[Shard, ...]
    done: tuple[int, ...]
    waiting: tuple[int, ...]
    removed: int


class Control(NamedTuple):
    """The routing hash. `table` counts the plans: 0 is the first, n + 1 that of plan n. `plan` is -1 for none."""

    table: int
    plan: int
    committed: bool
    begun: int


class Producer(NamedTuple):
    """
    sent     how many of its messages its application has sent
    route    of each key the shard it goes to; empty before it has connected
    buffers  of each shard, messages to be stored, in order
    flight   shard, messages, number of the batch, answer ("" for none yet)
    """

    sent: int
    route: Table
    buffers: tuple[tuple[int, ...], ...]
    flight: tuple[int, tuple[int, ...], int, str] | None
    batch: int


class Executor(NamedTuple):
    """Who carries out a plan: the step it is at, and what is left of it. `confirms`: waits for a replica."""

    plan: int
    step: int
    todo: tuple[tuple[int, ...], ...]
    confirms: bool = False


class State(NamedTuple):
    """`behind`: the home as its replica has it. `before`: of each message, those of its key that were acknowledged when
    it was sent (bits). `opening`, `resetting`: shards of an operation on a group under way; None when there is none."""

    control: Control
    home: Home
    behind: Home
    producers: tuple[Producer, ...]
    executors: tuple[Executor, ...]
    acknowledged: int
    before: tuple[int, ...]
    opening: tuple[int, ...] | None
    resetting: tuple[int, ...] | None
    failovers: int
    resets: int
    retries: int


Steps = Iterator[tuple[str, State]]

# runtime/reshard.py: STEPS, each with what it is done to; `look` reads, the others change.
ORDER = ("open_child", "look", "open_groups", "commit", "seal", "look", "open_groups", "publish", "move")
TOO_EARLY = ("open_child", "look", "open_groups", "commit", "publish", "seal", "look", "open_groups", "move")


def bits(messages: tuple[int, ...]) -> int:
    return sum(1 << message for message in messages)


def put(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    return (*items[:index], item, *items[index + 1 :])
