"""shardq: a sharded, cluster-aware stream queue on Redis Cluster.

The public names, nothing else. Importing this stays cheap: what is costly is imported by whoever uses it.
"""

from shardq.core.message import Message
from shardq.errors import (
    AuthenticationFailed,
    ClosedError,
    CorruptData,
    FunctionsMissing,
    InvalidKey,
    InvalidValue,
    LeaseLost,
    MessageTooLarge,
    NotStored,
    QueueMismatch,
    ShardqError,
    StoreError,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
    UnknownQueue,
    UnsafeStore,
    UsageError,
    WorkerNotFound,
)
from shardq.runtime.client import Client, Queue, connect
from shardq.runtime.producer import Producer
from shardq.runtime.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "AuthenticationFailed",
    "Client",
    "ClosedError",
    "CorruptData",
    "FunctionsMissing",
    "InvalidKey",
    "InvalidValue",
    "LeaseLost",
    "Message",
    "MessageTooLarge",
    "NotStored",
    "Producer",
    "Queue",
    "QueueMismatch",
    "ShardqError",
    "StoreError",
    "StoreRefused",
    "StoreTimeout",
    "StoreUnavailable",
    "UnknownQueue",
    "UnsafeStore",
    "UsageError",
    "Worker",
    "WorkerNotFound",
    "__version__",
    "connect",
]
