"""What a failed call means: one table from Redis errors to what to do next and what to tell the user. Does no I/O.

redis-py's texts may carry payload bytes, so only the leading error code is passed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from shardq.errors import (
    AuthenticationFailed,
    FunctionsMissing,
    ShardqError,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
)

Action = Literal["moved", "ask", "again", "refresh", "load", "fail"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one call failed: what to do before it is sent again, and the error if it is given up.

    moved    another node owns the slot (`address`): send it there at once
    ask      this one call goes to `address`, behind ASKING
    again    back off and send it again
    refresh  back off, look at the topology again, send it again
    load     put the functions library on the node, send it again
    fail     sending it again can't help
    """

    action: Action
    error: ShardqError
    address: tuple[str, int] | None = None
    redirect: AskError | None = None


# Error codes that redis-py leaves as plain ResponseErrors, and codes of states that pass by themselves.
_PASSING = {
    "OOM": "Redis is at maxmemory",
    "NOREPLICAS": "too few replicas are in reach (min-replicas-to-write)",
    "MISCONF": "Redis can't write to its disk",
    "BUSY": "Redis is running a long script",
    "UNBLOCKED": "the node changed its role",
    "CLUSTERDOWN": "the cluster is down",
    "LOADING": "Redis is loading its data",
    "MASTERDOWN": "the replica's master is down",
}

_REPLICATION_LATE = "the write was not confirmed by enough replicas in time"


def _code(error: BaseException) -> str:
    text = str(error)
    return text.split(" ", 1)[0].rstrip(":") if text else ""


def _from_response(error: ResponseError, node: str) -> Trouble:
    text, code = str(error), _code(error)
    if "Function not found" in text:
        return Trouble("load", FunctionsMissing(f"{node} has no shardq functions: run `shardq install --url ...`"))
    if code in _PASSING:
        return Trouble("again", StoreUnavailable(f"{_PASSING[code]} on {node}: {code}"))
    if code == "NOPERM" or "NOPERM" in text[:40] or "ACL failure" in text or "user executing the script" in text:
        return _no_permission(node)
    if code.startswith("SHARDQ_MISUSE") or "SHARDQ_MISUSE" in text:
        return Trouble("fail", StoreRefused(f"shardq called its functions wrongly, please report it: {text[:200]}"))
    return Trouble("fail", StoreRefused(f"{node} answered {code or 'an error'}; look at the server's log"))


def _no_permission(node: str) -> Trouble:
    return Trouble("fail", StoreRefused(f"{node} refused a command to this user (NOPERM): grant it by ACL SETUSER"))


def _address(error: AskError, node: str) -> tuple[str, int]:
    """Where a redirect points; one without a host means the host that answered."""
    error.host = error.host or node.rpartition(":")[0]
    return error.host, int(error.port)


def classify(error: BaseException, node: str) -> Trouble:
    """Maps an exception of redis-py or of the socket to its Trouble; `node` is host:port for the text."""
    match error:
        case MovedError():
            return Trouble(
                "moved",
                StoreUnavailable(f"slot {error.slot_id} keeps moving; last seen at {node}"),
                _address(error, node),
                error,
            )
        case AskError():
            return Trouble(
                "ask",
                StoreUnavailable(f"slot {error.slot_id} is moving away from {node}"),
                _address(error, node),
                error,
            )
        case TryAgainError():
            return Trouble("again", StoreUnavailable(f"a slot on {node} is half moved (TRYAGAIN)"))
        case ReadOnlyError():
            return Trouble("refresh", StoreUnavailable(f"{node} became a replica (READONLY)"))
        case ClusterDownError() | BusyLoadingError():
            return Trouble("refresh", StoreUnavailable(f"{node} can't serve yet: {_code(error) or 'CLUSTERDOWN'}"))
        case OutOfMemoryError():
            return Trouble(
                "again", StoreUnavailable(f"{node} is at maxmemory: raise it, or let workers drain the queue")
            )
        case AuthenticationError() if "uthentication required" in str(error):  # redis-py takes NOAUTH off the text
            way = "wants a password: write the URL as redis://user:password@host:port"
            return Trouble("fail", AuthenticationFailed(f"{node} {way}"))
        case NoPermissionError():
            return _no_permission(node)
        case AuthenticationError() | AuthorizationError():
            return Trouble("fail", AuthenticationFailed(f"{node} refused the user name or password: check the URL"))
        case ResponseError():
            return _from_response(error, node)
        case RedisClusterException():
            return Trouble("refresh", StoreUnavailable("the cluster has no node for a slot: is every master up?"))
        case RedisConnectionError() | RedisError() | OSError() | EOFError():
            return Trouble("refresh", StoreTimeout(f"the connection to {node} broke with a call under way"))
        case _:
            raise error


def unreachable(node: str) -> Trouble:
    """Nothing was sent: the node did not take the connection."""
    return Trouble("refresh", StoreUnavailable(f"can't connect to {node}: is it up, and the address right?"))


def unanswered(node: str, seconds: float) -> Trouble:
    """The call was sent and no answer came in time."""
    return Trouble("refresh", StoreTimeout(f"{node} did not answer within {seconds:g} s"))


def not_replicated(node: str, wanted: int, reached: int) -> Trouble:
    """The call was carried out on the master; WAIT saw too few replicas."""
    return Trouble("again", StoreTimeout(f"{_REPLICATION_LATE} ({reached} of {wanted} behind {node})"))
