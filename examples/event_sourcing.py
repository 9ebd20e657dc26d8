"""Event sourcing: what happened to accounts is kept, and what is known of them is worked out from it at any time anew.

The queue keeps its events for seven days after they were handled. One group keeps the balances; months later somebody
wants statements, and a new group that starts at the earliest event works them out from history, though one of its
workers is killed half way. Both are written through `message.atomic()`, so each event counts once in each of them, and
each account's events come in their order: in order, no account is ever overdrawn.

The naive version keeps balances only, or sends events through a queue that forgets what was handled: then a new
question can't be answered. That is tried beside it.

    python -m examples.event_sourcing
"""

from __future__ import annotations

import os
import random
from itertools import accumulate

import anyio
import msgspec

import shardq
from examples.common import LEASE_S, check, finished, plain_redis, run, unfinished, unique, until, workers

EVENTS, ACCOUNTS = 4000, [f"account-{number}" for number in range(50)]


class Event(msgspec.Struct):
    """`amount` in cents: above 0 was paid in, below 0 was paid out. `number` counts the account's events."""

    account: str
    number: int
    amount: int


queue_name = os.environ.get("QUEUE", "unset")
balances = shardq.Worker(queue_name, group="balances", type=Event, lease=LEASE_S)
statements = shardq.Worker(queue_name, group="statements", type=Event, lease=LEASE_S)


@balances.handler
async def add_up(message: shardq.Message) -> None:
    event: Event = message.value
    async with message.atomic() as tx:
        tx.hincrby(message.local_key("balances"), event.account, event.amount)


@statements.handler
async def write_line(message: shardq.Message) -> None:
    event: Event = message.value
    await anyio.sleep(0.01)  # whatever else there is to do for a line
    async with message.atomic() as tx:
        tx.rpush(message.local_key(f"statement:{event.account}"), f"{event.number}:{event.amount}")


def happenings() -> list[Event]:
    """Events of all accounts in turn; nobody pays out what is not there."""
    balance, number = dict.fromkeys(ACCOUNTS, 0), dict.fromkeys(ACCOUNTS, 0)
    events = []
    for _ in range(EVENTS):
        account = random.choice(ACCOUNTS)
        amount = random.randint(1, 100) if random.random() < 0.5 else -random.randint(0, balance[account])
        balance[account] += amount
        number[account] += 1
        events.append(Event(account, number[account], amount))
    return events


async def left_without_retention(client: shardq.Client, events: list[Event]) -> int:
    """How many events a later group finds in a queue that keeps what is unfinished only, which is the default."""
    queue = await client.queue(unique("forgetful"), shards=8, type=Event, key="account")
    await queue.open_group("balances")
    async with queue.producer() as producer:
        await producer.send_many(events)
    worker = shardq.Worker(queue.name, group="balances")

    @worker.batch_handler
    async def take(_: object) -> None:
        pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, client)
        await until(lambda: finished(queue, "balances"), "the forgetful queue")
        worker.stop()
    await queue.open_group("statements", start="earliest")
    return await unfinished(queue, "statements")


async def main(url: str) -> None:
    name, events = unique("events"), happenings()
    async with shardq.connect(url) as client, plain_redis(url) as redis:
        queue = await client.queue(name, shards=8, retention="7d", type=Event, key="account")
        await queue.open_group("balances")
        with workers(url, "examples.event_sourcing:balances", 1, QUEUE=name):
            async with queue.producer() as producer:
                await producer.send_many(events)
            left = await left_without_retention(client, events)
            await until(lambda: finished(queue, "balances"), "the balances")

        await queue.open_group("statements", start="earliest")
        print(f"{await unfinished(queue, 'statements')} events of the past wait for the new group")
        with workers(url, "examples.event_sourcing:statements", 2, QUEUE=name) as running:

            async def half() -> bool:
                return await unfinished(queue, "statements") <= EVENTS // 2

            await until(half, "half of the statements")
            running.kill_one()
            print(f"killed a worker after {EVENTS - await unfinished(queue, 'statements')} of them")
            await until(lambda: finished(queue, "statements"), "the rest")

        balance: dict[str, int] = {}
        lines: dict[str, list[str]] = {}
        for account in ACCOUNTS:
            balance[account] = int(await redis.hget(queue.local_key("balances", account), account) or 0)
            lines[account] = await redis.lrange(queue.local_key(f"statement:{account}", account), 0, -1)
        kept = {account: [record async for record in queue.history(key=account)] for account in ACCOUNTS}
    amounts = {account: [int(line.partition(":")[2]) for line in lines[account]] for account in ACCOUNTS}
    check(balance == {account: sum(amounts[account]) for account in ACCOUNTS}, "statements and balances agree")
    told = {account: [f"{e.number}:{e.amount}" for e in events if e.account == account] for account in ACCOUNTS}
    check(lines == told, f"all {EVENTS} events are in the statements, once and in order, though a worker died")
    check(min(min(accumulate(amounts[a]), default=0) for a in ACCOUNTS) >= 0, "at no line was an account overdrawn")
    check(sum(map(len, kept.values())) == EVENTS, "all events are kept still, for the next question")
    check(left == 0, f"without retention, {left} of {EVENTS} are left for the new group")


if __name__ == "__main__":
    run(main, __doc__)
