/* A driver for a watchdog device that is none: to be preloaded.  A terminal that is told a time-out takes it as if it
 * were one, and passes it on as text, between the bytes that feed it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#define WDIOC_SETTIMEOUT 0xC0045706UL

int ioctl(int fd, unsigned long request, ...)
{
    static int (*next)(int, unsigned long, void *);
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if ((request & 0xFFFFFFFFUL) == WDIOC_SETTIMEOUT && isatty(fd)) {
        return dprintf(fd, "T%d\n", *(int *)argument) > 0 ? 0 : -1;
    }
    if (!next)
        next = dlsym(RTLD_NEXT, "ioctl");
    return next(fd, request, argument);
}
