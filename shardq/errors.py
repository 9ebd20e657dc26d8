"""Every error shardq raises, grouped by who can act on it. Raised is always a leaf, with a next step in its text.

ShardqError
  UsageError       the caller's mistake; the same call fails again until the code or setting changes
    InvalidKey, InvalidValue, MessageTooLarge, UnknownQueue, UnknownGroup, GroupInUse, QueueMismatch, WorkerNotFound,
    ClosedError
  StoreError       the store's trouble; `retryable` says whether waiting may help
    StoreUnavailable, StoreTimeout, QueueFull, StoreRefused, AuthenticationFailed, TlsFailed, UnsafeStore,
    FunctionsMissing
  ReshardUnderWay  the queue's shards are being changed by somebody else
  LeaseLost        another owner has the shard; what was in flight will be handled there
  CorruptData      bytes in Redis that are not what they claim to be
  ArchiveFailed    messages could not be written to an archive; they are in the queue still
  NotStored        a flush or close ended with messages whose storage failed or is unknown
"""

from __future__ import annotations


class ShardqError(Exception):
    """Base of every error shardq raises."""


class UsageError(ShardqError):
    """The call or a setting is wrong; it fails the same way until it is changed."""


class InvalidKey(UsageError):
    """A message key is neither str nor bytes (nor None), or can't be encoded as UTF-8."""


class InvalidValue(UsageError):
    """A message value or header can't be carried by msgpack."""


class MessageTooLarge(UsageError):
    """A message is larger than the producer's `max_message_bytes`; it was not sent."""


class UnknownQueue(UsageError):
    """The queue was never declared on this cluster, or its keys are gone."""


class UnknownGroup(UsageError):
    """The queue has no such consumer group: it was never opened, or is deleted."""


class GroupInUse(UsageError):
    """Workers have the group's shards, so it was not reset or deleted: stop them first, or force it."""


class QueueMismatch(UsageError):
    """The queue exists with other settings than the ones asked for."""


class WorkerNotFound(UsageError):
    """`MODULE:WORKER` names no importable module or no shardq.Worker in it."""


class UnknownJob(UsageError):
    """There is no job of this id: never submitted, or forgotten since."""


class ClosedError(UsageError):
    """The client, producer or worker was used before it was opened or after it was closed."""


class StoreError(ShardqError):
    """Redis could not do what was asked.

    `retryable` is true when the same call may succeed later without anybody changing a setting.
    `outcome_unknown` is true when the call may have been carried out although no answer came.
    """

    retryable = False
    outcome_unknown = False


class StoreUnavailable(StoreError):
    """No node of the cluster that could answer was reached before the deadline."""

    retryable = True


class StoreTimeout(StoreError):
    """The deadline passed with a call under way: it may or may not have been carried out."""

    retryable = True
    outcome_unknown = True


class QueueFull(StoreError):
    """The queue holds `max_backlog` messages that its slowest group has not finished; nothing was stored."""

    retryable = True


class StoreRefused(StoreError):
    """Redis answered with an error that waiting does not mend (permissions, a wrong type, a bug)."""


class AuthenticationFailed(StoreError):
    """Redis refused the user name or password."""


class TlsFailed(StoreError):
    """Client and server do not accept each other's certificates, or only one of them speaks TLS."""


class UnsafeStore(StoreError):
    """The server would lose messages or can't run shardq: not a cluster, older than 7.0, or evicting keys."""


class FunctionsMissing(StoreError):
    """The functions library is not on the cluster and this user may not load it: run `shardq install`."""


class JobFailed(ShardqError):
    """A job that was waited for became a dead letter."""


class JobTimeout(ShardqError):
    """A job that was waited for did not end in time; it goes on."""


class ReshardUnderWay(ShardqError):
    """The queue's shards are being changed by somebody else, who comes first: look at them, then repeat the call."""


class LeaseLost(ShardqError):
    """Another worker owns the shard now; the commit was refused and its messages are handled there."""


class CorruptData(ShardqError):
    """Bytes read from Redis do not decode as what they claim to be."""


class ArchiveFailed(ShardqError):
    """Messages could not be written to an archive's folder: the archive stopped, and they are in the queue still."""


class NotStored(ShardqError):
    """Messages that a flush or close waited for are not (known to be) stored.

    `failed` counts them; the first cause is chained as `__cause__`.
    """

    def __init__(self, message: str, failed: int = 0) -> None:
        super().__init__(message)
        self.failed = failed
