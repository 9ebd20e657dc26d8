"""Puts the functions library on every master and says which build each runs. Everything else only checks that it is
there, and goes on without a master that is away; this does not.
"""

from __future__ import annotations

from shardq.errors import StoreUnavailable
from shardq.runtime.client import Client
from shardq.storage.commands import Packed, pack_call
from shardq.storage.functions import BUILD, LIBRARY
from shardq.storage.safety import ensure_functions
from shardq.storage.trouble import Trouble


async def install(client: Client) -> dict[str, int]:
    """Returns the build on every master, never older than this program's own.

    Raises FunctionsMissing where the user may not load it, StoreUnavailable when a master did not take it.
    """
    builds: dict[str, int] = {}
    for node in client.cluster.primaries():
        await ensure_functions(client.cluster, node)
        (reply,) = await client.cluster.exchange(node, [Packed(pack_call("build", (), ()))])
        if isinstance(reply, Trouble) or not isinstance(reply, int) or reply < BUILD:
            why = str(reply.error) if isinstance(reply, Trouble) else f"it answers {reply!r}"
            raise StoreUnavailable(
                f"{node.name} does not run {LIBRARY} build {BUILD}: {why}. Run `shardq install` again"
            )
        builds[node.name] = reply
    return builds
