"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer: all scenarios, and a real mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from t2_linux.kernel_fs.mounted import attached

import lockfs.kernel

HERE = Path(__file__).parent / "kernel_fs"
FLAGS = [
    "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
]  # fmt: skip


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that uses a build with sanitizers."""
    assert shutil.which("gcc"), "the tests need gcc"
    library = tmp_path_factory.mktemp("sanitized") / "_shim.so"
    sources = sorted(Path(lockfs.kernel.__file__).parent.glob("*.c"))
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(["gcc", *FLAGS, include, "-o", library, *sources], check=True, timeout=60)
    runtimes = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "TEST_SHIM": str(library),
        "LD_PRELOAD": ":".join(runtimes),
        "PYTHONMALLOC": "malloc",  # so that Python's objects are watched, too
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
    }


def test_the_sanitizer_watches(sanitized: dict[str, str]) -> None:
    """A read past the end of a buffer of Python's, as the C code might do it, ends the process."""
    program = "import ctypes, sys; b = bytes(1000); ctypes.CDLL(None).memcmp(b, bytes(2000), 1500)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **sanitized}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_all_scenarios(sanitized: dict[str, str]) -> None:
    command = [sys.executable, str(HERE / "scenarios.py")]
    names = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.split()
    done = subprocess.run(
        [*command, *names], env={**os.environ, **sanitized}, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in names for word in (name, "played")]
    assert "ERROR" not in done.stderr and "runtime error" not in done.stderr


def test_a_real_mount(sanitized: dict[str, str], storage: Path, tmp_path: Path) -> None:
    with attached(storage, tmp_path / "mnt", **sanitized) as mini:
        mini.start()
        first = mini.hello
        data = os.urandom(1 << 20)
        for plain in (b"0", b"1"):
            os.setxattr(mini.path, "user.plain", plain)
            (mini.path / f"f{plain!r}").write_bytes(data)
            assert (mini.path / f"f{plain!r}").read_bytes() == data
        with open(mini.path / "a", "w+b") as target, open(mini.path / f"f{b'0'!r}", "rb") as source:
            os.posix_fallocate(target.fileno(), 0, 4096)
            assert os.copy_file_range(source.fileno(), target.fileno(), 1 << 20) == 1 << 20
            assert os.lseek(target.fileno(), 0, os.SEEK_HOLE) == 1 << 20
        assert sorted(os.listdir(mini.path)) == ["a", "fb'0'", "fb'1'"]
        assert mini.daemon is not None
        mini.daemon.kill()
        mini.daemon.communicate(timeout=20)
        mini.start(resume=first["init"])
        assert (mini.path / "a").read_bytes() == data
        mini.end()
        assert (mini.status, mini.errors) == (0, "")
