/* How long a thread looks for the next request before it goes to sleep.
 *
 * Who reads or writes in one thing after another makes the next request some microseconds after it got its answer.  To
 * sleep in between, and to be woken, costs several times as much as the work, most of all in virtual machines, whose idle
 * processors stop.  So the thread looks again and again, but for no longer than has been worth it lately, as KVM does
 * before it halts a virtual processor: the time grows when a request has come soon after the thread went to sleep, and
 * shrinks when it has not.  Where requests are seldom that is no time at all.
 *
 * One thread at a time looks.  If it does not get the processor all the time, others need it, and it goes to sleep. */
#include "shim.h"

#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define SHORTEST 10000 /* ns */
#define LONGEST 80000
#define SOON 100000      /* who waits for a request that comes within this time should have looked for it */
#define AT_ONCE 3000     /* who waits no longer did not sleep */
#define TAKEN_AWAY 50000 /* between two looks: somebody else had the processor */
#define PATIENCE 16
#define PAUSE 2000 /* requests */
#define SHORT_PAUSE 100

/* Guarded by `taken`; who does not get it does without. */
static struct {
    atomic_flag taken;
    int window;             /* ns */
    unsigned vain, at_once; /* times in a row that it was of no use: none came, or the first look was enough */
    unsigned pause;         /* requests until the next try */
    bool pointless;         /* with one processor, whoever is to make the next request waits for this thread */
} spin = {.taken = ATOMIC_FLAG_INIT};

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

void spin_prepare(void)
{
    cpu_set_t processors;
    spin.pointless = sched_getaffinity(0, sizeof processors, &processors) == 0 && CPU_COUNT(&processors) < 2;
    spin.window = 0;
}

/* Look for a request for as long as it may be worth it, and return whether there is one. */
static bool look(int device, int64_t begin)
{
    struct pollfd request = {.fd = device, .events = POLLIN};
    for (int64_t last = begin, time = begin; time - begin < spin.window; last = time) {
        if (poll(&request, 1, 0) != 0) {
            spin.vain = 0;
            spin.at_once = last == begin ? spin.at_once + 1 : 0;
            if (spin.at_once > PATIENCE)
                spin.window = 0; /* it is there in any case */
            return true;
        }
        time = now();
        if (time - last > TAKEN_AWAY) {
            spin.window = 0;
            spin.pause = SHORT_PAUSE;
        }
    }
    return false;
}

/* Before a sleep.  Return when it began; 0 if there is nothing to learn from it. */
int64_t spin_begin(int device)
{
    if (spin.pointless || atomic_flag_test_and_set(&spin.taken))
        return 0;
    int64_t begin = now();
    bool there = look(device, begin);
    atomic_flag_clear(&spin.taken);
    return there ? 0 : begin;
}

static int longer(void)
{
    if (spin.window && ++spin.vain > PATIENCE) {
        /* Who makes the requests seems to wait for the processor on which we look. */
        spin.vain = 0;
        spin.pause = PAUSE;
        return 0;
    }
    return spin.window < SHORTEST ? SHORTEST : 2 * spin.window > LONGEST ? LONGEST : 2 * spin.window;
}

/* After a sleep, which has ended with a request: learn from it. */
void spin_end(int64_t begin)
{
    int64_t slept = begin ? now() - begin : 0;
    if (slept <= AT_ONCE || atomic_flag_test_and_set(&spin.taken))
        return;
    if (spin.pause)
        spin.pause--;
    else if (slept <= SOON)
        spin.window = longer();
    else
        spin.window = spin.window / 2 < SHORTEST ? 0 : spin.window / 2;
    atomic_flag_clear(&spin.taken);
}
