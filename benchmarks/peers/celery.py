"""celery on Redis: results ignored, no events, gossip, mingle or heartbeat, acknowledged when it starts a task (the
default); `apply_async` one by one, as it has no bulk call, by one producer. Finished: neither queued nor unacked."""

from celery import Celery
from redis import Redis

from benchmarks.peers import protocol

POOL, PREFETCH = protocol.setting("solo"), 1000

role, url, count = protocol.arguments()
tally = protocol.SharedTally() if role == "work" else protocol.Tally()
app = Celery("pipeline", broker=url, set_as_current=True)
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=PREFETCH, worker_redirect_stdouts=False)


@app.task(name="handle")
def handle(value: str) -> None:
    tally.add()


def send(values: list[str]) -> None:
    with app.producer_or_acquire() as producer:
        for value in values:
            handle.apply_async((value,), producer=producer)


if role == "work":
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=CRITICAL"]
    protocol.beside(lambda: app.worker_main(["--quiet", "worker", f"--pool={POOL}", "--concurrency=2", *quiet]))
    redis = Redis.from_url(url)
    protocol.watch_blocking(tally, count, lambda: redis.llen("celery") + redis.hlen("unacked"))
else:
    protocol.produce_blocking(count, send)
