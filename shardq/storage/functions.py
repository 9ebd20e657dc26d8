"""The functions library: puts the .lua files together and names what is in it. Runs nothing.

One library per wire version. `BUILD` rises with every change to a .lua file, so that a node running an older build of
the same wire version is brought up to date and a newer one is left alone (rolling deploys). tests/storage holds the
digest that reminds you.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

LIBRARY = "shardq_1"
BUILD = 5

READERS = frozenset({"inspect", "build"})  # registered with no-writes

_PARTS = (
    "common",
    "declare",
    "append",
    "timed",
    "effect",
    "fetch",
    "step",
    "dead",
    "delete",
    "group",
    "remove",
    "schedule",
    "reshard",
    "lease",
    "control",
    "limit",
    "inspect",
)


@cache
def library_source() -> str:
    """The source that FUNCTION LOAD takes."""
    folder = files("shardq.storage") / "scripts"
    parts = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in _PARTS]
    return "\n".join([f"#!lua name={LIBRARY}", f"local LIBRARY_BUILD = {BUILD}", *parts])


def function_name(function: str) -> str:
    """Function names are global on a server, so they carry the library's name."""
    return f"{LIBRARY}_{function}"
