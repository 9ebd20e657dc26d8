"""What the machine lends to faults: clocks and disks of a node's own. Decides nothing about when to use them.

Clocks need libfaketime (Debian's package of that name). Disks are memory (tmpfs) and need root. Linux only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardq.errors import UsageError
from shardq.ops.local_cluster import server_version

_CLOCK = "clock"  # beside a node's data: how many seconds its clock is off
_DISK_BYTES, _LEFT_BYTES = 512 * 1024 * 1024, 64 * 1024
_disks: list[Path] = []


# -- clocks ------------------------------------------------------------------------------------------------------


def why_no_clocks(server: Path) -> str | None:
    """Why servers of this binary can't have a clock of their own here; None when they can."""
    if _faketime() is None:
        return "libfaketime is not installed"
    if "v=7.0." in server_version(server):
        return "Redis 7.0 hangs at its start with libfaketime: its allocator asks for the time, which allocates"
    return None


def with_own_clock(server: Path, wrapper: Path) -> Path:
    """Writes a program that starts `server` with the clock that `set_clock` sets for its folder."""
    if why := why_no_clocks(server):
        raise UsageError(f"The nodes can't have clocks of their own: {why}.")
    settings = {
        "LD_PRELOAD": str(_faketime()),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    exports = "".join(f"export {name}='{value}'\n" for name, value in settings.items())
    wrapper.write_text(
        f"#!/bin/sh\n[ -e {_CLOCK} ] || echo +0 > {_CLOCK}\n"
        f'export FAKETIME_TIMESTAMP_FILE="$PWD/{_CLOCK}"\n{exports}exec \'{server}\' "$@"\n'
    )
    wrapper.chmod(0o700)
    return wrapper


def has_own_clock(folder: Path) -> bool:
    return (folder / _CLOCK).exists()


def set_clock(folder: Path, off_s: int) -> None:
    """From now on the node's clock is `off_s` seconds ahead of the machine's (behind it when negative)."""
    new = folder / f"{_CLOCK}.new"
    new.write_text(f"{off_s:+d}\n")
    new.replace(folder / _CLOCK)  # at once: it is read at any time


def _faketime() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"))), None)


# -- disks -------------------------------------------------------------------------------------------------------


def why_no_disks() -> str | None:
    """Why a node can't have a disk of its own here; None when it can."""
    if os.geteuid() != 0:
        return "mounting a disk needs root"
    return None if shutil.which("mount") and _may_mount() else "this machine does not allow mounting"


def _may_mount() -> bool:
    """Root in a container may still not."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@contextmanager
def own_disks() -> Iterator[None]:
    """Disks made inside are taken away at the end."""
    before = len(_disks)
    try:
        yield
    finally:
        for folder in _disks[before:]:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        del _disks[before:]


def move_to_own_disk(folder: Path) -> None:
    """What is in a folder goes to a new disk mounted in its place; nobody may use it meanwhile."""
    if why := why_no_disks():
        raise UsageError(f"The node can't have a disk of its own: {why}.")
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.move(folder, kept)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)], check=True)
    _disks.append(folder)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    shutil.rmtree(kept)


def has_own_disk(folder: Path) -> bool:
    return folder in _disks


def fill_disk(folder: Path) -> None:
    """Leaves next to nothing free."""
    usage = os.statvfs(folder)
    used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    _resize(folder, used + _LEFT_BYTES)


def empty_disk(folder: Path) -> None:
    """There is room again."""
    _resize(folder, _DISK_BYTES)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
