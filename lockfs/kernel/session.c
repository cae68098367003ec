/* How the shim gets between pyfuse3 and libfuse.
 *
 * pyfuse3 calls the functions of libfuse by name.  This module has four of these names, too, and, once it is loaded with
 * global symbols before pyfuse3 is, the dynamic linker takes ours:
 *
 *   fuse_session_mount        does INIT as well, so that the mount serves when pyfuse3.init() returns;
 *   fuse_session_fd           is what pyfuse3 waits for: that there are requests for it;
 *   fuse_session_receive_buf  gives it the next of them;
 *   fuse_session_destroy      ends it.
 *
 * Every version of pyfuse3 and libfuse 3 has these.  libfuse's own way in, fuse_session_custom_io, is refused by builds of
 * libfuse since 3.18.3, unless configured otherwise. */
#include "shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct fuse_session session;

static struct {
    int (*mount)(session *, const char *);
    int (*receive_buf)(session *, struct session_buf *);
    void (*destroy)(session *);
    void (*process_buf)(session *, const struct session_buf *);
    int (*fd)(session *);
    int (*exited)(session *);
    void (*exit)(session *);
} real;

#define MOST_AT_ONCE 64 /* requests that go to Python in one turn of its event loop */

static char failure[200];

const char *shim_failure(void)
{
    return failure;
}

static int fail(const char *what, int error)
{
    snprintf(failure, sizeof failure, "%s%s%s", what, error ? ": " : "", error ? strerror(error) : "");
    return -1;
}

/* Find libfuse's functions by way of the file of pyfuse3: a search there finds the very library that it was linked with,
 * whatever that is called, and does not find ours. */
const char *shim_bind(const char *path)
{
    void *pyfuse3 = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!pyfuse3)
        return "pyfuse3 itself, which is not loaded";
    const struct {
        const char *name;
        void *where;
    } wanted[] = {
        {"fuse_session_mount", &real.mount},
        {"fuse_session_receive_buf", &real.receive_buf},
        {"fuse_session_destroy", &real.destroy},
        {"fuse_session_process_buf", &real.process_buf},
        {"fuse_session_fd", &real.fd},
        {"fuse_session_exited", &real.exited},
        {"fuse_session_exit", &real.exit},
    };
    const char *missing = NULL;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = dlsym(pyfuse3, wanted[i].name);
        memcpy(wanted[i].where, &found, sizeof found);
        if (!found)
            missing = wanted[i].name;
    }
    dlclose(pyfuse3);
    return missing;
}

/* INIT ------------------------------------------------------------------------------------------------------------- */

/* Have libfuse answer a request, and take the answer: for that time its descriptor stands for a pipe.  Return the length
 * of the answer, or -1. */
static ssize_t ask_libfuse(session *se, int fd, void *request, size_t size, void *reply, size_t reply_room)
{
    int pipe[2], flags = fcntl(fd, F_GETFD), device = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (flags < 0 || device < 0 || pipe2(pipe, O_CLOEXEC | O_NONBLOCK) < 0) {
        int error = errno;
        if (device >= 0)
            close(device);
        return fail("cannot take libfuse's answer to INIT", error);
    }
    ssize_t got = -1;
    if (dup3(pipe[1], fd, O_CLOEXEC) >= 0) {
        struct session_buf buf = {.size = size, .mem = request};
        real.process_buf(se, &buf);
        if (dup3(device, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) >= 0)
            got = read(pipe[0], reply, reply_room);
    }
    if (got < 0)
        fail("libfuse did not answer INIT", errno);
    close(device);
    close(pipe[0]);
    close(pipe[1]);
    return got;
}

/* Make an answer to INIT what `configure` asked for. */
static void patch_init(struct init_out *out)
{
    struct init_in in = {0};
    memcpy(&in, shim.init + sizeof(struct in_header), sizeof in);
    uint64_t offered = in.flags | (in.flags & INIT_EXT ? (uint64_t)in.flags2 << 32 : 0);
    uint64_t flags = out->flags | (uint64_t)out->flags2 << 32 | (shim.flags & offered);
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
    shim.granted = flags;
    shim.buffer_size = (out->max_write > 4096 ? out->max_write : 4096) + HEADER_ROOM;
    if (shim.buffer_size < MIN_READ_BUFFER)
        shim.buffer_size = MIN_READ_BUFFER;
}

/* The kernel's INIT has waited since mount(2).  Answered here, the mount serves when pyfuse3.init() returns. */
static int shake_hands(session *se, int fd)
{
    alignas(8) unsigned char request[MIN_READ_BUFFER];
    ssize_t size;
    if (shim.resuming) {
        size = (ssize_t)shim.init_size;
        memcpy(request, shim.init, shim.init_size);
    } else {
        size = read(fd, request, sizeof request);
        if (size < 0 && errno == EAGAIN)
            return fail("the kernel has sent no INIT request: /dev/fuse is not mounted, or was answered before", 0);
        if (size < 0)
            return fail("cannot read the INIT request", errno);
        shim.init_size = (size_t)size < sizeof shim.init ? (size_t)size : sizeof shim.init;
        memset(shim.init, 0, sizeof shim.init); /* kernels before 5.17 send less of it */
        memcpy(shim.init, request, shim.init_size);
    }
    if (size < (ssize_t)(sizeof(struct in_header) + offsetof(struct init_in, flags2)))
        return fail("what came first is no INIT request", 0);
    struct {
        struct out_header header;
        struct init_out body;
    } reply = {0};
    ssize_t length = ask_libfuse(se, fd, request, (size_t)size, &reply, sizeof reply);
    if (length < 0)
        return -1;
    bool agreed = length == sizeof reply && reply.header.error == 0 && !real.exited(se);
    if (agreed)
        patch_init(&reply.body);
    if (!shim.resuming && write(fd, &reply, (size_t)length) < 0)
        return fail("cannot answer the INIT request", errno);
    return agreed ? 0 : fail("libfuse and the kernel do not agree on a protocol", 0);
}

/* What pyfuse3 calls ----------------------------------------------------------------------------------------------- */

static int hook_mount(session *se, const char *mountpoint)
{
    failure[0] = 0;
    if (!real.mount)
        return fail("lockfs.kernel was not bound to libfuse", 0);
    int status = real.mount(se, mountpoint);
    if (status != 0 || !shim.armed)
        return status;
    shim.armed = false;
    int fd = real.fd(se);
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return fail("the mountpoint stands for no open /dev/fuse", errno);
    if (shake_hands(se, fd) < 0)
        return -1;
    shim_forget_all();
    int error = readers_start(fd);
    if (error)
        return fail("cannot begin to read requests", error);
    shim.fd = fd;
    return 0;
}

static int hook_fd(session *se)
{
    return shim.fd < 0 ? real.fd(se) : inbox_event();
}

/* Returns the size of a request, 0 at the end, or a negative errno.  Of the errors pyfuse3 goes on only after EINTR: there
 * is nothing now. */
static int hook_receive_buf(session *se, struct session_buf *buf)
{
    if (shim.fd < 0)
        return real.receive_buf(se, buf);
    for (int i = 0; i < MOST_AT_ONCE && !real.exited(se); i++) {
        void *bytes = NULL;
        ssize_t got = readers_take(&bytes);
        if (got == -ENODEV || got == -ECONNABORTED) {
            real.exit(se); /* unmounted, or cut off */
            return 0;
        }
        if (got <= 0)
            return got ? (int)got : -EINTR;
        if (shim_inspect(bytes, (size_t)got)) {
            free(buf->mem);
            buf->mem = bytes; /* freed by pyfuse3 */
            buf->size = (size_t)got;
            buf->flags = 0;
            return (int)got;
        }
        free(bytes);
    }
    return real.exited(se) ? 0 : -EINTR;
}

static void hook_destroy(session *se)
{
    if (shim.fd >= 0 && readers_stop())
        gate_remove_all();
    shim.fd = -1;
    if (real.destroy)
        real.destroy(se);
}

/* Aliases, since the address of a global symbol of ours might be that of another library's namesake. */
#define EXPORTED(function) __attribute__((visibility("default"), alias(#function)))
EXPORTED(hook_mount) int fuse_session_mount(session *se, const char *mountpoint);
EXPORTED(hook_fd) int fuse_session_fd(session *se);
EXPORTED(hook_receive_buf) int fuse_session_receive_buf(session *se, struct session_buf *buf);
EXPORTED(hook_destroy) void fuse_session_destroy(session *se);

bool shim_interposed(void)
{
    const struct {
        const char *name;
        uintptr_t ours;
    } wanted[] = {
        {"fuse_session_mount", (uintptr_t)hook_mount},
        {"fuse_session_fd", (uintptr_t)hook_fd},
        {"fuse_session_receive_buf", (uintptr_t)hook_receive_buf},
        {"fuse_session_destroy", (uintptr_t)hook_destroy},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if ((uintptr_t)dlsym(RTLD_DEFAULT, wanted[i].name) != wanted[i].ours)
            return false;
    return true;
}
