"""What lockd has a mount daemon do."""

from __future__ import annotations

import msgspec


class Orders(msgspec.Struct, frozen=True):
    """The mount daemon asks for what it has to do, for as long as it lives."""

    mount_id: str


class FencedImage(msgspec.Struct, frozen=True):
    """An image that lockd fences, with the numbers by which the kernel knows it on the mount."""

    dev: int
    ino: int
    nodes: list[int]


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the mount daemon has to do at once, and then to answer with `Obeyed`: to ``fence`` images, or nothing but to
    answer (``ping``).

    The first one of the stream, ``listening``, needs no answer: what is sent after it arrives.
    """

    serial: int
    kind: str
    images: list[FencedImage] = []
    reason: str = ""


class Obeyed(msgspec.Struct, frozen=True):
    """The order with this serial number is carried out."""

    mount_id: str
    serial: int
