/* Reads, writes, syncs and attributes of open files, without a word to Python.
 *
 * Each open file that Python has named here has a gate.  While it is open, its requests are carried out by the thread
 * that read them (readers.c).  Right before each write the gate and the deadline of the lock are looked at.  What comes
 * while the gate is shut, or the lock is late, goes to Python, which says why, or waits.
 *
 * What is asked for with O_DIRECT is done with the descriptor that has it if it is aligned; else through the page cache,
 * but so that nothing of it stays there to be written later. */
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512 /* the least alignment that any storage takes for O_DIRECT */
#define LATELY 1         /* s; clocks of other hosts may differ from ours, so it is a hint, no more */
#define LATE_PAUSE 5000000L /* ns between two looks whether a late lock was renewed */

struct file {
    int fd, direct; /* direct: the same file with O_DIRECT, or -1 */
    bool guarded;      /* writes need a lock that is not late */
    uint64_t trust;    /* ns for which attributes may be trusted, and with them what the kernel has cached */
    bool calm_only;    /* but not at all where the file has changed lately */
    atomic_bool open;  /* the gate */
    atomic_uint users; /* the table, and each request under way */
};

static struct {
    pthread_mutex_t lock;
    struct file **file; /* by number */
    size_t room;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The deadline of all locks, in nanoseconds of CLOCK_BOOTTIME: lockfs/linux/deadline.py.  NULL: locks do not expire. */
static struct deadline {
    _Atomic int64_t late, lost;
} *_Atomic deadline;

/* Files ------------------------------------------------------------------------------------------------------------ */

static struct file *borrow(uint64_t number)
{
    pthread_mutex_lock(&table.lock);
    struct file *file = number < table.room ? table.file[number] : NULL;
    if (file)
        atomic_fetch_add(&file->users, 1);
    pthread_mutex_unlock(&table.lock);
    return file;
}

/* The last one closes the descriptors.  That can only be a request if the connection was cut off under it. */
static void let_go(struct file *file)
{
    if (atomic_fetch_sub(&file->users, 1) != 1)
        return;
    close(file->fd);
    if (file->direct >= 0)
        close(file->direct);
    free(file);
}

static bool make_room(uint32_t number)
{
    if (number < table.room)
        return true;
    size_t more = table.room ? table.room : 256;
    while (more <= number)
        more *= 2;
    struct file **moved = realloc(table.file, more * sizeof *moved);
    if (!moved)
        return false;
    memset(moved + table.room, 0, (more - table.room) * sizeof *moved);
    table.file = moved;
    table.room = more;
    return true;
}

int gate_add(uint32_t number, int fd, int direct, bool guarded, uint64_t trust, bool calm_only)
{
    struct file *file = calloc(1, sizeof *file);
    if (!file)
        return ENOMEM;
    *file = (struct file){.fd = fd, .direct = direct, .guarded = guarded, .trust = trust, .calm_only = calm_only};
    atomic_init(&file->open, true);
    atomic_init(&file->users, 1);
    pthread_mutex_lock(&table.lock);
    int error = !make_room(number) ? ENOMEM : table.file[number] ? EEXIST : 0;
    if (!error)
        table.file[number] = file;
    pthread_mutex_unlock(&table.lock);
    if (error)
        free(file);
    return error;
}

bool gate_shut(uint32_t number)
{
    struct file *file = borrow(number);
    if (!file)
        return false;
    atomic_store(&file->open, false);
    atomic_fetch_sub(&file->users, 1); /* not the last: the table has it */
    return true;
}

bool gate_remove(uint32_t number)
{
    pthread_mutex_lock(&table.lock);
    struct file *file = number < table.room ? table.file[number] : NULL;
    if (file)
        table.file[number] = NULL;
    pthread_mutex_unlock(&table.lock);
    if (!file)
        return true;
    atomic_store(&file->open, false);
    bool alone = atomic_load(&file->users) == 1;
    if (alone)
        free(file);
    else
        let_go(file);
    return alone;
}

void gate_remove_all(void)
{
    for (size_t i = 0; i < table.room; i++)
        gate_remove((uint32_t)i);
    atomic_store(&deadline, NULL);
}

/* The deadline ----------------------------------------------------------------------------------------------------- */

int gate_heed(int fd)
{
    void *page = fd < 0 ? NULL : mmap(NULL, sizeof(struct deadline), PROT_READ, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED)
        return errno;
    atomic_store(&deadline, page); /* the old one stays mapped: a thread may be looking at it */
    return 0;
}

static int64_t now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static bool is_late(const struct file *file)
{
    struct deadline *page = file->guarded ? atomic_load(&deadline) : NULL;
    return page && now(CLOCK_BOOTTIME) >= atomic_load(&page->late);
}

static bool is_lost(void)
{
    struct deadline *page = atomic_load(&deadline);
    return page && now(CLOCK_BOOTTIME) >= atomic_load(&page->lost);
}

/* Whether this moment is one to write.  Waits while a late lock may still be renewed. */
static bool may_write(struct file *file)
{
    while (atomic_load(&file->open)) {
        if (!is_late(file))
            return true;
        if (is_lost())
            return false;
        nanosleep(&(struct timespec){.tv_nsec = LATE_PAUSE}, NULL);
    }
    return false;
}

/* Requests --------------------------------------------------------------------------------------------------------- */

struct io {
    struct file *file;
    bool write, asked_direct, direct;
    uint64_t offset;
    size_t size;
    unsigned char *data;
};

static ssize_t write_durably(int fd, const struct iovec *iov, off_t offset)
{
    ssize_t got = pwritev2(fd, iov, 1, offset, RWF_DSYNC);
    if (got >= 0 || errno != EOPNOTSUPP)
        return got;
    got = pwritev2(fd, iov, 1, offset, 0);
    return got >= 0 && fdatasync(fd) < 0 ? -1 : got;
}

/* May clear io->direct: then the same is to be done once more. */
static ssize_t do_part(struct io *io, size_t done)
{
    struct iovec iov = {io->data + done, io->size - done};
    off_t offset = (off_t)(io->offset + done);
    /* What is left after a part need not be aligned. */
    io->direct = io->direct && done % SECTOR == 0;
    int fd = io->direct ? io->file->direct : io->file->fd;
    if (io->write && io->asked_direct && !io->direct)
        return write_durably(fd, &iov, offset);
    return io->write ? pwritev2(fd, &iov, 1, offset, 0) : preadv2(fd, &iov, 1, offset, 0);
}

/* Read or write all that can be; return how much, or a negative errno. */
static ssize_t do_all(struct io *io)
{
    size_t done = 0;
    while (done < io->size) {
        if (io->write && !may_write(io->file))
            return done ? (ssize_t)done : -EIO;
        ssize_t got = do_part(io, done);
        if (got < 0 && errno == EINVAL && io->direct)
            io->direct = false; /* this storage has larger sectors */
        else if (got < 0 && errno != EINTR)
            return done ? (ssize_t)done : -errno;
        else if (got == 0)
            break;
        else if (got > 0)
            done += (size_t)got;
    }
    return (ssize_t)done;
}

static void reply(int device, uint64_t unique, ssize_t result, const void *data, size_t size)
{
    struct out_header out = {(uint32_t)sizeof out, result < 0 ? (int32_t)result : 0, unique};
    struct iovec iov[2] = {{&out, sizeof out}, {(void *)data, size}};
    bool more = result >= 0 && size;
    if (more)
        out.len += (uint32_t)size;
    readers_look_around();
    ssize_t unused = writev(device, iov, more ? 2 : 1); /* fails if who asked is gone */
    (void)unused;
}

static void read_or_write(int device, struct file *file, struct request *request, const struct io_in *in)
{
    bool write = request->in->opcode == OP_WRITE, asked_direct = in->flags & O_DIRECT;
    struct io io = {
        .file = file, .write = write, .asked_direct = asked_direct, .offset = in->offset, .size = in->size,
        .direct = asked_direct && file->direct >= 0 && !((in->offset | in->size) % SECTOR),
        /* What is read may go over the request, which is done with. */
        .data = write ? (unsigned char *)request->in + IO_HEADERS : request->aligned,
    };
    uint64_t unique = request->in->unique;
    ssize_t done = do_all(&io);
    let_go(file); /* before the answer: the next request may be that to close it */
    struct write_out written = {(uint32_t)done, 0};
    if (write)
        reply(device, unique, done, &written, sizeof written);
    else
        reply(device, unique, done, io.data, done > 0 ? (size_t)done : 0);
}

static void sync_file(int device, struct file *file, const struct request *request, bool data_only)
{
    int failed = data_only ? fdatasync(file->fd) : fsync(file->fd);
    int error = failed ? -errno : 0;
    let_go(file);
    reply(device, request->in->unique, error, NULL, 0);
}

/* The device number in the form of the protocol: new_encode_dev() of the kernel. */
static uint32_t encode(dev_t dev)
{
    return (minor(dev) & 0xff) | major(dev) << 8 | (minor(dev) & ~0xffu) << 12;
}

static bool is_calm(const struct stat *s)
{
    const struct timespec *change = s->st_mtim.tv_sec > s->st_ctim.tv_sec ? &s->st_mtim : &s->st_ctim;
    int64_t changed = change->tv_sec * INT64_C(1000000000) + change->tv_nsec;
    return now(CLOCK_REALTIME) - changed > LATELY * INT64_C(1000000000);
}

static void get_attributes(int device, struct file *file, const struct request *request)
{
    struct stat s;
    struct attr_out out = {0};
    int failed = fstat(file->fd, &s);
    if (!failed) {
        uint64_t trust = file->calm_only && !is_calm(&s) ? 0 : file->trust;
        out = (struct attr_out){
            .valid = trust / 1000000000, .valid_nsec = (uint32_t)(trust % 1000000000), .ino = request->in->nodeid, .size = (uint64_t)s.st_size,
            .blocks = (uint64_t)s.st_blocks, .atime = (uint64_t)s.st_atim.tv_sec, .mtime = (uint64_t)s.st_mtim.tv_sec,
            .ctime = (uint64_t)s.st_ctim.tv_sec, .atime_nsec = (uint32_t)s.st_atim.tv_nsec,
            .mtime_nsec = (uint32_t)s.st_mtim.tv_nsec, .ctime_nsec = (uint32_t)s.st_ctim.tv_nsec, .mode = s.st_mode,
            .nlink = (uint32_t)s.st_nlink, .uid = s.st_uid, .gid = s.st_gid, .rdev = encode(s.st_rdev),
            .blksize = (uint32_t)s.st_blksize,
        };
    }
    int error = failed ? -errno : 0;
    let_go(file);
    reply(device, request->in->unique, error, &out, sizeof out);
}

/* Whether the request has the form that we know, and this is the moment for it. */
static bool passes(const struct file *file, const struct request *request, const struct io_in *in)
{
    if (!atomic_load(&file->open))
        return false;
    if (request->in->opcode == OP_READ)
        return in->size <= request->aligned_room;
    if (request->in->opcode == OP_WRITE)
        return in->size == request->length - IO_HEADERS && !(in->io_flags & WRITE_KILL_SUIDGID) && !is_late(file);
    return true;
}

bool gate_is_for_data(const struct request *request)
{
    switch (request->in->opcode) {
    case OP_READ:
    case OP_WRITE:
    case OP_FSYNC:
        return true;
    case OP_GETATTR:
        return request->length > sizeof *request->in && *(uint32_t *)(request->in + 1) & GETATTR_FH;
    default:
        return false;
    }
}

bool gate_serve(int device, struct request *request)
{
    union {
        struct io_in io;
        struct getattr_in getattr;
    } in = {0};
    uint32_t opcode = request->in->opcode;
    size_t least = opcode == OP_FSYNC ? FSYNC_IN_SIZE : opcode == OP_GETATTR ? sizeof in.getattr : sizeof in.io;
    if (request->length < sizeof *request->in + least)
        return false;
    memcpy(&in, request->in + 1, least);
    struct file *file = borrow(opcode == OP_GETATTR ? in.getattr.fh : in.io.fh);
    if (!file)
        return false;
    bool served = passes(file, request, &in.io);
    if (served && opcode == OP_GETATTR)
        get_attributes(device, file, request);
    else if (served && opcode == OP_FSYNC)
        sync_file(device, file, request, in.io.offset & FSYNC_DATA_ONLY); /* there, it has flags */
    else if (served)
        read_or_write(device, file, request, &in.io);
    else
        let_go(file);
    return served;
}
