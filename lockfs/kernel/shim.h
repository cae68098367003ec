/* What the files of the shim know of each other. */
#ifndef LOCKFS_SHIM_H
#define LOCKFS_SHIM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "protocol.h"

/* The one session of this process (pyfuse3 has no more).  Guarded by the GIL, which pyfuse3 holds whenever it calls;
 * `buffer_size` does not change while there are readers. */
struct shim {
    /* What `configure` asked for. */
    bool armed;         /* the next session is ours */
    PyObject *callback; /* gets the requests below */
    uint64_t opcodes;   /* the opcodes to be handed over, as a bit mask */
    uint64_t flags;     /* INIT flags to be set if the kernel offers them */
    uint16_t max_background, congestion_threshold; /* 0: as libfuse has it */
    bool resuming;      /* the kernel has its answer to INIT from a daemon that died */

    /* The session, once it is mounted. */
    int fd;                  /* /dev/fuse; -1: there is no session of ours */
    uint64_t granted;        /* INIT flags */
    unsigned char init[256]; /* the INIT request; longer than any so far */
    size_t init_size;
    size_t buffer_size;      /* for any request */

    /* The request that pyfuse3 has got last. */
    uint32_t opcode;
    uint64_t unique;
    bool kill_suidgid;
};

extern struct shim shim;

/* requests.c */
bool shim_inspect(const struct in_header *in, size_t got); /* whether pyfuse3 is to get the request */
int shim_reply(uint64_t unique, int error, const void *data, size_t size); /* 0, or an errno; ESRCH: not ours */
void shim_forget_all(void);

/* A request in the memory of the thread that has read it. */
struct request {
    struct in_header *in; /* its body follows */
    size_t length;        /* of all */
    size_t room;
    unsigned char *aligned; /* where the data of a WRITE begins; what is read may go there */
    size_t aligned_room;
};

/* gate.c: all may be called by any thread */
int gate_add(uint32_t number, int fd, int direct, bool guarded, uint64_t trust, bool calm_only); /* 0, or an errno */
bool gate_shut(uint32_t number);   /* whether there is such a file */
bool gate_remove(uint32_t number); /* whether its descriptors are the caller's again: nobody uses them */
void gate_remove_all(void);
int gate_heed(int fd); /* the deadline; 0, or an errno */
bool gate_is_for_data(const struct request *request);
bool gate_serve(int device, struct request *request); /* false: that is for Python; the request is as it was */

/* queue.c */
struct message {
    struct message *next;
    void *bytes;
    size_t size;
};

struct queue {
    struct message *first, **last; /* last: where the next one goes; of an empty queue, &first */
};

struct message *queue_copy(const struct request *request);
void queue_add(struct queue *queue, struct message *message);
struct message *queue_take(struct queue *queue);
void queue_discard(struct message *message);

/* inbox.c */
int inbox_open(void); /* 0, or an errno */
void inbox_close(void);
int inbox_event(void);
void inbox_put(struct message *message);
void inbox_end(int error);
ssize_t inbox_take(void **bytes);

/* spin.c: of the threads that read */
void spin_prepare(void);
int64_t spin_begin(int device);
void spin_end(int64_t begin);

/* readers.c */
int readers_start(int fd); /* 0, or an errno */
bool readers_stop(void); /* whether all threads have ended */
void readers_look_around(void);
ssize_t readers_take(void **bytes);

/* session.c */
const char *shim_bind(const char *path); /* NULL, or what is missing */
bool shim_interposed(void);
const char *shim_failure(void);

#endif
