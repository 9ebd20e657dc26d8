"""One shard of one worker: its lease is claimed, served while it is held, and handed over. What is done in each of
these is in claim.py, serving.py with steps.py and timekeeping.py, and handover.py; this has one follow the other.

    claim -> serve -> (lost | transferred | released) -> claim again while the shard is wanted

Invariant: nothing of a shard is handled under a new lease before every handler of the one before has ended.
"""

from __future__ import annotations

import logging

from shardq.core.lease import Trust
from shardq.errors import LeaseLost, ShardqError
from shardq.runtime.claim import Claim, Grant
from shardq.runtime.handover import give_away
from shardq.runtime.owning import Owning
from shardq.runtime.serving import Serving
from shardq.runtime.shard import OwnedShard
from shardq.runtime.steps import Steps
from shardq.runtime.timekeeping import first_tidy_s
from shardq.runtime.wishes import Wishes
from shardq.storage.keys import ShardKeys

_log = logging.getLogger("shardq")


class ShardOwner:
    """Claims and serves one shard until it is neither wanted nor held. Tell it through `wishes`."""

    def __init__(self, owning: Owning, shard: int, keys: ShardKeys) -> None:
        self.shard, self.keys = shard, keys
        self.wishes = Wishes(keys, owning.nonce, owning.pipes)
        self._owning = owning
        self._claim = Claim(owning, shard, keys, self.wishes)
        self._steps: Steps | None = None

    @property
    def held(self) -> OwnedShard | None:
        return self.wishes.held

    @property
    def claimed_from(self) -> str:
        """Who holds the lease that this is about to take; '' when nobody is known to."""
        return self._claim.claimed_from

    async def run(self) -> None:
        """Until the shard is neither wanted nor held."""
        owning, ours = self._owning, False
        while True:
            grant = await self._claim.take(ours=ours)
            if grant is None:
                return
            held = self._hold(grant)
            steps = self._steps = Steps(owning, held, self.wishes)
            self.wishes.held = held
            owning.on_taken()
            lost: LeaseLost | None = None
            owning.meters.shards += 1
            try:
                ours = not await Serving(owning, held, self.wishes, steps).run()
            except LeaseLost as error:
                lost, ours = error, False
            finally:
                owning.meters.shards -= 1
            held.lose()
            self._claim.was_held(held.trust.renewed_monotonic_s)
            owning.runners.interrupt(held)
            if lost is not None:
                await self._tell_lost(lost)
            while held.running:  # a handler slow to end must not meet its key's next one in a claim of our own
                await held.awake.wait()
            self.wishes.held = self._steps = None

    def _hold(self, grant: Grant) -> OwnedShard:
        owning = self._owning
        held = OwnedShard(
            owning.queue,
            owning.group,
            self.shard,
            grant.epoch,
            owning.nonce,
            keys=self.keys,
            step=grant.step,
            trust=Trust(owning.settings.lease_s, grant.sent_monotonic_s),
            ready=owning.runners.ready,
            by_key=owning.settings.ordering == "key",
            budget=owning.budget,
        )
        held.tidy_at_monotonic_s = first_tidy_s(grant.sent_monotonic_s)
        owning.runners.attach(held)
        return held

    async def _tell_lost(self, error: LeaseLost) -> None:
        if await self._owning.table.has(self.shard):
            _log.warning("%s", error)
            self._owning.meters.fenced += 1
        else:
            _log.info("shard %d of %s, which was retired, is removed", self.shard, self._owning.queue)

    async def abandon(self) -> None:
        """After a cancellation: one last commit of what was finished, and the lease back. Errors leave it to time."""
        held, steps = self.held, self._steps
        if held is None or steps is None:
            return
        try:
            await steps.commit_rest()
            await give_away(self._owning, held, "release")
        except ShardqError as error:
            where = f"shard {self.shard} of {self._owning.queue}"
            _log.warning("%s: its lease was not given back, it runs out: %s", where, error)
        finally:
            held.lose()
