"""Getting between pyfuse3 and libfuse: when it works, and that nobody is left in doubt when it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, *before: str, **environment: str) -> str:
    """Run a program in a process of its own, since what is loaded cannot be taken back."""
    command = [*before, sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_works_and_is_asked_once() -> None:
    program = (
        "from lockfs import kernel; print(kernel.why_not(), kernel.load(), kernel.load(off=True), kernel.why_not())"
    )
    assert run(program) == "lockfs.kernel.load() was not called None None None"


@pytest.mark.parametrize("binding", ["1", ""])
def test_it_works_however_symbols_are_bound(binding: str) -> None:
    assert run("from lockfs import kernel; print(kernel.load())", LD_BIND_NOW=binding) == "None"


def test_pyfuse3_was_first() -> None:
    assert "pyfuse3 was imported before" in run("import pyfuse3; from lockfs import kernel; print(kernel.load())")


def test_switched_off() -> None:
    program = """
import sys
from lockfs import kernel
print(kernel.load(), "pyfuse3" in sys.modules, kernel.probe())
"""
    off = "The kernel module is switched off (LOCKFS_KERNEL=off)."
    assert run(program, LOCKFS_KERNEL="off") == f"it is switched off False {off}"
    assert run(program.replace("load()", "load(off=True)")) == "it is switched off False None"


def test_not_built(tmp_path: Path) -> None:
    # As a build without a compiler leaves it: all of the package but the extension.
    import lockfs

    package = tmp_path / "lockfs"
    package.mkdir()
    for path in Path(lockfs.__file__).parent.rglob("*.py"):
        copy = package / path.relative_to(Path(lockfs.__file__).parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from lockfs import kernel
assert kernel.__file__.startswith({str(tmp_path)!r})
print(kernel.probe()); print(kernel.load()); import pyfuse3, lockfs.kernel.extra
"""
    probed, loaded = run(program).splitlines()
    assert "was not built" in probed and "compiler" in probed
    assert "was not built" in loaded


def test_another_library_is_in_the_way(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int fuse_session_mount(void *se, const char *mountpoint) { return -1; }\n")
    library = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    program = "from lockfs import kernel; print(kernel.load())"
    assert "another library" in run(program, LD_PRELOAD=str(library))


def test_libraries_that_do_not_fit() -> None:
    """What is not loaded cannot be bound, and what lacks a function is told by its name."""
    program = """
from lockfs.kernel import _shim
print(_shim.bind("/nonexistent/pyfuse3.so"))
print(_shim.bind(_shim.__file__))
"""
    not_loaded, missing = run(program).splitlines()
    assert "not loaded" in not_loaded
    assert missing == "fuse_session_exit"


def test_nothing_is_missing_here() -> None:
    assert run("from lockfs import kernel; print(kernel.probe())") == "None"


def test_probe_of_an_old_kernel() -> None:
    said = run("from lockfs import kernel; print(kernel.probe())", "setarch", "--uname-2.6")
    assert said.startswith("Linux 2.6.") and "too old for FUSE passthrough" in said


def test_probe_without_rights() -> None:
    program = """
from lockfs import kernel
from lockfs.linux import credentials
credentials.drop_capability(kernel.CAP_SYS_ADMIN)
print(kernel.probe())
"""
    assert "CAP_SYS_ADMIN" in run(program)


def test_probe_is_light_and_harmless() -> None:
    program = """
import sys
from lockfs import kernel
kernel.probe()
print(any(name in sys.modules for name in ("trio", "pyfuse3", "lockfs.kernel._shim")), kernel.load())
"""
    assert run(program) == "False None"
