"""The rules that `shardq acl` prints: exact patterns, no dangerous right, and what makes no sense is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.cli.app import run
from shardq.core.acl import user_rules
from shardq.errors import UsageError
from shardq.storage.acl import ROLES, Role, Wanted, grants
from shardq.storage.keys import CastNames, Keys, registry

names = st.text("abAB09_.-", min_size=1, max_size=6) | st.sampled_from(
    ["stream", "meta", "queues", "group", "cast", "casts", "bell", "routing", "a.b", "-", "0"]
)
NEVER = """
eval evalsha eval_ro script config keys scan flushall flushdb debug shutdown acl module monitor migrate function
function|flush function|delete function|restore save bgsave replicaof slaveof cluster client cluster|failover
cluster|reset sort sort_ro object latency slowlog swapdb psync sync select
"""


def rules(role: Role, queue: str = "orders", **more: Any) -> list[str]:
    return user_rules(grants(Wanted(role, [queue], **more)))


def keys_allowed(found: list[str], name: str) -> bool:
    words = " ".join(found).replace("(", "").replace(")", "").split()
    return any(fnmatchcase(name, word.partition("~")[2]) for word in words if word.startswith(("~", "%R~")))


@pytest.mark.parametrize("role", ROLES)
def test_nobody_may_what_no_role_needs(role: Role) -> None:
    everything: dict[str, Any] = {"broadcast": True, "listen": ["a*"], "fsync": True}
    for more in (dict[str, Any](), everything):
        words = " ".join(rules(role, **more)).replace("(", "").replace(")", "").split()
        assert not {f"+{command}" for command in NEVER.split()} & set(words)
        assert not [word for word in words if word.startswith("+@") or word in ("allkeys", "allcommands", "~*", "&*")]
        assert words[:5] == ["on", "clearselectors", "resetkeys", "resetchannels", "-@all"]
        assert ("+function|load" in words) == (role == "operator")


@given(queue=names, other=names, group=names, role=st.sampled_from(ROLES), shard=st.integers(0, 99999))
def test_a_user_of_one_queue_reaches_no_other(queue: str, other: str, group: str, role: Role, shard: int) -> None:
    found = rules(role, queue)
    keys = Keys("shardq", other)
    of_shard = keys.shard(shard, "a0z")
    theirs = [
        keys.routing, keys.schedules, keys.control(group), of_shard.stream, of_shard.meta, of_shard.delayed,
        of_shard.expiring, of_shard.timed, of_shard.scratch, *of_shard.of_group(group), of_shard.data("x"),
    ]  # fmt: skip
    if other != queue:
        assert not any(keys_allowed(found, name) for name in theirs)
    elif role == "producer":
        reached = {name for name in theirs if keys_allowed(found, name)}
        assert reached == {
            keys.routing,
            of_shard.stream,
            of_shard.meta,
            of_shard.delayed,
            of_shard.expiring,
            of_shard.timed,
        }
    elif role == "worker":
        assert [name for name in theirs if not keys_allowed(found, name)] == []
    assert keys_allowed(found, registry("shardq")) == (role in ("exporter", "operator"))
    assert not any(keys_allowed(found, name.replace("shardq:", "shardq2:", 1)) for name in theirs)


@given(queue=names, channel=st.text(min_size=1, max_size=12))
def test_a_broadcast_is_no_bell(queue: str, channel: str) -> None:
    """Who may only ring a queue's bells reaches no channel that is listened to by name, and the other way round."""
    keys, casts = Keys("shardq", queue), CastNames("shardq")
    bell = keys.of_every_shard("bell")
    assert not fnmatchcase(casts.exact(channel), bell)
    assert not fnmatchcase(keys.shard(3, "a0").bell, casts.exact("*"))


def test_a_group_is_one_group() -> None:
    found = rules("worker", group="billing")
    shard = Keys("shardq", "orders").shard(3, "a0")
    assert all(keys_allowed(found, key) for key in shard.of_group("billing"))
    assert not any(keys_allowed(found, key) for other in ("archive", "billing2", "b") for key in shard.of_group(other))


def test_a_password_goes_in_as_its_hash_and_never_as_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "canary-pass word"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    command = [sys.executable, "-m", "shardq", "acl", "producer", "--queue", "orders"]
    done = subprocess.run(
        [*command, "--password-stdin"], input=f"{secret}\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert f" #{digest} " in done.stdout
    assert secret not in done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THE_PASSWORD", secret)
        assert run(["acl", "producer", "--queue", "orders", "--password-env", "THE_PASSWORD", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["user"] == "shardq-producer"
    assert f"#{digest}" in printed["rules"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["producer"], "a producer is for a queue"),
        (["producer", "--queue", "a*"], "queue name 'a*' is not valid"),
        (["producer", "--queue", "{a}"], "is not valid"),
        (["worker", "--queue", "a", "--prefix", "a:b"], "prefix name 'a:b' is not valid"),
        (["worker", "--queue", "a", "--group", "*"], "group name '*' is not valid"),
        (["worker", "--queue", "a", "--sends-to", "b c"], "queue name 'b c' is not valid"),
        (["worker", "--queue", "a", "--effects", "a b"], "is no pattern of keys"),
        (["worker", "--queue", "a", "--effects", "a) +@all"], "is no pattern of keys"),
        (["worker", "--queue", "a", "--listen", "a) &* +@all"], "an ACL can't hold"),
        (["producer", "--queue", "a", "--group", "g"], "for no group"),
        (["producer", "--queue", "a", "--effects", "x:*"], "has no handlers"),
        (["producer", "--queue", "a", "--user", "a b"], "user name 'a b' is not valid"),
        (["producer", "--queue", "a", "--user", "a\n+@all"], "is not valid"),
        (["producer", "--queue", "a", "--password-env", "NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
        (["producer", "--queue", "a", "--password-env", "A", "--password-stdin"], "choose one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["acl", *arguments]) == 1
    assert says in capsys.readouterr().err


def test_an_empty_standard_input_is_no_password() -> None:
    command = [sys.executable, "-m", "shardq", "acl", "producer", "--queue", "a", "--password-stdin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: standard input has no password")


def test_wanted_checks_itself() -> None:
    with pytest.raises(UsageError, match="worker is for a queue"):
        Wanted("worker")
