"""What pyfuse3 lacks: passthrough, the missing requests, INIT done before "mounted" is said.

A C extension takes the place of three functions that pyfuse3 calls in libfuse, and so sees each raw request.  `load`
puts it there, and has to be called before anything imports pyfuse3; then

* `lockfs.kernel.session` starts the session and says what the kernel agreed to;
* `lockfs.kernel.extra` serves ``open`` and ``create``, and ``fallocate``, ``lseek`` and ``copy_file_range``;
* `lockfs.kernel.backing` keeps the backing ids of open files;
* `lockfs.kernel.device` talks to ``/dev/fuse`` beside pyfuse3, also from another process.

Without it, or with ``LOCKFS_KERNEL=off`` in the environment, pyfuse3 works as ever, and all data flows through the
daemon.

Even with passthrough some calls on data wait for the daemon: the first write to an inode since the kernel knows it,
which asks for ``security.capability``, and close(2), also that of exec, until one FLUSH was answered with ENOSYS.

Limits of passthrough that nothing here can lift: setting O_DIRECT by F_SETFL has no effect on the storage, and a
write by an O_DIRECT descriptor whose end is not aligned fails with EINVAL even after the flag was cleared; the kernel
itself refuses INSERT_RANGE, COLLAPSE_RANGE and UNSHARE_RANGE.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys

ENVIRONMENT = "LOCKFS_KERNEL"
PASSTHROUGH_SINCE = (6, 9)
CAP_SYS_ADMIN = 21

_why_not: str | None = "lockfs.kernel.load() was not called"
_called = False


def load(*, off: bool = False) -> str | None:
    """Get between pyfuse3 and libfuse, and import pyfuse3.  Return None if that worked, else a sentence that says why
    not.

    What the first call found holds for the process.  *off* does as ``LOCKFS_KERNEL=off``: nothing is touched.
    """
    global _why_not, _called
    if not _called:
        _called = True
        _why_not = _load(off)
    return _why_not


def why_not() -> str | None:
    """Return what `load` returned."""
    return _why_not


def _load(off: bool) -> str | None:
    if off or _switched_off():
        return "it is switched off"
    try:
        from lockfs.kernel import _shim
    except ImportError as error:
        return f"the extension module of lockfs was not built ({error})"
    if "pyfuse3" in sys.modules:
        # Its calls may be bound to libfuse by now, for good.
        return "pyfuse3 was imported before lockfs.kernel.load() was called"
    # Python loads extensions with local symbols; this makes those of one that is loaded global.
    ctypes.CDLL(_shim.__file__, os.RTLD_NOW | os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    if not _shim.interposed():
        return "another library in this process provides functions of libfuse"
    import pyfuse3

    if missing := _shim.bind(str(pyfuse3.__file__)):
        return f"this libfuse does not fit: it has no {missing}"
    return None


def probe() -> str | None:
    """Say in one sentence what this host lacks for passthrough; None if nothing is known to be missing.

    Light, and without effect on a later `load`: fit for a check before a mount.  Only the kernel's answer at the
    mount is certain (`lockfs.kernel.session.Negotiated`).
    """
    if _switched_off():
        return f"The kernel module is switched off ({ENVIRONMENT}=off)."
    if importlib.util.find_spec("lockfs.kernel._shim") is None:
        return "The extension module was not built: install a C compiler and Python's headers, then lockfs once more."
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found and (int(found[1]), int(found[2])) < PASSTHROUGH_SINCE:
        return f"Linux {release} is too old for FUSE passthrough, which came with 6.9."
    if not _effective_capabilities() >> CAP_SYS_ADMIN & 1:
        return "FUSE passthrough needs CAP_SYS_ADMIN, which this process does not have."
    return None


def _switched_off() -> bool:
    return os.environ.get(ENVIRONMENT) == "off"


def _effective_capabilities() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
