"""A virtual machine that writes to its disk and reads it back, while mount daemon and lockd are killed, in turn."""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import processes
from harness.actor import Actor
from harness.host import Host
from harness.waiting import wait_until
from t6_survival.successors import PATIENCE, kill, kill_lockd

SOURCE = Path(__file__).parent / "guest.s"
SIZE = 4 << 20
FIRST, SECTORS, SECTOR = 64, 1024, 512
ROUNDS = int(os.environ.get("LOCKFS_ROUNDS", "4"))
"""Kills, every second one of lockd."""


@pytest.fixture
def boot_sector(tmp_path: Path) -> bytes:
    linked = tmp_path / "guest"
    subprocess.run(["as", "--32", "-o", f"{linked}.o", SOURCE], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", linked, f"{linked}.o"], check=True)
    return linked.read_bytes()


class Guest:
    """The virtual machine.  What it says goes to a file."""

    def __init__(self, image: Path, cache: str, said: Path) -> None:
        self.said = said
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-no-reboot",
                "-drive", f"file={image},format=raw,if=virtio,cache={cache}", "-serial", f"file:{said}",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def progress(self) -> int:
        assert self.process.poll() is None, self.process.stdout and self.process.stdout.read()
        said = self.said.read_bytes() if self.said.exists() else b""
        assert b"E" not in said
        return said.count(b"P")

    def goes_on(self) -> None:
        before = self.progress()
        wait_until(lambda: self.progress() > before + 1, PATIENCE, "the guest to go on")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(20)
        if self.process.stdout:
            self.process.stdout.close()


@pytest.fixture
def patient(make_host: Callable[..., Host]) -> Host:
    return make_host("host-a", LOCKFS_RESTARTS="1000000")


@pytest.mark.timeout(60 + 5 * ROUNDS)
@pytest.mark.parametrize(("data", "cache"), [("gated", "writethrough"), ("passthrough", "none")])
def test_a_guest_notices_nothing(
    patient: Host, host_b: Host, storage: Path, tmp_path: Path, boot_sector: bytes, data: str, cache: str
) -> None:
    image = storage / "vm.img"
    image.write_bytes(boot_sector + bytes(SIZE - len(boot_sector)))
    mount, other = patient.mount(storage, tmp_path / "mnt", f"data={data}"), host_b.mount(storage, tmp_path / "other", "wait=0")
    guest = Guest(mount / "vm.img", cache, tmp_path / "said")
    taken: tuple[list[float], list[float]] = ([], [])
    try:
        wait_until(lambda: guest.progress() > 0, PATIENCE, "the guest to begin")
        with Actor() as asker:
            for number in range(ROUNDS):
                begin = time.monotonic()
                (kill_lockd if number % 2 else kill)(mount)
                taken[number % 2].append(time.monotonic() - begin)
                assert asker.result("open", other / "vm.img", os.O_RDWR) == "EBUSY"
                guest.goes_on()
                time.sleep(0.1)
        written = 16 * guest.progress()
    finally:
        guest.end()
    wait_until(lambda: not patient.locks(), PATIENCE, "the image to be free")
    content = image.read_bytes()
    for number in range(min(written, SECTORS)):
        sector = content[(FIRST + number) * SECTOR :][:SECTOR]
        (word,) = set(struct.unpack("<256H", sector)) or {0}
        assert word % SECTORS == number if word else number == 0
    print(f"{data}, cache={cache}: {written} sectors written and compared")
    for name, each in zip(("mount daemons", "lockds"), taken, strict=True):
        if each:
            print(f"{len(each)} {name} killed; the next one served after {statistics.median(each):.2f} s, at most {max(each):.2f} s")
    assert not processes.running(guest.process.pid)
