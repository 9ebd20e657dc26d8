"""shardq: a sharded, cluster-aware stream queue on Redis Cluster.

The public names, nothing else. Importing this stays cheap: what is costly is imported by whoever uses it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
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

# These bring redis-py with them: a fifth of a second that `shardq --help` and a supervisor of workers do without.
_LATER = {
    "Client": "shardq.runtime.client",
    "Producer": "shardq.runtime.producer",
    "Queue": "shardq.runtime.client",
    "Worker": "shardq.runtime.worker",
    "connect": "shardq.runtime.client",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value
