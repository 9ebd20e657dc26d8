"""rq: `enqueue_many` in chunks, jobs with result_ttl 0 keep no result; its WorkerPool of SimpleWorkers, which spares it
a fork for each job. Finished: neither queued nor in the registry of started jobs."""

from redis import Redis
from rq import Queue, SimpleWorker
from rq.worker_pool import WorkerPool

from benchmarks.peers import protocol

CHUNK, WORKERS = 500, int(protocol.setting("2"))
tally = protocol.SharedTally()


def handle(value: str) -> None:
    tally.add()


def send(queue: Queue, values: list[str]) -> None:
    for first in range(0, len(values), CHUNK):
        jobs = [Queue.prepare_data(handle, (value,), result_ttl=0) for value in values[first : first + CHUNK]]
        queue.enqueue_many(jobs)


def main() -> None:
    role, url, count = protocol.arguments()
    queue = Queue(connection=Redis.from_url(url))
    if role == "produce":
        protocol.produce_blocking(count, lambda values: send(queue, values))
    else:
        work(queue, url, count)


def work(queue: Queue, url: str, count: int) -> None:
    pool = WorkerPool([queue], queue.connection, num_workers=WORKERS, worker_class=SimpleWorker)
    protocol.beside(lambda: pool.start(logging_level="ERROR"))
    looking = Queue(connection=Redis.from_url(url))
    started = looking.started_job_registry
    protocol.watch_blocking(tally, count, lambda: looking.count + started.get_job_count(cleanup=False))


if __name__ == "__main__":
    from benchmarks.peers import rq  # jobs name their function by its module, which "__main__" is not

    rq.main()
