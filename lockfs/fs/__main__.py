"""The mount daemon's command line; the mount helper calls it, and waits for one line on ``--ready-fd``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

import trio

from lockfs import kernel, options, text
from lockfs import log as logs
from lockfs.errors import EXIT_SYSTEM, LockfsError
from lockfs.protocol.start import run_dir

kernel.load()  # before anything imports pyfuse3

from lockfs.fs import survival  # noqa: E402
from lockfs.fs.daemon import Request, serve  # noqa: E402
from lockfs.fs.successor import take_over  # noqa: E402

log = logging.getLogger("lockfs.fs")


class _Ready:
    """Tells the mount helper, once, how it went."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def tell(self, **what: object) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, json.dumps(what).encode() + b"\n")
        except BrokenPipeError:
            pass  # the helper was killed; the mount serves all the same
        os.close(self._fd)
        self._fd = -1


def _only(error: BaseException) -> BaseException:
    """Return what a nursery may have wrapped."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def main() -> int:
    """Serve one mount; return the exit code."""
    parser = argparse.ArgumentParser(prog="lockfs-mount-daemon", description=__doc__)
    parser.add_argument("source", type=os.fsencode)
    parser.add_argument("mountpoint", type=os.fsencode)
    parser.add_argument("--fsname", type=os.fsencode, help="what mount(8) and df show as source")
    parser.add_argument("--flags", default="nosuid,nodev", help="flags of mount(2), by their names")
    parser.add_argument("--data", default="", help="further options of mount(2), as security contexts")
    parser.add_argument("-o", dest="options", default="", help="lockfs's own options and the backend's")
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--resume", metavar="MOUNT_ID", default="", help="take over this mount from a daemon that died")
    parser.add_argument("--token", default="", help="by which lockd knows its successor")
    for name in ("fuse", "source", "namespace"):
        parser.add_argument(f"--{name}-fd", type=int, default=-1)
    arguments = parser.parse_args()
    ready = _Ready(arguments.ready_fd)
    directory = run_dir()
    # A successor must not look at its own mount, where nobody answers; it gets real paths.
    mountpoint = arguments.mountpoint if arguments.resume else os.path.realpath(arguments.mountpoint)
    if arguments.namespace_fd >= 0:
        # Before there are threads: all of them have to see the mounts that the daemon before has seen.
        survival.enter_namespace(arguments.namespace_fd)
    try:
        name = text.from_bytes(mountpoint).strip("/").replace("/", "-")
        logs.set_up(f"mount-{name[-200:]}", directory)
        if arguments.resume:
            heir = survival.Heir(directory, arguments.resume, arguments.token, arguments.fuse_fd, arguments.source_fd)
            trio.run(take_over, heir)
            return 0
        request = Request(
            source=os.path.realpath(arguments.source),
            mountpoint=mountpoint,
            fsname=arguments.fsname or arguments.source,
            flags=tuple(filter(None, arguments.flags.split(","))),
            data=tuple(filter(None, [arguments.data])),
            options=options.parse(arguments.options),
            run_dir=directory,
        )
        trio.run(serve, request, lambda: ready.tell(ready=True))
    except BaseException as group:
        error = _only(group)
        if isinstance(error, LockfsError):
            log.error("%s", error)
            ready.tell(error=error.message, hint=error.hint, exit=error.exit_code)
            return error.exit_code
        log.exception("the mount daemon failed")
        ready.tell(error=f"the mount daemon failed: {error!r}", hint="Its log has the details.", exit=EXIT_SYSTEM)
        return EXIT_SYSTEM
    return 0


if __name__ == "__main__":
    sys.exit(main())
