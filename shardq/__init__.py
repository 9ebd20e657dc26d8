"""shardq: a sharded, cluster-aware stream queue on Redis Cluster.

The public names, nothing else. Importing this stays cheap: what is costly is imported by whoever uses it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardq.core.dead import DeadLetter
from shardq.core.history import Record
from shardq.core.jobs import JobState
from shardq.core.message import Message
from shardq.core.meters import Meters
from shardq.core.notices import Missed, Notice
from shardq.core.queue_settings import QueueSettings
from shardq.core.retry import Reject, Retry, RetryLater
from shardq.core.schedule import Schedule
from shardq.errors import (
    ArchiveFailed,
    AuthenticationFailed,
    ClosedError,
    CorruptData,
    FunctionsMissing,
    GroupInUse,
    InvalidKey,
    InvalidValue,
    JobFailed,
    JobTimeout,
    LeaseLost,
    MessageTooLarge,
    NotStored,
    QueueFull,
    QueueMismatch,
    ReshardUnderWay,
    ShardqError,
    StoreError,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
    TlsFailed,
    UnknownGroup,
    UnknownJob,
    UnknownQueue,
    UnsafeStore,
    UsageError,
    WorkerNotFound,
)

if TYPE_CHECKING:
    from shardq.ops.own_metrics import MetersCollector
    from shardq.runtime.broadcast import Notices
    from shardq.runtime.client import Client, connect
    from shardq.runtime.groups import GroupInfo
    from shardq.runtime.jobs import Job
    from shardq.runtime.producer import Producer
    from shardq.runtime.queue import Queue
    from shardq.runtime.reshard_state import ReshardState
    from shardq.runtime.sync import SyncProducer
    from shardq.runtime.worker import Worker
    from shardq.runtime.workers import Workers

__version__ = "0.1.0"

__all__ = [
    "ArchiveFailed",
    "AuthenticationFailed",
    "Client",
    "ClosedError",
    "CorruptData",
    "DeadLetter",
    "FunctionsMissing",
    "GroupInUse",
    "GroupInfo",
    "InvalidKey",
    "InvalidValue",
    "Job",
    "JobFailed",
    "JobState",
    "JobTimeout",
    "LeaseLost",
    "Message",
    "MessageTooLarge",
    "Meters",
    "MetersCollector",
    "Missed",
    "NotStored",
    "Notice",
    "Notices",
    "Producer",
    "Queue",
    "QueueFull",
    "QueueMismatch",
    "QueueSettings",
    "Record",
    "Reject",
    "ReshardState",
    "ReshardUnderWay",
    "Retry",
    "RetryLater",
    "Schedule",
    "ShardqError",
    "StoreError",
    "StoreRefused",
    "StoreTimeout",
    "StoreUnavailable",
    "SyncProducer",
    "TlsFailed",
    "UnknownGroup",
    "UnknownJob",
    "UnknownQueue",
    "UnsafeStore",
    "UsageError",
    "Worker",
    "WorkerNotFound",
    "Workers",
    "__version__",
    "connect",
]

# These bring redis-py with them: a fifth of a second that `shardq --help` and a supervisor of workers do without.
_LATER = {
    "Client": "shardq.runtime.client",
    "GroupInfo": "shardq.runtime.groups",
    "Job": "shardq.runtime.jobs",
    "MetersCollector": "shardq.ops.own_metrics",
    "Notices": "shardq.runtime.broadcast",
    "Producer": "shardq.runtime.producer",
    "Queue": "shardq.runtime.queue",
    "ReshardState": "shardq.runtime.reshard_state",
    "SyncProducer": "shardq.runtime.sync",
    "Worker": "shardq.runtime.worker",
    "Workers": "shardq.runtime.workers",
    "connect": "shardq.runtime.client",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value
