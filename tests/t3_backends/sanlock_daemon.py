"""The real sanlock: its command line, and daemons that run side by side without privileges or watchdog."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

PATIENCE = 30.0


class SanlockError(Exception):
    """A sanlock command failed."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"{' '.join(map(str, done.args))}: {done.stdout}{done.stderr}")


def run(*arguments: str | Path, run_dir: Path | None = None) -> str:
    """Return what ``sanlock ARGUMENTS`` prints.  Raises `SanlockError`."""
    environment = {**os.environ, "SANLOCK_PRIVILEGED": "0", **({"SANLOCK_RUN_DIR": str(run_dir)} if run_dir else {})}
    done = subprocess.run(
        ["sanlock", *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE * 10, check=False
    )
    if done.returncode:
        raise SanlockError(done)
    return done.stdout


def direct(*arguments: str | Path) -> str:
    """Return what ``sanlock direct ARGUMENTS`` prints.  Raises `SanlockError`."""
    return run("direct", *arguments)


class Daemon:
    """A sanlock daemon; *name* is what other hosts see in its records."""

    def __init__(self, name: str, run_dir: Path) -> None:
        run_dir.mkdir()
        self.name = name
        self._run_dir = run_dir
        self._log = (run_dir / "output").open("wb")
        self.process = subprocess.Popen(
            ["sanlock", "daemon", "-D", "-w", "0", "-h", "0", "-l", "0", "-e", name],
            env={**os.environ, "SANLOCK_PRIVILEGED": "0", "SANLOCK_RUN_DIR": str(run_dir)},
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not (run_dir / "sanlock.sock").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sanlock did not start: {(run_dir / 'output').read_text(errors='replace')}")
            time.sleep(0.02)

    def client(self, *arguments: str | Path) -> str:
        """Return what ``sanlock client ARGUMENTS`` prints.  Raises `SanlockError`."""
        return run("client", *arguments, run_dir=self._run_dir)

    def command(self, resource: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a program that holds *resource* as long as it runs."""
        return subprocess.Popen(
            ["sanlock", "client", "command", "-r", resource, "-c", *command],
            env={**os.environ, "SANLOCK_PRIVILEGED": "0", "SANLOCK_RUN_DIR": str(self._run_dir)},
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def close(self) -> None:
        """End it at once, as a host that loses power."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
