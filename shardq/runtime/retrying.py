"""What becomes of messages whose handler raised: they are tried again later, or dead letters. Calls no handler.

Invariant: each of them has one of the two outcomes, unless the lease is lost: then they are their next owner's.
"""

from __future__ import annotations

import logging
import random

from shardq.core import jobs
from shardq.core.lanes import let_go
from shardq.core.message import Message
from shardq.core.retry import Reject, Retry, RetryLater
from shardq.runtime.failures import dead_record, text_of
from shardq.runtime.shard import OwnedShard

_log = logging.getLogger("shardq")


def handler_failed(shard: OwnedShard, messages: list[Message], error: Exception, retry: Retry) -> None:
    """Notes the outcome of messages that were handled together, and logs it."""
    if shard.lost:
        for message in messages:
            let_go(message)
        return
    what = text_of(error)
    for message in messages:
        wait_s = _wait_s(message, error, retry)
        if wait_s is None:
            _log.error(
                "message %s (key %r) is a dead letter after %d tries: %s",
                message.id,
                message.key,
                message.attempt,
                what,
            )
            shard.tell_job(message, jobs.DEAD, error=what)
            shard.bury(message, dead_record(message, error))
            continue
        _log.warning(
            "message %s (key %r) failed, try %d of %d, again in %.3g s: %s",
            message.id,
            message.key,
            message.attempt,
            retry.attempts,
            wait_s,
            what,
            exc_info=None if isinstance(error, RetryLater) else error,
        )
        shard.tell_job(message, jobs.RETRYING, error=what)
        shard.put_off(message, wait_s, what)


def _wait_s(message: Message, error: Exception, retry: Retry) -> float | None:
    """Seconds until the next try; None when there is none."""
    if message.attempt >= retry.attempts or isinstance(error, Reject):
        return None
    return error.delay if isinstance(error, RetryLater) else retry.delay_s(message.attempt, random.random())
