"""Waiting for what another process does: poll until a condition holds, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
INTERVAL = 0.005


def wait_until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Return the first true value of *condition*.  Raises TimeoutError, which says *what* did not happen."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise TimeoutError(f"after {seconds:g} s still waiting for: {what}")
        time.sleep(INTERVAL)
