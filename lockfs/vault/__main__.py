"""The command line of the vault: ``python -S -P -m lockfs.vault RUN_DIR FD``.  lockd starts it.

FD is the socket that it is reached by, which listens already.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys

from lockfs.vault import wire
from lockfs.vault.daemon import Daemon


def main() -> int:
    """Be the vault of a run directory; return the exit code."""
    run_dir, fd = sys.argv[1:]
    os.chdir("/")
    lock = os.open(os.path.join(run_dir, wire.LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # one that lockd has given up and killed has not ended yet
    with socket.socket(fileno=int(fd)) as listener:
        os.set_inheritable(listener.fileno(), False)
        Daemon(run_dir, listener).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
