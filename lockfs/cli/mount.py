"""mount.lockfs: the program that mount(8) runs for ``mount -t lockfs``.

Its calling form and exit codes are those that mount(8) gives every helper.  It returns only when the mount
serves.  It starts fast: it imports neither trio nor pyfuse3.
"""

from __future__ import annotations

import fcntl
import getopt
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from lockfs import __version__, config
from lockfs.cli import option_help, preflight, spawn
from lockfs.errors import EXIT_INTERRUPTED, EXIT_OK, LockfsError, MountError, UsageError
from lockfs.linux.libc import failed, libc
from lockfs.options import MountOptions, is_remount, join, parse
from lockfs.protocol import start

PROGRAM = "mount.lockfs"
USAGE = f"""\
Usage: {PROGRAM} SOURCE MOUNTPOINT [-sfnvh] [-N NAMESPACE] [-o OPTIONS] [-t TYPE] [-r|-w]

Mounts the directory SOURCE on the directory MOUNTPOINT, which may be the same, so that each file in it can be
written by one owner at a time on all hosts that do so.  Usually called as: mount -t lockfs SOURCE MOUNTPOINT

  -f              check the options and do nothing else
  -h, --help      show this help
  -n              accepted for mount(8), does nothing
  -N NAMESPACE    mount in this mount namespace: a process id or a file
  -o OPTIONS      options separated by commas, see below; mount flags such as ro, noexec, noatime
  -r, -w          the same as -o ro, -o rw
  -s              skip options that are not known
  -t TYPE         lockfs or fuse.lockfs
  -v              say what is done
  --version       show the version
"""
SEE_HELP = f"{PROGRAM} --help shows how."
TYPES = ("lockfs", "fuse.lockfs", "fuse")
DEFAULT_FLAGS = ("nosuid", "nodev")
CLONE_NEWNS = 0x20000


@dataclass(slots=True)
class Call:
    """A command line, taken apart."""

    operands: list[str]
    options: list[str] = field(default_factory=list)
    namespace: str = ""
    fake: bool = False
    sloppy: bool = False
    verbose: bool = False
    show: str = ""

    @property
    def text(self) -> str:
        """The whole ``-o`` string."""
        return ",".join(self.options)

    def parsed(self) -> MountOptions:
        """Return the options, with this host's defaults for those that are not given.  Raises `UsageError`."""
        return parse(self.text, sloppy=self.sloppy, defaults=config.load(config.path()))

    def say(self, message: str) -> None:
        """Tell what is done, if that was asked for."""
        if self.verbose:
            print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def main() -> int:
    """Mount as the command line says, and return the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return run(sys.argv[1:])
    except LockfsError as error:
        print(f"{PROGRAM}: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing is mounted", file=sys.stderr)
        return EXIT_INTERRUPTED


def run(arguments: Sequence[str]) -> int:
    """Do what *arguments* say.  Raises `LockfsError`."""
    call = take_apart(arguments)
    if call.show:
        print(call.show, end="")
        return EXIT_OK
    if len(call.operands) != 2:
        raise UsageError("give a source and a mountpoint", hint=SEE_HELP)
    if call.fake:
        call.parsed()
        return EXIT_OK
    if os.geteuid() != 0:
        hint = "Use sudo; the options user and users in /etc/fstab do not change this."
        raise UsageError("only root can mount lockfs", hint=hint)
    if call.namespace:
        enter(call.namespace)
    if is_remount(call.text):
        _remount(call)
    else:
        _mount(call)
    return EXIT_OK


def take_apart(arguments: Sequence[str]) -> Call:
    """Take a command line apart: options may come before and after the operands.  Raises `UsageError`."""
    try:
        words, operands = getopt.gnu_getopt(list(arguments), "sfnvhrwVN:o:t:", ["help", "version"])
    except getopt.GetoptError as error:
        raise UsageError(str(error), hint=SEE_HELP) from None
    call = Call(operands)
    for name, value in words:
        match name:
            case "-s":
                call.sloppy = True
            case "-f":
                call.fake = True
            case "-v":
                call.verbose = True
            case "-r":
                call.options.append("ro")
            case "-w":
                call.options.append("rw")
            case "-o":
                call.options.append(value)
            case "-N":
                call.namespace = value
            case "-t" if value not in TYPES:
                raise UsageError(f"this program mounts lockfs, not {value}", hint=SEE_HELP)
            case "-h" | "--help":
                call.show = f"{USAGE}\n{option_help.text(option_help.tables())}"
            case "-V" | "--version":
                call.show = f"{PROGRAM} {__version__}\n"
    return call


def enter(namespace: str) -> None:
    """Enter a mount namespace, named by a process id or a file.  Raises `MountError`."""
    path = f"/proc/{namespace}/ns/mnt" if namespace.isdecimal() else namespace
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, CLONE_NEWNS) < 0:
                raise failed(os.fsencode(path))
        finally:
            os.close(fd)
    except OSError as error:
        raise MountError(f"the mount namespace '{path}' cannot be entered: {error.strerror}") from error
    if not (os.path.exists(sys.executable) and os.path.exists(__file__)):
        raise MountError(
            f"lockfs is not installed in the mount namespace '{path}'",
            hint=f"The mount daemon runs there, and there is no {sys.executable} with lockfs.",
        )


def _mount(call: Call) -> None:
    options = call.parsed()
    typed, mountpoint = (os.fsencode(each) for each in call.operands)
    # As typed, since mount -a looks for it; but a relative path means nothing to anyone later.
    fsname = typed if typed.startswith(b"/") else os.path.abspath(typed)
    source = preflight.look(typed, "source")
    with alone(preflight.look(mountpoint, "mountpoint").path):
        target = preflight.look(mountpoint, "mountpoint")  # as it is now, after another helper may have mounted
        preflight.check(source, target, fsname)
        _start(call, options, source, target, fsname)


def _start(call: Call, options: MountOptions, source: preflight.Place, target: preflight.Place, fsname: bytes) -> None:
    run_dir = start.run_dir()
    call.say(f"mounting {source.shown} on {target.shown}, backend {options.values['backend']}")
    request = spawn.Request(
        source=source.path,
        mountpoint=target.path,
        fsname=fsname,
        flags=[*DEFAULT_FLAGS, *options.flags],
        options=join(options.text),
        data=kernel_data(options.kernel),
    )
    spawn.mount_and_wait(request, run_dir, call.say)
    call.say(f"{target.shown} is mounted")


@contextmanager
def alone(mountpoint: bytes) -> Iterator[None]:
    """Keep other mount helpers off a mountpoint: two that both found it free would mount one over the other."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Where the mountpoint's filesystem has no locks, nobody has to wait: nobody mounts there twice by chance.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def kernel_data(labels: Mapping[str, str]) -> str:
    """Return SELinux labels as mount(2) takes them; one with commas, which categories have, is quoted."""
    return ",".join(f'{name}="{value}"' for name, value in labels.items())


def _remount(call: Call) -> None:
    # Here and not above: see `lockfs.cli.remount`.
    from lockfs.cli.remount import remount

    target = preflight.look(os.fsencode(call.operands[1]), "mountpoint")
    remount(target, call.text, start.run_dir(), sloppy=call.sloppy)
    call.say(f"{target.shown} is remounted")


if __name__ == "__main__":
    sys.exit(main())
