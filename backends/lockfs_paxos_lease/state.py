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
    """This host's incarnation in a lockspace.

    `holding` is true from before its first grant until after its last one was given back: then somebody may still
    write who goes by it.
    """

    space: str
    boot: str
    host_id: int
    generation: int
    name: bytes
    holding: bool
    version: int = VERSION


_decoder = msgspec.json.Decoder(State)


class StateFile:
    """The file about lockspace *space*.  All methods do I/O in memory, and raise OSError."""

    def __init__(self, run_dir: str, space: bytes) -> None:
        self._directory = os.path.join(run_dir, PLACE)
        self._path = os.path.join(self._directory, f"{space.hex()}.json")
        self._space = space.hex()
        self._lock = -1

    def lock(self) -> bool:
        """Be the only one to use this host id on this host.  Return False if another process does.

        The lock ends when the process is wholly gone, with all its threads: a call that hangs in the storage keeps it.
        """
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
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

    def save(self, boot: str, host_id: int, generation: int, name: bytes, *, holding: bool) -> None:
        """Write it down, in one step."""
        state = State(self._space, boot, host_id, generation, name, holding)
        temporary = f"{self._path}.new"
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(state))
        os.rename(temporary, self._path)

    def forget(self) -> None:
        """Have nothing written down: the host id was given back."""
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass
