"""Open files that a successor has found in the journal and of which the kernel may know nothing.

The daemon before has written down that it opened a file, and died before it was certain that the kernel had taken the
answer.  As a rule the request is sent again.  It is not if the answer was taken after all; nor if whoever waited for it
was killed in the moment between, and then nobody is ever going to close the file, and its image would stay locked.  So
the kernel is asked whether it knows the inode, after it has been told to forget it if nobody has it open.
"""

from __future__ import annotations

import logging

import trio

from lockfs.errors import LockfsError
from lockfs.fs.operations import Operations
from lockfs.fs.session import LockdSession
from lockfs.kernel import device

log = logging.getLogger("lockfs.fs")

RESENT_WITHIN = 1.0
"""Seconds in which the kernel has sent again what it has to: it does so at once, and this daemon may be busy."""
FORGOTTEN_WITHIN = 0.2
"""Seconds in which the kernel forgets what nobody uses."""


async def resolve(operations: Operations, session: LockdSession, fuse_fd: int) -> None:
    """Close the open files that nobody has."""
    if not operations.handles.unanswered():
        return
    await trio.sleep(RESENT_WITHIN)
    handles = {number: each for number, each in operations.handles.unanswered().items() if each.inherited}
    nodes = sorted({handle.node.id for handle in handles.values()})
    if not nodes:
        return
    operations.doubtful.update(nodes)
    try:
        await trio.to_thread.run_sync(device.notify_prune, fuse_fd, nodes)
        await trio.sleep(FORGOTTEN_WITHIN)
        known = await session.inheritance.known(nodes)
    except (OSError, LockfsError) as error:
        log.info("files that may be open for nobody stay open: %s", error)
        return
    finally:
        operations.doubtful.difference_update(nodes)
    for number, handle in handles.items():
        if handle.node.id in known:
            operations.handles.answered(handle.unique)
        elif operations.handles.has(number, handle):
            log.info("%r was open for nobody, and is closed", handle.node.path())
            await operations.close_handle(operations.handles.take_file(number))
            operations.nodes.forget(handle.node.id, handle.node.lookups)
