"""What the commands ask lockd.  Imports trio: the mount helper imports this only for a remount."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from lockfs.errors import LockUnavailable, UsageError
from lockfs.protocol.client import LockdClient
from lockfs.protocol.messages import (
    ConfirmDead,
    ConfirmedDead,
    Fence,
    Fenced,
    FenceResult,
    FenceTarget,
    GetStatus,
    HostList,
    Hosts,
    LockInfo,
    Replace,
    Replaced,
    Status,
    Upgrade,
    Upgrading,
)
from lockfs.protocol.start import is_running

TIMEOUT = 10.0
"""Seconds for lockd to answer a question that needs no storage."""
UPGRADE_TIMEOUT = 60.0
"""Seconds for a new version to look at the state, or for a mount daemon to be replaced; both take about one."""
FENCE_TIMEOUT = 60.0
"""Seconds for a fence, which takes one or two; also of thousands of images on a host in trouble."""

STORAGE_ANSWER_TIMEOUT = 20.0
"""Seconds for a question that needs storage, for which lockd itself waits no longer than ten."""
CONFIRM_TIMEOUT = 600.0
"""Seconds for lockd to see whether a host lives that is said to be dead: one and a half of its renewals, with sanlock's
longest io_timeout somewhat less than 800; nobody uses that.
"""

T = TypeVar("T")


def status(run_dir: str) -> Status | None:
    """Return the status of the lockd of *run_dir*, or None if none runs.  Raises `LockfsError`."""
    return _ask(run_dir, _status)


def locks(run_dir: str) -> list[LockInfo] | None:
    """Return the locks that the lockd of *run_dir* holds, or None if none runs.  Raises `LockfsError`."""
    return _ask(run_dir, LockdClient.locks)


def fence(run_dir: str, images: Sequence[FenceTarget], reason: str) -> list[FenceResult]:
    """Have lockd fence images.  Raises `LockfsError`."""

    async def ask(client: LockdClient) -> list[FenceResult]:
        fenced, _ = await client.call(Fence(list(images), reason), Fenced)
        return fenced.results

    results = _ask(run_dir, ask, FENCE_TIMEOUT)
    if results is None:
        raise LockUnavailable(f"no lockd is running in {run_dir}")
    return results


def hosts(run_dir: str) -> HostList | None:
    """Return the hosts that share locks with this one, or None if no lockd runs.  Raises `LockfsError`."""

    async def ask(client: LockdClient) -> HostList:
        found, _ = await client.call(Hosts(), HostList)
        return found

    return _ask(run_dir, ask, STORAGE_ANSWER_TIMEOUT)


def confirm_dead(run_dir: str, host: str, source: str, reason: str) -> ConfirmedDead | None:
    """Tell lockd that a host is dead; None if none runs.  Raises `LockfsError`."""

    async def ask(client: LockdClient) -> ConfirmedDead:
        done, _ = await client.call(ConfirmDead(host, source, reason), ConfirmedDead)
        return done

    return _ask(run_dir, ask, CONFIRM_TIMEOUT)


def upgrade(run_dir: str, python: str, path: str) -> None:
    """Have lockd replaced by another version.  Raises `LockfsError` if it refuses."""

    async def ask(client: LockdClient) -> None:
        await client.call(Upgrade(python, path), Upgrading)

    _ask(run_dir, ask, UPGRADE_TIMEOUT)


def replace(run_dir: str, mount_id: str) -> bool:
    """Have the daemon of a mount replaced; return whether that was done.  Raises `LockfsError`."""

    async def ask(client: LockdClient) -> bool:
        replaced, _ = await client.call(Replace(mount_id), Replaced)
        return replaced.done

    return bool(_ask(run_dir, ask, UPGRADE_TIMEOUT))


async def _status(client: LockdClient) -> Status:
    found, _ = await client.call(GetStatus(), Status)
    return found


def _ask(run_dir: str, question: Callable[[LockdClient], Awaitable[T]], timeout: float = TIMEOUT) -> T | None:
    async def ask() -> T:
        with trio.fail_after(timeout):
            client = await LockdClient.connect(run_dir)
            try:
                return await question(client)
            finally:
                with trio.CancelScope(shield=True):
                    await client.aclose()

    if os.path.isdir(run_dir) and not os.access(run_dir, os.X_OK):
        hint = "`lockfs who IMAGE` needs no more than the right to read the image, if it is on a mount."
        raise UsageError(f"only root may ask lockd in {run_dir}", hint=hint)
    try:
        return trio.run(ask) if is_running(run_dir) else None
    except trio.TooSlowError:
        raise LockUnavailable(f"lockd in {run_dir} did not answer within {timeout:.0f} s") from None
    except LockUnavailable:
        if is_running(run_dir):
            raise
        return None
