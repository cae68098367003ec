"""The list of all cases.  A case is one function that does things in the current directory and notes what happened.

``@case(flag=[...], kind=[...])`` makes a case for each combination; ``on`` names the pair of directories it needs.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t7_parity.record import Recorder

Body = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """One case: `id` is unique, `on` one of the pairs in `twins`."""

    id: str
    body: Body
    on: str = "disk"
    parameters: dict[str, Any] = field(default_factory=dict)

    def __call__(self, recorder: Recorder) -> None:
        """Run in the current directory."""
        self.body(recorder, **self.parameters)


_cases: dict[str, Case] = {}


def case(*, on: str = "disk", **parameters: Sequence[Any]) -> Callable[[Body], Body]:
    """Register a function once for each combination of the parameters' values."""

    def register(body: Body) -> Body:
        prefix = f"{body.__module__.rpartition('.')[2]}.{body.__name__}"
        for values in itertools.product(*parameters.values()):
            label = "-".join(_label(*each) for each in zip(parameters, values, strict=True))
            name = f"{prefix}[{label}]" if label else prefix
            if name in _cases:
                raise ValueError(f"two cases are named {name}")
            _cases[name] = Case(name, body, on, dict(zip(parameters, values, strict=True)))
        return body

    return register


def _label(name: str, value: Any) -> str:
    if name in ("mode", "umask", "flags", "flag", "bits", "kind") and isinstance(value, int):
        return oct(value) if value else "0"
    return str(getattr(value, "__name__", value))


def all_cases() -> list[Case]:
    """Import the modules of cases and return what they registered."""
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        importlib.import_module(f"t7_parity.cases.{path.stem}")
    return list(_cases.values())
