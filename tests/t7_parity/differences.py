"""In what a mount is known to differ from the directory it shows, and why.  Everything else must be the same."""

from __future__ import annotations

from collections.abc import Sequence

from t7_parity.twins import Difference

DIFFERENCES: Sequence[Difference] = (
    Difference(
        "pyfuse3 has no handler for FUSE_TMPFILE, so the kernel says EOPNOTSUPP",
        ["opening.tmpfile[dir-O_WRONLY]", "opening.tmpfile[dir-O_RDWR]"],
        ["O_TMPFILE*"],
    ),
    Difference(
        "the kernel does not know the largest file size of the storage, so a seek beyond it is not refused",
        [f"data.extreme_offsets[{offset}]" for offset in (2**63 - 1, 2**63 - 11, 2**44, 2**50)],
        ["lseek", "write", "size", "tree: b'it' *"],
    ),
    Difference(
        "the kernel does not know the largest file size of the storage, so a seek beyond it is not refused",
        [f"data.lseek[0-{2**63 - 1}]"],
        ["lseek", "read", "position"],
    ),
    Difference(
        "FUSE in the kernel knows allocation, punching and zeroing only",
        ["data.allocation[collapse]", "data.allocation[insert]"],
        ["fallocate", "beyond the end", "stat", "content", "tree: b'it' *"],
    ),
    Difference("pyfuse3 has no handler for FUSE_IOCTL", ["data.ioctls"], ["FS_IOC_*"]),
    Difference(
        "who holds an image's lock caches its attributes, since nobody else may change the image",
        ["data.growth_behind_the_mount[0o2]"],
        ["end*", "content after*", "seen from behind", "a new descriptor", "fstat", "tree: b'it' *"],
    ),
    Difference(
        "FUSE in the kernel leaves the set-group-id bit of a file that its group may not execute alone",
        [
            f"attributes.suid_and_sgid_after[{how}-1000]"
            for how in (
                "by_write", "by_truncate", "by_same_truncate", "by_ftruncate", "by_open_truncate", "by_append", "by_copy",
            )
        ],
        ["2767 then", "6767 then", "tree: b'2767' attributes", "tree: b'6767' attributes"],
    ),
    Difference(
        "FUSE in the kernel leaves the set-group-id bit of a file that its group may not execute alone",
        ["attributes.chown[file-owner-outside-group-0o2745]", "attributes.chown[fifo-owner-outside-group-0o2745]"],
        ["*:* then", "tree: *"],
    ),
    Difference(
        "on FUSE the kernel checks rights and kinds before the storage can say that it is read-only",
        ["storage.read_only[*]"],
        [
            "open *", "mk*", "symlink", "link", "rename", "unlink", "rmdir", "chmod", "chown", "*xattr",
            "access for writing",
        ],
    ),
    Difference(
        "on FUSE the kernel checks kinds before the storage can say that a file is immutable or append-only",
        ["storage.protected[*]"],
        ["rmdir", "unlink", "replace"],
    ),
)  # fmt: skip

GATED_ONLY: Sequence[Difference] = (
    Difference(
        "the kernel asks for no alignment of direct I/O on FUSE",
        ["data.direct[*-100]", "data.direct[1000-*]", "data.direct[4097-*]"],
        ["write", "read", "content", "tree: b'it' content", "tree: b'it' attributes"],
    ),
    Difference(
        "the kernel asks for no alignment of direct I/O on FUSE",
        [
            "opening.extra_flags[file-*-O_DIRECT]", "opening.extra_flags[symlink-*-O_DIRECT]",
            "opening.extra_flags[dangling-O_WRONLY-O_DIRECT]", "opening.extra_flags[dangling-O_RDWR-O_DIRECT]",
            "opening.extra_flags[missing-O_WRONLY-O_DIRECT]", "opening.extra_flags[missing-O_RDWR-O_DIRECT]",
        ],
        ["*O_DIRECT* read", "*O_DIRECT* write", "*O_DIRECT* offset", "*O_DIRECT* fstat", "tree: *"],
    ),
    Difference(
        "the kernel does not ask the daemon to read an empty file, so its time of access stays",
        ["attributes.times_after[by_read-0]"],
        ["tree: b'd/it' st_atime_ns"],
    ),
)  # fmt: skip
"""What comes on top where data goes through the daemon."""

WITHOUT_MODULE: Sequence[Difference] = (
    Difference(
        "pyfuse3 has no handlers for FUSE_FALLOCATE, so the kernel says EOPNOTSUPP",
        [
            *(f"data.allocation[{how}]" for how in ("allocate", "keep", "punch", "zero", "zero-keep")),
            "data.wrong_direction[0o1]", "data.wrong_direction[0o2]",
        ],
        ["fallocate", "beyond the end", "stat", "content", "tree: b'it' *"],
    ),
    Difference(
        "pyfuse3 has no handler for FUSE_LSEEK, so to the kernel each file is all data",
        [f"data.seek_data_and_hole[{shape}]" for shape in ("islands", "hole-then-data", "data-then-hole")],
        ["SEEK_*"],
    ),
    Difference(
        "pyfuse3 does not ask for FUSE_DONT_MASK, so the umask counts in spite of a default ACL",
        [
            f"creating.modes[by_{how}-{mask}-{parent}-{uid}]"
            for how in ("open", "mknod", "mkfifo", "mkdir")
            for mask in ("0o22", "0o27", "0o77")
            for parent in ("acl", "setgid+acl")
            for uid in (0, 1000)
        ],
        ["stat *", "tree: *"],
    ),
)
"""What comes on top of these, where the extension is missing."""
