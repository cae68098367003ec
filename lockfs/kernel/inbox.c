/* The requests that wait for pyfuse3, and the descriptor that tells its event loop of them. */
#include "shim.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

static struct {
    pthread_mutex_t lock;
    int event; /* readable while there is something, and when nothing more will come */
    int error; /* with which the connection has ended */
    struct queue queue;
} inbox = {.lock = PTHREAD_MUTEX_INITIALIZER, .event = -1, .queue.last = &inbox.queue.first};

static void raise_event(void)
{
    uint64_t one = 1;
    ssize_t unused = write(inbox.event, &one, sizeof one);
    (void)unused;
}

static void lower_event(void)
{
    uint64_t count;
    ssize_t unused = read(inbox.event, &count, sizeof count);
    (void)unused;
}

/* Be ready, with the descriptor readable, so that somebody looks at once.  Return 0, or an errno. */
int inbox_open(void)
{
    pthread_mutex_lock(&inbox.lock);
    inbox.error = 0;
    inbox.event = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = inbox.event < 0 ? errno : 0;
    pthread_mutex_unlock(&inbox.lock);
    return error;
}

void inbox_close(void)
{
    pthread_mutex_lock(&inbox.lock);
    for (struct message *each; (each = queue_take(&inbox.queue));)
        queue_discard(each);
    if (inbox.event >= 0)
        close(inbox.event);
    inbox.event = -1;
    pthread_mutex_unlock(&inbox.lock);
}

int inbox_event(void)
{
    return inbox.event;
}

void inbox_put(struct message *message)
{
    pthread_mutex_lock(&inbox.lock);
    if (!inbox.queue.first)
        raise_event();
    queue_add(&inbox.queue, message);
    pthread_mutex_unlock(&inbox.lock);
}

/* Nothing more will come. */
void inbox_end(int error)
{
    pthread_mutex_lock(&inbox.lock);
    inbox.error = error;
    raise_event();
    pthread_mutex_unlock(&inbox.lock);
}

/* Return the length of the next request, whose memory becomes the caller's; 0 if there is none now, or a negative errno
 * at the end of the connection. */
ssize_t inbox_take(void **bytes)
{
    pthread_mutex_lock(&inbox.lock);
    struct message *message = queue_take(&inbox.queue);
    ssize_t size = message ? (ssize_t)message->size : -inbox.error;
    if (!inbox.queue.first && !inbox.error)
        lower_event();
    pthread_mutex_unlock(&inbox.lock);
    if (message) {
        *bytes = message->bytes;
        free(message);
    }
    return size;
}
