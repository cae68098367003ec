/* The threads that read the requests.
 *
 * Each waits for a request; one for data it carries out and answers by itself (gate.c), any other goes to the inbox, from
 * which pyfuse3 gets it.  So data costs no switch between threads, and no wait for the GIL.  While a thread is busy with
 * the storage another one waits for requests; where there may be no more threads the last one puts the work on data off,
 * for those that come back, so that there is always one that reads.
 *
 * Two requests may change places on their way to the inbox, as they may in libfuse's own loop. */
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MOST_THREADS 32
#define ENOUGH_WAITING 4 /* threads; with fewer, one would go to rest while the next request is on its way */
#define PAGE 4096
#define WAKE_UP (SIGRTMIN + 5)

struct message {
    struct message *next;
    void *bytes;
    size_t size;
};

struct queue {
    struct message *first, **last;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t call, end;
    int device; /* a descriptor of our own, so that its number is never another file's */
    int event;  /* readable while there is something in the inbox, and when the connection has ended */
    struct queue inbox, put_off;
    pthread_t thread[MOST_THREADS];
    bool alive[MOST_THREADS];
    unsigned threads;
    unsigned waiting; /* threads that read, or are called to */
    unsigned parked;  /* threads that rest; of these are */
    unsigned called;  /* called to read */
    int error;        /* the connection has ended with */
    bool stop;
} readers = {
    .lock = PTHREAD_MUTEX_INITIALIZER, .call = PTHREAD_COND_INITIALIZER, .end = PTHREAD_COND_INITIALIZER,
    .device = -1, .event = -1, .inbox.last = &readers.inbox.first, .put_off.last = &readers.put_off.first,
};

/* Queues: with the lock held --------------------------------------------------------------------------------------- */

static struct message *take(struct queue *queue)
{
    struct message *message = queue->first;
    if (message && !(queue->first = message->next))
        queue->last = &queue->first;
    return message;
}

static void discard(struct message *message)
{
    free(message->bytes);
    free(message);
}

static void raise_event(void)
{
    uint64_t one = 1;
    ssize_t unused = write(readers.event, &one, sizeof one);
    (void)unused;
}

static void lower_event(void)
{
    uint64_t count;
    ssize_t unused = read(readers.event, &count, sizeof count);
    (void)unused;
}

/* Without the lock held: queue a copy of a request. */
static void put(struct queue *queue, const struct request *request)
{
    struct message *message = malloc(sizeof *message);
    void *bytes = malloc(request->length);
    if (!message || !bytes) {
        free(message);
        free(bytes);
        struct out_header out = {sizeof out, -ENOMEM, request->in->unique};
        ssize_t unused = write(readers.device, &out, sizeof out);
        (void)unused;
        return;
    }
    memcpy(bytes, request->in, request->length);
    *message = (struct message){.bytes = bytes, .size = request->length};
    pthread_mutex_lock(&readers.lock);
    if (queue == &readers.inbox && !queue->first)
        raise_event();
    *queue->last = message;
    queue->last = &message->next;
    pthread_mutex_unlock(&readers.lock);
}

/* Threads ---------------------------------------------------------------------------------------------------------- */

static void *run(void *);

/* With the lock held. */
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
    readers.waiting += readers.alive[slot];
    return readers.alive[slot];
}

/* Before work that may take long: see to it that another thread reads.  Return whether one does. */
static bool go_off(void)
{
    pthread_mutex_lock(&readers.lock);
    bool others = readers.waiting > 1;
    if (!others && readers.parked > readers.called) {
        readers.called++;
        readers.waiting++;
        pthread_cond_signal(&readers.call);
        others = true;
    }
    others = others || one_more_thread();
    if (others)
        readers.waiting--;
    pthread_mutex_unlock(&readers.lock);
    return others;
}

/* After it: do what was put off meanwhile, then read again, or rest where enough others read. */
static void come_back(struct request *request)
{
    struct message *message;
    pthread_mutex_lock(&readers.lock);
    while (!readers.stop && (message = take(&readers.put_off))) {
        pthread_mutex_unlock(&readers.lock);
        memcpy(request->in, message->bytes, request->length = message->size);
        discard(message);
        if (!gate_serve(readers.device, request))
            put(&readers.inbox, request);
        pthread_mutex_lock(&readers.lock);
    }
    if (readers.waiting < ENOUGH_WAITING || readers.stop) {
        readers.waiting++;
    } else {
        readers.parked++;
        while (!readers.called)
            pthread_cond_wait(&readers.call, &readers.lock);
        readers.called--;
        readers.parked--;
    }
    pthread_mutex_unlock(&readers.lock);
}

static void handle(struct request *request)
{
    if (request->in->opcode == OP_INTERRUPT)
        return; /* One that nobody answers is dropped when its request is; libfuse might have it sent for ever. */
    if (!gate_is_for_data(request)) {
        put(&readers.inbox, request);
    } else if (go_off()) {
        if (!gate_serve(readers.device, request))
            put(&readers.inbox, request);
        come_back(request);
    } else {
        put(&readers.put_off, request);
    }
}

/* Return the length of a request, or a negative errno: the connection has ended, or we are to. */
static ssize_t receive(struct request *request)
{
    while (!__atomic_load_n(&readers.stop, __ATOMIC_SEQ_CST)) {
        ssize_t got = read(readers.device, request->in, request->room);
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
        while ((got = receive(&request)) > 0) {
            request.length = (size_t)got;
            handle(&request);
        }
        free(block);
    }
    pthread_mutex_lock(&readers.lock);
    readers.alive[(uintptr_t)slot] = false;
    readers.threads--;
    readers.waiting--;
    /* Without memory one thread less will do, unless it is the last. */
    if (!readers.stop && (got != -ENOMEM || readers.threads == 0)) {
        readers.error = (int)-got;
        raise_event();
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
    readers.error = 0;
    int error = readers.threads ? EBUSY : 0;
    if (!error) {
        readers.device = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        readers.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (readers.device < 0 || readers.event < 0)
            error = errno;
        else
            raise_event(); /* so that the first call of readers_take() comes at once */
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
    readers.waiting += readers.parked - readers.called;
    readers.called = readers.parked;
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
    for (struct message *each; (each = take(&readers.inbox)) || (each = take(&readers.put_off));)
        discard(each);
    if (readers.event >= 0)
        close(readers.event);
    bool all = readers.threads == 0;
    if (all && readers.device >= 0)
        close(readers.device);
    readers.event = -1;
    pthread_mutex_unlock(&readers.lock);
    return all;
}

/* With the lock held.  A read(2) is to wait, and to wake one thread only. */
static void begin(void)
{
    int flags = fcntl(readers.device, F_GETFL);
    if (flags < 0 || fcntl(readers.device, F_SETFL, flags & ~O_NONBLOCK) < 0)
        readers.error = errno;
    else if (!one_more_thread())
        readers.error = EAGAIN;
    if (readers.error)
        raise_event();
}

int readers_event(void)
{
    return readers.event;
}

/* Return the length of the next request for pyfuse3, whose memory becomes the caller's; 0 if there is none now, or a
 * negative errno at the end of the connection. */
ssize_t readers_take(void **bytes)
{
    pthread_mutex_lock(&readers.lock);
    if (!readers.threads && !readers.error)
        begin();
    struct message *message = take(&readers.inbox);
    ssize_t size = message ? (ssize_t)message->size : -readers.error;
    if (!readers.inbox.first && !readers.error)
        lower_event();
    pthread_mutex_unlock(&readers.lock);
    if (message) {
        *bytes = message->bytes;
        free(message);
    }
    return size;
}
