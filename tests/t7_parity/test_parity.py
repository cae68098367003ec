"""Every case gives the same on the mount as in a plain directory, but for the differences that are listed."""

from __future__ import annotations

import itertools

import pytest
from harness.host import without_kernel_module
from t7_parity.conftest import OPTIONS, TARGET
from t7_parity.differences import DIFFERENCES, GATED_ONLY, WITHOUT_MODULE
from t7_parity.registry import Case, all_cases
from t7_parity.twins import Difference, Pair, compare

CASES = all_cases()
_numbers = itertools.count()



def _known() -> list[Difference]:
    if TARGET != "lockfs":
        return []
    gated = "data=gated" in OPTIONS or without_kernel_module()
    return [*DIFFERENCES, *(GATED_ONLY if gated else []), *(WITHOUT_MODULE if without_kernel_module() else [])]


KNOWN = _known()


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_mount_does_as_a_plain_directory(case: Case, pairs: dict[str, Pair]) -> None:
    gaps = compare(case, pairs[case.on], f"{next(_numbers):04}")
    unknown = [gap for gap in gaps if not any(known.covers(case.id, gap.step) for known in KNOWN)]
    assert not unknown, f"{len(unknown)} differences:\n" + "\n".join(map(str, unknown[:20]))
    for known in KNOWN:
        if known.concerns(case.id) and not any(known.covers(case.id, gap.step) for gap in gaps):
            pytest.fail(f"this listed difference shows no more; remove it: {known}", pytrace=False)


def test_every_listed_difference_concerns_a_case() -> None:
    idle = [known for known in DIFFERENCES if not any(known.concerns(case.id) for case in CASES)]
    assert not idle
