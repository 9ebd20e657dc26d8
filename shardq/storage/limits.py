"""Rate limits as Python calls (scripts/limit.lua): leave to handle messages, taken from Redis. Decides nothing about
how much to take, or when; keeps none.

No call waits for a replica: leave is good for a moment, and one that lags must not stop the work. What a master gave
just before its replica took over, and the replica had not heard of, may be given again: once, and no more than for the
time ahead and the bucket, for leave begins at the present of whoever gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardq.core.limits import AHEAD_S, KEY_AHEAD_S, Grant, Limit
from shardq.storage.keys import Keys, ShardKeys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape


async def take(pipes: Pipes, keys: Keys, group: str, limit: Limit, wanted: int, *, timeout_s: float) -> Grant:
    """Leave for at most `wanted` messages of the group, of the strictest limit that its workers have."""
    args: list[str | bytes | int] = [
        limit.count,
        limit.period_us,
        limit.capacity,
        limit.hold_us,
        wanted,
        int(AHEAD_S * 1e6),
    ]
    reply = await pipes.call(keys.control_slot, "take", [keys.control(group)], args, timeout_s=timeout_s)
    with shape("take"):
        status, *numbers = reply
        given, first_us, count, period_us, hold_us, again_us = map(_number, numbers)
        if status != b"OK" or not 0 <= given <= wanted or count < 1:
            raise ValueError
        return Grant(given, first_us, period_us / count, hold_us, again_us)


async def take_keys(
    pipes: Pipes,
    shard: ShardKeys,
    group: str,
    limit: Limit,
    wanted: Sequence[tuple[bytes, int]],
    *,
    timeout_s: float,
) -> list[Grant]:
    """Leave for so many messages of each key (its tag, how many); a grant for each."""
    args: list[str | bytes | int] = [limit.count, limit.period_us, limit.capacity, int(KEY_AHEAD_S * 1e6)]
    for tag, count in wanted:
        args += [tag, count]
    reply = await pipes.call(shard.slot, "take_keys", [shard.limits(group)], args, timeout_s=timeout_s)
    with shape("take_keys"):
        status, *numbers = reply
        found = list(map(_number, numbers))
        if status != b"OK" or len(found) != 3 * len(wanted):
            raise ValueError
        grants = []
        for at, (_, most) in enumerate(wanted):
            given, first_us, again_us = found[3 * at : 3 * at + 3]
            if not 0 <= given <= most:
                raise ValueError
            grants.append(Grant(given, first_us, limit.period_us / limit.count, limit.hold_us, again_us))
        return grants


def _number(digits: bytes) -> int:
    number = int(digits)
    if abs(number) >= 1 << 53:
        raise ValueError
    return number
