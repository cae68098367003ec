"""The ways to an image that a fence has to stop, each tried by a process of its own on an image of its own.

The first try must work; the second, after the fence, says what the caller gets.  What it writes is told from what the
first one wrote.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from t2_linux.puppet import Puppet

SIZE = 1 << 20
BEFORE, AFTER = b"B", b"A"

HELPERS = r"""
import errno, mmap, fcntl, struct
PAGE = mmap.mmap(-1, 4096)
def outcome(work, *args):
    try: work(*args); return "ok"
    except OSError as error: return errno.errorcode[error.errno]
def page(mark):
    PAGE[:] = mark * 4096
    return PAGE
def fallocate(fd, offset, length):
    checked(libc.fallocate(fd, 0, ctypes.c_long(offset), ctypes.c_long(length)))
def copy_into(fd, mark):
    source = os.memfd_create("source"); os.write(source, mark * 4096); os.lseek(source, 0, 0)
    try: os.sendfile(fd, source, 0, 4096)
    finally: os.close(source)
def splice_into(fd, mark):
    out, into = os.pipe()
    try:
        os.write(into, mark * 4096)
        os.splice(out, fd, 4096, None, 0)
    finally: os.close(out); os.close(into)
SETUP, DESTROY, GETEVENTS, SUBMIT = (206, 207, 208, 209) if os.uname().machine == "x86_64" else (0, 1, 4, 2)
def submit(fd, mark):
    "One write by the kernel's own asynchronous I/O."
    context = ctypes.c_ulong(); checked(libc.syscall(SETUP, 1, ctypes.byref(context)))
    try:
        data = ctypes.addressof((ctypes.c_char * 4096).from_buffer(page(mark)))
        block = ctypes.create_string_buffer(struct.pack("QIiHhIQQqQII", 0, 0, 0, 1, 0, fd, data, 4096, 0, 0, 0, 0))
        checked(libc.syscall(SUBMIT, context, ctypes.c_long(1), (ctypes.c_void_p * 1)(ctypes.addressof(block))))
        events = ctypes.create_string_buffer(32)
        checked(libc.syscall(GETEVENTS, context, ctypes.c_long(1), ctypes.c_long(1), events, None))
        result = struct.unpack("QQqq", events.raw)[2]
        if result < 0: raise OSError(-result, os.strerror(-result))
    finally: libc.syscall(DESTROY, context)
class Again:
    "Does something again and again in a thread, whatever comes of it; `outcomes` counts what came."
    def __init__(self, work, *args):
        self.outcomes = {}; self.going = True
        threading.Thread(target=self.run, args=(work, *args), daemon=True).start()
    def run(self, work, *args):
        while self.going:
            what = outcome(work, *args)
            time.sleep(0.001)
            self.outcomes[what] = self.outcomes.get(what, 0) + 1
"""


@dataclass(frozen=True)
class Way:
    """`setup` and `act` are Python for a puppet that has `path`, `directory`, `fd` and `mark`.

    One that `needs_kernel_module` is refused by a mount without it.
    """

    name: str
    act: str
    setup: str = "fd = os.open(path, os.O_RDWR)"
    prefix: tuple[str, ...] = ()
    needs_kernel_module: bool = False


PLAIN = [
    Way("pwrite", "os.pwrite(fd, mark * 4096, 0)"),
    Way("pwrite to a descriptor that only writes", "os.pwrite(fd, mark, 5)", "fd = os.open(path, os.O_WRONLY)"),
    Way("synchronous pwrite", "os.pwrite(fd, mark, 5)", "fd = os.open(path, os.O_RDWR | os.O_DSYNC)"),
    Way("append", "os.write(fd, mark * 100)", "fd = os.open(path, os.O_WRONLY | os.O_APPEND)"),
    Way("O_DIRECT", "os.pwritev(fd, [page(mark)], 0)", "fd = os.open(path, os.O_RDWR | os.O_DIRECT)"),
    Way("pread", "os.pread(fd, 10, 0)"),
    Way("pread by a reader", "os.pread(fd, 10, 0)",
        "fd = os.open(path, os.O_RDONLY); writer = os.open(path, os.O_RDWR)"),
    Way("asynchronous write", "submit(fd, mark)"),
    Way("asynchronous direct write", "os.pwritev(fd, [page(b'-')], 4096); submit(fd, mark)",
        "fd = os.open(path, os.O_RDWR | os.O_DIRECT)"),
    Way("fsync", "os.fsync(fd)"),
    Way("ftruncate", "os.ftruncate(fd, 5000 if mark == b'B' else 100)"),
    Way("fallocate", "fallocate(fd, 0, 2 << 20 if mark == b'B' else 4 << 20)", needs_kernel_module=True),
    Way("lseek to a hole", "os.lseek(fd, 0, os.SEEK_HOLE)"),
    Way("copy_file_range", "os.pwrite(twin, mark * 9, 0); os.copy_file_range(twin, fd, 9, 0, 0)",
        "fd = os.open(path, os.O_RDWR); twin = os.open(directory + '/twin', os.O_RDWR | os.O_CREAT)"),
    Way("by a hard link", "os.pwrite(fd, mark, 0)", "os.link(path, path + '.link'); fd = os.open(path + '.link', os.O_RDWR)"),
    Way("renamed", "os.pwrite(fd, mark, 0)", "fd = os.open(path, os.O_RDWR); os.rename(path, path + '.renamed')"),
    Way("unlinked", "os.pwrite(fd, mark, 0)", "fd = os.open(path, os.O_RDWR); os.unlink(path)"),
    Way("by a dup in a child", "os.pwrite(fd, mark, 0)",
        "fd = os.dup(os.open(path, os.O_RDWR)); child = os.fork()\n"
        "if child == 0: libc.prctl(1, signal.SIGKILL); time.sleep(1000)"),
    Way("in another mount namespace", "os.pwrite(fd, mark, 0)", prefix=("unshare", "--mount")),
    Way("in another pid namespace", "os.pwrite(fd, mark, 0)", prefix=("unshare", "--pid", "--fork", "--kill-child")),
]  # fmt: skip
"""Who uses these gets an error, and lives."""

BUSY = [way for way in PLAIN if way.name in ("pwrite", "O_DIRECT", "asynchronous direct write")]
"""Those that are done again and again meanwhile."""

FORCED = [
    Way("mapped", "memory[0:1] = mark", "fd = os.open(path, os.O_RDWR); memory = mmap.mmap(fd, 4096)"),
    Way("mapped and closed", "ctypes.memmove(address, mark, 1)", "address = mapped(os.open(path, os.O_RDWR), RW, SHARED)"),
    Way("mapped for reading", "checked(libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), 3)); ctypes.memmove(address, mark, 1)",
        "address = mapped(os.open(path, os.O_RDWR), RO, SHARED)"),
]  # fmt: skip
"""Who has these is killed."""

SPLICED = [
    Way("splice", "splice_into(fd, mark)"),
    Way("sendfile", "copy_into(fd, mark)"),
]
"""Who does this is killed where data bypasses the daemon, and gets an error elsewhere."""


@dataclass
class Attempt:
    """One way, tried on one image of a mount."""

    way: Way
    directory: Path
    storage: Path
    puppet: Puppet = field(init=False)
    backing: int = -1

    def begin(self) -> None:
        """Make the image, open it, and see that the way is one."""
        (self.storage / self.name).write_bytes(bytes(SIZE))
        self.backing = os.open(self.storage / self.name, os.O_RDONLY)
        self.puppet = Puppet(*self.way.prefix)
        self.puppet.tell(HELPERS, path=str(self.directory / self.name), directory=str(self.directory), mark=BEFORE)
        self.puppet.tell(self.way.setup)
        assert self.act() == "ok"

    @property
    def name(self) -> str:
        return self.way.name.replace(" ", "-")

    def act(self) -> str:
        """Return "ok", or the name of the errno; "killed" if the process is gone."""
        try:
            return str(self.puppet.tell(f"outcome(exec, {self.way.act!r})"))
        except (BrokenPipeError, ValueError):
            return "killed"

    def act_after(self) -> str:
        try:
            self.puppet.tell("pass", mark=AFTER)
        except (BrokenPipeError, ValueError):
            return "killed"
        return self.act()

    def repeat(self) -> None:
        """Go on with it, in a thread."""
        self.puppet.tell(f"code = compile({self.way.act!r}, 'act', 'exec'); again = Again(exec, code)")

    def alive(self) -> bool:
        return self.puppet.process.poll() is None

    def content(self) -> tuple[int, bytes]:
        """Return size and beginning of the file on the storage, whatever its name."""
        return os.fstat(self.backing).st_size, os.pread(self.backing, 2 * SIZE, 0)

    def end(self) -> None:
        if hasattr(self, "puppet"):
            self.puppet.end()
        if self.backing >= 0:
            os.close(self.backing)


class Fio:
    """fio writing to an image by an engine, until it gets an error."""

    def __init__(self, path: Path, engine: str, *, direct: bool) -> None:
        self.process = subprocess.Popen(
            [
                "fio", "--name=job", f"--filename={path}", f"--ioengine={engine}", f"--direct={direct:d}", "--rw=randwrite",
                "--bs=4k", "--iodepth=16", f"--size={SIZE}", "--time_based", "--runtime=60", "--thread", "--norandommap",
                "--allow_file_create=0", "--invalidate=0", "--end_fsync=0", "--eta=never",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self) -> str:
        """Return what it has to say when it has ended."""
        said, _ = self.process.communicate(timeout=30)
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def wait_until_written(path: Path, seconds: float = 10) -> None:
    """Return when somebody has changed a file."""
    before = os.stat(path).st_mtime_ns
    deadline = time.monotonic() + seconds
    while os.stat(path).st_mtime_ns == before:
        assert time.monotonic() < deadline, f"nobody writes to {path}"
        time.sleep(0.005)
