"""The backend ``nop``: it grants everything, for where exclusion is solved elsewhere."""

from __future__ import annotations

from lockfs.backend import Spec

SPEC = Spec(
    name="nop",
    summary="grants everything: for where something else keeps two writers apart",
    factory="lockfs_nop.backend:NopBackend",
)
