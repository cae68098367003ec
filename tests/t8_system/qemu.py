"""QEMU's programs: tools that end, a qemu-io that has an image open until it is told, and a virtual machine."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class QemuIo:
    """A qemu-io that has an image open until it is told to quit."""

    def __init__(self, image: Path, kind: str) -> None:
        self.process = subprocess.Popen(
            ["qemu-io", "-f", kind, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.do("write -P 65 0 64k")

    def do(self, command: str) -> str:
        """Run one command and return what it printed up to its last line."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        lines = ""
        while "ops; " not in lines:
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(f"qemu-io: {command}: {lines}")
            lines += line
        return lines

    def quit(self) -> None:
        assert self.process.stdin and self.process.stdout
        if not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def __enter__(self) -> QemuIo:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.quit()


class VirtualMachine:
    """A QEMU without a guest: a disk on a virtio controller, and a monitor."""

    def __init__(self, image: Path, monitor: Path, cache: str, *more: str) -> None:
        direct = "on" if cache == "none" else "off"
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "32", "-nodefaults", "-display", "none",
             "-name", "guest=test-vm", "-qmp", f"unix:{monitor},server=on,wait=off",
             "-blockdev", json.dumps({"driver": "file", "filename": str(image), "node-name": "file", "auto-read-only": True,
                                      "discard": "unmap", "cache": {"direct": direct == "on", "no-flush": False}}),
             "-blockdev", '{"driver":"raw","file":"file","node-name":"disk"}',
             "-device", "virtio-blk-pci,drive=disk", *more],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.socket.connect(str(monitor))
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    assert self.process.stdout
                    raise AssertionError(self.process.stdout.read()) from None
                time.sleep(0.02)
        self.file = self.socket.makefile("rw")
        json.loads(self.file.readline())
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: object) -> dict[str, object]:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise AssertionError(answer)

    def __enter__(self) -> VirtualMachine:
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self.process.stdout
        self.file.close()
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()
