"""Message ids: where a message lies, as `<shard>/<entry id>/<index>`, e.g. `3/1795231414661-0/7`.

An id is the message's address in its queue: the shard, the stream entry, the position in the entry's record batch.
Never a timestamp: an entry id follows the server's clock only as long as that clock never steps back.
"""

from __future__ import annotations

import re
from typing import Self

import msgspec

from shardq.errors import UsageError

_U64_MAX = (1 << 64) - 1
_NUMBER = "(0|[1-9][0-9]{0,19})"
_ENTRY = re.compile(f"{_NUMBER}-{_NUMBER}")
_MESSAGE_ID = re.compile(f"{_NUMBER}/({_NUMBER}-{_NUMBER})/{_NUMBER}")


class MessageId(msgspec.Struct, frozen=True):
    """The address of one message: shard id, stream entry id (`<ms>-<seq>`), index in the entry's record batch.

    The constructor trusts its caller, as ids are made for every message; `parse` is the way in for text from
    outside. Ids do not compare by order; sort by `(entry_key(id.entry), id.index)` within a shard.
    """

    shard: int
    entry: str
    index: int

    def __str__(self) -> str:
        """Return `<shard>/<entry id>/<index>`, which `parse` reads back."""
        return f"{self.shard}/{self.entry}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the id that `text` is; raises UsageError for anything `str()` of an id could not have given."""
        match = _match(_MESSAGE_ID, text)
        if match is None or max(map(int, match.group(1, 3, 4, 5))) > _U64_MAX:
            raise UsageError(
                f"{_short(text)} is not a message id; it looks like 3/1795231414661-0/7 (shard/entry id/index)"
            )
        return cls(int(match[1]), match[2], int(match[5]))


def entry_key(entry: str) -> tuple[int, int]:
    """Return `(ms, seq)` of a stream entry id, by which entries of one stream sort in the order appended.

    Raises UsageError when `entry` is not `<ms>-<seq>` in unsigned 64-bit decimal without leading zeros.
    """
    match = _match(_ENTRY, entry)
    if match is None:
        raise UsageError(f"{_short(entry)} is not a stream entry id; it looks like 1795231414661-0")
    key = int(match[1]), int(match[2])
    if max(key) > _U64_MAX:
        raise UsageError(f"{_short(entry)} is not a stream entry id: its numbers must be below 2**64")
    return key


def _match(pattern: re.Pattern[str], text: object) -> re.Match[str] | None:
    return pattern.fullmatch(text) if isinstance(text, str) else None


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
