"""Which commands and keys each role needs: the users that an operator makes with ACL SETUSER. Asks no server.

COMMANDS says what each function of scripts/*.lua calls, as Redis checks the caller's rights for that too; a test reads
it off the sources. ACCESS says which functions a role calls, and what its Python calls by itself.

What an ACL can't say: a user who may call a function may also run the function's commands by hand. So a role keeps to
its queue and its commands, but leases, sequences and counters are for honest clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shardq.core.acl import Grant, Key
from shardq.errors import UsageError
from shardq.storage.keys import CastNames, Keys, check_channel, check_name, registry

Role = Literal["producer", "worker", "coordinator", "exporter", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

COMMANDS: dict[str, str] = {
    "declare": "hmget hset time",
    "open_shard": "hdel hget hset hsetnx type xgroup|create xgroup|destroy zadd",
    "settings": "hmget hset time",
    "tune": "hdel hexists hget hset",
    "append": "hdel hget hgetall hlen hmget hset spublish xadd xdel xrange",
    "append_each": "hdel hget hmget hset spublish time type xadd xdel xrange zadd zscore",
    "promote": "hdel hget hmget hset spublish time type xadd zcard zrange zrangebyscore zrem",
    "trim": "exists hget hmget type xtrim",
    "tidy": "hdel hget hgetall hmget memory|usage time type xlen xtrim zrangebyscore zrem",
    "step": (
        "exists hdel hget hmget hset pexpiretime spublish time type xack xadd xclaim xdel xinfo|stream "
        "xpending xrange xreadgroup xtrim zadd zrangebyscore zrem zremrangebyscore"
    ),
    "replay": "hget hmget hset spublish time type xdel zadd",
    "purge": "xdel",
    "mark": "exists hget hkeys hset spublish type xdel xrange",
    "redact": (
        "del hdel hget hset rename type xadd xclaim xdel xgroup|create xinfo|groups xinfo|stream xpending xrange xsetid"
    ),
    "forget": "hdel hset type zcard zrem",
    "open_group": "exists hdel hmget hset type xclaim xgroup|create xgroup|destroy xinfo|stream xrange xrevrange zadd",
    "reset_group": (
        "exists hdel hget hkeys hmget hset spublish time type unlink xclaim xgroup|create xgroup|destroy "
        "xinfo|stream xrange xrevrange xtrim zadd"
    ),
    "delete_group": "exists hdel hget hmget hset spublish time type unlink xgroup|destroy xtrim",
    "remove_shard": "hget hmget spublish unlink",
    "acquire": "hget hmget hset info spublish time zcard",
    "release": "hmget hset spublish",
    "offer": "hmget hset spublish",
    "ready": "hmget hset spublish",
    "transfer": "hmget hset spublish time",
    "beat": "hget hgetall hmget hset",
    "lead": "hget hmget hset time",
    "resign": "hmget hset spublish",
    "plan": "hdel hget hmget hset spublish time",
    "leave": "hdel hget hgetall spublish",
    "pause": "hdel hset spublish",
    "take": "exists hmget hset time type",
    "take_keys": "pexpire time type zadd zrange zremrangebyscore zscore",
    "swap_schedule": "hdel hget hset time",
    "close_ticks": "hget hset time",
    "open_ticks": "hget hset",
    "begin_reshard": "hdel hmget hset",
    "commit_reshard": "hget hset",
    "end_reshard": "hdel hmget hset spublish",
    "forget_shard": "hmget hset",
    "open_child": "hdel hexists hget hset hsetnx type xgroup|create xgroup|destroy zadd",
    "seal": "hget hgetall hset type",
    "move_delayed": "hdel hexists hget hset spublish type zadd zcard zrange zrem zscore",
    "retire": "exists hdel hget hgetall hkeys hmget hset memory|usage time type xlen xtrim zcard",
    "remove_retired": "hmget spublish unlink",
    "inspect": "hget hmget time xlen xpending xrange zcard zrange",
    "build": "",
}

# Commands of append that look into a stream: called only where the queue has a max_backlog.
BOUNDED = "xdel xrange"

# What message.atomic() writes with, and what takes back one that another one's refusal undoes.
EFFECTS = (
    "append del hdel hincrby hincrbyfloat hset incrby incrbyfloat lpush pexpire rpush sadd set srem zadd zincrby zrem"
)
UNDOING = "dump exists get hget lpop persist pexpireat pexpiretime restore rpop sismember type zscore"

# What a step needs on the shard of another queue that it sends to.
SENDING = "exists hdel hget hmget hset spublish type xadd xdel xinfo|stream xrange"

# Everyone: the topology, the checks at connecting, a slot on its way, durability.
CONNECTING = "asking cluster|nodes cluster|slots fcall_ro info"


@dataclass(frozen=True, slots=True)
class Access:
    """The functions that a role calls, and the commands that its Python sends by itself."""

    functions: str
    commands: str


_MEMBER = "beat lead resign plan leave offer append swap_schedule close_ticks open_ticks"

# What carries on a reshard that somebody began, and removes old shards: of every group.
RESHARDING = Access(
    "commit_reshard end_reshard forget_shard open_child open_group delete_group seal tune move_delayed retire "
    "remove_retired trim",
    "hdel hkeys hmget memory|usage zrange",
)

ACCESS: dict[Role, Access] = {
    "producer": Access("append append_each", "hmget hget"),
    "worker": Access(
        f"{_MEMBER} open_group acquire release ready transfer step promote tidy redact take take_keys",
        "hmget hget hgetall xrange",
    ),
    "coordinator": Access(_MEMBER, "hmget hget hgetall"),
    "exporter": Access("inspect build", "hmget hgetall smembers"),
    "operator": Access(
        "declare settings open_shard reset_group delete_group pause remove_shard inspect build replay purge mark "
        "redact forget trim append append_each swap_schedule close_ticks open_ticks begin_reshard "
        + RESHARDING.functions,
        f"del exists function|load hget hgetall hset sadd smembers srem time xrange xrevrange {RESHARDING.commands}",
    ),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user is for. No queues: every queue of the prefix, for an exporter or operator. No group: all of them.

    bounded    a producer's queue has a max_backlog
    fsync      durability="fsync": WAITAOF, which Redis 7.0 does not know
    sends_to   queues that a worker's handlers send to in their commits
    effects    globs of further keys that its handlers write in their commits
    reshards   a worker or coordinator carries on reshards that were begun, and removes old shards, when it leads
    broadcast  it may broadcast, and listen to channels that it names
    listen     patterns that it may listen to
    """

    role: Role
    queues: Sequence[str] = ()
    prefix: str = "shardq"
    group: str | None = None
    bounded: bool = False
    fsync: bool = False
    sends_to: Sequence[str] = ()
    effects: Sequence[str] = ()
    reshards: bool = False
    broadcast: bool = False
    listen: Sequence[str] = ()

    def __post_init__(self) -> None:
        for queue in (*self.queues, *self.sends_to):
            check_name("queue", queue)
        check_name("prefix", self.prefix)
        if self.group is not None:
            check_name("group", self.group)
        if self.role not in ("exporter", "operator") and not self.queues:
            raise UsageError(f"a {self.role} is for a queue: name it with --queue")
        if self.role not in ("worker", "coordinator") and self.group is not None:
            raise UsageError(f"a {self.role} is for no group: leave out --group")
        if self.role != "worker" and (self.sends_to or self.effects):
            raise UsageError(f"a {self.role} has no handlers: --sends-to and --effects are for a worker")
        if self.role not in ("worker", "coordinator") and self.reshards:
            raise UsageError(f"a {self.role} leads no group: --reshards is for a worker or coordinator")
        for glob in self.effects:
            if not glob or glob != "".join(glob.split()) or ")" in glob:
                raise UsageError(f"{glob!r} is no pattern of keys: it has blanks or brackets that an ACL can't hold")
        for pattern in self.listen:
            if check_channel("pattern", pattern) != "".join(pattern.split()) or ")" in pattern:
                raise UsageError(f"{pattern!r} is a pattern that an ACL can't hold: it has blanks or brackets")


def grants(wanted: Wanted) -> list[Grant]:
    """The user's rights. A command is allowed when one grant allows all of it; the first one is the user's own."""
    access = ACCESS[wanted.role]
    commands = _commands(access.functions) | _set(access.commands) | _set(CONNECTING)
    if wanted.role == "producer" and not wanted.bounded:
        commands -= _set(BOUNDED)
    if wanted.fsync:
        commands |= {"waitaof"}
    if wanted.role != "exporter":
        commands |= {"fcall", "wait"}
    if wanted.role in ("worker", "coordinator"):
        commands |= {"ssubscribe"}
    keys, channels = _reach(wanted)
    own = Grant(frozenset(commands), tuple(keys), tuple(channels))
    return [own, *_of_handlers(wanted, keys), *_of_reshards(wanted), *_of_broadcasts(wanted)]


def _set(names: str) -> set[str]:
    return set(names.split())


def _commands(functions: str) -> set[str]:
    return {command for function in functions.split() for command in COMMANDS[function].split()}


def _reach(wanted: Wanted) -> tuple[list[Key], list[str]]:
    if not wanted.queues:
        everything = f"{wanted.prefix}:*"
        return [Key(everything, reads_only=wanted.role == "exporter")], [everything] * (wanted.role == "operator")
    keys: list[Key] = []
    channels: list[str] = []
    if wanted.role in ("exporter", "operator"):
        keys.append(Key(registry(wanted.prefix), reads_only=wanted.role == "exporter"))
    for queue in wanted.queues:
        more_keys, more_channels = _of_queue(wanted, Keys(wanted.prefix, queue))
        keys += more_keys
        channels += more_channels
    return keys, channels


def _of_queue(wanted: Wanted, keys: Keys) -> tuple[list[Key], list[str]]:
    if wanted.role in ("exporter", "operator"):
        globs = keys.whole_queue
        reads_only = wanted.role == "exporter"
        return [Key(glob, reads_only) for glob in globs], [] if reads_only else list(globs)
    of_shard = ["stream", "meta"]
    of_queue = [Key(keys.routing, reads_only=True)]
    channels = [keys.of_every_shard("bell")]
    group = wanted.group or "*"
    if wanted.role == "producer":
        of_shard += ["delayed", "expiring", "timed"]
    else:
        of_queue += [Key(keys.schedules), Key(keys.control(group))]
        channels += [keys.control_bell(group)]
        of_shard += [f"group:{group}"]
    if wanted.role == "worker":
        of_shard += ["delayed", "expiring", "timed", "scratch"]
        of_shard += [f"{name}:{group}" for name in ("dead", "later", "kept", "limits")]
    return of_queue + [Key(keys.of_every_shard(name)) for name in of_shard], channels


def _of_handlers(wanted: Wanted, own: Iterable[Key]) -> list[Grant]:
    """What a worker's handlers do in their commits, on keys of their own and on shards of other queues; and the call
    itself, which names all of these keys together."""
    if wanted.role != "worker":
        return []
    written = [Key(Keys(wanted.prefix, queue).of_every_shard("data:*")) for queue in wanted.queues]
    written += [Key(glob) for glob in wanted.effects]
    sent: list[Key] = []
    bells: list[str] = []
    routing: list[Key] = []
    for queue in wanted.sends_to:
        other = Keys(wanted.prefix, queue)
        sent += [Key(other.of_every_shard("stream")), Key(other.of_every_shard("meta"))]
        routing.append(Key(other.routing, reads_only=True))
        bells.append(other.of_every_shard("bell"))
    found = [
        Grant(frozenset({"fcall"}), (*own, *written, *sent)),
        Grant(frozenset(_set(EFFECTS) | _set(UNDOING)), tuple(written)),
    ]
    if sent:
        found.append(Grant(frozenset(_set(SENDING)), (*routing, *sent), tuple(bells)))
    return found


_RESHARDED = "stream meta delayed expiring timed group:* dead:* later:* kept:*"


def _of_reshards(wanted: Wanted) -> list[Grant]:
    """What a leader does beyond its own group: new shards have every group's keys, and the table is the queue's."""
    if not wanted.reshards:
        return []
    commands = _commands(RESHARDING.functions) | _set(RESHARDING.commands) | {"fcall"}
    named = [Keys(wanted.prefix, queue) for queue in wanted.queues]
    keys = [Key(each.of_every_shard(name)) for each in named for name in _RESHARDED.split()]
    channels = [channel for each in named for channel in (each.of_every_shard("bell"), each.control_bell("*"))]
    return [Grant(frozenset(commands), (*(Key(each.routing) for each in named), *keys), tuple(channels))]


def _of_broadcasts(wanted: Wanted) -> list[Grant]:
    names = CastNames(wanted.prefix)
    found = []
    if wanted.broadcast:
        channels = (names.exact("*"), names.ordinary("*"))
        found.append(Grant(frozenset({"spublish", "publish", "ssubscribe"}), (), channels))
    if wanted.listen:
        patterns = tuple(names.ordinary(pattern) for pattern in wanted.listen)
        found.append(Grant(frozenset({"psubscribe"}), (), patterns))
    return found
