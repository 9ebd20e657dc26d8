"""What every owner of a shard in one run of a worker works with, the same for all of them. Does nothing by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardq.core.budget import Budget
from shardq.core.meters import GroupMeters
from shardq.runtime.contact import Contact
from shardq.runtime.gates import Gates
from shardq.runtime.idle import IdlePolls
from shardq.runtime.outages import Outages
from shardq.runtime.runners import Runners
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.table import TableFollower
from shardq.storage.commands import Confirm
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes


@dataclass(frozen=True, slots=True)
class Owning:
    """
    bounded       whether senders to a full queue may wait for each commit
    on_taken      called when a lease was taken
    hears         whether the bell of that name is heard now
    is_silent     whether the member of that name gives no sign of life
    parents       the retired shards that the group has to finish before it may own this one
    """

    queue: str
    group: str
    worker: str
    nonce: str
    settings: WorkerSettings
    bounded: Callable[[], bool]
    pipes: Pipes
    confirm: Callable[[], Confirm | None]
    polls: IdlePolls
    on_taken: Callable[[], None]
    runners: Runners
    plan_version: Callable[[], int]
    hears: Callable[[str], bool]
    is_silent: Callable[[str], bool]
    parents: Callable[[int], Mapping[int, ShardKeys]]
    table: TableFollower
    gates: Gates
    outages: Outages
    meters: GroupMeters
    budget: Budget
    contact: Contact

    def failed(self, what: str, error: object, shard: int) -> None:
        self.outages.failed(f"{self.queue}/{self.group}: {what}", error, shard)

    def well(self, what: str, shard: int) -> None:
        self.outages.well(f"{self.queue}/{self.group}: {what}", shard)
