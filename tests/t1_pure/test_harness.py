"""The harness catches what it is there to catch: each fault is made on purpose, in a pytest of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import logs
from harness.waiting import wait_until

TESTS = Path(__file__).resolve().parent.parent
Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def run_tests(tmp_path: Path) -> Run:
    """Run the text of a test module with the conftest of this suite, and return how pytest ended."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        shutil.copy(TESTS / "conftest.py", tmp_path)
        (tmp_path / "test_it.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp=t", "test_it.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_a_clean_test_passes(run_tests: Run) -> None:
    done = run_tests(
        "def test_it(host, host_b, storage):\n"
        "    assert host.name != host_b.name and host.run_dir != host_b.run_dir\n"
        "    assert list(storage.iterdir()) == [] and host.processes() == []\n"
        "    open(storage / 'image', 'wb').close()\n"
    )
    assert done.returncode == 0, done.stdout


def test_a_leaked_descriptor_fails(run_tests: Run) -> None:
    done = run_tests("import os\ndef test_it(tmp_path):\n    os.open(tmp_path, os.O_RDONLY)\n")
    assert done.returncode == 1
    assert "was left open" in done.stdout


def test_a_leftover_mount_fails_and_is_unmounted(run_tests: Run, tmp_path: Path) -> None:
    done = run_tests(
        "import subprocess\n"
        "def test_it(tmp_path):\n"
        "    subprocess.run(['mount', '-t', 'tmpfs', 'none', tmp_path], check=True)\n"
    )
    assert done.returncode == 1
    assert "was left mounted" in done.stdout
    assert f" {tmp_path}/" not in Path("/proc/self/mountinfo").read_text()


def test_a_leftover_process_fails_and_is_ended(run_tests: Run) -> None:
    done = run_tests(
        "import subprocess\n"
        "def test_it(host):\n"
        "    process = subprocess.Popen(['sleep', '77'], env=host.environment)\n"
        "    print('started', process.pid, flush=True)\n"
        "    process.returncode = 0  # or its destructor warns\n"
        "    assert False, 'show the output'\n"
    )
    assert done.returncode == 1
    assert "left behind: process" in done.stdout
    pid = int(done.stdout.partition("started ")[2].split()[0])
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 5, "the process to be reaped")


LOGGED = "    (host.run_dir / 'log').mkdir()\n    (host.run_dir / 'log' / 'lockd.log').write_text({!r})\n"
ALARM = "2026-01-01T00:00:00.000 WARNING lockfs.x[1]: the sky falls\n"
CALM = "2026-01-01T00:00:00.000 INFO lockfs.x[1]: all is well\n"


@pytest.mark.parametrize(
    ("body", "fails"),
    [
        (LOGGED.format(CALM), False),
        (LOGGED.format(CALM + ALARM), True),
        (LOGGED.format(CALM + ALARM) + "    expect_log('sky')\n", False),
        (LOGGED.format(CALM + ALARM) + "    expect_log('sea')\n", True),
        (LOGGED.format(CALM) + "    expect_log('sky')\n", True),
        (LOGGED.format(CALM) + "    expect_log('sky', optional=True)\n", False),
    ],
)
def test_an_undeclared_warning_fails(run_tests: Run, body: str, fails: bool) -> None:
    done = run_tests(f"def test_it(host, expect_log):\n{body}")
    assert done.returncode == (1 if fails else 0), done.stdout


def test_a_failure_shows_the_logs(run_tests: Run) -> None:
    done = run_tests(f"def test_it(host):\n{LOGGED.format(CALM)}    assert False\n")
    assert "all is well" in done.stdout


def test_an_alarm_takes_its_traceback_along() -> None:
    trace = "Traceback (most recent call last):\n  File x\nValueError: y\n"
    assert logs.alarms(f"--- a.log\n{CALM}{ALARM}{trace}{CALM}") == [(ALARM + trace).rstrip("\n")]
    assert logs.alarms(f"--- a.log\nFatal Python error: y\n{CALM}") == ["Fatal Python error: y"]
