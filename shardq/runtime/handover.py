"""How a lease leaves its owner in good order: to the heir that is ready, or to nobody. Commits nothing: whoever calls
this has done so.

Invariant: no lease is given away on the word of a master that may be cut off (runtime/grants.py).
"""

from __future__ import annotations

import random
from time import monotonic

import anyio

from shardq.errors import CorruptData, StoreError
from shardq.runtime.grants import GrantConfirm
from shardq.runtime.owning import Owning
from shardq.runtime.shard import OwnedShard
from shardq.runtime.wishes import Wishes
from shardq.storage import calls
from shardq.storage.commands import Confirm

CANT_HAND_OVER = "can't hand a shard over yet"


async def hand_over(owning: Owning, held: OwnedShard, wishes: Wishes, *, heir_ready: bool) -> bool:
    """Transfers to the heir, or releases. False when the heir is gone: the claim that follows finds the lease ours
    still, and the pending entries are read again."""
    if not heir_ready and not wishes.leaving:
        return False  # the offer was withdrawn while this drained
    function = "transfer" if heir_ready else "release"
    grant = GrantConfirm(owning.pipes, held.keys.slot, owning.confirm())
    while True:
        try:
            status = await give_away(owning, held, function, grant.confirm)
        except (StoreError, CorruptData) as error:
            if not held.trust.trusted(monotonic()):
                return True  # whoever comes next waits the lease out
            await anyio.sleep(owning.settings.claim_poll_s * random.uniform(0.5, 1.0))
            owning.failed(CANT_HAND_OVER, error, held.shard)
            await grant.failed(error)
            continue
        owning.well(CANT_HAND_OVER, held.shard)
        if status == "NOHEIR" and wishes.leaving:
            function = "release"
            continue
        return status != "NOHEIR"


async def give_away(owning: Owning, held: OwnedShard, function: str, confirm: Confirm | None = None) -> str:
    """One try of release or transfer: the status word. Raises what the store does."""
    return await calls.lease_call(
        owning.pipes,
        held.keys,
        owning.group,
        function,
        [held.token],
        timeout_s=owning.settings.lease_s,
        confirm=confirm,
    )
