"""The functions library takes no string of a user's but as an argument: its source is a constant, and every key that it
touches is one of KEYS. Read off the sources, so that a new function can't forget it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from shardq.storage import functions
from shardq.storage.acl import ACCESS, COMMANDS, EFFECTS, SENDING, UNDOING
from tests.security import lua

NO_KEY = {"TIME", "INFO"}
CHANNEL = {"SPUBLISH"}
SECOND = {"XGROUP", "XINFO", "MEMORY"}  # their first argument is a subcommand

# What holds a key: places of KEYS, and the parameters and locals that they are handed on by.
NAMES = r"(?:stream|meta|key|hash|dead|kept|later|scratch)"
KEY = re.compile(rf"keys\[[^\]]+\]|{NAMES}")


def without_strings(text: str) -> str:
    """As long as it was, with blanks in its quotes."""
    return re.sub(r"'[^'\n]*'", lambda found: f"'{' ' * (len(found[0]) - 2)}'", text)


def arguments(text: str) -> list[str]:
    """The top-level arguments of a call."""
    found, depth, start = [], 0, 0
    for index, char in enumerate(without_strings(text)):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            found.append(text[start:index].strip())
            start = index + 1
    return [*found, text[start:].strip()]


def calls(text: str, name: str = r"redis\.p?call") -> Iterator[list[str]]:
    """The arguments of every call of a command, or of the function `name`, those within others too."""
    bare = without_strings(text)
    for begun in re.finditer(rf"(?<!function )\b{name}\(", bare):
        depth, end = 1, begun.end()
        while depth:
            depth += (bare[end] == "(") - (bare[end] == ")")
            end += 1
        yield arguments(text[begun.end() : end - 1])


CALLS = list(calls(lua.code()))


def test_the_reader_sees_every_call() -> None:
    assert len(CALLS) == len(re.findall(r"redis\.p?call\(", lua.code())) > 150


def key_of(call: list[str]) -> list[str]:
    """What stands at the places of keys."""
    command = call[0].strip("'")
    if command in NO_KEY | CHANNEL:
        return []
    if command == "XREADGROUP":
        return [call[call.index("'STREAMS'") + 1]]
    if command in {"UNLINK", "DEL", "RENAME"}:
        return call[1:]
    return [call[2 if command in SECOND else 1]]


def test_a_key_is_never_built() -> None:
    # Effects are for test_effects_stay_on_their_key.
    plain = [call for call in CALLS if call not in (["command", "key", "unpack(args)"], ["unpack(one)"])]
    assert len(plain) == len(CALLS) - 2
    for call in plain:
        assert re.fullmatch(r"'[A-Z]+'", call[0]), f"the name of a command is a constant: {call}"
        for key in key_of(call):
            assert KEY.fullmatch(key), f"{key} may be no key that was declared: {call}"


def test_who_hands_on_a_key_has_one() -> None:
    """What a function takes for a key is one of KEYS, or was handed to it: no name of a key is ever put together."""
    handed_on = 0
    for name, body in lua.bodies().items():
        used = {key for call in calls(body) for key in key_of_any(call) if re.fullmatch(NAMES, key)}
        for left, right in re.findall(r"\blocal ([\w, ]+) = ([^\n]+)", body):
            for local, value in zip(left.split(", "), arguments(right), strict=False):
                assert local not in used or KEY.fullmatch(value), f"{name}: {local} = {value}"
        for place, parameter in enumerate(re.match(r".*?\(([\w, ]*)\)", body)[1].split(", ")):  # type: ignore[index]  # it is one
            for call in calls(lua.code(), re.escape(name)) if parameter in used else ():
                assert KEY.fullmatch(call[place]), f"{name} is called with {call[place]} for {parameter}"
                handed_on += 1
    assert handed_on > 30


def key_of_any(call: list[str]) -> list[str]:
    return [call[1]] if call[0] == "command" else key_of(call) if call != ["unpack(one)"] else []


def test_effects_stay_on_their_key() -> None:
    """The one command whose name comes from a caller is one of a list, on a key of KEYS; so is what takes it back."""
    assert "if not effect_undo[command] then return nil" in lua.bodies()["effect_run"]
    assert "effect_run(keys[write.place], write.command" in lua.bodies()["effect_all"]
    known = set(re.findall(r"effect_undo\.([A-Z]+)", lua.code()))
    assert known == {command.upper() for command in EFFECTS.split()}
    effects = "".join(body for name, body in lua.bodies().items() if name.startswith("effect_"))
    backwards = {"DEL", *re.findall(r"\{'([A-Z]+)', key", effects), "SADD", "SREM"}
    read = {
        command.upper() for name in lua.bodies() if name.startswith("effect_undo") for command in lua.commands_of(name)
    }
    read |= {
        command.upper()
        for name in ("effect_any", "effect_string", "effect_whole", "effect_scores", "effect_members")
        for command in lua.commands_of(name)
    }
    read |= {"EXISTS", "PEXPIRETIME", "TYPE"}
    later = {"HPEXPIRETIME", "HPEXPIREAT"}  # Redis 7.0 does not know them: docs/guide/security.md
    allowed = {command.upper() for command in f"{EFFECTS} {UNDOING}".split()}
    assert (backwards | read) - later == allowed - (known - backwards - read)


def test_nothing_is_loaded_or_run_from_text() -> None:
    for word in ("loadstring", "load", "dofile", "require", "EVAL", "setfenv", "debug", "os", "io"):
        assert not re.search(rf"\b{word}\s*[\(.]", lua.code()), word


def test_the_source_is_a_constant() -> None:
    """What FUNCTION LOAD takes is made of files of this package and of a number: no argument, no environment."""
    tree = ast.parse(Path(functions.__file__).read_text())
    source = next(node for node in ast.walk(tree) if getattr(node, "name", "") == "library_source")
    assert isinstance(source, ast.FunctionDef)
    assert not source.args.args
    formatted = [ast.unparse(node.value) for node in ast.walk(source) if isinstance(node, ast.FormattedValue)]
    assert sorted(formatted) == ["BUILD", "LIBRARY", "part"]
    assert isinstance(functions.BUILD, int)
    assert functions.library_source() == functions.library_source.__wrapped__()
    assert re.fullmatch(r"shardq_\d+", functions.LIBRARY)


# -- the tables of storage/acl.py -------------------------------------------------------------------------------------


def test_each_function_calls_what_the_table_says() -> None:
    found = {name: lua.commands_of(*carried_out) for name, carried_out in lua.registered().items()}
    assert {name: frozenset(commands.split()) for name, commands in COMMANDS.items()} == found


def test_a_send_calls_what_the_table_says() -> None:
    assert set(SENDING.split()) == lua.commands_of("effect_send", "effect_check")


def test_the_table_has_every_function_and_each_is_somebodys() -> None:
    used = {function for access in ACCESS.values() for function in access.functions.split()}
    assert used == set(COMMANDS) == set(lua.registered())


def test_what_only_reads_is_called_so() -> None:
    flagged = set(re.findall(r"'shardq_1_(\w+)', callback=[^\n{]+, flags=\{'no-writes'\}", lua.code()))
    assert flagged == functions.READERS
