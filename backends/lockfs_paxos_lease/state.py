"""What a lockd writes down in its run directory so that its successor can go on with the same host id and generation.

The run directory lies in memory: what it says is gone with the boot that it is about.  A file that is damaged, or of
another boot, says nothing; then the host begins a new incarnation, which costs time but never a lock.
"""

from __future__ import annotations

import os

import msgspec

from lockfs.linux import ofd

PLACE = "paxos-lease"
VERSION = 1


class State(msgspec.Struct, frozen=True):
    """This host's incarnation in a lockspace, and when it was last renewed (`renewed`, CLOCK_BOOTTIME)."""

    space: str
    boot: str
    host_id: int
    generation: int
    name: bytes
    renewed: float
    version: int = VERSION


_decoder = msgspec.json.Decoder(State)


class StateFile:
    """The file about lockspace *space*.  All methods do I/O in memory, and raise OSError."""

    def __init__(self, run_dir: str, space: bytes) -> None:
        self._directory = os.path.join(run_dir, PLACE)
        self._path = os.path.join(self._directory, f"{space.hex()}.json")
        self._held = os.path.join(self._directory, f"{space.hex()}.held")
        self._space = space.hex()
        self._lock = -1

    def lock(self) -> bool:
        """Be the only one to use this host id on this host.  Return False if another process does.

        The lock ends when the process is wholly gone, with all its threads: a call that hangs in the storage keeps it.
        """
        os.makedirs(self._held, mode=0o700, exist_ok=True)
        fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            locked = ofd.lock(fd, exclusive=True, start=0, length=1)
        except BaseException:
            os.close(fd)
            raise
        if locked:
            self._lock = fd
        else:
            os.close(fd)
        return locked

    def unlock(self) -> None:
        """Let another one use it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def load(self, boot: str) -> State | None:
        """Return what the last one wrote down in this boot; None if that is nothing, or makes no sense."""
        try:
            with open(self._path, "rb") as file:
                state = _decoder.decode(file.read())
        except (FileNotFoundError, ValueError):
            return None
        good = (state.version, state.space, state.boot) == (VERSION, self._space, boot)
        return state if good and state.host_id > 0 and state.generation > 0 else None

    def save(self, boot: str, host_id: int, generation: int, name: bytes, renewed: float) -> None:
        """Write it down, in one step."""
        state = State(self._space, boot, host_id, generation, name, renewed)
        temporary = f"{self._path}.new"
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(state))
        os.rename(temporary, self._path)

    def note(self, lease: str, image: tuple[int, int]) -> None:
        """Write down that a lease is about to be taken, and for which image (device and inode number).

        *lease* is a name that can be one of a file.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(os.path.join(self._held, lease), flags, 0o600)
        try:
            os.write(fd, b"%d %d" % image)
        finally:
            os.close(fd)

    def names(self) -> dict[tuple[int, int], str]:
        """Return the leases that are written down, by their images.

        Without those of which that is not readable, and images that have two: one of them could not be given back.
        """
        found: dict[tuple[int, int], str] = {}
        twice = set()
        for lease in self.held():
            with open(os.path.join(self._held, lease), "rb") as file:
                numbers = file.read(64).split()
            if len(numbers) == 2 and all(each.isdigit() for each in numbers):
                image = int(numbers[0]), int(numbers[1])
                if image in found:
                    twice.add(image)
                found[image] = lease
        return {image: lease for image, lease in found.items() if image not in twice}

    def drop(self, lease: str) -> None:
        """Write down that a lease was given back."""
        try:
            os.unlink(os.path.join(self._held, lease))
        except FileNotFoundError:
            pass

    def held(self) -> set[str]:
        """Return the leases that are written down: while there is any, somebody may still write who goes by it."""
        return set(os.listdir(self._held))

    def forget(self) -> None:
        """Have nothing written down: the host id was given back."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass
