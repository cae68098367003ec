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
    OP_SETATTR = 4,
    OP_OPEN = 14,
    OP_WRITE = 16,
    OP_INIT = 26,
    OP_CREATE = 35,
    OP_INTERRUPT = 36,
};

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

#define OPEN_NOFLUSH (1u << 5)
#define OPEN_PASSTHROUGH (1u << 7)

struct open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

#define ENTRY_OUT_SIZE 128 /* struct fuse_entry_out, which stands before struct fuse_open_out in a reply to CREATE */

/* Where a request says that the suid and sgid bits of the file must go: the offset of a word in its body, and the bit. */
#define SETATTR_VALID 0 /* fuse_setattr_in.valid */
#define SETATTR_FH (1u << 6)
#define SETATTR_LOCKOWNER (1u << 9)
#define SETATTR_KILL_SUIDGID (1u << 11)
#define OPEN_OPEN_FLAGS 4 /* fuse_open_in.open_flags */
#define CREATE_OPEN_FLAGS 12 /* fuse_create_in.open_flags */
#define OPEN_KILL_SUIDGID (1u << 0)
#define WRITE_WRITE_FLAGS 20 /* fuse_write_in.write_flags */
#define WRITE_KILL_SUIDGID (1u << 2)

/* libfuse: include/fuse_lowlevel.h and fuse_common.h, 3.14 to 3.18. */
struct fuse_session;

struct custom_io {
    ssize_t (*writev)(int fd, struct iovec *iov, int count, void *userdata);
    ssize_t (*read)(int fd, void *buf, size_t size, void *userdata);
    void *splice_receive, *splice_send; /* absent: libfuse reads and writes */
    void *clone_fd;                     /* since 3.17 */
};

struct session_buf {
    size_t size;
    int flags;
    void *mem;
    int fd;
    off_t pos;
    size_t mem_size; /* since 3.17 */
    char later[64];  /* for members that a later version may append */
};

#endif
