"""The keys that a terminal's bytes mean. Pure: reads no terminal.

Names: up, down, left, right, home, end, pageup, pagedown, enter, esc, backspace, or the character itself.
"""

from __future__ import annotations

_LETTERS = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_SEQUENCES = {
    **{f"\x1b[{letter}": name for letter, name in _LETTERS.items()},
    **{f"\x1bO{letter}": name for letter, name in _LETTERS.items()},
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1b[5~": "pageup",
    "\x1b[6~": "pagedown",
    "\x1b[7~": "home",
    "\x1b[8~": "end",
}
_CHARACTERS = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", "\x1b": "esc"}
_MOST_PARAMETERS = 16


def parse(text: str, *, more: bool) -> tuple[list[str], str]:
    """The keys, and the rest that is the beginning of one. `more`: bytes may be on their way; without it an escape that
    nothing followed is the key Esc. Sequences without a name here are left out."""
    keys: list[str] = []
    at = 0
    while at < len(text):
        end = _end(text, at)
        if end is None and more:
            return keys, text[at:]
        if end is None:
            end = at + 1
        name = _name(text[at:end])
        if name:
            keys.append(name)
        at = end
    return keys, ""


def _end(text: str, at: int) -> int | None:
    """Where the key that begins at `at` ends; None: not in this text."""
    if text[at] != "\x1b":
        return at + 1
    if at + 1 == len(text):
        return None
    if text[at + 1] == "O":
        return at + 3 if at + 2 < len(text) else None
    if text[at + 1] != "[":
        return at + 1  # Esc, then another key
    for end in range(at + 2, min(len(text), at + 2 + _MOST_PARAMETERS)):
        if "@" <= text[end] <= "~":
            return end + 1
    return None if len(text) < at + 2 + _MOST_PARAMETERS else at + 1


def _name(sequence: str) -> str:
    known = _SEQUENCES.get(sequence) or _CHARACTERS.get(sequence)
    return known or (sequence if len(sequence) == 1 and sequence.isprintable() else "")
