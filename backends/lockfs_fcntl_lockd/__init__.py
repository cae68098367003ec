"""The backend ``fcntl-lockd``: the byte locks of the shared filesystem, the same that libvirt's virtlockd
takes.
"""

from __future__ import annotations

from lockfs.backend import Spec
from lockfs.options import Option, absolute_path, one_of


def _lockspace(text: str) -> str:
    return absolute_path(text) if text else ""


SPEC = Spec(
    name="fcntl-lockd",
    summary="byte locks on the images, as virtlockd takes them: for NFS, GFS2, OCFS2 and others that have locks",
    factory="lockfs_fcntl_lockd.backend:FcntlBackend",
    options=(
        Option("lockspace", _lockspace, "", "DIR",
               "lock files in this shared directory instead of the images; virtlockd's file_lockspace_dir"),
        Option("cards", one_of("yes", "no"), "yes", "yes|no",
               "leave a note on the share about who holds what (SOURCE/.lockfs/holders), for people on other hosts"),
    ),
)  # fmt: skip
