"""What a server must be to carry queues, judged by what it says of itself (INFO, CLUSTER NODES). Pure.

The connection refuses a server for `refusals` (storage/safety.py); `shardq doctor` says the same and more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardq.core.findings import Finding

OLDEST_VERSION = (7, 0)

# The first release of each series with the fixes of CVE-2025-49844, -46817, -46818, -46819 (code run through the Lua
# interpreter by whoever may send a script); 8.2.3 also has that of CVE-2025-62507. Later series have had them from
# their beginning; for other series there is no fixed release.
_FIXED = {
    "Redis": ((6, 2, 20), (7, 2, 11), (7, 4, 6), (8, 0, 4), (8, 2, 3)),
    "Valkey": ((7, 2, 11), (8, 0, 6), (8, 1, 4)),
}


@dataclass(frozen=True, slots=True)
class Version:
    """Whose server it is, the version as it says it, and its numbers, () when it says none."""

    kind: str
    text: str
    numbers: tuple[int, ...]


def parse_info(text: str) -> dict[str, str]:
    """The fields of INFO or CLUSTER INFO."""
    lines = (line.partition(":") for line in text.splitlines())
    return {name: value for name, sep, value in lines if sep}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isascii() and part.isdigit() and len(part) < 10)


def version_of(info: Mapping[str, str]) -> Version:
    """Valkey says an old Redis version beside its own."""
    own = info.get("valkey_version", "")
    text = own or info.get("redis_version", "")
    return Version("Valkey" if own or info.get("server_name") == "valkey" else "Redis", text, _numbers(text))


def fixed_version(version: Version) -> str | None:
    """The release to upgrade to for known security fixes; None when this one has them, or says no version."""
    floors = _FIXED[version.kind]
    if not version.numbers or version.numbers[:2] > floors[-1][:2]:
        return None
    same = [floor for floor in floors if floor[:2] == version.numbers[:2]]
    if same and version.numbers >= same[0]:
        return None
    wanted = same[0] if same else next(floor for floor in floors if floor > version.numbers)
    return ".".join(map(str, wanted))


def refusals(node: str, info: Mapping[str, str]) -> Iterator[Finding]:
    """Why no queue may lie on this node at all; nothing for a sound one."""
    if info.get("cluster_enabled") == "0":
        do = "set `cluster-enabled yes` in its configuration, or run `shardq up`"
        yield Finding("problem", "server.no_cluster", node, "is not in cluster mode", do)
    text = info.get("redis_version", "")
    numbers = _numbers(text)[:2]
    if numbers and numbers < OLDEST_VERSION:
        do = "shardq needs Redis 7.0 or newer, or Valkey; upgrade the server"
        yield Finding("problem", "server.old", node, f"runs {text}", do)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys-"):
        do = f"set `maxmemory-policy noeviction` (it is {policy})"
        yield Finding("problem", "memory.evicts", node, "may evict a queue's messages", do)


# -- CLUSTER NODES -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListedNode:
    """One line of CLUSTER NODES. `slots` counts those it serves; `moving` has those that the node which was asked is
    migrating or importing, which it says of itself alone."""

    id: str
    host: str
    port: int
    hostname: str
    flags: frozenset[str]
    master_id: str
    slots: int
    moving: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_master(self) -> bool:
        return "master" in self.flags


def parse_nodes(text: str, asked_host: str) -> list[ListedNode]:
    """The nodes of CLUSTER NODES; a line without an address is about the node at `asked_host` or one not known yet."""
    found = []
    for line in text.splitlines():
        parts = line.split()
        if len(parts) >= 8 and "noaddr" not in parts[2] and "handshake" not in parts[2]:
            try:
                found.append(_listed(parts, asked_host))
            except ValueError:
                continue  # no port, or no slots, as any server writes them
    return found


def nodes_away(text: str) -> int:
    """How many nodes of CLUSTER NODES own no slot and can't be reached now: replicas that are down, or masters that
    were failed over and will come back as replicas."""
    return sum(1 for _ in _flags_of_away(text))


def _flags_of_away(text: str) -> Iterator[set[str]]:
    for line in text.splitlines():
        parts = line.split()
        flags = {*parts[2].split(",")} if len(parts) == 8 else {"noaddr"}  # a ninth part would be a slot
        if not {"myself", "noaddr", "handshake"} & flags and (parts[7] == "disconnected" or {"fail", "fail?"} & flags):
            yield flags


def replicas_spread(text: str) -> int:
    """How many replicas each master of CLUSTER NODES would have if they were spread evenly, those included that are
    away and the masters that will come back as such. Each node counts once, whatever is said of it elsewhere."""
    nodes = parse_nodes(text, "")
    masters = sum(node.is_master and node.slots > 0 for node in nodes)
    others = sum("slave" in node.flags for node in nodes) + sum("slave" not in flags for flags in _flags_of_away(text))
    return others // masters if masters else 0


def replicas_listed(text: str) -> int:
    """How many replicas CLUSTER NODES lists for the master that has fewest, whatever state they are in: one that reads
    its data after a restart is neither away nor connected."""
    nodes = parse_nodes(text, "")
    replicas = Counter(node.master_id for node in nodes if "slave" in node.flags)
    return min((replicas[node.id] for node in nodes if node.is_master and node.slots), default=0)


def _listed(parts: list[str], asked_host: str) -> ListedNode:
    address, _, names = parts[1].partition(",")
    host, _, port = address.partition("@")[0].rpartition(":")
    slots = [part for part in parts[8:] if not part.startswith("[")]
    hostname = "" if "=" in names.partition(",")[0] else names.partition(",")[0]
    moving = tuple(part.strip("[]") for part in parts[8:] if part.startswith("["))
    flags = frozenset(parts[2].split(","))
    return ListedNode(
        parts[0], host or asked_host, int(port), hostname, flags, parts[3], sum(map(_size, slots)), moving
    )


def _size(slots: str) -> int:
    first, _, last = slots.partition("-")
    return int(last or first) - int(first) + 1
