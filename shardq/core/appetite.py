"""How much one step may fetch: learnt from what came, less when an answer was lost. Counts entries, items and bytes;
sees no message. Pure.
"""

from __future__ import annotations

from shardq.core.step import STEP_BYTES

FIRST_ENTRIES = 2  # of a size not known yet; where these leave room, the same step brings more
FIRST_ITEMS = 16
MAX_ENTRIES = 500
ITEMS_AT_ONCE = 500


class Appetite:
    """That of one shard's owner. The caps are halved when an answer was lost, and doubled when one came."""

    def __init__(self) -> None:
        self.entries_cap, self.items_cap = MAX_ENTRIES, ITEMS_AT_ONCE
        self.messages_per_entry = 1.0
        self._bytes_per_entry = 0.0
        self._bytes_per_item = STEP_BYTES / FIRST_ITEMS

    def entries(self, messages: int) -> int:
        """Entries that hold about so many messages, as far as one step brings them; at least one."""
        if not self._bytes_per_entry:
            return min(FIRST_ENTRIES, self.entries_cap)
        by_count = int(messages / self.messages_per_entry) or 1
        by_bytes = int(STEP_BYTES / self._bytes_per_entry) or 1
        return min(by_count, by_bytes, self.entries_cap)

    def items(self) -> int:
        by_bytes = int(STEP_BYTES / self._bytes_per_item) or 1
        return min(by_bytes, self.items_cap)

    def room(self, entries: int, messages: int) -> tuple[int, int, int]:
        """What a step that asks for so many entries may bring, for about so many messages."""
        return max(entries, self.entries_cap), max(messages, 1), STEP_BYTES

    def entries_came(self) -> None:
        self.entries_cap = min(self.entries_cap * 2, MAX_ENTRIES)

    def learn_entries(self, entries: int, messages: int, size: int) -> None:
        self.messages_per_entry = 0.5 * self.messages_per_entry + 0.5 * max(messages, 1) / entries
        self._bytes_per_entry = max(size / entries, 0.5 * self._bytes_per_entry, 1.0)

    def learn_items(self, items: int, size: int) -> None:
        self._bytes_per_item = max(size / items, 0.5 * self._bytes_per_item, 1.0)
        self.items_cap = min(self.items_cap * 2, ITEMS_AT_ONCE)

    def answer_lost(self) -> None:
        """It may be the size of the answer that kept it from coming in time."""
        self.entries_cap, self.items_cap = max(1, self.entries_cap // 2), max(1, self.items_cap // 2)
