"""How long a change of owner waits for a replica's word. Changes no owner itself.

Invariant: a lease is not granted, handed over or released on the word of one master alone while that master may be cut
off from the others: they may have made its replica the master, where the old owner goes on under its own, smaller epoch
(which `message.fence` must never show after a greater one). Such a master takes writes no longer than its
cluster-node-timeout (15 s by default). One that has no replica connected at all has lost it, and nobody else has one.
"""

from __future__ import annotations

import re
from time import monotonic

from shardq.errors import StoreError, StoreTimeout
from shardq.storage.commands import Confirm, pack_command
from shardq.storage.pipes import Pipes

PATIENCE_S = 20.0
_ASK_WITHIN_S = 1.0
_CONNECTED = re.compile(rb"connected_slaves:(\d+)")


class GrantConfirm:
    """What the calls of one change of owner wait for: `confirm`, until waiting for it is given up."""

    def __init__(self, pipes: Pipes, slot: int, confirm: Confirm | None) -> None:
        self.confirm = confirm
        self._pipes, self._slot = pipes, slot
        self._since: float | None = None

    async def failed(self, error: Exception) -> None:
        """A call was not answered, or no replica confirmed it."""
        if self.confirm is None or not isinstance(error, StoreTimeout):
            return
        now = monotonic()
        if self._since is None:
            self._since = now
        if now - self._since > PATIENCE_S or await self._no_replica():
            self.confirm = None

    async def _no_replica(self) -> bool:
        try:
            info = await self._pipes.command(self._slot, pack_command("INFO", "replication"), timeout_s=_ASK_WITHIN_S)
        except StoreError:
            return False  # not known
        found = _CONNECTED.search(info) if isinstance(info, bytes) else None
        return found is not None and int(found[1]) == 0
