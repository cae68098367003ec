/* Where the shim sits: each request on its way in, and each reply on its way out. */
#include "shim.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct shim shim = {.fd = -1};

/* Requests that must be known again when they are answered.  Few at any time, so a search from end to end will do. */

enum kind { UNKNOWN, INIT, OPENING, HANDED_OVER };

static struct pending {
    uint64_t unique;
    enum kind kind;
} *pending;
static size_t used, room;

static bool remember(uint64_t unique, enum kind kind)
{
    if (used == room) {
        size_t more = room ? 2 * room : 64;
        struct pending *moved = realloc(pending, more * sizeof *pending);
        if (!moved)
            return false;
        pending = moved;
        room = more;
    }
    pending[used++] = (struct pending){unique, kind};
    return true;
}

static struct pending *find(uint64_t unique)
{
    for (size_t i = 0; i < used; i++)
        if (pending[i].unique == unique)
            return &pending[i];
    return NULL;
}

static enum kind take(uint64_t unique)
{
    struct pending *found = find(unique);
    if (!found)
        return UNKNOWN;
    enum kind kind = found->kind;
    *found = pending[--used];
    return kind;
}

void shim_forget_all(void)
{
    used = 0;
}

/* Requests. */

static int answer(uint64_t unique, int error, const void *data, size_t size)
{
    if (shim.fd < 0)
        return ENODEV; /* closed: the number may be another file's by now */
    struct out_header out = {(uint32_t)(sizeof out + size), -error, unique};
    struct iovec iov[2] = {{&out, sizeof out}, {(void *)data, size}};
    return writev(shim.fd, iov, size ? 2 : 1) < 0 ? errno : 0;
}

int shim_reply(uint64_t unique, int error, const void *data, size_t size)
{
    struct pending *found = find(unique);
    if (!found || found->kind != HANDED_OVER)
        return ESRCH;
    take(unique);
    return answer(unique, error, data, size);
}

static void hand_over(const struct in_header *in, const void *body, size_t size)
{
    if (!remember(in->unique, HANDED_OVER)) {
        answer(in->unique, ENOMEM, NULL, 0);
        return;
    }
    PyGILState_STATE gil = PyGILState_Ensure(); /* a formality: pyfuse3 holds it */
    PyObject *done = PyObject_CallFunction(
        shim.callback, "IKKIIIy#", in->opcode, (unsigned long long)in->unique, (unsigned long long)in->nodeid,
        in->uid, in->gid, in->pid, body, (Py_ssize_t)size);
    if (!done) {
        PyErr_WriteUnraisable(shim.callback);
        shim_reply(in->unique, EIO, NULL, 0);
    }
    Py_XDECREF(done);
    PyGILState_Release(gil);
}

static uint32_t word(const void *body, size_t size, size_t offset)
{
    uint32_t value = 0;
    if (offset + sizeof value <= size)
        memcpy(&value, (const char *)body + offset, sizeof value);
    return value;
}

/* pyfuse3 does not show its handlers which request they serve, nor the bits of FUSE_HANDLE_KILLPRIV_V2. */
static void note(const struct in_header *in, const void *body, size_t size)
{
    shim.opcode = in->opcode;
    shim.unique = in->unique;
    switch (in->opcode) {
    case OP_SETATTR: {
        /* One that sets nothing comes before a write, for the bits alone. */
        uint32_t valid = word(body, size, SETATTR_VALID);
        shim.kill_suidgid = valid & SETATTR_KILL_SUIDGID || !(valid & ~(SETATTR_FH | SETATTR_LOCKOWNER));
        break;
    }
    case OP_OPEN:
        shim.kill_suidgid = word(body, size, OPEN_OPEN_FLAGS) & OPEN_KILL_SUIDGID;
        break;
    case OP_CREATE:
        shim.kill_suidgid = word(body, size, CREATE_OPEN_FLAGS) & OPEN_KILL_SUIDGID;
        break;
    case OP_WRITE:
        shim.kill_suidgid = word(body, size, WRITE_WRITE_FLAGS) & WRITE_KILL_SUIDGID;
        break;
    default:
        shim.kill_suidgid = false;
    }
}

/* What the kernel offers; the request is also what a daemon needs that resumes the session. */
static void note_init(const void *request, size_t size)
{
    shim.init_size = size < sizeof shim.init ? size : sizeof shim.init;
    memcpy(shim.init, request, shim.init_size);
    struct init_in in = {0};
    memcpy(&in, shim.init + sizeof(struct in_header), sizeof in);
    shim.offered = in.flags;
    if (in.flags & INIT_EXT)
        shim.offered |= (uint64_t)in.flags2 << 32;
}

/* Look at a request; return whether libfuse is to get it. */
static bool inspect(const struct in_header *in, size_t got)
{
    const void *body = in + 1;
    size_t size = got - sizeof *in;
    enum kind kind = UNKNOWN;
    switch (in->opcode) {
    case OP_INIT:
        note_init(in, got);
        kind = INIT;
        break;
    case OP_OPEN:
    case OP_CREATE:
        kind = OPENING;
        break;
    case OP_INTERRUPT: {
        /* libfuse does not know our requests: it would answer EAGAIN, the kernel would send the interrupt again, and
         * so on in a circle.  An interrupt that nobody answers is dropped when its request is. */
        uint64_t unique = 0;
        memcpy(&unique, body, size < sizeof unique ? size : sizeof unique);
        struct pending *found = find(unique);
        return !found || found->kind != HANDED_OVER;
    }
    default:
        if (in->opcode < 64 && shim.opcodes >> in->opcode & 1) {
            hand_over(in, body, size);
            return false;
        }
    }
    if (kind != UNKNOWN && !remember(in->unique, kind)) {
        answer(in->unique, ENOMEM, NULL, 0);
        return false;
    }
    note(in, body, size);
    return true;
}

/* pyfuse3 reads with the GIL held once trio has found the device readable.  By then the request may be gone, with the
 * caller that was killed; so the device is non-blocking.  Of what this can return pyfuse3 goes on only after EINTR. */
static ssize_t read_request(int fd, void *buf, size_t size, void *userdata)
{
    (void)userdata;
    ssize_t got;
    if (shim.resuming && !shim.agreed && shim.init_size <= size) {
        got = (ssize_t)shim.init_size;
        memcpy(buf, shim.init, shim.init_size);
    } else {
        got = read(fd, buf, size);
    }
    if (got < 0 && errno == EAGAIN)
        errno = EINTR;
    if (got < (ssize_t)sizeof(struct in_header) || inspect(buf, (size_t)got))
        return got;
    errno = EINTR;
    return -1;
}

/* Replies. */

static void patch_init(struct init_out *out, size_t size)
{
    uint64_t flags = out->flags;
    if (size >= sizeof *out) {
        flags |= (uint64_t)out->flags2 << 32 | (shim.flags & shim.offered);
        if (flags >> 32)
            flags |= INIT_EXT;
        out->flags = (uint32_t)flags;
        out->flags2 = (uint32_t)(flags >> 32);
        if (flags & INIT_PASSTHROUGH)
            /* One below ours; with 2, for a stacked filesystem below, ours could not lie below an overlayfs. */
            out->max_stack_depth = 1;
        if (shim.max_background)
            out->max_background = shim.max_background;
        if (shim.congestion_threshold)
            out->congestion_threshold = shim.congestion_threshold;
    }
    shim.granted = flags;
    shim.agreed = true;
}

/* A handler's fh is `index | backing_id << 32`; the kernel gets and gives back the index alone. */
static void patch_open(void *reply)
{
    struct open_out out;
    memcpy(&out, reply, sizeof out);
    uint32_t backing_id = (uint32_t)(out.fh >> 32);
    if (backing_id == 0 || backing_id > INT32_MAX)
        return;
    out.fh &= UINT32_MAX;
    if (shim.granted & INIT_PASSTHROUGH) {
        /* The kernel takes few flags beside this one, and EIO is what the caller sees (FOPEN_PASSTHROUGH_MASK). */
        out.open_flags = (out.open_flags & OPEN_NOFLUSH) | OPEN_PASSTHROUGH;
        out.backing_id = (int32_t)backing_id;
    }
    memcpy(reply, &out, sizeof out);
}

static ssize_t write_reply(int fd, struct iovec *iov, int count, void *userdata)
{
    (void)userdata;
    const struct out_header *out = iov[0].iov_base;
    enum kind kind = out->unique ? take(out->unique) : UNKNOWN;
    union {
        struct init_out init;
        char bytes[ENTRY_OUT_SIZE + sizeof(struct open_out)];
    } body = {0};
    if (out->error == 0 && count == 2 && iov[1].iov_len <= sizeof body) {
        size_t size = iov[1].iov_len;
        struct iovec patched[2] = {iov[0], {&body, size}};
        memcpy(&body, iov[1].iov_base, size);
        if (kind == INIT) {
            patch_init(&body.init, size);
            return shim.resuming ? (ssize_t)out->len : writev(fd, patched, 2);
        }
        if (kind == OPENING && size >= sizeof(struct open_out)) {
            patch_open(body.bytes + size - sizeof(struct open_out));
            return writev(fd, patched, 2);
        }
    }
    return writev(fd, iov, count);
}

const struct custom_io shim_io = {.writev = write_reply, .read = read_request};
