"""Change data capture: a copy of a SQLite database follows the original, row by row, whatever is killed.

Triggers write down each change in the transaction that makes it. A reader sends what is written down and then deletes
it; killed in between it sends the same again, with the same `dedupe_id`, and the queue keeps one. Changes of one row
are one key, so they stay in order. A worker applies a list of them in one transaction of the copy, together with the
number of each row's last change, by which it knows what it has applied already.

The naive version writes to both databases, one after the other: killed in between, the copy differs for ever, and
nobody knows where. What this does not give: rows of different keys may be changed in another order than in the
original, until the copy has caught up.

    python -m examples.cdc
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.to_thread

import shardq
from examples.common import GROUP, LEASE_S, check, finished, programs, run, unique, until, workers

TABLE = "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);"
COPY = f"{TABLE} CREATE TABLE applied (key PRIMARY KEY, number);"
ORIGINAL = f"""
    {TABLE}
    CREATE TABLE changes (number INTEGER PRIMARY KEY AUTOINCREMENT, key, row);
    CREATE TABLE reader (sends); INSERT INTO reader VALUES (0);
    CREATE TRIGGER inserted AFTER INSERT ON customers BEGIN
        INSERT INTO changes (key, row) VALUES ('customers/' || new.id, json_array(new.id, new.name, new.city)); END;
    CREATE TRIGGER updated AFTER UPDATE ON customers BEGIN
        INSERT INTO changes (key, row) VALUES ('customers/' || new.id, json_array(new.id, new.name, new.city)); END;
    CREATE TRIGGER deleted AFTER DELETE ON customers BEGIN
        INSERT INTO changes (key, row) VALUES ('customers/' || old.id, NULL); END;
"""
queue_name, folder = os.environ.get("QUEUE", "unset"), os.environ.get("FOLDER", ".")

worker = shardq.Worker(queue_name, group=GROUP, lease=LEASE_S)


@worker.batch_handler
def apply(messages: Sequence[shardq.Message]) -> None:
    with closing(database(folder, "copy.db")) as copy:
        copy.execute("BEGIN IMMEDIATE")
        for message in messages:
            number, key, row = message.value
            known = copy.execute("SELECT number FROM applied WHERE key = ?", (key,)).fetchone()
            if known is not None and known[0] >= number:
                continue  # delivered again: its worker died after this transaction, and before it could say so
            copy.execute("DELETE FROM customers WHERE id = ?", (int(key.partition("/")[2]),))
            if row is not None:
                copy.execute("INSERT INTO customers VALUES (?, ?, ?)", json.loads(row))
            copy.execute("INSERT OR REPLACE INTO applied VALUES (?, ?)", (key, number))
        copy.execute("COMMIT")


async def read(url: str) -> None:
    """What the reader's process does. (SQLite has one writer at a time: changes are committed in order of number.)"""
    with closing(database(folder, "original.db")) as original:
        async with shardq.connect(url) as client, (await client.queue(queue_name)).producer() as producer:
            while True:
                changes = original.execute("SELECT * FROM changes ORDER BY number LIMIT 100").fetchall()
                original.execute("UPDATE reader SET sends = sends + ?", (len(changes),))
                async with anyio.create_task_group() as tasks:
                    for number, key, row in changes:
                        tasks.start_soon(partial(producer.send, (number, key, row), key=key, dedupe_id=str(number)))
                await anyio.sleep(0.02)  # so that the kill below falls between the sending and the deleting
                if changes:
                    original.execute("DELETE FROM changes WHERE number <= ?", (changes[-1][0],))


def live(folder: str, stop: threading.Event) -> None:
    """What the application does to the original, one small transaction after the other."""
    with closing(database(folder, "original.db")) as original:
        while not stop.is_set():
            key, name = random.randrange(200), f"name {random.randrange(1000)}"
            match random.randrange(3):
                case 0:
                    original.execute("INSERT OR IGNORE INTO customers VALUES (?, ?, 'Rome')", (key, name))
                case 1:
                    original.execute("UPDATE customers SET city = 'Oslo', name = ? WHERE id = ?", (name, key))
                case _:
                    original.execute("DELETE FROM customers WHERE id = ?", (key,))
            time.sleep(0.001)


def database(folder: str, name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(Path(folder, name), timeout=30, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")  # readers and a writer side by side
    return connection


def rows(folder: str, name: str, query: str) -> list[Any]:
    with closing(database(folder, name)) as connection:
        return connection.execute(query).fetchall()


async def main(url: str) -> None:
    name, stop = unique("changes"), threading.Event()
    with TemporaryDirectory() as folder:
        for file, script in (("original.db", ORIGINAL), ("copy.db", COPY)):
            with closing(database(folder, file)) as connection:
                connection.executescript(script)
        async with shardq.connect(url) as client:
            queue = await client.queue(name, shards=6)
            await queue.open_group(GROUP)

            async def applied(number: int) -> bool:
                return bool(rows(folder, "copy.db", f"SELECT 1 FROM applied WHERE number > {number}"))

            async def caught_up() -> bool:
                return not rows(folder, "original.db", "SELECT 1 FROM changes") and await finished(queue)

            environment = {"QUEUE": name, "FOLDER": folder}
            with (
                workers(url, "examples.cdc:worker", 2, **environment) as appliers,
                programs(url, "examples.cdc", PART="reader", **environment) as reader,
            ):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, live, folder, stop)
                    try:
                        for processes, what in ((reader, "reader"), (appliers, "worker")):
                            [(last,)] = rows(folder, "copy.db", "SELECT ifnull(max(number), 0) FROM applied")
                            await until(partial(applied, last + 100), "the copy to follow")
                            processes.kill_one()
                            processes.start()
                            print(f"killed the {what}, and started another")
                    finally:
                        stop.set()
                await until(caught_up, "the copy to catch up")
            stored = sum(shard.appended for shard in (await queue.counters()).values())
        [(changes,)] = rows(folder, "original.db", "SELECT seq FROM sqlite_sequence")
        [(sends,)] = rows(folder, "original.db", "SELECT sends FROM reader")
        original, copy = (
            rows(folder, file, "SELECT * FROM customers ORDER BY id") for file in ("original.db", "copy.db")
        )
    print(f"{changes} changes; the reader sent {sends}, {sends - changes} of them again")
    check(stored == changes, "each change is stored once, though the reader died")
    check(original == copy, f"the copy equals the original's {len(original)} rows, though a worker died")


if __name__ == "__main__":
    run(read if os.environ.get("PART") == "reader" else main, __doc__)
