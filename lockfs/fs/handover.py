"""What a mount daemon tells a lockd that was started anew: all that it holds, in messages of limited size.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockfs.protocol import messages
from lockfs.protocol.messages import HeldImage
from lockfs.protocol.wire import MAX_FDS

AT_ONCE = 200
"""Images of one message of a hand-over: far below its limit of bytes, with names of usual lengths."""


@dataclass(frozen=True, slots=True)
class Held:
    """One image that the guard holds, with the descriptors that its lock lives in, which stay the guard's."""

    image: messages.Image
    holds: list[messages.HeldBy]
    lock_fd: int
    keep_fds: Sequence[int]
    lost: bool
    token: int | None = None


def in_messages(held: Sequence[Held]) -> list[tuple[list[HeldImage], list[int]]]:
    """Return messages of a hand-over, each with its descriptors; at least one."""
    parts: list[tuple[list[HeldImage], list[int]]] = [([], [])]
    for each in held:
        more = [*([each.lock_fd] if each.lock_fd >= 0 else []), *each.keep_fds]
        images, fds = parts[-1]
        if len(images) >= AT_ONCE or len(fds) + len(more) > MAX_FDS:
            images, fds = [], []
            parts.append((images, fds))
        at = len(fds)
        keep_at = at + (each.lock_fd >= 0)
        keep = list(range(keep_at, keep_at + len(each.keep_fds)))
        images.append(HeldImage(each.image, each.holds, at if each.lock_fd >= 0 else -1, keep, each.lost, each.token))
        fds += more
    return parts
