"""The main job with real programs: qemu-io holds an image on one host, and every other writer on either is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount
from t8_system.qemu import QemuIo, VirtualMachine, run

SIZE = 16 << 20
FORMATS = ("raw", "qcow2")


BACKENDS = ("fcntl-lockd", "paxos-lease")
on_each_backend = pytest.mark.parametrize("mounts", BACKENDS, indirect=True)


@pytest.fixture
def mounts(request: pytest.FixtureRequest, host: Host, host_b: Host, storage: Path, tmp_path: Path) -> tuple[Mount, Mount]:
    options = f"backend={getattr(request, 'param', BACKENDS[0])},wait=0"
    return host.mount(storage, tmp_path / "a", options), host_b.mount(storage, tmp_path / "b", options)


@pytest.fixture(params=FORMATS)
def image(request: pytest.FixtureRequest, mounts: tuple[Mount, Mount]) -> Iterator[tuple[str, str]]:
    name = f"disk.{request.param}"
    done = run("qemu-img", "create", "-f", request.param, mounts[0] / name, str(SIZE))
    assert done.returncode == 0, done.stderr
    return name, request.param


@on_each_backend
def test_every_other_writer_is_refused_and_readers_are_not(
    mounts: tuple[Mount, Mount], image: tuple[str, str], storage: Path, tmp_path: Path
) -> None:
    name, kind = image
    (storage / "other").write_bytes(b"x" * 100)
    with QemuIo(mounts[0] / name, kind) as holder:
        digest = hashlib.md5((storage / name).read_bytes()).hexdigest()
        for mount in mounts:
            path = mount / name
            writers: list[list[str | Path]] = [
                ["qemu-img", "resize", "-f", kind, path, "+1M"],
                ["qemu-io", "-f", kind, "-c", "write 0 64k", path],
                ["dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=1", "conv=notrunc"],
                ["dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=1"],
                ["truncate", "-s", "0", path],
                ["rm", "-f", path],
                ["mv", path, mount / "elsewhere"],
                ["mv", "-f", mount / "other", path],
                ["sh", "-c", f"echo x >> {path}"],
                ["cp", mount / "other", path],
                ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-machine", "q35", "-m", "32",
                 "-drive", f"file={path},format={kind},if=none,id=d", "-device", "virtio-blk-pci,drive=d"],
            ]  # fmt: skip
            for command in writers:
                done = run(*command)
                assert done.returncode != 0, command
                assert "Device or resource busy" in done.stderr, (command, done.stderr)
            holders = json.loads(os.getxattr(path, "user.lockfs.holder"))["holders"]
            assert [(each["host"], each["pid"], each["command"]) for each in holders] == [
                ("host-a", holder.process.pid, "qemu-io")
            ]
            assert f"process {holder.process.pid} (qemu-io)" in mount.host.log()
            told = mount.host.run("lockfs", "who", path)
            assert "host-a" in told.stdout and str(holder.process.pid) in told.stdout
            info = run("qemu-img", "info", "-U", path)
            assert info.returncode == 0, info.stderr
            copy = tmp_path / f"copy-{mount.host.name}"
            assert run("cp", path, copy).returncode == 0
            assert run("md5sum", path).stdout.split()[0] == digest
            assert hashlib.md5(copy.read_bytes()).hexdigest() == digest
        holder.do("write -P 66 64k 64k")
        holder.do("read -P 65 0 64k")


@on_each_backend
def test_the_other_host_gets_the_image_when_the_holder_exits(
    mounts: tuple[Mount, Mount], image: tuple[str, str], record_property
) -> None:
    name, kind = image
    with Actor() as next_one:
        with QemuIo(mounts[0] / name, kind) as holder:
            assert next_one.result("open", mounts[1] / name, os.O_RDWR) == "EBUSY"
            holder.quit()
            left = time.monotonic()
        while next_one.result("open", mounts[1] / name, os.O_RDWR) != "ok":
            assert time.monotonic() < left + 10
        record_property("handover_ms", round((time.monotonic() - left) * 1000, 1))
    done = run("qemu-io", "-f", kind, "-c", "read -P 65 0 64k", mounts[1] / name)
    assert done.returncode == 0 and "verification failed" not in done.stdout, done.stdout


def test_tools_leave_the_same_bytes_as_on_the_storage(mounts: tuple[Mount, Mount], storage: Path, tmp_path: Path) -> None:
    """A chain of qemu-img commands gives the same result on the mount and beside it."""
    plain = tmp_path / "plain"
    plain.mkdir()
    steps = [
        ["qemu-img", "create", "-q", "-f", "qcow2", "base", "8M"],
        ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 64k", "base"],
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"],
        ["qemu-io", "-f", "qcow2", "-c", "write -P 3 512k 64k", "-c", "discard 3M 64k", "-c", "write -z 1M 1M", "top"],
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "top", "flat"],
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "flat", "again"],
        ["qemu-img", "resize", "-q", "-f", "raw", "flat", "12M"],
        ["qemu-img", "commit", "-q", "-f", "qcow2", "top"],
        ["qemu-img", "snapshot", "-c", "one", "base"],
        ["qemu-img", "rebase", "-q", "-f", "qcow2", "-u", "-b", "", "top"],
        ["qemu-img", "check", "-q", "base"],
    ]
    for directory in (plain, mounts[0].path):
        for step in steps:
            done = subprocess.run(step, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, (step, done.stderr)
    for name in ("flat", "again"):
        assert (plain / name).read_bytes() == (storage / name).read_bytes()
        assert (mounts[1] / name).read_bytes() == (storage / name).read_bytes()
    for name in ("base", "top"):
        done = run("qemu-img", "compare", plain / name, storage / name)
        assert done.returncode == 0, done.stdout


SPACE = [
    "fallocate -l 4M allocated",
    "fallocate -p -o 1M -l 1M allocated",
    "fallocate -z -o 2500k -l 100k allocated",
    "dd if=/dev/zero of=dug bs=64k count=32 status=none",
    "fallocate -d dug",
    "qemu-img create -q -f raw empty 16M",
    "qemu-img create -q -f raw -o preallocation=falloc falloc 4M",
    "qemu-img create -q -f raw -o preallocation=full full 4M",
    "qemu-img create -q -f qcow2 -o preallocation=falloc falloc.qcow2 4M",
    "qemu-img create -q -f qcow2 base.qcow2 16M",
    "qemu-io -f qcow2 -c 'write -P 1 0 3M' -c 'write -P 2 8M 1M' -c 'discard 1M 1M' -c 'write -z 2M 512k' base.qcow2",
    "qemu-io -f raw -c 'write -P 3 1M 2M' -c 'discard 1M 256k' -c 'write -z -u 2M 256k' -c 'write -z 2560k 64k' falloc",
    "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    "qemu-io -f qcow2 -c 'write -P 4 4M 1M' top.qcow2",
    "qemu-img convert -f qcow2 -O raw top.qcow2 flat",
    "qemu-img convert -f raw -O qcow2 flat again.qcow2",
    "qemu-img convert -f raw -O raw -W flat unordered",
    "qemu-img convert -n -C -f qcow2 -O raw base.qcow2 empty",
    "cp --sparse=always full always",
    "cp --sparse=auto flat auto",
    "cp --sparse=never dug never",
    "qemu-img resize -q -f raw falloc 6M",
    "qemu-img resize -q --shrink -f raw full 2M",
    "qemu-img rebase -q -u -f qcow2 -b '' top.qcow2",
    "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 change.qcow2",
    "qemu-io -f qcow2 -c 'write -P 5 5M 1M' -c 'write -z 8M 512k' change.qcow2",
    "qemu-img commit -q -f qcow2 change.qcow2",
]
"""Commands that allocate, free, copy and skip."""


def space(directory: Path, names: list[str]) -> dict[str, object]:
    """What files are made of: what qemu-img says of their holes, their blocks and their bytes.

    The holes first: to read allocated blocks that were never written makes them data, as long as they are cached.
    """
    found: dict[str, object] = {}
    for name in names:
        kind = "qcow2" if name.endswith(".qcow2") else "raw"
        done = run("qemu-img", "map", "-f", kind, "--output=json", directory / name)
        assert done.returncode == 0, done.stderr
        found[f"{name}: map"] = json.loads(done.stdout)
    for name in names:
        status = (directory / name).stat()
        found[f"{name}: size"], found[f"{name}: blocks"] = status.st_size, status.st_blocks
    for name in names:
        found[f"{name}: bytes"] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("data", ["passthrough", "gated"])
def test_space_is_used_as_on_the_storage(host: Host, storage: Path, tmp_path: Path, data: str) -> None:
    """Bytes, blocks and holes are the same after commands on the mount and on the same kind of storage beside it."""
    plain = tmp_path / "plain"
    plain.mkdir()
    mount = host.mount(storage, tmp_path / "mnt", f"data={data}")
    for directory in (plain, mount.path):
        for command in SPACE:
            done = subprocess.run(command, shell=True, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, (command, done.stderr)
    os.sync()
    names = sorted(each.name for each in plain.iterdir())
    assert names == sorted(each.name for each in storage.iterdir() if each.name != ".lockfs")
    assert len(names) >= 12
    expected = space(plain, names)
    on_mount, on_storage = space(mount.path, names), space(storage, names)
    assert {key: value for key, value in on_mount.items() if not same(key, expected[key], value)} == {}
    # Its holes are not looked at once more: by now what was read on the mount is cached.
    for key in [key for key in expected if "map" not in key]:
        assert on_mount[key] == on_storage[key], key


def same(key: str, one: object, other: object) -> bool:
    """Say whether it is the same; where a file lies in more pieces than another, one more block has to list them."""
    if "blocks" in key and isinstance(one, int) and isinstance(other, int):
        return abs(one - other) <= 8
    return one == other


@pytest.mark.parametrize(
    ("backend", "cache"), [(BACKENDS[0], "none"), (BACKENDS[0], "writeback"), (BACKENDS[1], "none")]
)
def test_migration_hands_the_image_over(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, backend: str, cache: str
) -> None:
    """A live migration of unmodified QEMU, with the disk as libvirt configures it: the target waits for the source."""
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    assert run("qemu-img", "create", "-q", "-f", "raw", storage / "vm", "8M").returncode == 0
    hosts = [host, host_b]
    again = [each.mount(storage, tmp_path / f"vm-{each.name}", f"backend={backend}") for each in hosts]
    with VirtualMachine(again[0] / "vm", sockets / "a", cache) as source:
        assert holder_of(again[1] / "vm") == "host-a"
        incoming = f"unix:{sockets / 'migration'}"
        with VirtualMachine(again[1] / "vm", sockets / "b", cache, "-incoming", incoming) as target:
            source.qmp("migrate", uri=incoming)
            deadline = time.monotonic() + 60
            while target.qmp("query-status")["status"] != "running":
                assert time.monotonic() < deadline, (source.qmp("query-migrate"), hosts[1].log())
                time.sleep(0.05)
            assert holder_of(again[0] / "vm") == "host-b"
            with Actor() as other:
                assert other.result("open", again[0] / "vm", os.O_RDWR) == "EBUSY"


def holder_of(path: Path) -> str:
    holders = json.loads(os.getxattr(path, "user.lockfs.holder"))["holders"]
    assert len(holders) <= 1
    return holders[0]["host"] if holders else ""
