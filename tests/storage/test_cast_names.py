"""Names of broadcast channels: each its own, in the slot Redis reckons, never taken for a bell."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core.slots import key_slot
from shardq.errors import UsageError
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.keys import LONGEST_CHANNEL, CastNames, Keys, check_channel
from shardq.storage.nodes import node_command

prefixes = st.from_regex(re.compile(r"[A-Za-z0-9_.-]{1,8}", re.ASCII), fullmatch=True)
channels = st.text(st.sampled_from("ab{}:*[]\\é "), min_size=1, max_size=8)


@given(prefixes, channels, prefixes, channels)
def test_no_two_channels_share_a_name(prefix: str, channel: str, other_prefix: str, other: str) -> None:
    one, two = CastNames(prefix), CastNames(other_prefix)
    same = (prefix, channel) == (other_prefix, other)
    assert (one.exact(channel) == two.exact(other)) is same
    assert (one.ordinary(channel) == two.ordinary(other)) is same
    assert one.channel_of(one.ordinary(channel)) == channel


@given(channels)
def test_no_channel_is_a_bell(channel: str) -> None:
    keys = Keys("shardq", "cast")
    assert CastNames("shardq").exact(channel) not in (keys.shard(0, "a").bell, keys.control_bell("g"))
    assert CastNames("shardq").exact(channel).endswith("}"), "no bell does"


@pytest.mark.parametrize("channel", ["plain", "{", "}", "{}", "}{", "a{b}c", "{b}", "}a{b}", "prix:été", "user:42 *?["])
def test_the_slot_is_the_one_redis_reckons(cluster: LocalCluster, channel: str) -> None:
    names = CastNames("shardq")
    assert names.exact_slot(channel) == key_slot(names.exact(channel).encode())
    (reckoned,) = {
        node_command("127.0.0.1", port, "CLUSTER", "KEYSLOT", names.exact(channel)) for port in cluster.ports
    }
    assert reckoned == names.exact_slot(channel)


@pytest.mark.parametrize("name", ["a", "user:42", "x" * LONGEST_CHANNEL, "été", "with space", "{}[]*?\\", "印刷", "🎉"])
def test_printable_text_names_a_channel(name: str) -> None:
    assert check_channel("channel", name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * (LONGEST_CHANNEL + 1), "a\nb", "a\x00", "\x7f", "\ud800", "\u200b", b"bytes", None, 7]
)
def test_anything_else_does_not(name: object) -> None:
    with pytest.raises(UsageError, match=f"channel .* is not valid: use a str of 1 to {LONGEST_CHANNEL} printable"):
        check_channel("channel", name)
