/* Each request is looked at before pyfuse3 gets it: some go to Python, and are answered from there. */
#include "shim.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

struct shim shim = {.fd = -1};

/* The requests that were handed over and are not answered yet.  Few at any time, so a search from end to end will do. */
static uint64_t *pending;
static size_t used, room;

static bool remember(uint64_t unique)
{
    if (used == room) {
        size_t more = room ? 2 * room : 64;
        uint64_t *moved = realloc(pending, more * sizeof *pending);
        if (!moved)
            return false;
        pending = moved;
        room = more;
    }
    pending[used++] = unique;
    return true;
}

static uint64_t *find(uint64_t unique)
{
    for (size_t i = 0; i < used; i++)
        if (pending[i] == unique)
            return &pending[i];
    return NULL;
}

void shim_forget_all(void)
{
    used = 0;
}

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
    uint64_t *found = find(unique);
    if (!found)
        return ESRCH;
    *found = pending[--used];
    return answer(unique, error, data, size);
}

static void hand_over(const struct in_header *in, const void *body, size_t size)
{
    if (!remember(in->unique)) {
        answer(in->unique, ENOMEM, NULL, 0);
        return;
    }
    PyObject *done = PyObject_CallFunction(
        shim.callback, "IKKIIIy#", in->opcode, (unsigned long long)in->unique, (unsigned long long)in->nodeid,
        in->uid, in->gid, in->pid, body, (Py_ssize_t)size);
    if (!done) {
        PyErr_WriteUnraisable(shim.callback);
        shim_reply(in->unique, EIO, NULL, 0);
    }
    Py_XDECREF(done);
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
    shim.kill_suidgid = false;
    if (in->opcode == OP_SETATTR) {
        /* One that sets nothing comes before a write, for the bits alone. */
        uint32_t valid = word(body, size, SETATTR_VALID);
        shim.kill_suidgid = valid & SETATTR_KILL_SUIDGID || !(valid & ~(SETATTR_FH | SETATTR_LOCKOWNER));
    } else if (in->opcode == OP_WRITE) {
        shim.kill_suidgid = word(body, size, WRITE_FLAGS) & WRITE_KILL_SUIDGID;
    }
}

bool shim_inspect(const struct in_header *in, size_t got)
{
    const void *body = in + 1;
    size_t size = got - sizeof *in;
    if (in->opcode < 64 && shim.opcodes >> in->opcode & 1) {
        hand_over(in, body, size);
        return false;
    }
    note(in, body, size);
    return true;
}
