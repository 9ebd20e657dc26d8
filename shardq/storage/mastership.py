"""Whether the answer of a WAIT is about the write before it. Does no I/O and trusts no clock but the caller's own.

WAIT counts replicas by how many bytes they have read of the node's replication stream, and that may mislead:
- A master that is demoted, takes over its successor's data and is promoted again counts on in a stream that lacks what
  it had taken before, and may say of that that a replica has it. Valkey 9 keeps a client waiting in WAIT through all of
  this (checked on 9.1.2; Redis answers UNBLOCKED), and on any server a large write may be read half before, half after.
- What a master without an append-only file wrote before its first replica came stands at byte 0, which every replica
  has read; and a replica counts from the end of the transfer on, while it still loads the data (checked on Redis 7.0
  and 8.2 and on Valkey 9.1).

Invariants:
- A node names its replication history anew at every promotion (master_replid). An answer counts when the node, asked
  after it, is master of the history that it was master of before the write, and enough replicas have confirmed
  anything but byte 0.
- An answer that came within ROLES_CHANGE_S of the write counts unasked: elections, handshakes and the transfer of the
  data do not fit in there. So the usual write asks nothing.
- A history that is not known, or not any more, costs one more try of the write, never an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardq.core.servers import parse_info

ROLES_CHANGE_S = 0.005
_CONFIRMED = re.compile(r"state=online,offset=[1-9]")


def parsed(reply: Any) -> dict[str, str]:
    """The reply of INFO replication; empty for what is none."""
    return parse_info(reply.decode(errors="replace")) if isinstance(reply, bytes) else {}


def replicas_confirming(info: Mapping[str, str]) -> int:
    """Replicas that have confirmed anything, as their master says."""
    return sum(_CONFIRMED.search(said) is not None for name, said in info.items() if name.startswith("slave"))


class Histories:
    """The history that each node, by its name, was last known to be master of; '' for none."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, node: str) -> str:
        return self._known.get(node, "")

    def told(self, node: str, info: Mapping[str, str]) -> str:
        """Takes in what the node says of its replication (INFO); returns its history."""
        found = info.get("master_replid", "") if info.get("role") == "master" else ""
        self._known[node] = found
        return found
