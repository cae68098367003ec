"""What is wrong with a record, in sanlock's codes."""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """sanlock's return codes (its sanlock_rv.h); those of the system (-ENOENT and so on) stand beside them."""

    GENERAL = -201
    IO_TIMEOUT = -202
    WATCHDOG = -203
    DBLOCK_READ = -210
    DBLOCK_WRITE = -211
    DBLOCK_LVER = -212
    DBLOCK_MBAL = -213
    DBLOCK_CHECKSUM = -214
    LEADER_READ = -220
    LEADER_WRITE = -221
    LEADER_DIFF = -222
    LEADER_MAGIC = -223
    LEADER_VERSION = -224
    LEADER_SECTOR_SIZE = -225
    LEADER_LOCKSPACE = -226
    LEADER_RESOURCE = -227
    LEADER_NUM_HOSTS = -228
    LEADER_CHECKSUM = -229
    SIZES = -230
    HOST_ID = -231
    ACQUIRE_LVER = -240
    ACQUIRE_LOCKSPACE = -241
    ACQUIRE_ID_DISK = -242
    ACQUIRE_ID_LIVE = -243
    ACQUIRE_OWNED = -244
    ACQUIRE_OTHER = -245
    ACQUIRE_SHARED_RETRY = -246
    ACQUIRE_OWNED_NOWAIT = -247
    RELEASE_LVER = -250
    RELEASE_OWNER = -251
    RENEW_OWNER = -260
    RENEW_DIFF = -261
    HOST_ID_BUSY = -262
    REQUEST_MAGIC = -270
    REQUEST_VERSION = -271
    REQUEST_OLD = -272
    REQUEST_LVER = -273
    RINDEX_MAGIC = -274
    RINDEX_VERSION = -275
    RINDEX_LOCKSPACE = -276
    RINDEX_OFFSET = -277
    RINDEX_DIFF = -278


class BadRecord(Exception):
    """A record on the disk that must not be believed.  `code` is sanlock's, `what` says it in words."""

    def __init__(self, code: Code, what: str) -> None:
        super().__init__(f"{what} (sanlock's code {int(code)})")
        self.code = code
        self.what = what
