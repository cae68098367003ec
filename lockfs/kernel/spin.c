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
#define SOON 100000      /* a request that comes within this time would have been worth it */
#define TAKEN_AWAY 50000 /* between two looks: somebody else had the processor */

static struct {
    atomic_flag taken;
    _Atomic int64_t window; /* ns */
    bool pointless; /* with one processor, whoever is to make the next request waits for this thread */
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

/* Look for a request for a while.  Return when that began if there is none yet; else, or if another thread looks, 0. */
int64_t spin_begin(int device)
{
    if (spin.pointless || atomic_flag_test_and_set(&spin.taken))
        return 0;
    struct pollfd request = {.fd = device, .events = POLLIN};
    int64_t begin = now(), window = atomic_load(&spin.window);
    bool there = false;
    for (int64_t last = begin, time = begin; !there && time - begin < window; last = time) {
        there = poll(&request, 1, 0) != 0;
        time = now();
        if (time - last > TAKEN_AWAY)
            window = 0;
    }
    if (!window)
        atomic_store(&spin.window, 0);
    atomic_flag_clear(&spin.taken);
    return there ? 0 : begin;
}

/* After a sleep that has ended with a request: learn from it. */
void spin_end(int64_t begin)
{
    if (!begin)
        return;
    int64_t window = atomic_load(&spin.window);
    if (now() - begin > SOON)
        window /= 2;
    else
        window = window < SHORTEST ? SHORTEST : 2 * window;
    atomic_store(&spin.window, window < SHORTEST ? 0 : window > LONGEST ? LONGEST : window);
}
