/* How the shim gets between pyfuse3 and libfuse.
 *
 * pyfuse3 calls `fuse_session_mount`.  This module has a function of that name too, and, once it is loaded with global
 * symbols before pyfuse3 is, the dynamic linker takes ours.  Every pyfuse3 calls this one; `fuse_session_new` is called
 * `fuse_session_new_versioned` since libfuse 3.17. */
#include "shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct fuse_session session;

static struct {
    int (*mount)(session *, const char *);
    void (*destroy)(session *);
    int (*fd)(session *);
    int (*exited)(session *);
    int (*receive_buf)(session *, struct session_buf *);
    void (*process_buf)(session *, const struct session_buf *);
    int (*custom_io)(session *, const struct custom_io *, int fd);
    int (*custom_io_317)(session *, const struct custom_io *, size_t size, int fd);
} real;

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
        {"fuse_session_destroy", &real.destroy},
        {"fuse_session_fd", &real.fd},
        {"fuse_session_exited", &real.exited},
        {"fuse_session_receive_buf", &real.receive_buf},
        {"fuse_session_process_buf", &real.process_buf},
        {"fuse_session_custom_io", &real.custom_io},
    };
    const char *missing = NULL;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = dlsym(pyfuse3, wanted[i].name);
        memcpy(wanted[i].where, &found, sizeof found);
        if (!found)
            missing = wanted[i].name;
    }
    void *found = dlsym(pyfuse3, "fuse_session_custom_io_317");
    memcpy(&real.custom_io_317, &found, sizeof found);
    dlclose(pyfuse3);
    return missing;
}

static int install(session *se)
{
    int fd = real.fd(se);
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return fail("the mountpoint stands for no open /dev/fuse", errno);
    /* The two differ in how they learn the size of custom_io; the older reads as far as splice_send. */
    int error = real.custom_io_317 ? real.custom_io_317(se, &shim_io, offsetof(struct custom_io, clone_fd), fd)
                                   : real.custom_io(se, &shim_io, fd);
    if (error)
        return fail("libfuse refused the custom I/O", -error);
    shim.fd = fd;
    shim.agreed = false;
    shim.granted = 0;
    shim_forget_all();
    return 0;
}

/* The kernel's INIT has waited since mount(2).  Answered here, the mount serves when pyfuse3.init() returns. */
static int shake_hands(session *se)
{
    struct session_buf buf = {0};
    int got = real.receive_buf(se, &buf);
    if (got > 0)
        real.process_buf(se, &buf);
    free(buf.mem);
    if (got == -EINTR)
        return fail("the kernel has sent no INIT request: /dev/fuse is not mounted, or was answered before", 0);
    if (got <= 0)
        return fail("cannot read the INIT request", got < 0 ? -got : ENODEV);
    if (!shim.agreed || real.exited(se))
        return fail("libfuse and the kernel do not agree on a protocol", 0);
    return 0;
}

static int hook_mount(session *se, const char *mountpoint)
{
    failure[0] = 0;
    if (!real.mount)
        return fail("lockfs.kernel was not bound to libfuse", 0);
    int status = real.mount(se, mountpoint);
    if (status != 0 || !shim.armed)
        return status;
    shim.armed = false;
    if (install(se) == 0 && shake_hands(se) == 0)
        return 0;
    shim.fd = -1;
    return -1;
}

static void hook_destroy(session *se)
{
    shim.fd = -1;
    if (real.destroy)
        real.destroy(se);
}

/* Aliases, since the address of a global symbol of ours might be that of another library's namesake. */
__attribute__((visibility("default"), alias("hook_mount"))) int fuse_session_mount(session *se, const char *mountpoint);
__attribute__((visibility("default"), alias("hook_destroy"))) void fuse_session_destroy(session *se);

bool shim_interposed(void)
{
    int (*found)(session *, const char *) = NULL;
    void *symbol = dlsym(RTLD_DEFAULT, "fuse_session_mount");
    memcpy(&found, &symbol, sizeof found);
    return found == hook_mount;
}
