"""A host with leases in a process of its own, which can be killed, stopped and continued: the program and its handle.

The program reads commands as lines of JSON and answers each with one line; what is lost comes as lines of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

PATIENCE = 60.0


class LeaseHost:
    """A host that runs.  *share* is the directory of the images, *run_dirs* has the run directories of all hosts.

    *elsewhere*: on another machine of the same identity, a clone.
    """

    def __init__(self, name: str, share: Path, run_dirs: Path, *, elsewhere: bool = False, **options: str) -> None:
        self.name = name
        self.losses: deque[dict[str, Any]] = deque()
        run_dir = run_dirs / name
        run_dir.mkdir(parents=True, exist_ok=True)
        arguments = [name, str(share), str(run_dirs), json.dumps(options)]
        self.log = run_dir / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(_other_machine(run_dir) if elsewhere else []), sys.executable, __file__, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, what: str, **arguments: Any) -> Any:
        """Have something done, and return its result.  Raises RuntimeError with what the host says."""
        self.send(what, **arguments)
        return self._result()

    def send(self, what: str, **arguments: Any) -> None:
        """Have something done, and do not wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()

    def _result(self) -> Any:
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}: {answer['text']}")
        return answer["result"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            if "lost" not in answer:
                return answer
            self.losses.append(answer)
        raise RuntimeError(f"{self.name} has ended: {self.log.read_text()}")

    def wait_for_loss(self) -> dict[str, Any]:
        """Return the next loss."""
        assert self.process.stdout is not None
        if not self.losses:
            self.losses.append(json.loads(self.process.stdout.readline()))
        return self.losses.popleft()

    def kill(self) -> None:
        """End it at once, as lockd that is killed."""
        self.process.kill()
        self.close()

    def pause(self) -> None:
        """Stop it, as a host that hangs."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def leave(self) -> None:
        """Have it leave in an orderly way."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.close()

    def close(self) -> None:
        """Be rid of it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        self.process.wait(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass


def _other_machine(run_dir: Path) -> list[str]:
    """Return what starts a program with the same run directory, which is another one."""
    script = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(run_dir)]


def boottime() -> float:
    """Return the clock that leases go by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def main(name: str, share: str, run_dirs: str, options: str) -> None:
    """Be a host until the input ends."""
    import trio
    from lockfs_paxos_lease.backend import PaxosBackend
    from t3_backends.stations import station

    from lockfs.backend import Busy, Grant, Mode
    from lockfs.errors import LockfsError

    grants: dict[str, Grant] = {}

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    async with station(name, Path(share), "paxos-lease", json.loads(options), run_dirs=Path(run_dirs)) as made:
        backend = made.backend
        assert isinstance(backend, PaxosBackend)
        joined = backend._joined

        async def tell_losses() -> None:
            async for grant in backend.lost():
                image = next(each for each, held in grants.items() if held is grant)
                until = joined._membership.valid_until if joined._membership else 0.0
                say(lost=image, at=boottime(), valid_until=until)

        async def do(what: str, image: str, mode: Mode) -> Any:
            if what == "acquire":
                grants[image] = await made.acquire(mode, image)
                return grants[image].token
            if what == "release":
                return await made.release(grants.pop(image))
            if what == "adopt":
                image_there = made.image(image)
                grants[image] = Grant(image_there, mode)  # as lockd does, for what it then fences
                grants[image] = await backend.adopt(image_there, mode, made.holder(mode), [], None)
                return grants[image].mode.value
            if what == "fenced":
                return await backend.fenced(grants[image])
            if what == "convert":
                return await backend.convert(grants[image], mode, made.holder(mode))
            if what == "holder":
                holder = await made.holder_seen(image)
                return str(holder) if holder else None
            if what == "confirm-dead":
                return await backend.confirm_dead(image)
            if what == "inherit":
                return await backend.inherit()
            if what == "hosts":
                return [[host.name, host.state, host.detail] for host in await backend.hosts()]
            membership = joined.membership()
            return [membership.host_id, membership.generation]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_losses)
            say(started=boottime())
            stream = trio.wrap_file(sys.stdin)
            async for line in stream:
                asked = json.loads(line)
                try:
                    with trio.fail_after(PATIENCE):
                        mode = Mode(asked.get("mode", "exclusive"))
                        say(result=await do(asked["what"], asked.get("image", "img"), mode))
                except Busy as error:
                    say(error="Busy", text=str(error.holder))
                except (LockfsError, trio.TooSlowError) as error:
                    say(error=type(error).__name__, text=str(error))
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    import logging

    import trio

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(relativeCreated)d %(levelname)s %(message)s")
    trio.run(main, *sys.argv[1:])
