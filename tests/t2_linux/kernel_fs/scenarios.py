"""Plays scenarios: ``scenarios.py SCENARIO...``; one that fails ends it by an exception.  ``--list`` lists them."""

from __future__ import annotations

import logging
import sys

import fake_kernel
import scenarios_of_data  # noqa: F401
import scenarios_of_init  # noqa: F401
import scenarios_of_requests  # noqa: F401
import trio

if __name__ == "__main__":
    logging.getLogger().addHandler(fake_kernel.LOG)
    if sys.argv[1:] == ["--list"]:
        print("\n".join(fake_kernel.SCENARIOS))
    for name in sys.argv[1:]:
        if name in fake_kernel.SCENARIOS:
            trio.run(fake_kernel.play, name)
            print(name, "played")
