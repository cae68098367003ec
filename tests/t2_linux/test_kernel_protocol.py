"""What a kernel may say to the daemon, and what must come of it: scenarios on a socket pair in place of /dev/fuse.

Each is played in a process of its own.  The scenarios themselves, and their assertions, are in `kernel_fs`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lockfs.kernel import wire

HERE = Path(__file__).parent / "kernel_fs"
NAMES = [
    name
    for path in sorted(HERE.glob("scenarios_of_*.py"))
    for name in re.findall(r"^@(?:scenario|before_session)\nasync def (\w+)", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("name", NAMES)
def test_scenario(name: str) -> None:
    command = [sys.executable, "-W", "error", str(HERE / "scenarios.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name} played\n"


def test_no_scenario_is_forgotten() -> None:
    command = [sys.executable, str(HERE / "scenarios.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert sorted(listed) == sorted(NAMES)
    assert len(NAMES) > 15


def test_the_bodies_of_notifications() -> None:
    assert wire.resend() == bytes.fromhex("10000000 07000000 0000000000000000")
    assert wire.prune([5, 1 << 40]) == bytes.fromhex(
        "30000000 09000000 0000000000000000  02000000 00000000 0000000000000000  0500000000000000 0000000000010000"
    )
    assert wire.inval_inode(7, -1, 0) == bytes.fromhex(
        "28000000 02000000 0000000000000000  0700000000000000 ffffffffffffffff 0000000000000000"
    )
