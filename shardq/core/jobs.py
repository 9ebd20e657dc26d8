"""Tracked jobs: the record of one message whose state somebody wants to know, and how a message names its job. Pure.

A job's id is `<queue>/<shard>/<random>`: it says where its record lies. The record is stored with the message, and
changed in the very step that commits what happened to it, so `done` means done. It is forgotten some time after its
last change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from shardq.core.records import Headers
from shardq.errors import CorruptData, UsageError

JOB_HEADER = "shardq-job"
KEEP_HEADER = "shardq-job-keep-ms"
MAX_RESULT_BYTES = 1024 * 1024
QUEUED, RUNNING, RETRYING, DONE, DEAD = "queued", "running", "retrying", "done", "dead"

_MAX_KEEP_MS = 10**13
_ID = re.compile(r"([A-Za-z0-9_.-]{1,64})/(0|[1-9][0-9]{0,9})/[0-9a-f]{8,64}")


class JobState(msgspec.Struct, frozen=True):
    """What is known of a job.

    status         queued, running, retrying (failed, is tried again later), done or dead (a dead letter)
    group          the consumer group that status is of; '' while queued. With several groups: the one that spoke last
    attempts       tries begun
    submitted_ms, updated_ms   Unix time in ms
    result         what the handler returned (done); error what it raised last (retrying, dead)
    """

    id: str
    status: str
    queue: str = ""
    group: str = ""
    attempts: int = 0
    submitted_ms: int = 0
    updated_ms: int = 0
    result: Any = None
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.status in (DONE, DEAD)


_decoder = msgspec.msgpack.Decoder(JobState)


def job_of(headers: Headers) -> tuple[str, int] | None:
    """The job a message belongs to and for how many ms its record is kept; None for a message without one."""
    job, keep = headers.get(JOB_HEADER), headers.get(KEEP_HEADER)
    if not isinstance(job, str) or not _ID.fullmatch(job) or not isinstance(keep, str) or not keep.isdecimal():
        return None
    return job, min(int(keep), _MAX_KEEP_MS) if len(keep) < 20 else _MAX_KEEP_MS  # int() refuses very long numbers


def job_headers(headers: Headers | None, job: str, keep_ms: int) -> Mapping[str, str | bytes]:
    """A message's headers with those of its job."""
    return {**(headers or {}), JOB_HEADER: job, KEEP_HEADER: str(keep_ms)}


def job_place(job: str) -> tuple[str, int]:
    """The queue and the shard that a job's record lies on. Raises UsageError."""
    match = _ID.fullmatch(str(job))
    if match is None:
        msg = f"{job!r} is not a job id; it looks like orders/3/9f86d081884c7d65 (queue/shard/random)"
        raise UsageError(msg)
    return match[1], int(match[2])


def encode_state(state: JobState) -> bytes:
    """The record in wire form. A result that can't be carried is left out, and the error says so."""
    try:
        data = msgspec.msgpack.encode(state)
    except Exception as error:  # the result is a user's object: anything may come out of it
        return _without_result(state, f"the result can't be carried: {error}")
    if len(data) > MAX_RESULT_BYTES:
        return _without_result(state, f"the result is larger than {MAX_RESULT_BYTES} bytes")
    return data


def _without_result(state: JobState, error: str) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(state, result=None, error=error[:2000]))


def decode_state(data: bytes) -> JobState:
    """The record in `data`. Raises CorruptData."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError, TypeError) as error:
        msg = f"a job's record does not decode: {error}"
        raise CorruptData(msg) from error
