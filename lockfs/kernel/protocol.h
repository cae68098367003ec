/* The little of the FUSE protocol and of libfuse's ABI that the shim touches.
 *
 * Spelled out, since the headers of the distributions this runs on are older than passthrough, and so that one build
 * serves every libfuse.  Kernel part: include/uapi/linux/fuse.h of Linux 6.18, protocol 7.45.  All of it is ABI. */
#ifndef LOCKFS_PROTOCOL_H
#define LOCKFS_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum opcode {
    OP_GETATTR = 3,
    OP_SETATTR = 4,
    OP_READ = 15,
    OP_WRITE = 16,
    OP_FSYNC = 20,
    OP_INTERRUPT = 36,
};

#define MIN_READ_BUFFER 8192 /* what the kernel demands of a read, if its max_write is not larger */
#define HEADER_ROOM 4096     /* for all that comes with the data of a WRITE */

struct in_header {
    uint32_t len;
    uint32_t opcode;
    uint64_t unique;
    uint64_t nodeid;
    uint32_t uid, gid, pid;
    uint32_t padding;
};

struct out_header {
    uint32_t len;
    int32_t error;
    uint64_t unique; /* 0: a notification, and error is its code */
};

#define INIT_EXT (UINT64_C(1) << 30) /* flags2 is valid */
#define INIT_PASSTHROUGH (UINT64_C(1) << 37)

struct init_in {
    uint32_t major, minor;
    uint32_t max_readahead;
    uint32_t flags, flags2;
    uint32_t unused[11];
};

struct init_out {
    uint32_t major, minor;
    uint32_t max_readahead;
    uint32_t flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write;
    uint32_t time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2;
    uint32_t max_stack_depth; /* since 7.40; what an older libfuse has here is zero */
    uint32_t unused[6];
};

/* Where a request says that the suid and sgid bits of the file must go: the offset of a word in its body, and the bit. */
#define SETATTR_VALID 0 /* fuse_setattr_in.valid */
#define SETATTR_FH (1u << 6)
#define SETATTR_LOCKOWNER (1u << 9)
#define SETATTR_KILL_SUIDGID (1u << 11)
#define WRITE_FLAGS 20 /* fuse_write_in.write_flags */
#define WRITE_KILL_SUIDGID (1u << 2)

struct io_in { /* of READ and WRITE; after that of WRITE comes the data */
    uint64_t fh, offset;
    uint32_t size, io_flags;
    uint64_t lock_owner;
    uint32_t flags, padding; /* flags: as of open(2), at this moment */
};

#define IO_HEADERS (sizeof(struct in_header) + sizeof(struct io_in))

struct write_out {
    uint32_t size, padding;
};

struct getattr_in {
    uint32_t flags, padding;
    uint64_t fh;
};

#define GETATTR_FH 1u

struct attr_out {
    uint64_t valid; /* seconds for which it may be trusted */
    uint32_t valid_nsec, padding;
    uint64_t ino, size, blocks, atime, mtime, ctime;
    uint32_t atime_nsec, mtime_nsec, ctime_nsec;
    uint32_t mode, nlink, uid, gid, rdev, blksize, flags;
};

#define FSYNC_IN_SIZE 16 /* fuse_fsync_in: the fh as above, then a word of flags */
#define FSYNC_DATA_ONLY 1u

/* libfuse: include/fuse_common.h, 3.0 to 3.18. */
struct fuse_session;

struct session_buf {
    size_t size;
    int flags;
    void *mem;
    /* In a buffer of pyfuse3's, what follows is as long as its libfuse had it; in one of ours, long enough. */
    char rest[96];
};

#endif
