"""A group's members, leader and plan as Python calls (scripts/control.lua). Decides nothing about them: that is for
runtime/member.py, leadership.py and coordinator.py.

A member's state is `active` or `leaving`; one that declares something says `active:load:2.5`, its balance and its
capacity. Builds that know only the two words take that as active. A leaving one has nothing to declare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.pipes import Pipes
from shardq.storage.reply import shape

_LEAST_CAPACITY, _MOST_CAPACITY = 0.01, 1000.0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as its heartbeats show it; `value` is what was stored, for comparing. `capacity` is beside that of the
    others, from 0.01 to 1000; `balance` is how it would have shards assigned."""

    nonce: str
    beats: int
    leaving: bool
    value: str
    balance: str = "count"
    capacity: float = 1.0

    @classmethod
    def parse(cls, value: bytes) -> Member | None:
        """None for what no worker wrote: one broken field must not keep a group from electing."""
        text = value.decode(errors="replace")
        nonce, _, rest = text.partition(":")
        beats, _, state = rest.partition(":")
        if not beats.isdecimal() or len(beats) > 20:
            return None
        word, _, declared = state.partition(":")
        balance, _, capacity = declared.partition(":")
        leaving, known = word == "leaving", "load" if balance == "load" else "count"
        return cls(nonce, int(beats), leaving, text, known, _capacity(capacity))


def _capacity(text: str) -> float:
    try:
        capacity = float(text)
    except ValueError:
        return 1.0
    return capacity if _LEAST_CAPACITY <= capacity <= _MOST_CAPACITY else 1.0


def _state(balance: str, capacity: float, *, leaving: bool) -> str:
    if leaving:
        return "leaving"
    return "active" if (balance, capacity) == ("count", 1.0) else f"active:{balance}:{capacity:g}"


@dataclass(frozen=True, slots=True)
class Beat:
    """The control hash as one heartbeat saw it; `plan` is None when the caller knew that version."""

    term: int
    leader_nonce: str
    leader_beats: int
    plan_version: int
    plan: bytes | None
    members: dict[str, Member]
    paused: bool = False


Refusal = Literal["REPLACED", "GONE"]


async def beat(
    pipes: Pipes,
    keys: Keys,
    group: str,
    *,
    worker: str,
    nonce: str,
    beats: int,
    leaving: bool,
    term: int,
    plan_version: int,
    watch: Sequence[str],
    timeout_s: float,
    balance: str = "count",
    capacity: float = 1.0,
) -> Beat | Refusal:
    """One heartbeat. REPLACED: another incarnation goes under this worker's name. GONE: the control hash that it joined
    is not there any more; its next heartbeat of the number 1 makes it anew."""
    state = _state(balance, capacity, leaving=leaving)
    args: list[str | bytes | int] = [worker, nonce, beats, state, term, plan_version, *watch]
    reply = await pipes.call(keys.control_slot, "beat", [keys.control(group)], args, timeout_s=timeout_s)
    with shape("beat"):
        if reply[0] in (b"REPLACED", b"GONE"):
            return "REPLACED" if reply[0] == b"REPLACED" else "GONE"
        _, now_term, leader, leader_beats, version, plan, flat, *rest = reply  # an older build says no more than that
        found = {name.decode(): Member.parse(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}
        members = {name: member for name, member in found.items() if member is not None}
        paused = bool(rest and bytes(rest[0]) == b"1")
        return Beat(int(now_term), leader.decode(), int(leader_beats), int(version), plan or None, members, paused)


async def control_call(
    pipes: Pipes, keys: Keys, group: str, function: str, args: Sequence[str | bytes | int], *, timeout_s: float
) -> tuple[str, int]:
    """lead, resign, plan, leave or pause: the status word and, where there is one, the number behind it: a term, a
    version, how many members are left (an older build does not say)."""
    reply = await pipes.call(keys.control_slot, function, [keys.control(group)], args, timeout_s=timeout_s)
    with shape(function):
        return reply[0].decode(), int(reply[1]) if len(reply) > 1 else 0


@dataclass(frozen=True, slots=True)
class ControlState:
    """A group's control hash at one moment. A member listed may be dead: only watching its beats tells."""

    leader: str
    term: int
    plan_version: int
    rebalances: int
    members: dict[str, Member]
    paused: bool = False


async def control_state(pipes: Pipes, keys: Keys, group: str, *, timeout_s: float = 5.0) -> ControlState:
    """Reads a group's control hash; writes nothing. A group that nobody ever joined is all zeros."""
    packed = pack_command("HGETALL", keys.control(group))
    flat = await pipes.command(keys.control_slot, packed, timeout_s=timeout_s)
    with shape("HGETALL"):
        fields = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
        term, version, rebalances = (int(fields.get(name, 0)) for name in ("term", "plan_version", "rebalances"))
        found = {name[2:]: Member.parse(value) for name, value in fields.items() if name.startswith("m:")}
        members = {name: member for name, member in found.items() if member is not None}
        return ControlState(fields.get("leader", b"").decode(), term, version, rebalances, members, "paused" in fields)
