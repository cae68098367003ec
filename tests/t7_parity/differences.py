"""In what a mount is known to differ from the directory it shows, and why.  Everything else must be the same."""

from __future__ import annotations

from collections.abc import Sequence

from t7_parity.twins import Difference

DIFFERENCES: Sequence[Difference] = ()
