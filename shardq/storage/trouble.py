"""What a failed call means: one table from Redis errors to what to do next and what to tell the user. Does no I/O.

Redis' texts may carry payload bytes and name the user, so only the leading error code is passed on, and what is chained
as the cause is redacted.
"""

from __future__ import annotations

import re
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
    CorruptData,
    FunctionsMissing,
    ShardqError,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
)
from shardq.storage.tls import tls_failure

Action = Literal["moved", "ask", "again", "refresh", "load", "update", "fail"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one call failed: what to do before it is sent again, and the error if it is given up.

    moved    another node owns the slot (`address`): send it there at once
    ask      this one call goes to `address`, behind ASKING
    again    back off and send it again
    refresh  back off, look at the topology again, send it again
    load     put the functions library on the node, send it again
    update   the same where the node's is of an older build than ours; where it is not, sending it again helps once:
             the node may have been updated since it answered
    fail     sending it again can't help

    `away`: the node took no connection, broke it or did not answer, so whatever else waits for it would fare the same.
    """

    action: Action
    error: ShardqError
    address: tuple[str, int] | None = None
    redirect: AskError | None = None
    away: bool = False


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

NO_REPLY = (ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError)
"""What redis-py raises for bytes that are no reply, or a redirect or a list of slots that names none."""

_ARGUMENTS_FOLLOW = ", with args beginning with"
_COMMAND = re.compile(r"run the '([\w|-]+)' command")
_FUNCTION = re.compile(r"\bscript: (\w+)")
_QUOTED = re.compile(r"'[^']*'(?! command)")
_USER = re.compile(r"\b[Uu]ser \S+(?= has )")

_REPLICATION_LATE = "the write was not confirmed by enough replicas in time"


def _code(error: BaseException) -> str:
    text = str(error)
    return text.split(" ", 1)[0].rstrip(":") if text else ""


def _from_response(error: ResponseError, node: str) -> Trouble:
    text, code = str(error), _code(error)
    if "Function not found" in text:
        return Trouble("load", _functions_missing(node))
    if code in _PASSING:
        return Trouble("again", StoreUnavailable(f"{_PASSING[code]} on {node}: {code}"))
    if code == "NOPERM" or "NOPERM" in text[:40] or "ACL failure" in text or "user executing the script" in text:
        return _no_permission(error, node)
    if code == "SHARDQ_CORRUPT":
        return Trouble("fail", CorruptData(f"{node}: {text.partition(' ')[2][:200]}; put back a sound copy of it"))
    if code.startswith("SHARDQ_MISUSE") or "SHARDQ_MISUSE" in text:
        return Trouble("update", StoreRefused(f"shardq called its functions wrongly, please report it: {text[:200]}"))
    return Trouble("fail", StoreRefused(f"{node} answered {code or 'an error'}; look at the server's log"))


def _functions_missing(node: str) -> FunctionsMissing:
    return FunctionsMissing(f"{node} has no shardq functions: run `shardq install --url ...`")


def no_functions(node: str) -> Trouble:
    """The functions library is not there and is not to be loaded."""
    return Trouble("fail", _functions_missing(node))


def _no_permission(error: BaseException, node: str) -> Trouble:
    text = str(error)
    if command := _COMMAND.search(text):
        missing = f"run {command[1].upper()}"
    elif function := _FUNCTION.search(text):  # Redis 7.0 does not say more
        missing = f"run a command that {function[1]} runs"
    elif "channel" in text:
        missing = "use a Pub/Sub channel that this takes"
    elif "key" in text:
        missing = "use a key that this takes"
    else:
        missing = "do this"
    how = "`shardq acl ROLE` prints what each role needs (producer, worker, coordinator, exporter, operator)"
    return Trouble("fail", StoreRefused(f"{node} does not let this user {missing} (NOPERM): {how}"))


def refused_topology(error: BaseException, node: str) -> ShardqError | None:
    """Why the topology could not be read, when it was refused; redis-py says then that this is no cluster."""
    chain, at = [error], error
    while (under := at.__cause__ or at.__context__) is not None and under not in chain:
        chain.append(at := under)
    denied = next((each for each in chain if isinstance(each, NoPermissionError)), None)
    return tls_failure(error, node) if denied is None else _no_permission(denied, node).error


def redacted(error: ResponseError) -> ResponseError:
    """The error without what Redis quotes in its text: a command's arguments, and the user's name."""
    text = str(error)
    said = _QUOTED.sub("'...'", _USER.sub("this user", text.split(_ARGUMENTS_FOLLOW)[0]))
    return error if said == text else type(error)(said)


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
            return _no_permission(error, node)
        case AuthenticationError() | AuthorizationError():
            return Trouble("fail", AuthenticationFailed(f"{node} refused the user name or password: check the URL"))
        case ResponseError():
            return _from_response(error, node)
        case RedisConnectionError() | OSError() if (refused := tls_failure(error, node)) is not None:
            # Sent again until the deadline: certificates are changed while clients run. A new client says it at once.
            return Trouble("refresh", refused, away=True)
        case RedisClusterException():
            return Trouble("refresh", StoreUnavailable("the cluster has no node for a slot: is every master up?"))
        case RedisConnectionError() | RedisError() | OSError() | EOFError():
            return Trouble("refresh", StoreTimeout(f"the connection to {node} broke with a call under way"), away=True)
        case _ if isinstance(error, NO_REPLY):
            return Trouble("refresh", StoreTimeout(f"{node} answered what is no reply of Redis: is it one?"))
        case _:
            raise error


def unreachable(node: str) -> Trouble:
    """Nothing was sent: the node did not take the connection."""
    return Trouble("refresh", StoreUnavailable(f"can't connect to {node}: is it up, and the address right?"), away=True)


def unanswered(node: str, seconds: float) -> Trouble:
    """The call was sent and no answer came in time."""
    return Trouble("refresh", StoreTimeout(f"{node} did not answer within {seconds:.3g} s"), away=True)


def not_replicated(node: str, wanted: int, reached: int | str) -> Trouble:
    """The call was carried out on the master; WAIT saw too few replicas, or was not waited for to its end."""
    gone = "start those that are down; gone for good: CLUSTER FORGET on every node (`shardq doctor` names them)"
    return Trouble("again", StoreTimeout(f"{_REPLICATION_LATE} ({reached} of {wanted} behind {node}): {gone}"))


def doubtful(node: str) -> Trouble:
    """WAIT saw enough replicas, but maybe not of this write."""
    return Trouble("refresh", StoreTimeout(f"{node} changed its role, or its replicas, while a write was confirmed"))
