/* Counts the calls by which a process changes files below one directory, and at a chosen
 * one kills the process, or lets that call and all later ones fail.
 *
 * Loaded with LD_PRELOAD, so that the calls of all threads and languages pass here.
 * Off until fault_begin is called:
 *
 *   fault_begin(directory, log, at, mode, exchange)
 *     directory  absolute path; calls elsewhere are not counted
 *     log        file to which each counted call is written, or ""
 *     at         number of the call, from 1, at which to strike; 0 for never
 *     mode       "kill": SIGKILL before the call; "torn": SIGKILL after half of it, if
 *                it writes; "ENOSPC", "EIO": fail from that call on
 *     exchange   0 lets renameat2 with flags fail, as on file systems that lack it
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATES, WRITES, SYNCS, MOVES, REMOVES };

static char root[PATH_MAX];
static size_t root_length;
static int log_descriptor = -1;
static long strike_at;
static char mode[16];
static int has_exchange = 1;
static atomic_long count;

void fault_begin(const char *directory, const char *log, long at, const char *how,
                 int exchange) {
  log_descriptor =
      *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644)
           : -1;
  strike_at = at;
  strncpy(mode, how, sizeof mode - 1);
  has_exchange = exchange;
  atomic_store(&count, 0);
  strncpy(root, directory, sizeof root - 1);
  root_length = strlen(root);
}

long fault_count(void) { return atomic_load(&count); }

static int below(const char *path) {
  return root_length && !strncmp(path, root, root_length) &&
         (path[root_length] == '/' || path[root_length] == 0);
}

static const char *descriptor_path(int descriptor, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlink, link, buffer, PATH_MAX - 1);
  buffer[length > 0 ? length : 0] = 0;
  return buffer;
}

static const char *full_path(int directory, const char *path, char *buffer) {
  if (path[0] == '/' || directory == AT_FDCWD) return path;
  descriptor_path(directory, buffer);
  strncat(buffer, "/", PATH_MAX - strlen(buffer) - 1);
  return strncat(buffer, path, PATH_MAX - strlen(buffer) - 1);
}

/* Returns 0 to go on, 1 to tear this write and die, -1 to fail with errno set. */
static int strike(const char *call, enum kind kind, const char *path) {
  if (!below(path)) return 0;
  long number = atomic_fetch_add(&count, 1) + 1;
  if (log_descriptor >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", call,
                          path[root_length] ? path + root_length + 1 : ".");
    syscall(SYS_write, log_descriptor, line, length);
  }
  if (!strike_at || number < strike_at) return 0;
  if (!strcmp(mode, "EIO")) return errno = EIO, -1;
  if (!strcmp(mode, "ENOSPC"))
    return kind == CREATES || kind == WRITES || kind == SYNCS ? (errno = ENOSPC, -1) : 0;
  if (!strcmp(mode, "torn") && kind == WRITES) return 1;
  syscall(SYS_kill, getpid(), SIGKILL);
  pause();
  return -1;
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  pause();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARD(call, kind, path)       \
  do {                                \
    int struck = strike(call, kind, path); \
    if (struck < 0) return -1;        \
    if (struck) die();                \
  } while (0)

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))

#define OPEN(name)                                                  \
  int name(const char *path, int flags, ...) {                      \
    mode_t permission = 0;                                          \
    if (flags & (O_CREAT | O_TMPFILE)) {                            \
      va_list more;                                                 \
      va_start(more, flags);                                        \
      permission = va_arg(more, mode_t);                            \
      va_end(more);                                                 \
    }                                                               \
    if (CHANGES(flags)) GUARD("open", CREATES, path);               \
    return REAL(name)(path, flags, permission);                     \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
  int name(int directory, const char *path, int flags, ...) {            \
    char buffer[PATH_MAX];                                               \
    mode_t permission = 0;                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                 \
      va_list more;                                                      \
      va_start(more, flags);                                             \
      permission = va_arg(more, mode_t);                                 \
      va_end(more);                                                      \
    }                                                                    \
    if (CHANGES(flags))                                                  \
      GUARD("open", CREATES, full_path(directory, path, buffer));        \
    return REAL(name)(directory, path, flags, permission);               \
  }
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t permission) {
  GUARD("open", CREATES, path);
  return REAL(creat)(path, permission);
}

ssize_t write(int descriptor, const void *data, size_t size) {
  char buffer[PATH_MAX];
  int struck =
      root_length ? strike("write", WRITES, descriptor_path(descriptor, buffer)) : 0;
  if (struck < 0) return -1;
  ssize_t written = REAL(write)(descriptor, data, struck ? size / 2 : size);
  if (struck) die();
  return written;
}

#define PWRITE(name, offset_type)                                                     \
  ssize_t name(int descriptor, const void *data, size_t size, offset_type offset) {   \
    char buffer[PATH_MAX];                                                            \
    int struck = strike("write", WRITES, descriptor_path(descriptor, buffer));        \
    if (struck < 0) return -1;                                                        \
    ssize_t written = REAL(name)(descriptor, data, struck ? size / 2 : size, offset); \
    if (struck) die();                                                                \
    return written;                                                                   \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
  char buffer[PATH_MAX];
  int struck =
      root_length ? strike("write", WRITES, descriptor_path(descriptor, buffer)) : 0;
  if (struck < 0) return -1;
  if (struck) {
    REAL(write)(descriptor, parts[0].iov_base, parts[0].iov_len / 2);
    die();
  }
  return REAL(writev)(descriptor, parts, number);
}

#define TRUNCATE(name, offset_type)                                         \
  int name(int descriptor, offset_type size) {                              \
    char buffer[PATH_MAX];                                                  \
    GUARD("truncate", CREATES, descriptor_path(descriptor, buffer));        \
    return REAL(name)(descriptor, size);                                    \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                 \
  int name(int descriptor) {                                       \
    char buffer[PATH_MAX];                                         \
    GUARD("sync", SYNCS, descriptor_path(descriptor, buffer));     \
    return REAL(name)(descriptor);                                 \
  }
SYNC(fsync)
SYNC(fdatasync)

int mkdir(const char *path, mode_t permission) {
  GUARD("mkdir", CREATES, path);
  return REAL(mkdir)(path, permission);
}

int mkdirat(int directory, const char *path, mode_t permission) {
  char buffer[PATH_MAX];
  GUARD("mkdir", CREATES, full_path(directory, path, buffer));
  return REAL(mkdirat)(directory, path, permission);
}

int rmdir(const char *path) {
  GUARD("rmdir", REMOVES, path);
  return REAL(rmdir)(path);
}

int unlink(const char *path) {
  GUARD("unlink", REMOVES, path);
  return REAL(unlink)(path);
}

int unlinkat(int directory, const char *path, int flags) {
  char buffer[PATH_MAX];
  GUARD("unlink", REMOVES, full_path(directory, path, buffer));
  return REAL(unlinkat)(directory, path, flags);
}

int rename(const char *from, const char *to) {
  char both[PATH_MAX];
  snprintf(both, sizeof both, "%s -> %s", from, below(to) ? to + root_length + 1 : to);
  GUARD("rename", MOVES, below(from) ? both : to);
  return REAL(rename)(from, to);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
  char buffer[PATH_MAX];
  GUARD("rename", MOVES, full_path(to_directory, to, buffer));
  return REAL(renameat)(from_directory, from, to_directory, to);
}

int renameat2(int from_directory, const char *from, int to_directory, const char *to,
              unsigned int flags) {
  char both[PATH_MAX];
  if (flags && !has_exchange && below(to)) return errno = EINVAL, -1;
  snprintf(both, sizeof both, "%s -> %s", from, below(to) ? to + root_length + 1 : to);
  GUARD(flags ? "exchange" : "rename", MOVES, below(from) ? both : to);
  return REAL(renameat2)(from_directory, from, to_directory, to, flags);
}

int link(const char *from, const char *to) {
  GUARD("link", CREATES, to);
  return REAL(link)(from, to);
}

int linkat(int from_directory, const char *from, int to_directory, const char *to,
           int flags) {
  char buffer[PATH_MAX];
  GUARD("link", CREATES, full_path(to_directory, to, buffer));
  return REAL(linkat)(from_directory, from, to_directory, to, flags);
}

int symlink(const char *from, const char *to) {
  GUARD("link", CREATES, to);
  return REAL(symlink)(from, to);
}
