"""A peer of the case `pipeline` that speaks its protocol with a file as its store: a byte for each message, all of them
handled at once. `WRONG` is how many messages it is off by; with `BREAKS` set it ends before it is ready."""

from __future__ import annotations

import asyncio
import os

from benchmarks.peers import protocol

role, path, count = protocol.arguments()
wrong = int(os.environ.get("WRONG", "0"))


class StoreTally(protocol.Tally):
    """Counts what is stored as handled, and is wrong once all are."""

    def total(self) -> int:
        stored = os.stat(path).st_size
        return stored + wrong if stored == protocol.WARM_UP + count else stored


async def left() -> int:
    return 0


def send(values: list[str]) -> None:
    assert all(len(value) == protocol.VALUE_BYTES for value in values)
    with open(path, "ab", buffering=0) as store:
        store.write(b"." * len(values))


if os.environ.get("BREAKS") and role == "produce":
    raise SystemExit("there is no such server")
if role == "work":
    asyncio.run(protocol.watch(StoreTally(), count, left))
protocol.produce_blocking(count, send)
