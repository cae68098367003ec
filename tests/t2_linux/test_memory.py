"""A daemon that stays in memory."""

from __future__ import annotations

import subprocess
import sys

SHOW = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmLck')))"


def run(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_it_uses_is_locked_and_threads_still_start() -> None:
    program = f"""
from lockfs.linux import memory
import threading
print(memory.lock())
threads = [threading.Thread(target=lambda: bytearray(1 << 20)) for _ in range(50)]
for each in threads: each.start()
for each in threads: each.join()
{SHOW}
"""
    locked, kilobytes = run(program)
    assert locked == "True"
    assert int(kilobytes) > 1000


def test_without_the_right_nothing_is_locked() -> None:
    program = f"""
from lockfs.linux import credentials, memory
credentials.drop_capability(14)
print(memory.lock())
{SHOW}
"""
    assert run(program) == ["False", "0"]


def test_the_oom_killer_is_told_or_that_is_said() -> None:
    program = """
from lockfs.linux import memory
print(memory.spare_from_oom_killer(), open('/proc/self/oom_score_adj').read())
"""
    told, adjustment = run(program)
    assert (told == "True") == (adjustment == "-1000")
