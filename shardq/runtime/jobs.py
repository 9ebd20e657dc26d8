"""Tracked jobs as a sender sees them: ask for the state, wait for the end. Changes nothing: senders and workers do."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from typing import Any

import anyio

from shardq.core import jobs
from shardq.core.jobs import JobState
from shardq.errors import JobFailed, JobTimeout, UnknownJob
from shardq.storage.commands import pack_command
from shardq.storage.keys import ShardKeys
from shardq.storage.pipes import DEFAULT_TIMEOUT_S, Pipes

POLL_FIRST_S = 0.01
POLL_LAST_S = 0.5
FIRST_LOOK_S = 1.0  # also with a shorter timeout there is one look


class Job:
    """One tracked job. Get it from `producer.submit(...)` or `queue.job(id)`.

    id           `<queue>/<shard>/<random>`, to be kept and asked for from anywhere
    message_id   the message's id, where this process sent it
    """

    def __init__(self, pipes: Callable[[], Pipes], shard: ShardKeys, job_id: str) -> None:
        self.id = job_id
        self.message_id = ""
        self._pipes, self._shard = pipes, shard

    async def state(self) -> JobState:
        """What is known of the job now. Raises UnknownJob when there is no such job (any more), StoreError after 10 s
        at the latest when Redis can't be asked."""
        return await self._look(DEFAULT_TIMEOUT_S)

    async def _look(self, within_s: float) -> JobState:
        packed = pack_command("HGET", self._shard.timed, f"j:{self.id}")
        data = await self._pipes().command(self._shard.slot, packed, timeout_s=within_s)
        if data is None:
            msg = f"no job {self.id}: it was never submitted, or finished so long ago that it is forgotten (see keep=)"
            raise UnknownJob(msg)
        return jobs.decode_state(bytes(data))

    async def wait(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109  # what every future takes
        """Waits for the end and returns what the handler returned.

        Raises JobFailed when the message became a dead letter, JobTimeout after `timeout` seconds (the job goes on),
        UnknownJob when its record is gone, StoreError when Redis can't be asked for 10 s.
        """
        state = await self.ended(timeout)
        if state.status == jobs.DEAD:
            msg = f"job {self.id} is a dead letter after {state.attempts} tries: {state.error}"
            raise JobFailed(msg)
        return state.result

    async def ended(self, timeout: float | None = None) -> JobState:  # noqa: ASYNC109  # as above
        """Waits for the end and returns the last state, done or dead. Raises JobTimeout and UnknownJob."""
        pause = POLL_FIRST_S
        wanted_s = DEFAULT_TIMEOUT_S if timeout is None else max(timeout, FIRST_LOOK_S)
        state = await self._look(min(DEFAULT_TIMEOUT_S, wanted_s))
        with anyio.move_on_after(timeout):
            while not state.finished:
                await anyio.sleep(pause * random.uniform(0.7, 1.0))
                state = await self.state()
                pause = min(pause * 1.5, POLL_LAST_S)
            return state
        msg = f"job {self.id} did not end within {timeout:g} s: wait again, or look at its state"
        raise JobTimeout(msg)

    def __repr__(self) -> str:
        return f"<Job {self.id}>"


def new_job_id(queue: str, shard: int) -> str:
    return f"{queue}/{shard}/{secrets.token_hex(8)}"
