"""Runs a case in a plain directory and in its twin on a mount, and says in what they differed.

A pair of directories lies on one filesystem; one is the source of the mount, the other is left plain.  Every case runs
in a child process of its own, in a fresh directory, so that it may change its user, its limits, or die.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from t7_parity import snapshot
from t7_parity.record import Event, Recorder
from t7_parity.registry import Case

LIMIT = 30
"""Seconds that a case may take on one side; then it is ended, which is noted like any other outcome."""


@dataclass(frozen=True)
class Pair:
    """A plain directory, a mount, and the source of the mount; and where to write what these two show."""

    plain: Path
    view: Path
    source: Path
    plain_backing: Path
    source_backing: Path


@dataclass(frozen=True)
class Gap:
    """One step or one property in which the sides differed."""

    step: str
    plain: object
    mount: object

    def __str__(self) -> str:
        return f"{self.step}\n    plain: {self.plain}\n    mount: {self.mount}"


@dataclass(frozen=True)
class Difference:
    """A difference that is known, and why: which cases show it, and in which steps.

    Both are globs in which brackets stand for themselves.  It must show in every case that one of *cases* matches, or
    it is out of date.
    """

    reason: str
    cases: Sequence[str]
    steps: Sequence[str]

    def covers(self, case: str, step: str) -> bool:
        """Say whether this explains a gap."""
        return self.concerns(case) and _matches(step, self.steps)

    def concerns(self, case: str) -> bool:
        """Say whether this must show in a case."""
        return _matches(case, self.cases)


def _matches(text: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(text, glob.replace("[", "[[]")) for glob in globs)


def compare(case: Case, pair: Pair, name: str) -> list[Gap]:
    """Run a case on both sides in fresh directories called *name* and return all differences."""
    for directory in (pair.plain_backing, pair.source_backing):
        (directory / name).mkdir()
        (directory / name).chmod(0o755)
    plain = run(case, pair.plain / name, pair.plain_backing / name)
    mount = run(case, pair.view / name, pair.source_backing / name)
    gaps = [Gap(*each) for each in _unequal(plain, mount)]
    ours, theirs = snapshot.tree(pair.plain / name), snapshot.tree(pair.view / name)
    keys = sorted(ours.keys() | theirs.keys())
    gaps += [Gap(f"tree: {key}", ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]
    gaps += [Gap("view", "as its source", problem) for problem in snapshot.views(pair.view / name, pair.source / name)]
    return gaps


def _unequal(plain: Sequence[Event], mount: Sequence[Event]) -> list[tuple[str, object, object]]:
    """Pair the events of both sides by step; a step that occurs again gets a number."""
    left, right = _numbered(plain), _numbered(mount)
    steps = [*left, *(step for step in right if step not in left)]
    missing = "this step was not reached"
    return [
        (step, left.get(step, missing), right.get(step, missing))
        for step in steps
        if left.get(step, missing) != right.get(step, missing)
    ]


def _numbered(events: Sequence[Event]) -> dict[str, object]:
    found: dict[str, object] = {}
    for step, value in events:
        name, number = step, 1
        while name in found:
            number += 1
            name = f"{step} #{number}"
        found[name] = value
    return found


def run(case: Case, directory: Path, backing: Path) -> list[Event]:
    """Run a case in a child whose current directory is *directory*, and return its events.

    How it ended, if not as it should, is the last event.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_and_exit(case, directory, backing, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    events: list[Event] = pickle.loads(data) if data else []
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        events.append(("ended", signal.Signals(-code).name if code < 0 else f"exit {code}"))
    for step, value in events:
        if step == "exception":
            raise AssertionError(f"the case itself failed in {directory}:\n{value}")
    return events


def _run_and_exit(case: Case, directory: Path, backing: Path, writing: int) -> None:
    """Never returns: a child of pytest must not go on as a second pytest."""
    recorder = Recorder(-1)
    try:
        faulthandler.disable()  # a signal that ends a case is a result as any other
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        recorder.backing = os.open(backing, os.O_RDONLY | os.O_DIRECTORY)
        os.chdir(directory)
        os.umask(0o022)
        case(recorder)
    except BaseException:
        recorder.note("exception", traceback.format_exc())
    finally:
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(recorder.events, pipe)
        os._exit(0)
