"""Who a process is."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from lockfs.linux import process


def test_a_thread_belongs_to_its_process() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(process.of_thread(threading.get_native_id())))
    thread.start()
    thread.join()
    assert found == [process.of_pid(os.getpid())]


def test_start_time_tells_a_later_process_apart() -> None:
    found = process.of_pid(os.getpid())
    assert found is not None
    ticks = float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")
    assert 0 < found.start <= ticks + 100


def test_what_is_gone_is_none() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
        assert process.of_pid(child.pid) is None
        assert process.of_thread(child.pid) is None
        assert process.groups(child.pid) is None
        assert process.command(child.pid) == process.program(child.pid) == process.cgroup(child.pid) == ""
    assert process.of_thread(0) is None


def run_as(name: bytes, *arguments: bytes):
    """Start a process that looks as QEMU does in /proc, and wait for input."""
    return subprocess.Popen(
        [name, "-c", "print(flush=True); input()", *arguments],
        executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_a_virtual_machine_by_the_name_that_qemu_was_given() -> None:
    for given, name in (
        (b"guest=web,,1,debug-threads=on", "web,1"),
        (b"plain,process=x", "plain"),
        (b"g\n1", "g\\x0a1"),
    ):
        with run_as(b"qemu-system-x86_64", b"-name", given) as child:
            assert child.stdout
            assert child.stdin
            child.stdout.readline()
            assert process.virtual_machine(child.pid) == name
            child.stdin.close()
    assert process.virtual_machine(os.getpid()) == ""


def test_a_command_with_parentheses_and_newlines(tmp_path: Path) -> None:
    program = tmp_path / "a) 1 (\nb"
    program.symlink_to(sys.executable)
    with subprocess.Popen(
        [program, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        assert child.stdin
        child.stdout.readline()
        found = process.of_pid(child.pid)
        assert found is not None
        assert found.pid == child.pid
        assert found.start > 0
        assert process.command(child.pid) == "a) 1 (\\x0ab"
        child.stdin.close()


def test_the_program_is_told_by_its_file_not_by_its_name() -> None:
    with run_as(b"virtlockd") as child:
        assert child.stdout
        assert child.stdin
        child.stdout.readline()
        assert process.program(child.pid) == os.path.basename(os.path.realpath(sys.executable))
        child.stdin.close()
