"""Loads the shim in the processes of these tests: the installed one, or the build that ``TEST_SHIM`` names."""

from __future__ import annotations

import importlib.util
import os
import sys

from lockfs import kernel

VARIABLE = "TEST_SHIM"


def take_other_build() -> None:
    """Make `lockfs.kernel` find the build that the environment names, if it names one."""
    name = "lockfs.kernel._shim"
    if path := os.environ.get(VARIABLE):
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        kernel._shim = module  # as the import of a submodule does


def load() -> None:
    """Load the shim, which must work."""
    take_other_build()
    why_not = kernel.load()
    assert why_not is None, why_not
    from lockfs.kernel import _shim

    if path := os.environ.get(VARIABLE):
        assert _shim.__file__ == path
