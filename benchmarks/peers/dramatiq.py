"""dramatiq with its RedisBroker: `send` one by one, as it has no bulk call, from several threads; a worker of several
threads; no results (the default) and no middleware, so no retries or time limits either. Finished: gone from the
queue's hash of messages."""

from concurrent.futures import ThreadPoolExecutor

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from redis import Redis

from benchmarks.peers import protocol

THREADS, SENDERS = int(protocol.setting("8")), 4

role, url, count = protocol.arguments()
broker = RedisBroker(url=url, middleware=[])
dramatiq.set_broker(broker)
tally = protocol.SharedTally() if role == "work" else protocol.Tally()


@dramatiq.actor
def handle(value: str) -> None:
    tally.add()


def send(values: list[str]) -> None:
    with ThreadPoolExecutor(SENDERS) as senders:
        list(senders.map(handle.send, values))


if role == "work":
    worker = dramatiq.Worker(broker, worker_threads=THREADS)
    worker.start()
    redis = Redis.from_url(url)
    protocol.watch_blocking(tally, count, lambda: redis.hlen("dramatiq:default.msgs"))
else:
    protocol.produce_blocking(count, send)
