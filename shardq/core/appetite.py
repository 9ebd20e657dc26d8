"""How much one step may fetch: learnt from what came, less when an answer was lost. Counts entries, items and bytes;
sees no message. Pure.
"""

from __future__ import annotations

from shardq.core.step import STEP_BYTES

FIRST_ENTRIES = 2  # of a size not known yet; where these leave room, the same step brings more
FIRST_ROOM_BYTES = 256 * 1024  # for those: what is compressed may be many times as large when it is here
IDLE_ROOM_BYTES = 64 * 1024  # for what an idle poll brings, which nobody made room for
FIRST_ITEMS = 16
MAX_ENTRIES = 500
ITEMS_AT_ONCE = 500


class Appetite:
    """That of one shard's owner. The caps are halved when an answer was lost, and doubled when one came. `entry_bytes`
    is what an entry takes when it is here, rather too much than too little; 0 while none came."""

    def __init__(self) -> None:
        self.entries_cap, self.items_cap = MAX_ENTRIES, ITEMS_AT_ONCE
        self.messages_per_entry = 1.0
        self._bytes_per_entry = 0.0
        self.entry_bytes = 0.0
        self._swell = 1.0  # how many times as large entries are when they are unpacked
        self._bytes_per_item = STEP_BYTES / FIRST_ITEMS

    def entries(self, messages: int, held: float) -> int:
        """Entries that hold about so many messages and take `held` bytes when they are here, as far as one step brings
        them: at least one by the messages, maybe none by the bytes."""
        if not self.entry_bytes:
            return min(FIRST_ENTRIES, self.entries_cap)
        by_count = int(messages / self.messages_per_entry) or 1
        by_bytes = int(STEP_BYTES / self._bytes_per_entry) or 1
        entries = min(by_count, by_bytes, self.entries_cap)
        return entries if entries * self.entry_bytes <= held else max(int(held / self.entry_bytes), 0)

    def needs(self, messages: int, entry_bytes: float) -> int:
        """About what a fetch for so many messages takes when it is here, if entries are so large."""
        if not self.entry_bytes:
            return max(int(FIRST_ENTRIES * entry_bytes), FIRST_ROOM_BYTES)
        size = int(messages / self.messages_per_entry * entry_bytes)
        return size if entry_bytes < size <= STEP_BYTES else max(min(size, STEP_BYTES), int(entry_bytes))

    def items(self) -> int:
        by_bytes = int(STEP_BYTES / self._bytes_per_item) or 1
        return min(by_bytes, self.items_cap)

    def room(self, entries: int, messages: int, held: int) -> tuple[int, int, int]:
        """What a step that asks for so many entries may bring: entries, messages, and bytes as they are stored, which
        are about `held` when they are here."""
        most = STEP_BYTES if self.entry_bytes else FIRST_ROOM_BYTES
        size = int(held / self._swell)
        if size > most:
            size = most
        return max(entries, self.entries_cap), max(messages, 1), size

    def entries_came(self) -> None:
        self.entries_cap = min(self.entries_cap * 2, MAX_ENTRIES)

    def learn_entries(self, entries: int, messages: int, size: int, held: int, entry_bytes: float) -> None:
        """What came: bytes as they are stored, and what they take here. `entry_bytes` is what was believed where none
        came before; it counts the less the more come."""
        self.messages_per_entry = 0.5 * self.messages_per_entry + 0.5 * max(messages, 1) / entries
        self._bytes_per_entry = max(size / entries, 0.5 * self._bytes_per_entry, 1.0)
        self.entry_bytes = max(held / entries, 0.9**entries * (self.entry_bytes or entry_bytes), 1.0)
        self._swell = max(held / max(size, 1), 0.5 * self._swell, 1.0)

    def learn_items(self, items: int, size: int) -> None:
        self._bytes_per_item = max(size / items, 0.5 * self._bytes_per_item, 1.0)
        self.items_cap = min(self.items_cap * 2, ITEMS_AT_ONCE)

    def answer_lost(self) -> None:
        """It may be the size of the answer that kept it from coming in time."""
        self.entries_cap, self.items_cap = max(1, self.entries_cap // 2), max(1, self.items_cap // 2)
