"""The pairs of directories that the parity cases run in, made once.

The environment variable ``LOCKFS_PARITY`` puts something else in the place of the mount: ``plain`` (then nothing may
differ: this tests the suite) or ``bindfs``.  ``LOCKFS_PARITY_OPTIONS`` are mount options to test with, as ``backend=nop``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from harness import logs, mounts
from harness.host import Host, close_all
from t7_parity.twins import Pair

TARGET = os.environ.get("LOCKFS_PARITY", "lockfs")
OPTIONS = ",".join(["suid,dev", *os.environ.get("LOCKFS_PARITY_OPTIONS", "").split()])
"""Or the mount would be nosuid and nodev, unlike its plain twin."""
SMALL_BYTES = 8 << 20

Shower = Callable[[Path, Path], AbstractContextManager[None]]


@contextmanager
def mounted(*command: str | Path) -> Iterator[None]:
    """Mount something with a command whose last argument is the mountpoint."""
    Path(command[-1]).mkdir(exist_ok=True)
    subprocess.run(command, check=True, timeout=60)
    try:
        yield
    finally:
        if problem := mounts.umount(Path(command[-1])):
            mounts.umount(Path(command[-1]), lazy=True)
            pytest.fail(problem, pytrace=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all pairs."""
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shower]:
    """Show a directory at another place: ``with show(source, view)``."""
    host = Host("parity", tmp_path_factory.mktemp("h"))

    @contextmanager
    def shown(source: Path, view: Path) -> Iterator[None]:
        if TARGET == "plain":
            with mounted("mount", "--bind", source, view):
                yield
        elif TARGET == "bindfs":
            with mounted("bindfs", "-o", f"{OPTIONS},allow_other", source, view):
                yield
        else:
            mount = host.mount(source, view, OPTIONS)
            yield
            mount.umount()

    yield shown
    if complaints := close_all([host], logs.Expected()):
        pytest.fail("\n".join(complaints), pytrace=False)


@contextmanager
def pair_in(top: Path, view: Path, show: Shower, writable: Path | None = None) -> Iterator[Pair]:
    """Make a pair of directories in *top*; where that is read-only, *writable* is the same place for writing."""
    backing = writable or top
    for name in ("plain", "source"):
        (backing / name).mkdir(parents=True)
    with show(top / "source", view):
        yield Pair(top / "plain", view, top / "source", backing / "plain", backing / "source")


@contextmanager
def small_filesystem(image: Path, place: Path) -> Iterator[None]:
    """Mount a small filesystem of its own, which a case may fill."""
    with open(image, "wb") as file:
        file.truncate(SMALL_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-N", "512", image], check=True, timeout=60)
    with mounted("mount", "-o", "loop", image, place):
        yield


@pytest.fixture(scope="module")
def pairs(base: Path, show: Shower) -> Iterator[dict[str, Pair]]:
    """The pairs by name: ``disk`` is the usual one, ``small`` can be filled, ``readonly`` shows what is read-only."""
    writable = base / "writable"
    writable.mkdir()
    with ExitStack() as stack:
        stack.enter_context(small_filesystem(base / "small.img", base / "small"))
        stack.enter_context(mounted("mount", "--bind", "-o", "ro", writable, base / "readonly"))
        yield {
            "disk": stack.enter_context(pair_in(base / "disk", base / "disk-view", show)),
            "small": stack.enter_context(pair_in(base / "small", base / "small-view", show)),
            "readonly": stack.enter_context(pair_in(base / "readonly", base / "readonly-view", show, writable)),
        }
