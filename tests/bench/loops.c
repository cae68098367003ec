/* The loops that are measured: one system call, or a few, again and again, in C, so that little else is measured.
 *
 *   loops OPERATION DIRECTORY COUNT     prints how many nanoseconds one round took
 *   loops hold-read|hold-write DIRECTORY COUNT
 *                                       opens COUNT files, prints a line, and keeps them open until its input ends
 *
 * DIRECTORY has file-0000000 ... and data, which is DATA_SIZE bytes long.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DATA_SIZE (64L << 20)
#define LARGE (1L << 20)
#define SMALL 4096L
#define FILES 10000L

static char buffer[LARGE] __attribute__((aligned(4096)));

static long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void check(long result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
}

static const char *name(long number)
{
	static char text[32];

	snprintf(text, sizeof text, "file-%07ld", number % FILES);
	return text;
}

static void open_and_close(const char *file, int flags)
{
	int fd = open(file, flags, 0644);

	check(fd, file);
	check(close(fd), file);
}

static void list(const char *directory)
{
	DIR *stream = opendir(directory);

	if (!stream)
		err(1, "%s", directory);
	while (readdir(stream))
		;
	closedir(stream);
}

static void one_round(const char *operation, long number, int data)
{
	struct stat status;

	if (!strcmp(operation, "stat")) {
		check(stat(name(number), &status), "stat");
	} else if (!strcmp(operation, "open-read")) {
		open_and_close(name(number), O_RDONLY);
	} else if (!strcmp(operation, "open-write")) {
		open_and_close(name(number), O_RDWR);
	} else if (!strcmp(operation, "create")) {
		open_and_close("new", O_RDWR | O_CREAT | O_EXCL);
		check(unlink("new"), "unlink");
	} else if (!strcmp(operation, "list")) {
		list(".");
	} else if (!strcmp(operation, "read-1m")) {
		check(pread(data, buffer, LARGE, number * LARGE % DATA_SIZE), "pread");
	} else if (!strcmp(operation, "write-1m")) {
		check(pwrite(data, buffer, LARGE, number * LARGE % DATA_SIZE), "pwrite");
	} else if (!strcmp(operation, "read-4k")) {
		check(pread(data, buffer, SMALL, random() % (DATA_SIZE / SMALL) * SMALL), "pread");
	} else if (!strcmp(operation, "write-4k")) {
		check(pwrite(data, buffer, SMALL, random() % (DATA_SIZE / SMALL) * SMALL), "pwrite");
	} else {
		errx(2, "there is no operation %s", operation);
	}
}

static void hold(int flags, long count)
{
	struct rlimit limit = {count + 100, count + 100};

	check(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
	for (long number = 0; number < count; number++)
		check(open(name(number), flags), name(number));
	puts("open");
	fflush(stdout);
	while (getchar() != EOF)
		;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		errx(2, "usage: loops OPERATION DIRECTORY COUNT");
	long count = atol(argv[3]);

	check(chdir(argv[2]), argv[2]);
	if (!strncmp(argv[1], "hold-", 5)) {
		hold(strcmp(argv[1], "hold-write") ? O_RDONLY : O_RDWR, count);
		return 0;
	}
	int data = -1;

	/* The data file is open only where it is used: who writes it holds its lock. */
	if (strstr(argv[1], "-1m") || strstr(argv[1], "-4k"))
		check(data = open("data", strstr(argv[1], "write") ? O_RDWR : O_RDONLY), "data");
	one_round(argv[1], 0, data);
	long long begin = now();

	for (long number = 1; number <= count; number++)
		one_round(argv[1], number, data);
	printf("%.1f\n", (double)(now() - begin) / count);
	return 0;
}
