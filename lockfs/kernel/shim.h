/* What the three files of the shim know of each other. */
#ifndef LOCKFS_SHIM_H
#define LOCKFS_SHIM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "protocol.h"

/* The one session of this process (pyfuse3 has no more).  Guarded by the GIL, which pyfuse3 holds whenever it reads a
 * request or writes a reply; only notifications are written without it, and they touch nothing here. */
struct shim {
    /* What `configure` asked for. */
    bool armed;            /* the next session is ours */
    PyObject *callback;    /* gets the requests below */
    uint64_t opcodes;      /* the opcodes to be handed over, as a bit mask */
    uint64_t flags;        /* INIT flags to be set if the kernel offers them */
    uint16_t max_background, congestion_threshold; /* 0: as libfuse has it */

    /* The session, once it is mounted. */
    int fd;                /* /dev/fuse; -1: there is no session */
    bool agreed;           /* INIT was answered */
    bool resuming;         /* the kernel has its answer to INIT from a daemon that died */
    uint64_t offered, granted; /* INIT flags */
    unsigned char init[256];   /* the INIT request; longer than any so far */
    size_t init_size;

    /* The request that was passed on last. */
    uint32_t opcode;
    uint64_t unique;
    bool kill_suidgid;
};

extern struct shim shim;
extern const struct custom_io shim_io;

/* hooks.c */
void shim_forget_all(void);
int shim_reply(uint64_t unique, int error, const void *data, size_t size); /* 0, or an errno; ESRCH: not ours */

/* session.c */
const char *shim_bind(const char *path); /* NULL, or what is missing */
bool shim_interposed(void);
const char *shim_failure(void);

#endif
