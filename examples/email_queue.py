"""An e-mail queue: a request only stores the mail and gets a job to ask for; workers hand it to a mail server that
hangs up on them, and try again with growing pauses. What is refused for good becomes a dead letter, to be replayed when
the cause is mended.

The naive version talks to the mail server in the request and logs the error: the mail is lost. It runs here first.

What is exactly once and what is not: a mail is stored once, and its job ends once. Handing it to the server is at least
once, for a server may take a mail and hang up before it says so, and a worker may die in between. So every mail carries
a Message-ID of its own, the same at every try, by which the server (or the reader's program) knows it again.

    python -m examples.email_queue
"""

from __future__ import annotations

import asyncio
import os
import smtplib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from email import message_from_bytes
from email.message import EmailMessage

import anyio.to_thread

import shardq
from examples.common import GROUP, LEASE_S, check, finished, run, unique, until, workers

MAILS = [(f"customer{number % 12}@example.org", f"order-{number}") for number in range(60)]
CLOSED = ("closed@example.org", "order-60")

worker = shardq.Worker(
    os.environ.get("QUEUE", "unset"),
    group=GROUP,
    lease=LEASE_S,
    concurrency=4,
    retry=shardq.Retry(attempts=8, base=0.1, factor=2, max_delay=1),
)


def hand_over(port: int, to: str, name: str) -> None:
    """Raises OSError, of which all errors of smtplib are."""
    mail = EmailMessage()
    mail["To"], mail["From"], mail["Subject"] = to, "shop@example.org", f"Your {name}"
    mail["Message-ID"] = f"<{name}@example.org>"
    mail.set_content("It is on its way.")
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as server:
        server.send_message(mail)


@worker.handler
def deliver(message: shardq.Message) -> str:  # a plain function: it runs in a thread, as smtplib needs it
    try:
        hand_over(int(os.environ["SMTP_PORT"]), str(message.key), message.value)
    except smtplib.SMTPRecipientsRefused as error:
        raise shardq.Reject(f"refused for good: {error}") from error  # a try more would change nothing
    return "accepted"


class MailServer:
    """Speaks enough SMTP for smtplib. It hangs up on every 6th caller, and on every 9th after it took the mail."""

    def __init__(self) -> None:
        self.handed: Counter[str] = Counter()  # Message-ID: how often it was handed over
        self.closed = {CLOSED[0]}
        self._calls = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._calls += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):  # the caller died
            await self._talk(self._calls, reader, writer)
        writer.close()

    async def _talk(self, call: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = "220 mail.example.org"
        while call % 6 and answer:
            writer.write(f"{answer}\r\n".encode())
            await writer.drain()
            answer = self._answer((await reader.readline()).decode().strip())
            if answer.startswith("354"):
                writer.write(f"{answer}\r\n".encode())
                self._take(await reader.readuntil(b"\r\n.\r\n"))
                await asyncio.sleep(0.03)
                answer = "250 accepted" if call % 9 else ""

    def _answer(self, line: str) -> str:
        match line.upper().split(":")[0].split():
            case ["QUIT"] | []:
                return ""
            case ["DATA"]:
                return "354 go on"
            case ["RCPT", "TO"] if line[9:-1] in self.closed:
                return "550 this mailbox is closed"
            case _:
                return "250 fine"

    def _take(self, data: bytes) -> None:
        self.handed[message_from_bytes(data)["Message-ID"]] += 1


async def states(jobs: Sequence[shardq.Job]) -> str:
    counted = Counter([(await job.state()).status for job in jobs])
    return ", ".join(f"{count} {status}" for status, count in sorted(counted.items()))


async def naive(port: int) -> int:
    """Returns how many mails it lost."""
    lost = 0
    for to, name in MAILS:
        try:
            await anyio.to_thread.run_sync(hand_over, port, to, f"naive-{name}")
        except OSError:
            lost += 1
    return lost


async def main(url: str) -> None:
    name, mail_server = unique("mails"), MailServer()
    server = await asyncio.start_server(mail_server.talk, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    async with server, shardq.connect(url) as client:
        lost = await naive(port)
        mail_server.handed.clear()
        queue = await client.queue(name, shards=6)
        await queue.open_group(GROUP)
        async with queue.producer() as producer:
            jobs = [await producer.submit(order, key=to) for to, order in [*MAILS, CLOSED]]
        print(f"stored: {await states(jobs)}")
        with workers(url, "examples.email_queue:worker", 2, QUEUE=name, SMTP_PORT=str(port)) as running:

            async def third() -> bool:
                return len(mail_server.handed) > len(MAILS) // 3

            await until(third, "a third of the mails")
            running.kill_one()
            print(f"killed a worker: {await states(jobs)}")
            await until(lambda: finished(queue), "the rest")
            print(f"handled: {await states(jobs)}")
            dead = [letter async for letter in queue.dead_letters(GROUP)]
            print(f"dead letter: {dead[0].key!s} {dead[0].error}")
            mail_server.closed.clear()
            replayed = await queue.dead_letters(GROUP).replay(error="mailbox is closed")
            await until(lambda: finished(queue), "the mended mail")
            results = [await job.wait(timeout=10) for job in jobs]
    tries = sum(mail_server.handed.values())
    check(len(mail_server.handed) == len(MAILS) + 1, f"all {len(jobs)} mails arrived, though a worker died")
    check(results == ["accepted"] * len(jobs), "every job says so")
    check(len(dead) == 1 and replayed == 1, "the refused one was a dead letter, and arrived once mended and replayed")
    check(tries > len(jobs), f"handed over {tries - len(jobs)} times too often, which the server tells by Message-ID")
    check(lost > 0, f"sent in the request, {lost} of {len(MAILS)} are lost")


if __name__ == "__main__":
    run(main, __doc__)
