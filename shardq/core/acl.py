"""Rules of a Redis user, as ACL SETUSER and an aclfile read them. Knows no role: those are storage/acl.py's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from shardq.errors import UsageError

# All that is not named is taken away first, so that the same rules also narrow a user who had more.
_NOTHING = ("on", "clearselectors", "resetkeys", "resetchannels", "-@all")


class Key(NamedTuple):
    """A glob of keys."""

    glob: str
    reads_only: bool = False

    def rule(self) -> str:
        return f"%R~{self.glob}" if self.reads_only else f"~{self.glob}"


class Grant(NamedTuple):
    """Commands (`xadd`, `xgroup|create`) allowed on keys and channels."""

    commands: frozenset[str]
    keys: Sequence[Key] = ()
    channels: Sequence[str] = ()

    def rules(self) -> list[str]:
        """Keys, channels, commands, each once."""
        keys = dict.fromkeys(key.rule() for key in self.keys)
        channels = dict.fromkeys(f"&{channel}" for channel in self.channels)
        return [*keys, *channels, *(f"+{command}" for command in sorted(self.commands))]


def check_user(name: str) -> str:
    """Returns `name`; raises UsageError for one that an aclfile can't hold."""
    if not re.fullmatch(r"[A-Za-z0-9_.@-]{1,64}", name):
        raise UsageError(f"user name {name!r} is not valid: use 1 to 64 of the characters A-Z a-z 0-9 _ . @ -")
    return name


def user_rules(grants: Sequence[Grant], password: str | None = None) -> list[str]:
    """The rules behind a user's name: the first grant is the user's own, the others are selectors. The password goes in
    as its SHA-256, which is how Redis keeps it."""
    own, *others = grants
    secret = [] if password is None else ["resetpass", f"#{hashlib.sha256(password.encode()).hexdigest()}"]
    return [*_NOTHING, *secret, *own.rules(), *(f"({' '.join(other.rules())})" for other in others)]
