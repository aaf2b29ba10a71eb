/* Kills its process at the n-th call that changes, or makes durable, what lies on disk. Loaded with LD_PRELOAD, armed through
   ctypes. Calls are counted where the C library is entered, which is where Python enters it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BEFORE, AFTER, TORN };
#define MOST 65536

static atomic_long seen;
static atomic_int armed;
static long at;
static int mode;
static const char *names[MOST];

void crash_arm(long n, int how) {
    at = n;
    mode = how;
    atomic_store(&seen, 0);
    atomic_store(&armed, 1);
}

long crash_disarm(void) {
    atomic_store(&armed, 0);
    return atomic_load(&seen);
}

const char *crash_name(long n) { return n > 0 && n < MOST ? names[n] : ""; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static int hit(const char *name) {
    if (!atomic_load(&armed)) return 0;
    long n = atomic_fetch_add(&seen, 1) + 1;
    if (n < MOST) names[n] = name;
    return n == at;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define CALL(type, name, params, args) \
    type name params { \
        REAL(name); \
        int now = hit(#name); \
        if (now && mode != AFTER) die(); \
        type result = real args; \
        if (now) die(); \
        return result; \
    }

#define WRITE(name, params, args, half) \
    ssize_t name params { \
        REAL(name); \
        int now = hit(#name); \
        if (now && mode == TORN) { real half; die(); } \
        if (now && mode == BEFORE) die(); \
        ssize_t result = real args; \
        if (now) die(); \
        return result; \
    }

#define HALF(n) ((n) > 8192 ? (n) / 2 & ~4095UL : (n) / 2)

WRITE(write, (int fd, const void *data, size_t n), (fd, data, n), (fd, data, HALF(n)))
WRITE(pwrite, (int fd, const void *data, size_t n, off_t to), (fd, data, n, to), (fd, data, HALF(n), to))
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t to), (fd, data, n, to), (fd, data, HALF(n), to))
WRITE(writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), (fd, parts, n / 2))
WRITE(pwritev, (int fd, const struct iovec *parts, int n, off_t to), (fd, parts, n, to), (fd, parts, n / 2, to))
WRITE(pwritev64, (int fd, const struct iovec *parts, int n, off64_t to), (fd, parts, n, to), (fd, parts, n / 2, to))
CALL(int, fsync, (int fd), (fd))
CALL(int, fdatasync, (int fd), (fd))
CALL(int, ftruncate, (int fd, off_t n), (fd, n))
CALL(int, ftruncate64, (int fd, off64_t n), (fd, n))
CALL(int, fallocate, (int fd, int how, off_t from, off_t n), (fd, how, from, n))
CALL(int, posix_fallocate, (int fd, off_t from, off_t n), (fd, from, n))
CALL(int, rename, (const char *from, const char *to), (from, to))
CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
CALL(int, link, (const char *from, const char *to), (from, to))
CALL(int, linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
CALL(int, unlink, (const char *path), (path))
CALL(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
CALL(int, rmdir, (const char *path), (path))
CALL(int, mkdir, (const char *path, mode_t m), (path, m))
CALL(int, mkdirat, (int fd, const char *path, mode_t m), (fd, path, m))

/* Opening counts where it may create. */
#define OPEN(name, params, args, flags) \
    int name params { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t m = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int now = flags & O_CREAT ? hit(#name) : 0; \
        if (now && mode != AFTER) die(); \
        int result = real args; \
        if (now) die(); \
        return result; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, m), flags)
OPEN(open64, (const char *path, int flags, ...), (path, flags, m), flags)
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, path, flags, m), flags)
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, path, flags, m), flags)
