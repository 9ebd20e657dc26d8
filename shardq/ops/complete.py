"""Names of queues and groups for a shell's completion: quickly or not at all. Loads no functions, says no errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio

from shardq.ops.inspect import read_group_names
from shardq.runtime.client import Client

LIMIT_S = 1.0


def queues(url: str) -> Sequence[str]:
    """The queues of the cluster, none when it does not answer within a second."""
    return _asked(url, lambda client: client.queue_names())


def groups(url: str, queue: str) -> Sequence[str]:
    """The groups of the queue, none when there is no such queue."""

    async def ask(client: Client) -> Sequence[str]:
        return await read_group_names(await client.queue(queue), timeout_s=LIMIT_S)

    return _asked(url, ask)


def _asked(url: str, ask: Callable[[Client], Awaitable[Sequence[str]]]) -> Sequence[str]:
    names: Sequence[str] = ()

    async def main() -> None:
        nonlocal names
        with anyio.move_on_after(LIMIT_S):
            async with Client(url, only_looks=True) as client:
                names = await ask(client)

    logging.disable()  # the line that is being typed is no place for a log
    try:
        anyio.run(main)
    except Exception:
        return ()  # whatever it is: the command itself will say it
    return names
