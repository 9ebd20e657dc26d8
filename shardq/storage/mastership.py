"""Whether a node was master all the while from a write to the answer of its WAIT. Does no I/O and trusts no clock but
the caller's own.

WAIT counts replicas by how many bytes they have read of the node's replication stream. A master that is demoted, takes
over its successor's data and is promoted again goes on counting in a stream that lacks what it had taken before, and
may then say of such a write that a replica has it: Valkey 9 keeps a client waiting in WAIT through all of that (checked
on 9.1.2; Redis answers UNBLOCKED), and on any server a large write may be read half before it and half after.

Invariants:
- A node names its replication history anew at every promotion (master_replid). A write was confirmed by its own
  history when the node, asked after WAIT's answer, is master of the history that it was master of before the write.
- An answer that came within CHANGE_OF_ROLES_S of the write is believed unasked: two elections, two handshakes and the
  transfer of the data do not fit in there. So the usual write asks nothing.
- Histories only save asking: one that is not known, or not any more, has the write sent again, which is safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardq.core.servers import parse_info

CHANGE_OF_ROLES_S = 0.005


class Histories:
    """The history that each node, by its name, was last known to be master of."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, node: str) -> str:
        """'' when none is known."""
        return self._known.get(node, "")

    def told(self, node: str, info: Mapping[str, str]) -> str:
        """Takes in what the node says of its replication (INFO); its history, '' when it is no master."""
        found = info.get("master_replid", "") if info.get("role") == "master" else ""
        self._known[node] = found
        return found

    def answered(self, node: str, reply: Any) -> str:
        """The same for the reply of INFO replication."""
        return self.told(node, parse_info(reply.decode(errors="replace")) if isinstance(reply, bytes) else {})
