"""The command line of lockd.  It is started on demand, by `lockfs.protocol.start`."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import trio

import lockfs
from lockfs import log
from lockfs.errors import EXIT_OK, LockfsError, SystemError_
from lockfs.linux import memory
from lockfs.lockd.daemon import Daemon, raise_descriptor_limit
from lockfs.lockd.seat import AlreadyRuns
from lockfs.options import seconds
from lockfs.protocol import start


def main(argv: list[str] | None = None) -> int:
    """Run lockd; return the exit code."""
    arguments = _parse(argv)
    ready_fd: int | None = arguments.ready_fd
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)  # who waits for its end waits for that of this process alone

    def tell(error: LockfsError | None = None) -> None:
        nonlocal ready_fd
        if ready_fd is not None:
            start.tell_ready(ready_fd, error)
            ready_fd = None

    try:
        start.prepare_run_dir(arguments.run_dir)
        run_dir = os.path.abspath(arguments.run_dir)
        log.set_up("lockd", run_dir)
        raise_descriptor_limit()
        _stay_in_memory()
        host = os.environ.get("LOCKFS_HOST") or os.uname().nodename
        trio.run(Daemon(run_dir, host, arguments.idle_exit).run, tell, strict_exception_groups=True)
    except Exception as raised:
        error = _first(raised)
        if isinstance(error, LockfsError):
            logging.log(logging.INFO if isinstance(error, AlreadyRuns) else logging.ERROR, "%s", error)
        else:
            logging.exception("lockd failed")
            error = SystemError_(f"lockd failed: {error!r}")
        print(f"lockd: {error}", file=sys.stderr)
        tell(error)
        return error.exit_code
    return EXIT_OK


def _stay_in_memory() -> None:
    """Have lockd go on where memory is short: all opens for writing wait for it."""
    try:
        if not memory.lock():
            logging.info("without CAP_IPC_LOCK lockd may be paged out, and be slow where memory is short")
    except OSError as error:
        logging.info("lockd may be paged out: %s", error.strerror)
    if not memory.spare_from_oom_killer():
        logging.info("without CAP_SYS_RESOURCE lockd may be killed where memory is short; it is then started again")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lockd", description="Hold the locks of this host for all its lockfs mounts.")
    parser.add_argument("--run-dir", default=start.run_dir(), metavar="DIR", help="where its socket and log are")
    parser.add_argument(
        "--idle-exit", type=seconds, metavar="SECONDS", help="leave when nobody has been connected for so long"
    )
    parser.add_argument("--ready-fd", type=int, metavar="FD", help="where to tell the starter how it went")
    parser.add_argument("--version", action="version", version=f"lockd {lockfs.__version__}")
    return parser.parse_args(argv)


def _first(error: Exception) -> Exception:
    """Return the error itself where the nurseries of trio have wrapped it."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
