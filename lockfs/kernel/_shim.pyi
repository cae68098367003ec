"""The C extension: see module.c.  One session per process, as in pyfuse3."""

from collections.abc import Callable

def bind(path: str) -> str | None:
    """Find libfuse through the loaded extension of pyfuse3 at *path*; return the name of a function it lacks."""

def interposed() -> bool:
    """Say whether what is loaded from now on calls our functions instead of libfuse's."""

def configure(
    callback: Callable[[int, int, int, int, int, int, bytes], None],
    opcodes: int,
    flags: int,
    max_background: int,
    congestion_threshold: int,
    resume: bytes,
) -> None:
    """Make the next session ours.

    *callback* gets (opcode, unique, node, uid, gid, pid, body) of each request whose opcode is in the bit mask
    *opcodes*; *flags* are INIT flags to set where the kernel offers them; 0 for a limit leaves libfuse's.  With an INIT
    request as *resume* the kernel gets no second answer to it.  Raises RuntimeError while a session is open.
    """

def session() -> tuple[int, int, bytes] | None:
    """Return (descriptor, granted INIT flags, INIT request) of our session, None if there is none."""

def failure() -> str:
    """Return why the last session did not start."""

def current() -> tuple[int, int, bool]:
    """Return (opcode, unique, whether suid and sgid must go) of the request that pyfuse3 has got last."""

def reply(unique: int, error: int, data: bytes, /) -> None:
    """Answer a request that *callback* got, once.

    Raises OSError: ESRCH for a request that is not there to be answered, ENODEV without a session, else what
    writev(2) on the device says.
    """

def add(number: int, fd: int, direct: int, guarded: bool, trust: int, calm_only: bool, /) -> None:
    """Serve reads, writes, syncs and attributes of an open file without Python.

    Its descriptors stay open until `remove`.  *direct* is the file opened with O_DIRECT, for requests that ask for it;
    or -1.  Writes of a *guarded* file heed the deadline.  The kernel may trust attributes for *trust*
    nanoseconds; with *calm_only* not if the file has changed within the last second.  Raises OSError: EEXIST, ENOMEM.
    """

def shut(number: int, /) -> bool:
    """Leave all that comes for a file to Python from now on.  Return False if there is no such file."""

def remove(number: int, /) -> bool:
    """Forget a file.  Return False if requests of it are under way: then the last of them closes its descriptors."""

def heed(fd: int, /) -> None:
    """Let no guarded write begin after the deadline in this shared memory (`lockfs.linux.deadline`); -1: there is none.

    Raises OSError.
    """
