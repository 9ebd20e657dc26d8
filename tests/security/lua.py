"""Reads the functions library as text: who calls what. Knows the style of scripts/*.lua, no more of Lua:
functions stand at the left edge and end with an `end` there."""

from __future__ import annotations

import re
from functools import cache

from shardq.storage.functions import library_source

_WITH_SUBCOMMANDS = {"XGROUP", "XINFO", "MEMORY"}


def code() -> str:
    """The source without comments."""
    return "\n".join(re.sub(r"--.*$", "", line) for line in library_source().splitlines())


@cache
def bodies() -> dict[str, str]:
    """Each function's text by its name."""
    found: dict[str, str] = {}
    name = ""
    for line in code().splitlines():
        begun = re.match(r"(?:local )?function ([\w.]+)\(", line)
        if begun:
            name = begun[1]
            found[name] = ""
        if name:
            found[name] += line + "\n"
        if line == "end" or (begun and re.search(r"\bend$", line)):
            name = ""
    return found


def registered() -> dict[str, list[str]]:
    """The library's functions: what they are called by, and what carries them out, what wraps that included."""
    found = re.findall(r"'shardq_1_(\w+)'(?:, callback=|, )([^\n{]+?)[,)}]*(?:, flags=.*)?$", code(), re.MULTILINE)
    return {name: re.findall(r"\b[a-z_]+\b", re.sub(r"'[^']*'", "", callback)) for name, callback in found}


def commands_of(*functions: str) -> frozenset[str]:
    """The Redis commands that they call, themselves or through others, as an ACL names them."""
    return frozenset(command for function in functions for command in _commands(function, set()))


def _commands(name: str, seen: set[str]) -> set[str]:
    if name in seen:
        return set()
    seen.add(name)
    body = bodies()[name]
    found = set()
    for command, sub in re.findall(r"redis\.p?call\('(\w+)'(?:, '(\w+)')?", body):
        found.add(f"{command}|{sub}".lower() if command in _WITH_SUBCOMMANDS else command.lower())
    for other in bodies():
        if re.search(rf"\b{re.escape(other)}\(|pcall\({re.escape(other)}\b", body):
            found |= _commands(other, seen)
    return found
