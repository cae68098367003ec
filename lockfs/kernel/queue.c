/* Requests that wait for somebody, as copies.  No lock: that is the caller's. */
#include "shim.h"

#include <stdlib.h>
#include <string.h>

/* Return a copy of a request, NULL without memory. */
struct message *queue_copy(const struct request *request)
{
    struct message *message = malloc(sizeof *message);
    void *bytes = malloc(request->length);
    if (!message || !bytes) {
        free(message);
        free(bytes);
        return NULL;
    }
    memcpy(bytes, request->in, request->length);
    *message = (struct message){.bytes = bytes, .size = request->length};
    return message;
}

void queue_add(struct queue *queue, struct message *message)
{
    *queue->last = message;
    queue->last = &message->next;
}

/* Return the first, NULL if there is none. */
struct message *queue_take(struct queue *queue)
{
    struct message *message = queue->first;
    if (message && !(queue->first = message->next))
        queue->last = &queue->first;
    return message;
}

void queue_discard(struct message *message)
{
    free(message->bytes);
    free(message);
}
