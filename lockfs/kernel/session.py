"""The session of the mount daemon: pyfuse3's, with INIT done and agreed on as lockfs wants it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockfs import kernel
from lockfs.errors import MountError, SystemError_
from lockfs.kernel import wire

if TYPE_CHECKING:
    import pyfuse3

    from lockfs.kernel.extra import Requests

MAX_INDEX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What to ask of the kernel.

    `flags` are set where it offers them.  PASSTHROUGH is for data.  With HANDLE_KILLPRIV_V2 a write does not make it
    ask for ``security.capability`` each time; handlers must then clear suid and sgid bits when `current` says so.
    With DONT_MASK new files obey default ACLs; handlers must then apply ``ctx.umask`` where there is none.
    `max_background` is the number of requests nobody waits for that may be under way: the default of 12 is soon full,
    and RELEASE is one of them, so that the next open of an image would overtake it.
    """

    flags: int = wire.PASSTHROUGH | wire.HANDLE_KILLPRIV_V2 | wire.DONT_MASK
    max_background: int = 1000
    congestion_threshold: int = 750


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What INIT agreed on.  `major` and `minor` are the kernel's; `offered` and `granted` INIT flags.

    `init` is the kernel's request: with it another daemon can resume the session.
    """

    major: int
    minor: int
    offered: int
    granted: int
    init: bytes

    @property
    def passthrough(self) -> bool:
        """Whether backing ids work."""
        return bool(self.granted & wire.PASSTHROUGH)

    @property
    def resends(self) -> bool:
        """Whether the kernel can send requests again that a daemon which died has not answered."""
        return bool(self.offered & wire.HAS_RESEND)

    @property
    def dont_mask(self) -> bool:
        """Whether handlers have to apply the umask."""
        return bool(self.granted & wire.DONT_MASK)

    @property
    def kill_suidgid(self) -> bool:
        """Whether handlers have to clear suid and sgid bits."""
        return bool(self.granted & wire.HANDLE_KILLPRIV_V2)


@dataclass(frozen=True, slots=True)
class Current:
    """The request that a handler was called for.

    `unique` is its number on the connection, with bit 63 set if it was sent again.  `kill_suidgid` says that it clears
    suid, and sgid of what the group may execute, beside what else it does.
    """

    opcode: int
    unique: int
    kill_suidgid: bool


def begin(
    operations: pyfuse3.Operations,
    fuse_fd: int,
    requests: Requests,
    settings: Settings | None = None,
    resume: bytes = b"",
) -> Negotiated:
    """Do as ``pyfuse3.init`` on a mounted ``/dev/fuse``; when this returns, the mount serves as soon as the main loop
    runs.

    The open file description of *fuse_fd* becomes non-blocking; pyfuse3 without this module cannot serve it
    afterwards.  The handler ``init`` must leave the descriptor alone: while it runs, that stands for something else.
    With *resume*, the `Negotiated.init` of a daemon that died, take over its connection; then send `notify_resend`.
    Raises `SystemError_` if `load` did not work or pyfuse3 went past us, `MountError` if the session did not start;
    in both cases *fuse_fd* is still the caller's.
    """
    import pyfuse3

    if why := kernel.why_not():
        raise SystemError_(f"cannot get between pyfuse3 and libfuse: {why}")
    from lockfs.kernel import _shim

    wanted = settings or Settings()
    _shim.configure(
        requests.take, requests.opcodes, wanted.flags, wanted.max_background, wanted.congestion_threshold, resume
    )
    try:
        pyfuse3.init(operations, f"/dev/fd/{fuse_fd}", set())
    except RuntimeError as error:
        raise MountError(f"the FUSE session did not start: {_shim.failure() or error}") from error
    return negotiated()


def negotiated() -> Negotiated:
    """Return what the session of this process agreed on.  Raises `SystemError_` if it is not ours."""
    from lockfs.kernel import _shim

    session = _shim.session()
    if session is None:
        raise SystemError_("the FUSE session is not ours: pyfuse3 calls libfuse directly")
    _fd, granted, init = session
    offer = wire.parse_init(init)
    return Negotiated(offer.major, offer.minor, offer.flags, granted, init)


handed_over: ContextVar[Current] = ContextVar("handed_over")
"""The request that `lockfs.kernel.extra` serves in this task."""


def current() -> Current:
    """Return the request that a handler was called for.

    In handlers that pyfuse3 calls, which are all but those of `lockfs.kernel.extra`, only before the first ``await``.
    """
    from lockfs.kernel import _shim

    return handed_over.get(None) or Current(*_shim.current())


def mint(index: int, backing_id: int) -> int:
    """Return the ``fh`` that a handler of ``open`` or ``create`` returns: with a backing id, data bypasses the daemon.

    Other flags of its FileInfo count only without one.  The kernel, and so every later request for this open file, has
    the *index* alone.  Raises OverflowError for an index
    above `MAX_INDEX`, which is all that fits: use numbers again after their RELEASE.
    """
    if not 0 <= index <= MAX_INDEX:
        raise OverflowError(f"the number of an open file must be at most {MAX_INDEX}, not {index}")
    return index | backing_id << 32


def split(fh: int) -> tuple[int, int]:
    """Return the index and the backing id that `mint` made *fh* of."""
    return fh & MAX_INDEX, fh >> 32
