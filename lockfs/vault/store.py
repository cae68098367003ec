"""What the vault keeps: descriptors by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lockfs.linux.closer import Closer
from lockfs.vault import wire
from lockfs.vault.wire import Item


class Store:
    """See the module.  What is not kept any more is closed by threads, one for each mount and each storage."""

    def __init__(self) -> None:
        self._kept: dict[str, Sequence[int]] = {}
        self._closers: dict[str, Closer] = {}

    @property
    def mounts(self) -> bool:
        """Say whether anything is kept of a mount."""
        return any(key.startswith("mount/") for key in self._kept)

    def put(self, key: str, fds: Sequence[int]) -> None:
        """Keep descriptors, which are the store's from here on."""
        self.drop(key)
        self._kept[key] = fds

    def drop(self, key: str) -> None:
        """Close what is kept under a key, the first one first."""
        if (fds := self._kept.pop(key, None)) is not None:
            self._closers.setdefault(wire.group(key), Closer(key)).close(fds)

    def forget(self, mount_id: str) -> None:
        """Close all that is kept of a mount, its connection first."""
        self.drop(wire.mount_key(mount_id))
        self.drop(wire.whole_key(mount_id))
        for key in [key for key in self._kept if key.startswith(f"nameless/{mount_id}/")]:
            self.drop(key)
        self._closers.pop(mount_id, None)

    def messages(self) -> Iterator[tuple[bytes, list[int]]]:
        """Yield messages that say all that is kept, each with its descriptors, which stay the store's."""
        items, fds, size = list[Item](), list[int](), 0
        for key, kept in self._kept.items():
            if len(fds) + len(kept) > wire.MAX_FDS or size > wire.MAX_BYTES // 2:
                yield wire.encode(items), fds
                items, fds, size = [], [], 0
            items.append(Item(wire.KEPT, len(kept), key))
            fds += kept
            size += len(key) + 16
        if items:
            yield wire.encode(items), fds
