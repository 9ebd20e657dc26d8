"""What is wanted of the owner of one shard: by the plan, by a worker that stops, by the shard's bell. Kept here for its
loops to look at, which are woken; does nothing about it itself.

Invariant: once its worker leaves, a shard is wanted no more.
"""

from __future__ import annotations

from time import monotonic

import anyio

from shardq.runtime.shard import OwnedShard
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import Pipes

HEIR_PATIENCE_S = 2.0


class Wishes:
    """`held` is the lease, while there is one. `rung`: a message came, or the lease moved; `stands`: the bell can be
    heard from now on. Whoever looks at these two puts them out. `called` is set at anything new while there is no
    lease. `release_at_monotonic_s`: when a lease is released that no heir has come for; infinite while the worker
    stays."""

    def __init__(self, keys: ShardKeys, nonce: str, pipes: Pipes) -> None:
        self.held: OwnedShard | None = None
        self.wanted = True
        self.leaving = False
        self.rung = self.stands = False
        self.called = anyio.Event()
        self.release_at_monotonic_s = float("inf")
        self._keys, self._pipes = keys, pipes
        self._taken = f"taken {nonce}"  # what the bell says when this very worker took the lease

    def ring(self, payload: str) -> None:
        """The shard's bell: a message came, the lease moved, or (nothing) the bell can be heard from now on."""
        if payload == self._taken:
            return
        if payload:
            self.rung = True
        else:
            self.stands = True
        held = self.held
        if held is None:
            self.called.set()
            return
        held.awake.set()
        self._pipes.expect(self._keys.slot)  # the step that looks is written in the turn in which it is built

    def deaf(self) -> None:
        """The bell can't be heard any more: the shard is polled faster."""
        if self.held is not None:
            self.held.wake()

    def want(self, wanted: bool) -> None:
        """Whether the plan (or a silent owner's standby) gives this shard to this worker."""
        if wanted != self.wanted and not self.leaving:  # once it leaves, another claim follows it, if any
            self.wanted = wanted
            self._look()

    def leave(self, *, has_heir: bool) -> None:
        """The worker stops: hand over to the heir, or, without one, release once what runs is finished."""
        if not self.leaving or not has_heir:
            self.release_at_monotonic_s = monotonic() + HEIR_PATIENCE_S if has_heir else -1e9
            self.leaving, self.wanted = True, False
            self._look()

    def _look(self) -> None:
        self.rung = True
        self._rouse()

    def _rouse(self) -> None:
        if self.held is not None:
            self.held.wake()
        else:
            self.called.set()
