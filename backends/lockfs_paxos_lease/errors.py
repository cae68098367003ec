"""What the engine's errors mean to whoever opens an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lockfs.errors import LockUnavailable
from lockfs_paxos_lease.engine.errors import BadArea, EngineError, Held


@contextmanager
def explained(what: str, where: str) -> Iterator[None]:
    """Raise what the engine raises as `LockUnavailable`; *what* was attempted, on the lease or lockspace in *where*.

    `Held` passes: it is no trouble.
    """
    try:
        yield
    except Held:
        raise
    except BadArea as error:
        raise LockUnavailable(
            f"cannot {what}: the lease {where} is damaged: {error.message}",
            hint=f"Look with: lockfs lease check {where}",
        ) from error
    except EngineError as error:
        raise LockUnavailable(f"cannot {what}: {error.message}") from error
