"""Checks of one node, by what it says of itself. Pure: `now` and limits are arguments or in the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shardq.core.findings import Finding, Level
from shardq.core.servers import fixed_version, refusals, version_of
from shardq.ops.doctor.check import Check
from shardq.ops.doctor.facts import MIB, Limits
from shardq.storage.functions import BUILD, LIBRARY
from shardq.storage.node_facts import NodeFacts


def away(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if node.away:
        level: Level = "problem" if node.serves else "warning"
        do = "start it, or see what holds it up in its log and on its machine"
        yield Finding(level, "node.away", node.name, f"is left out: {node.away.partition(': ')[0]}", do)


def denied(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    """What this user may not ask, with the right that is missing; and what the server does not offer to anybody."""
    for right in sorted(node.denied):
        yield denied_right(node.name, right, node.user)
    for right in sorted(node.refused):
        command = right.lstrip("+").replace("|", " ").upper()
        do = "what it would say was not checked: ask whoever runs the server"
        yield Finding("unknown", "access.refused", node.name, f"the server does not answer {command}", do)


def denied_right(subject: str, right: str, user: str) -> Finding:
    """The finding for a right that is missing."""
    do = f"on every node: ACL SETUSER {user or 'USER'} {right}"
    return Finding("unknown", "access.denied", subject, f"this user lacks {right}: what needs it was not checked", do)


def refused(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    """What the connection itself refuses a server for."""
    yield from refusals(node.name, node.info)


def security(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    version = version_of(node.info)
    wanted = fixed_version(version)
    if wanted is not None:
        what = f"{version.kind} {version.text} is older than {wanted}: known holes in its Lua interpreter"
        do = f"upgrade to {wanted} or newer (or a distribution's patched build), and give no user +eval or +script"
        yield Finding("advice", "server.security", node.name, what, do)


def policy(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    found = node.info.get("maxmemory_policy", "noeviction")
    if found.startswith("volatile-"):
        what = f"may evict keys that have a time to live (maxmemory-policy {found})"
        yield Finding("warning", "memory.policy", node.name, what, _set("maxmemory-policy", "noeviction"))


def memory(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    used, most = _number(node, "used_memory"), _number(node, "maxmemory")
    if not most:
        do = _set("maxmemory", "BYTES") + ", with room for a fork: sends then wait before the system kills the server"
        yield Finding("advice", "memory.unbounded", node.name, "no maxmemory is set", do)
    elif used >= limits.memory * most:
        level: Level = "problem" if used >= limits.memory_full * most else "warning"
        what = f"{used // MIB} of {most // MIB} MiB are used; at maxmemory sends wait"
        yield Finding(level, "memory.full", node.name, what, "raise maxmemory, add masters, or let workers catch up")


def fragmented(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    wasted, used = _number(node, "mem_fragmentation_bytes"), _number(node, "used_memory")
    if wasted > max(limits.fragmented_bytes, used // 2):
        what = f"{wasted // MIB} MiB are held beyond the {used // MIB} MiB in use"
        yield Finding("advice", "memory.fragmented", node.name, what, _set("activedefrag", "yes"))


def persistence(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if node.info.get("aof_enabled") == "1":
        return
    do = _set("appendonly", "yes") + " and CONFIG REWRITE"
    if node.config.get("save", "") == "" and "save" in node.config:
        what = "nothing is written to disk: after a fast restart it comes back empty and wipes its replicas"
        yield Finding("problem", "persistence.off", node.name, what, do)
    else:
        what = "only snapshots are written to disk: a restart loses what came after the last one"
        yield Finding("warning", "persistence.snapshots", node.name, what, do)


def fsync(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if node.info.get("aof_enabled") == "1" and node.config["appendfsync"] == "no":
        what = "appendfsync no: a power failure loses what the system had not written, up to half a minute"
        yield Finding("warning", "persistence.fsync", node.name, what, _set("appendfsync", "everysec"))


def disk(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    do = "free its disk and see its log; writes go on as soon as one succeeds"
    if node.info.get("aof_last_write_status") == "err":
        what = "the last write to the append-only file failed: it refuses writes"
        yield Finding("problem", "persistence.failed", node.name, what, do)
    if node.info.get("aof_last_bgrewrite_status") == "err":
        what = "the last rewrite of the append-only file failed: the file grows without end"
        yield Finding("warning", "persistence.rewrite_failed", node.name, what, "free its disk, then BGREWRITEAOF")
    if node.info.get("rdb_last_bgsave_status") == "err":
        stops = node.config.get("stop-writes-on-bgsave-error") != "no" and node.config.get("save") != ""
        what = "the last snapshot failed" + (": it refuses writes until one succeeds" if stops else "")
        yield Finding("problem" if stops else "warning", "persistence.failed", node.name, what, f"{do}; then BGSAVE")


def enough_in_sync(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    wanted = int(node.config["min-replicas-to-write"])
    there = _number(node, "min_slaves_good_slaves")
    if wanted > there and "min_slaves_good_slaves" in node.info:
        what = f"refuses writes: {there} replicas keep up, min-replicas-to-write is {wanted}"
        do = f"bring replicas back, or {_set('min-replicas-to-write', there)}"
        yield Finding("problem", "replicas.too_few", node.name, what, do)


def repl_backlog(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    size = _number(node, "repl_backlog_size")
    if 0 < size < limits.backlog_bytes and _number(node, "connected_slaves"):
        what = (
            f"repl-backlog-size is {size // 1024} KiB: a replica that is cut off for a moment is copied anew as a whole"
        )
        do = _set("repl-backlog-size", f"{limits.backlog_bytes // MIB}mb")
        yield Finding("advice", "replicas.backlog_small", node.name, what, do)


def link(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if not node.is_master and node.info.get("master_link_status", "up") != "up":
        what = "is a replica without a link to its master"
        yield Finding(
            "warning", "replicas.unlinked", node.name, what, "see both logs: address, password, disk, network"
        )


def lag(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    sent, room = _number(node, "master_repl_offset"), max(_number(node, "repl_backlog_size"), 1)
    for name, text in node.info.items():
        if not (name.startswith("slave") and "offset=" in text):
            continue
        replica = dict(part.partition("=")[::2] for part in text.split(","))
        behind = sent - int(replica.get("offset", sent))
        if behind > min(room, limits.backlog_bytes):
            what = f"its replica {replica.get('ip')}:{replica.get('port')} is {behind // 1024} KiB behind"
            do = "see the replica's load and network; sends with durability='replica' wait for it"
            yield Finding("warning", "replicas.lag", node.name, what, do)


def full_coverage(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if node.config["cluster-require-full-coverage"] == "yes":
        what = "one lost master stops the shards of all others (cluster-require-full-coverage yes)"
        yield Finding("advice", "cluster.full_coverage", node.name, what, _set("cluster-require-full-coverage", "no"))


def state(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if node.cluster_info.get("cluster_state") != "ok":
        what = "says that the cluster is down"
        yield Finding("problem", "cluster.down", node.name, what, "bring back the masters or the slots named here")


def functions(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if node.build == 0:
        what = f"has no {LIBRARY} functions: whoever may not load them can't use its shards"
        yield Finding("problem", "functions.missing", node.name, what, "shardq install")
    elif node.build is not None and node.build < BUILD:
        what = f"has {LIBRARY} build {node.build}, this shardq wants {BUILD}"
        yield Finding("warning", "functions.old", node.name, what, "shardq install")
    elif node.build is not None and node.build > BUILD:
        what = f"has {LIBRARY} build {node.build}, this shardq has {BUILD}"
        yield Finding("advice", "functions.newer", node.name, what, "upgrade this shardq")


def clock(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    ahead = node.clock_ahead_s or 0.0
    if abs(ahead) - node.clock_error_s > limits.clock_s:
        what = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        do = "run NTP on both (delays, retention and schedules go by these clocks; leases and order do not)"
        yield Finding("warning", "clock.skew", node.name, what, do)


def clients(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    # Nodes' connections to each other count too: a node over its maxclients refuses even those of the cluster.
    there = _number(node, "connected_clients") + _number(node, "cluster_connections")
    most = _number(node, "maxclients")
    if most and there >= limits.memory * most:
        level: Level = "problem" if there >= limits.memory_full * most else "warning"
        what = f"{there} of {most} connections are taken (maxclients)"
        yield Finding(level, "clients.full", node.name, what, _set("maxclients", 2 * most))


def idle_timeout(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    if (seconds := int(node.config["timeout"])) > 0:
        what = f"cuts connections that are idle for {seconds} s"
        yield Finding("advice", "clients.idle_timeout", node.name, what, _set("timeout", 0))


def output_buffer(node: NodeFacts, _limits: Limits) -> Iterator[Finding]:
    words = node.config["client-output-buffer-limit"].split()
    bounds = {words[at]: int(words[at + 1]) for at in range(0, len(words) - 3, 4)}
    for kind, least in (("normal", 64 * MIB), ("pubsub", MIB)):
        if 0 < bounds.get(kind, 0) < least:
            what = f"cuts {kind} connections whose answers take more than {bounds[kind] // 1024} KiB"
            wanted = "'normal 0 0 0'" if kind == "normal" else "'pubsub 32mb 8mb 60'"
            yield Finding(
                "advice", "clients.output_buffer", node.name, what, _set("client-output-buffer-limit", wanted)
            )


def slow(node: NodeFacts, limits: Limits) -> Iterator[Finding]:
    now = _number(node, "server_time_usec") // 1_000_000
    recent = [call for call in node.slow if call.at >= now - limits.slow_s]
    if recent:
        worst = max(recent, key=lambda call: call.took_us)
        what = f"{len(recent)} slow calls lately, the slowest {worst.function} with {worst.took_us / 1000:.0f} ms"
        do = "SLOWLOG GET there; a slow disk, swapping, a fork, or very large batches; SLOWLOG RESET when it is known"
        yield Finding("advice", "slowlog.ours", node.name, what, do)


def _number(node: NodeFacts, name: str) -> int:
    text = node.info.get(name, "")
    return int(text) if text.lstrip("-").isdigit() else 0


def _set(name: str, value: str | int) -> str:
    return f"CONFIG SET {name} {value}"


def _knows_info(node: NodeFacts) -> bool:
    return bool(node.info)


def _master(node: NodeFacts) -> bool:
    return bool(node.info) and node.serves


def _has(*names: str) -> Callable[[NodeFacts], bool]:
    return lambda node: bool(node.info) and all(name in node.config for name in names)


def _of_masters(knows: Callable[[NodeFacts], bool]) -> Callable[[NodeFacts], bool]:
    return lambda node: node.serves and knows(node)


CHECKS: tuple[Check[NodeFacts], ...] = (
    Check("node", "answer", away, lambda _node: True),
    Check("access", "this user may ask all that is checked", denied, lambda node: not node.away),
    Check("server", "cluster mode, a version that works, nothing that evicts messages", refused, _knows_info),
    Check("security", "no known hole in this version", security, _knows_info),
    Check("policy", "maxmemory-policy noeviction", policy, _knows_info),
    Check("memory", "room below maxmemory", memory, _knows_info),
    Check("fragmentation", "little memory wasted", fragmented, _knows_info),
    Check("persistence", "appendonly yes", persistence, _master),
    Check("fsync", "appendfsync everysec or always", fsync, _of_masters(_has("appendfsync"))),
    Check("disk", "the last writes to disk succeeded", disk, _knows_info),
    Check(
        "min_replicas",
        "writes are not held up for want of replicas",
        enough_in_sync,
        _of_masters(_has("min-replicas-to-write")),
    ),
    Check("repl_backlog", "repl-backlog-size suffices", repl_backlog, _master),
    Check("link", "linked to their masters", link, lambda node: bool(node.info) and not node.is_master),
    Check("lag", "replicas keep up", lag, lambda node: _master(node) and bool(_number(node, "connected_slaves"))),
    Check(
        "full_coverage", "a lost master stops its own shards only", full_coverage, _has("cluster-require-full-coverage")
    ),
    Check("state", "say that the cluster is up", state, lambda node: bool(node.cluster_info)),
    Check("functions", f"{LIBRARY} build {BUILD}", functions, lambda node: node.serves and node.build is not None),
    Check("clock", "clocks agree with this machine's", clock, lambda node: node.clock_ahead_s is not None),
    Check("clients", "connections to spare", clients, _knows_info),
    Check("idle_timeout", "idle connections are left alone", idle_timeout, _has("timeout")),
    Check("output_buffer", "output buffers suffice", output_buffer, _has("client-output-buffer-limit")),
    Check(
        "slowlog", "no slow calls lately", slow, lambda node: _knows_info(node) and "+slowlog|get" not in node.denied
    ),
)
