"""Fixtures of pure tests."""

from __future__ import annotations

import pytest
from sim.bench import Bench
from t1_pure.lease_bench import TIMINGS


@pytest.fixture(params=TIMINGS)
def bench(request: pytest.FixtureRequest) -> Bench:
    """A lockspace and a lease in memory, by each kind of timing."""
    return Bench(TIMINGS[request.param])
