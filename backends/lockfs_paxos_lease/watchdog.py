"""A watchdog that resets the host before others may have what somebody here could still write to.

It is for what no program can promise: that lockd lives, and that every fence succeeds.  The device is armed before the
first lease is taken, with a time-out somewhat shorter than that after which other hosts take leases over, and is fed

* when this host's own lease was renewed, and
* at any time, while nothing is held but by grants that are lost and fenced, and nothing that was written under these
  is in the host's memory any more.

It is disarmed when that is so and nothing is held; one that was told to know no way out is fed then, too.  A lockd that
dies leaves it armed, and its successor feeds it on, or the host is reset in time.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
from typing import Protocol

from lockfs.errors import MountError
from lockfs_paxos_lease.engine.timing import Timing

_SET_TIMEOUT = 0xC0045706
"""ioctl WDIOC_SETTIMEOUT of Linux: _IOWR('W', 6, int)."""
_DISARM = b"V"
_FEED = b"\0"
FRESH = 0.5
"""Seconds: a renewal that took longer says too little of how long the lease still is."""
SLACK = 1.0
"""Seconds for the reset itself, and between a renewal and the feeding for it."""


class Device(Protocol):
    """What is asked of a watchdog.  Methods raise OSError."""

    def arm(self, timeout: int) -> None:
        """Have the host reset if it is not fed for *timeout* seconds."""

    def feed(self) -> None:
        """Start its time anew."""

    def disarm(self) -> bool:
        """Have no reset any more.  Return False if it goes on, and must be fed."""


class LinuxWatchdog:
    """A watchdog device of Linux (Documentation/watchdog/watchdog-api.rst)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def arm(self, timeout: int) -> None:
        """Open the device, which arms it."""
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        value = array.array("i", [timeout])
        fcntl.ioctl(self._fd, _SET_TIMEOUT, value, True)
        if value[0] > timeout:
            self.disarm()
            raise OSError(errno.EINVAL, f"its time-out is {value[0]} s at least, and {timeout} s are needed")
        self.feed()

    def feed(self) -> None:
        """Start its time anew."""
        os.write(self._fd, _FEED)

    def disarm(self) -> bool:
        """Close the device in the way that says that this is meant."""
        fd, self._fd = self._fd, -1
        try:
            os.write(fd, _DISARM)
        finally:
            os.close(fd)
        nowayout = f"/sys/class/watchdog/{os.path.basename(self._path)}/nowayout"
        try:
            with open(nowayout, encoding="ascii") as file:
                forced = file.read().strip() == "1"
        except (OSError, ValueError):
            forced = False
        if forced:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        return not forced


class Watchdog:
    """A watchdog and whether it is armed.  The calls are short, and go to a device, not to the storage."""

    def __init__(self, device: Device, timing: Timing) -> None:
        self._device = device
        self._timeout = int(timing.dead_after(timing.stored) - SLACK)
        self.armed = False
        if self._timeout < 1:
            raise MountError("with watchdog=, takeover= must be 3 seconds at least")

    def arm(self) -> None:
        """Arm it, if it is not.  Raises OSError."""
        if not self.armed:
            self._device.arm(self._timeout)
            self.armed = True

    def renewed(self, age: float) -> None:
        """This host's lease was renewed *age* seconds ago.  Raises OSError."""
        if self.armed and age <= FRESH:
            self._device.feed()

    def look(self, *, holding: bool, at_stake: bool) -> None:
        """Feed or disarm it where that is safe.

        *holding*: there are grants; *at_stake*: some of them are not both lost and fenced, or something that was
        written under a lost one is not on the storage yet.  Raises OSError.
        """
        if not self.armed:
            return
        if not at_stake:
            self._device.feed()
        if not holding and not at_stake:
            self.armed = not self._device.disarm()


def on(path: str, timing: Timing) -> Watchdog | None:
    """Return the watchdog that is named by the option; None for none.  Raises `MountError`."""
    if not path:
        return None
    try:
        good = stat.S_ISCHR(os.stat(path).st_mode)
    except OSError as error:
        raise MountError(f"cannot use the watchdog {path}: {error.strerror}") from error
    if not good:
        raise MountError(f"{path} is no watchdog: it is not a character device")
    return Watchdog(LinuxWatchdog(path), timing)
