"""The logs of a host's daemons: no warning may pass that a test did not declare."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

RECORD = re.compile(r"^\S+T\S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
QUIET = ("DEBUG", "INFO")


def read(run_dir: Path) -> str:
    """Return all logs of a host, one file after the other, the older generation first."""
    files = list((run_dir / "log").glob("*.log*"))
    files.sort(key=lambda path: (path.name.removesuffix(".1"), path.stat().st_mtime))
    return "".join(f"--- {path.name}\n{path.read_text(errors='backslashreplace')}" for path in files)


def alarms(text: str) -> list[str]:
    """Return every record of level WARNING or above, with the lines (a traceback) that belong to it.

    A line that is no record and follows none, such as what an interpreter prints while it dies, is one too.
    """
    found: list[str] = []
    taking = True
    for line in text.splitlines():
        if line.startswith("--- "):
            taking = True
            continue
        match = RECORD.match(line)
        if match:
            taking = match[1] not in QUIET
            if taking:
                found.append(line)
        elif taking and found:
            found[-1] += "\n" + line
        elif taking and line:
            found.append(line)
    return found


@dataclass
class Expected:
    """What a test declared: patterns that alarms may match, and which of them must occur."""

    patterns: dict[str, bool] = field(default_factory=dict)

    def __call__(self, pattern: str, *, optional: bool = False) -> None:
        """Declare that an alarm matches *pattern*; one must come, unless *optional*."""
        self.patterns[pattern] = not optional

    def complaints(self, found: list[str]) -> list[str]:
        """Return the alarms that no pattern matches, and the patterns that no alarm matched."""
        unexpected = [alarm for alarm in found if not any(re.search(each, alarm) for each in self.patterns)]
        missing = [
            pattern
            for pattern, required in self.patterns.items()
            if required and not any(re.search(pattern, alarm) for alarm in found)
        ]
        return [f"not expected in the log: {alarm}" for alarm in unexpected] + [
            f"declared by expect_log but not in the log: {pattern}" for pattern in missing
        ]
