"""What this lockd takes over from the one before: its state, the mounts that come back, and those that do not."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from lockfs.lockd.adoption import Adoption
from lockfs.lockd.claims import Claims
from lockfs.lockd.orphans import Orphans, Places
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted
from lockfs.lockd.state import Identity
from lockfs.lockd.table import Table
from lockfs.protocol.messages import HeldImage
from lockfs.protocol.wire import close_all
from lockfs.vault.wire import lock_key


class Succession:
    """See the module.  `Shares` tells it of mounts that come and go."""

    def __init__(self, table: Table, claims: Claims, adoption: Adoption, recorder: Recorder) -> None:
        self.claims = claims
        self._table = table
        self._adoption = adoption
        self._recorder = recorder
        self._orphans: Orphans | None = None

    def begin(self, nursery: trio.Nursery, places: Places) -> None:
        """Look after the mounts of the last lockd from now on; see `Orphans`."""
        self._orphans = Orphans(nursery, self._table, self.claims, self._adoption, self._recorder, places)
        self._orphans.begin()

    async def kill_orphans(self) -> None:
        """End all who can still write to images that only this lockd keeps locked, and that cannot be fenced."""
        if self._orphans is not None:
            await self._orphans.kill()

    def register(self, mounted: Mounted) -> None:
        """Note a mount that is new, or has come back.  Raises `LockUnavailable`."""
        claim = self.claims.get(mounted.mount_id)
        if claim is not None:
            mounted.since = claim.mount.mount.since
        self._recorder.mount(mounted)

    async def hand_over(
        self, mounted: Mounted, images: Sequence[tuple[HeldImage, int, list[int]]], *, last: bool
    ) -> None:
        """Take up what a mount that has come back holds; see `Adoption`."""
        await self._adoption.take_up(mounted, images)
        if last:
            self._adoption.finish(mounted)

    async def died(self, mounted: Mounted) -> None:
        """The daemon of a mount has died: if it had come back, and had not said all that it holds, look after the rest.

        Locks live on in the descriptors that the vault has kept.  Where there are none, what can still be written to,
        past the daemon or by way of a successor, is fenced.
        """
        claim, attachment = self.claims.get(mounted.mount_id), mounted.attachment
        if claim is not None and attachment is not None and (attachment.data == "passthrough" or attachment.resumable):
            rest = []
            for identity, image in claim.images.items():
                kept = mounted.share.vault.copies(lock_key(*identity))
                if identity in mounted.adopting or not (kept or image.lost or self._may_be_held(mounted, identity)):
                    close_all(kept)
                    continue
                fd, *keep = kept or [-1]
                rest.append((HeldImage(image.image, list(image.holds.values()), lost=image.lost), fd, keep))
            await self._adoption.take_up(mounted, rest)
            self._adoption.finish(mounted)
        await mounted.adopting.done()

    def _may_be_held(self, mounted: Mounted, identity: Identity) -> bool:
        """Say whether an image may be held through a mount although the vault has no lock of it.

        If the vault was whole, its lock was wanted, and the mount not told that it has it; or it was given back.
        """
        share = mounted.share
        return not share.backend.excludes or not share.vault.is_whole(mounted.mount_id) or self._table.has(identity)

    async def gone(self, mounted: Mounted) -> None:
        """A mount is not served any more; return when it is known that nothing of it is left."""
        claim = self.claims.get(mounted.mount_id)
        if claim is None:
            self._recorder.left(mounted.mount_id)
        elif self._orphans is not None:
            # It had come back, and died before lockd could fence it.
            await self._orphans.see_off(claim)
