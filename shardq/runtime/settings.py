"""A worker's numbers, each with its unit, and what follows from the lease time. Computes; reads no environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardq.core.balance import Pace
from shardq.core.budget import DEFAULT_BYTES
from shardq.core.limits import Limit
from shardq.core.retry import Retry
from shardq.errors import UsageError

DEFAULT_RETRY = Retry()


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """
    lease_s          how long a lease is worth without a renewal: a crashed worker's shards rest about this long
    leader_lease_s   the same for the coordinator's leadership
    concurrency      messages handled at a time in this process
    buffer_messages  messages held of one shard at most, about
    buffer_bytes     bytes of messages that the process holds of all its shards at most, about
    drain_limit_s    how long a stopping worker waits for its running handlers before it cancels them
    retry            when a failing message is tried again, and when it becomes a dead letter
    limit            how many messages the whole group begins in a time
    key_limit        the same for each key
    ordering         "key": messages of a key wait for each other; "none": nothing waits for anything
    balance          what the leader of the group makes even: "count" of shards, or their measured "load"
    capacity         this worker's, beside that of the others: one of 2 gets twice the load (balance="load")
    load_sample_s    how often a leader looks at the shards' counters for that; all that follows from loads is a
                     multiple of it, see `pace`
    """

    lease_s: float = 5.0
    leader_lease_s: float = 3.0
    concurrency: int = 32
    buffer_messages: int = 2000
    buffer_bytes: int = DEFAULT_BYTES
    drain_limit_s: float = 25.0
    retry: Retry = DEFAULT_RETRY
    ordering: Literal["key", "none"] = "key"
    balance: Literal["count", "load"] = "count"
    capacity: float = 1.0
    load_sample_s: float = 5.0
    limit: Limit | None = None
    key_limit: Limit | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("lease_s", 0.5),
            ("leader_lease_s", 0.3),
            ("concurrency", 1),
            ("buffer_messages", 1),
            ("buffer_bytes", 1),
            ("drain_limit_s", 0),
            ("load_sample_s", 0.05),
        ):
            if getattr(self, name) < least:
                msg = f"{name.removesuffix('_s')} must be at least {least}, not {getattr(self, name)}"
                raise UsageError(msg)

        if self.ordering not in ("key", "none"):
            msg = f"ordering is 'key' or 'none', not {self.ordering!r}"
            raise UsageError(msg)
        if self.balance not in ("count", "load"):
            msg = f"balance is 'count' or 'load', not {self.balance!r}"
            raise UsageError(msg)
        if type(self.capacity) not in (int, float) or not 0.01 <= self.capacity <= 1000:
            msg = f"capacity is a number from 0.01 to 1000, 1 for a worker like most, not {self.capacity!r}"
            raise UsageError(msg)
        if self.capacity != 1 and self.balance == "count":
            msg = f"capacity={self.capacity!r} says something only with balance='load', on every worker of the group"
            raise UsageError(msg)
        if type(self.retry) is not Retry:
            msg = f"retry is a shardq.Retry(...), not {self.retry!r}"
            raise UsageError(msg)

    @property
    def pace(self) -> Pace:
        """How often shards may move for their load; with the default of 5 s between samples as Pace has it."""
        sample_s = self.load_sample_s
        return Pace(warmup_s=2 * sample_s, cooldown_s=6 * sample_s, rest_s=60 * sample_s)

    @property
    def load_half_life_s(self) -> float:
        """How fast the loads follow a change."""
        return 6 * self.load_sample_s

    @property
    def heartbeat_s(self) -> float:
        """One missed makes the others watch a worker's leases closely; that waits for a whole lease from then on, so
        what a crash costs beyond the lease is above all how soon the silence is noticed (0.75 s at the default)."""
        return min(0.25, self.lease_s / 10, self.leader_lease_s / 4)

    @property
    def lone_heartbeat_s(self) -> float:
        """The same for the only member of its group, whom nobody watches: it keeps its leadership by it."""
        return min(4 * self.heartbeat_s, self.leader_lease_s / 3)

    @property
    def silent_after_s(self) -> float:
        """A member whose heartbeat stood still so long is watched; a false alarm costs a few reads.

        Beats come, and are looked at, every 0.8 to 1.0 heartbeats: of a living member the same beat is seen twice at
        most, up to one heartbeat apart; the third look, 1.6 to 2.0 after the first, tells."""
        return self.heartbeat_s * 1.4

    @property
    def claim_poll_s(self) -> float:
        """How often a lease that is wanted or watched is looked at."""
        return min(0.25, self.lease_s / 20)

    @property
    def idle_poll_s(self) -> float:
        """How often an idle shard is looked at and its lease renewed while its bell is heard."""
        return min(5 / 3, self.lease_s / 3)

    @property
    def deaf_poll_s(self) -> float:
        """The same while its bell is not heard."""
        return min(0.25, self.lease_s / 10)

    @property
    def commit_interval_s(self) -> float:
        """The longest a finished message waits to be committed while others of its shard are still being handled."""
        return 0.05
