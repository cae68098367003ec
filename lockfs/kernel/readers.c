/* The threads that read the requests.
 *
 * A request for data is carried out and answered by the thread that has read it (gate.c), any other goes to the inbox
 * (inbox.c), from which pyfuse3 gets it.  So data costs no switch between threads, and no wait for the GIL.
 *
 * As long as requests come one by one a single thread serves them all: the kernel wakes those that wait in turn, and
 * each time another one on another processor would cost as much as the work itself.  Another thread keeps watch, and
 * reads when the first has been busy for a while.  Once requests overlap, several wait for them, and while one is busy
 * there is always another that reads.  Where there may be no more threads the last one puts the work on data off, for
 * those that come back.  With no requests all are at rest.
 *
 * Two requests may change places on their way to the inbox, as they may in libfuse's own loop. */
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOST_THREADS 32
#define ENOUGH_WAITING 4 /* threads, of a crowd; with fewer, one would rest while the next request is on its way */
#define CROWD_LASTS 64   /* requests for data after the last that overlapped with another */
#define LOOK_EACH 8      /* requests for data, to see whether they overlap */
#define WATCH_TICK 2000000L /* ns; whoever is busy for a tick or two is not waited for any longer */
#define WATCH_LASTS 16      /* ticks without a request for data */
#define PAGE 4096
#define WAKE_UP (SIGRTMIN + 5)

static struct {
    pthread_mutex_t lock;
    pthread_cond_t call, end;
    int device; /* a descriptor of our own, so that its number is never another file's */
    struct queue put_off;
    pthread_t thread[MOST_THREADS];
    bool alive[MOST_THREADS];
    unsigned threads;
    unsigned waiting; /* threads that read, or are called to */
    unsigned busy;    /* threads at work on data */
    unsigned parked;  /* threads that rest; of these are */
    unsigned called;  /* called to read */
    bool watch, watching; /* one of those that rest is to keep watch; one does */
    atomic_uint taken; /* requests for data, ever */
    atomic_uint crowd; /* for so many requests more, several threads wait */
    bool ended; /* the connection has */
    bool stop;
} readers = {
    .lock = PTHREAD_MUTEX_INITIALIZER, .call = PTHREAD_COND_INITIALIZER, .end = PTHREAD_COND_INITIALIZER,
    .device = -1, .put_off.last = &readers.put_off.first,
};

/* What is read ---------------------------------------------------------------------------------------------------- */

/* Return a copy, or answer that there is no memory for it. */
static struct message *copy(const struct request *request)
{
    struct message *message = queue_copy(request);
    if (!message) {
        struct out_header out = {sizeof out, -ENOMEM, request->in->unique};
        ssize_t unused = write(readers.device, &out, sizeof out);
        (void)unused;
    }
    return message;
}

static void give_to_pyfuse3(const struct request *request)
{
    struct message *message = copy(request);
    if (message)
        inbox_put(message);
}

/* Without the lock held. */
static void put_off(const struct request *request)
{
    struct message *message = copy(request);
    if (!message)
        return;
    pthread_mutex_lock(&readers.lock);
    queue_add(&readers.put_off, message);
    pthread_mutex_unlock(&readers.lock);
}

/* Threads ---------------------------------------------------------------------------------------------------------- */

static void *run(void *);

/* With the lock held: one that rests. */
static bool one_more_thread(void)
{
    uintptr_t slot = 0;
    while (slot < MOST_THREADS && readers.alive[slot])
        slot++;
    if (slot == MOST_THREADS)
        return false;
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, WAKE_UP);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the main thread */
    readers.alive[slot] = pthread_create(&readers.thread[slot], &attributes, run, (void *)slot) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    readers.threads += readers.alive[slot];
    readers.parked += readers.alive[slot];
    return readers.alive[slot];
}

/* With the lock held: have one more thread read. */
static bool call(void)
{
    if (readers.parked == readers.called && !one_more_thread())
        return false;
    readers.called++;
    readers.waiting++;
    pthread_cond_signal(&readers.call);
    return true;
}

/* With the lock held: see to it that a thread keeps watch. */
static bool have_watch(void)
{
    if (readers.watching)
        return true;
    if (readers.parked == readers.called && !one_more_thread())
        return false;
    readers.watch = true;
    pthread_cond_signal(&readers.call);
    return true;
}

/* Before work that may take long: see to it that requests are read meanwhile.  Return whether the work is to be done. */
static bool go_off(void)
{
    pthread_mutex_lock(&readers.lock);
    atomic_fetch_add(&readers.taken, 1);
    if (readers.busy)
        atomic_store(&readers.crowd, CROWD_LASTS);
    else if (atomic_load(&readers.crowd))
        atomic_fetch_sub(&readers.crowd, 1);
    readers.waiting--;
    bool others = readers.waiting || (atomic_load(&readers.crowd) ? call() : have_watch());
    bool now = others || !readers.busy; /* if nobody else is there, nobody will come back */
    if (now)
        readers.busy++;
    else
        readers.waiting++;
    pthread_mutex_unlock(&readers.lock);
    return now;
}

/* With the lock held: read if nobody else has done so for a tick, until called, or there is nothing to watch. */
static void keep_watch(void)
{
    unsigned quiet = 0;
    readers.watch = false;
    readers.watching = true;
    while (!readers.called && !readers.stop && quiet < WATCH_LASTS) {
        struct timespec until;
        unsigned taken = atomic_load(&readers.taken);
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += WATCH_TICK;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&readers.call, &readers.lock, &until); /* by that clock: readers_start() */
        quiet = taken == atomic_load(&readers.taken) ? quiet + 1 : 0;
        if (quiet && readers.busy && !readers.waiting && !readers.called) {
            atomic_store(&readers.crowd, CROWD_LASTS);
            readers.called++;
            readers.waiting++;
        }
    }
    readers.watching = false;
}

/* With the lock held: rest until called. */
static void rest(void)
{
    while (!readers.called && !readers.stop)
        if (readers.watch)
            keep_watch();
        else
            pthread_cond_wait(&readers.call, &readers.lock);
    if (readers.called)
        readers.called--;
    else
        readers.waiting++; /* to see that it is the end */
    readers.parked--;
}

/* After work: do what was put off meanwhile, then read again, or rest where enough others read. */
static void come_back(struct request *request)
{
    struct message *message;
    pthread_mutex_lock(&readers.lock);
    while (!readers.stop && (message = queue_take(&readers.put_off))) {
        pthread_mutex_unlock(&readers.lock);
        memcpy(request->in, message->bytes, request->length = message->size);
        queue_discard(message);
        if (!gate_serve(readers.device, request))
            give_to_pyfuse3(request);
        pthread_mutex_lock(&readers.lock);
    }
    readers.busy--;
    if (readers.waiting < (atomic_load(&readers.crowd) ? ENOUGH_WAITING : 1) || readers.stop) {
        readers.waiting++;
    } else {
        readers.parked++;
        rest();
    }
    pthread_mutex_unlock(&readers.lock);
}

/* After a request was put off: those who were to do it may have come back meanwhile. */
static bool is_left_alone(void)
{
    pthread_mutex_lock(&readers.lock);
    bool alone = !readers.busy && readers.put_off.first;
    if (alone) {
        readers.busy++;
        readers.waiting--;
    }
    pthread_mutex_unlock(&readers.lock);
    return alone;
}

/* Return whether that was a request for data. */
static bool handle(struct request *request)
{
    if (request->in->opcode == OP_INTERRUPT)
        return false; /* One that nobody answers is dropped when its request is; libfuse might have it sent for ever. */
    if (!gate_is_for_data(request)) {
        give_to_pyfuse3(request);
        return false;
    }
    if (go_off()) {
        if (!gate_serve(readers.device, request))
            give_to_pyfuse3(request);
        come_back(request);
    } else {
        put_off(request);
        if (is_left_alone())
            come_back(request);
    }
    return true;
}

/* Return the length of a request, or a negative errno: the connection has ended, or we are to.  With *soon* the next one
 * may be on its way. */
static ssize_t receive(struct request *request, bool soon)
{
    while (!__atomic_load_n(&readers.stop, __ATOMIC_SEQ_CST)) {
        int64_t begin = soon ? spin_begin(readers.device) : 0;
        ssize_t got = read(readers.device, request->in, request->room);
        spin_end(begin);
        if (got >= (ssize_t)sizeof *request->in)
            return got;
        if (got >= 0)
            return -EIO;
        if (errno == EAGAIN)
            poll(&(struct pollfd){.fd = readers.device, .events = POLLIN}, 1, -1);
        else if (errno != EINTR && errno != ENOENT) /* ENOENT: that one was taken back */
            return -errno;
    }
    return -EINTR;
}

static void *run(void *slot)
{
    pthread_mutex_lock(&readers.lock);
    rest();
    pthread_mutex_unlock(&readers.lock);
    /* The data of a WRITE, and what is read, are aligned as O_DIRECT needs it. */
    unsigned char *block = NULL;
    ssize_t got = -ENOMEM;
    if (!posix_memalign((void **)&block, PAGE, PAGE + shim.buffer_size)) {
        /* All of it must be there before anything is read: if this process is killed while the kernel copies a request
         * to memory that is not, the kernel gives up, and answers the caller with EIO (fuse_dev_do_read). */
        memset(block, 0, PAGE + shim.buffer_size);
        struct request request = {
            .in = (struct in_header *)(block + PAGE - IO_HEADERS), .room = shim.buffer_size,
            .aligned = block + PAGE, .aligned_room = shim.buffer_size - HEADER_ROOM,
        };
        bool soon = false;
        while ((got = receive(&request, soon)) > 0) {
            request.length = (size_t)got;
            soon = handle(&request);
        }
        free(block);
    }
    pthread_mutex_lock(&readers.lock);
    readers.alive[(uintptr_t)slot] = false;
    readers.threads--;
    readers.waiting--;
    /* Without memory one thread less will do, unless it is the last. */
    if (!readers.stop && (got != -ENOMEM || readers.threads == 0)) {
        readers.ended = true;
        inbox_end((int)-got);
    }
    pthread_cond_signal(&readers.end);
    pthread_mutex_unlock(&readers.lock);
    return NULL;
}

/* For session.c ---------------------------------------------------------------------------------------------------- */

static void heed_nothing(int signal)
{
    (void)signal;
}

/* Be ready.  The first request is read when pyfuse3 asks for one; until then somebody else may serve the connection. */
int readers_start(int fd)
{
    sigaction(WAKE_UP, &(struct sigaction){.sa_handler = heed_nothing}, NULL); /* ends a read(2) */
    pthread_mutex_lock(&readers.lock);
    readers.stop = false;
    readers.ended = false;
    spin_prepare();
    int error = readers.threads ? EBUSY : 0;
    if (!error) {
        pthread_condattr_t attributes;
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(&readers.call, &attributes);
        pthread_condattr_destroy(&attributes);
        readers.device = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        error = readers.device < 0 ? errno : inbox_open();
    }
    pthread_mutex_unlock(&readers.lock);
    if (error)
        readers_stop();
    return error;
}

/* Threads that are stuck in the storage are left behind, with what they need; the end of the process is theirs. */
bool readers_stop(void)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    time_t last = until.tv_sec + 1;
    pthread_mutex_lock(&readers.lock);
    __atomic_store_n(&readers.stop, true, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&readers.call);
    while (readers.threads && until.tv_sec <= last) {
        for (int i = 0; i < MOST_THREADS; i++) /* again and again: one may have been about to read */
            if (readers.alive[i])
                pthread_kill(readers.thread[i], WAKE_UP);
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 10000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&readers.end, &readers.lock, &until);
    }
    for (struct message *each; (each = queue_take(&readers.put_off));)
        queue_discard(each);
    bool all = readers.threads == 0;
    if (all && readers.device >= 0)
        close(readers.device);
    pthread_mutex_unlock(&readers.lock);
    inbox_close();
    return all;
}

/* With the lock held.  A read(2) is to wait, and to wake one thread only. */
static void begin(void)
{
    int flags = fcntl(readers.device, F_GETFL), error = 0;
    if (flags < 0 || fcntl(readers.device, F_SETFL, flags & ~O_NONBLOCK) < 0)
        error = errno;
    else if (!call())
        error = EAGAIN;
    readers.ended = error != 0;
    if (error)
        inbox_end(error);
}

/* Called by a thread that is about to answer a request for data: until then whoever has made it makes no other, so that
 * one that waits is evidence that they overlap. */
void readers_look_around(void)
{
    struct pollfd device = {.fd = readers.device, .events = POLLIN};
    bool now = atomic_load(&readers.taken) % LOOK_EACH == 0 && !atomic_load(&readers.crowd);
    if (now && poll(&device, 1, 0) > 0)
        atomic_store(&readers.crowd, CROWD_LASTS);
}

/* For pyfuse3: as inbox_take().  The first call is the beginning. */
ssize_t readers_take(void **bytes)
{
    pthread_mutex_lock(&readers.lock);
    if (!readers.threads && !readers.ended)
        begin();
    pthread_mutex_unlock(&readers.lock);
    return inbox_take(bytes);
}
