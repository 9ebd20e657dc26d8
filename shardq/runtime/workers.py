"""Several workers in one process that share its handler slots by weight. Handles nothing itself: each worker does, as
if it were alone, but for the slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import anyio

from shardq.errors import UsageError
from shardq.runtime.client import Client
from shardq.runtime.slots import Share, Slots
from shardq.runtime.tasks import one_error
from shardq.runtime.worker import Worker
from shardq.storage.keys import check_name


class Workers:
    """Serves several queues with one number of handler slots:

        workers = shardq.Workers({orders: 3, mails: 1}, concurrency=32)

    Run it with `shardq work MODULE:workers`, or inside a program with `await workers.run(client)`.

    weights      each worker with its weight, 1 to 1000: while all have messages, of 4 slots handed out 3 go to `orders`
                 and 1 to `mails`. Who has none leaves its part to the others and gains no credit by it; nobody starves
    concurrency  messages (or lists, with a batch handler) handled at a time in this process, of all queues together;
                 that of each worker does not count
    """

    def __init__(self, weights: Mapping[Worker, int], *, concurrency: int = 32) -> None:
        given: object = weights
        if not isinstance(given, Mapping) or not given or not all(isinstance(one, Worker) for one in given):
            msg = f"workers and their weights are a dict such as {{orders: 3, mails: 1}}, not {weights!r:.80}"
            raise UsageError(msg)
        if type(concurrency) is not int or concurrency < 1:
            msg = f"concurrency must be at least 1, not {concurrency!r:.40}"
            raise UsageError(msg)
        served = [(worker.queue, worker.group) for worker in weights]
        if len(set(served)) < len(served):
            msg = "two of the workers serve the same queue for the same group: give that one a larger weight instead"
            raise UsageError(msg)
        if len({worker.name for worker in weights}) > 1:
            msg = "the workers have different names: a process goes by one, give them all the same or none"
            raise UsageError(msg)
        self.workers = tuple(weights)
        self._weights, self._concurrency = tuple(weights.values()), concurrency
        self._stopped = False
        Slots(concurrency, self._weights)  # refuses what is no weight, here and not when it runs

    @property
    def name(self) -> str | None:
        """The name of this process in every group, if it was given one; set it before it runs."""
        return self.workers[0].name

    @name.setter
    def name(self, name: str) -> None:
        for worker in self.workers:
            worker.name = check_name("worker", name)

    @property
    def has_handler(self) -> bool:
        return all(worker.has_handler for worker in self.workers)

    def stop(self) -> None:
        """Asks them to finish what is in flight, hand their shards over and return from `run`."""
        self._stopped = True
        for worker in self.workers:
            worker.stop()

    async def join(self, client: Client) -> None:
        """What `Worker.join` does, for each of them."""
        for worker in self.workers:
            await worker.join(client)

    async def run(self, client: Client) -> None:
        """Handles messages until `stop()` or cancellation, as `Worker.run` does. An error of one worker ends all."""
        self._stopped = False
        slots = Slots(self._concurrency, self._weights)
        with one_error():
            async with anyio.create_task_group() as tasks:
                for worker, share in zip(self.workers, slots.shares, strict=True):
                    tasks.start_soon(self._serve, worker, client, share)

    async def _serve(self, worker: Worker, client: Client, share: Share) -> None:
        if not self._stopped:  # else it came before this task had begun
            await worker._run(client, share)
