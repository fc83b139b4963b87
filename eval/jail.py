"""The child process of eval/sandbox.py: confines itself, then runs a program and its tests. It imports little, because
every program starts one."""

import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import time
import types

CONFINED, READY, UNCONFINED = b"confined", b"ready", b"unconfined: "


def main(channel, parent):
    """Talk over the descriptor `channel`, with a 4-byte length before each message: receive the job, send CONFINED, run
    the program, send READY, receive token + tests, run them, send the token, or what went wrong.

    A failure before CONFINED is the machine's fault: it sends UNCONFINED and the reason, or prints a traceback."""
    # The program may replace builtins and functions of modules, so those needed later are local.
    read, write, pack, unpack, execute, make_code = os.read, os.write, struct.pack, struct.unpack, exec, compile
    error, text, kind = BaseException, str, type

    def receive():
        n, data = unpack("!I", read(channel, 4))[0], b""
        while len(data) < n:
            data += read(channel, n - len(data))
        return data

    def send(data):
        write(channel, pack("!I", len(data)) + data)

    end_with(parent)
    job = json.loads(receive())
    try:
        confine(job, parent)
    except Exception as problem:
        return send(UNCONFINED + repr(problem).encode())
    send(CONFINED)
    module = sys.modules["program"] = types.ModuleType("program")  # a real module: dataclasses and pickle look it up
    try:
        execute(make_code(job["program"], "program", "exec"), module.__dict__)
        send(READY)
        message = receive()
        execute(make_code(message[16:], "tests", "exec"), module.__dict__)
        send(message[:16])
    except error as problem:
        send((kind(problem).__name__ + ": " + text(problem))[:200].encode(errors="replace"))


def end_with(parent):
    """Have the kernel kill this process when the thread that started it ends."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it may have ended before the kernel was asked
        sys.exit("it was not started by the evaluator itself, or that has ended")


def confine(job, parent):
    """Limits, no capabilities, Landlock where the kernel has it, seccomp. OSError where one of them fails."""
    sys.path += job["packages"]
    os.environ.pop("LD_LIBRARY_PATH", None)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads
    os.dup2(1, 2)  # from here on stderr, which the parent read, is /dev/null too
    cpu = math.ceil(time.process_time()) + job["cpu"]  # starting up is not the program's time
    limits = dict(CPU=cpu, AS=job["memory"], MEMLOCK=0, CORE=0, FSIZE=0, NPROC=0, NOFILE=64)
    for limit, soft in limits.items():
        number = getattr(resource, "RLIMIT_" + limit)
        most = resource.getrlimit(number)[1]  # the user may have a lower limit
        pair = soft, soft + (limit == "CPU")
        resource.setrlimit(number, [value if most == resource.RLIM_INFINITY else min(value, most) for value in pair])
    # Root without capabilities has the rights of an ordinary user. Version 3 of the header, this process, no sets.
    _call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
    end_with(parent)  # giving up capabilities may have undone it
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # a crash must not start the system's crash handler
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _landlock([*job["readable"], *job["packages"], *SYSTEM])
    code = _seccomp_filter()
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def _call(function, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, function)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 4, 22, 38, 2

# ---- Landlock (https://docs.kernel.org/userspace-api/landlock.html): which files can be read

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
GET_VERSION, PATH_BENEATH, READ_FILE, READ_DIR = 1, 1, 1 << 2, 1 << 3
# All rights of version 1, TCP of version 4, sockets and signals of version 6.
FILES, NETWORK, SCOPES = (1 << 13) - 1, 0b11, 0b11
LIBRARIES = "/lib /lib64 /usr/lib /usr/lib64 /usr/share/zoneinfo /etc/ld.so.cache"
SYSTEM = f"{LIBRARIES} /dev/null /dev/urandom".split()


def _landlock(paths):
    try:
        version = _call("syscall", CREATE_RULESET, None, 0, GET_VERSION)
    except OSError as problem:
        if problem.errno in (errno.ENOSYS, errno.EOPNOTSUPP):  # older kernels, or switched off
            return
        raise
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _call("syscall", CREATE_RULESET, struct.pack("=QQQ", FILES, NETWORK, SCOPES), size, 0)
    for path in filter(os.path.exists, paths):
        handle = os.open(path, os.O_PATH)
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        _call("syscall", ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)
    _call("syscall", RESTRICT_SELF, rules, 0)
    os.close(rules)


# ---- seccomp: which system calls exist

# What an interpreter needs to compute, with the numbers on x86-64 and ARM64 (-: not there).
TABLE = """
    read 0 63  write 1 64  close 3 57  fstat 5 80  newfstatat 262 79  statx 332 291  stat 4 -  lstat 6 -  lseek 8 62
    access 21 -  faccessat 269 48  readlink 89 -  readlinkat 267 78  getcwd 79 17  getdents64 217 61  open 2 -
    openat 257 56  fcntl 72 25  dup 32 23  pread64 17 67  readv 19 65  writev 20 66  mmap 9 222  mprotect 10 226
    munmap 11 215  mremap 25 216  madvise 28 233  brk 12 214  rt_sigaction 13 134  rt_sigprocmask 14 135
    rt_sigreturn 15 139  sigaltstack 131 132  restart_syscall 219 128  futex 202 98  sched_yield 24 124
    sched_getaffinity 204 123  getrandom 318 278  clock_gettime 228 113  clock_getres 229 114  clock_nanosleep 230 115
    nanosleep 35 101  gettimeofday 96 169  times 100 153  getrusage 98 165  getpid 39 172  gettid 186 178
    getuid 102 174  geteuid 107 175  getgid 104 176  getegid 108 177  uname 63 160  sysinfo 99 179  setitimer 38 103
    alarm 37 -  exit 60 93  exit_group 231 94
"""
WORDS = TABLE.replace("-", "-1").split()
CALLS = {name: (int(x86), int(arm)) for name, x86, arm in zip(WORDS[::3], WORDS[1::3], WORDS[2::3], strict=True)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last: O_TMPFILE
FUTEXES = tuple(128 | command for command in (0, 1, 3, 4, 5, 9, 10, 9 | 256))  # within this process, no owners
CLOCKS = 0, tuple(range(12))  # no clocks of other processes
# Calls that reach out of the process with some arguments: which argument must be one of these numbers ...
ONE_OF = dict(
    fcntl=(1, (0, 1, 2, 3, 1030)),  # copies, close-on-exec, reading flags: no owners, signals, leases, locks
    madvise=(2, (0, 1, 2, 3, 4, 8, 14, 15)),  # not HWPOISON, SOFT_OFFLINE, MERGEABLE, REMOVE
    futex=(1, FUTEXES),
    sched_getaffinity=(0, (0,)),  # of this process
    clock_gettime=CLOCKS,
    clock_getres=CLOCKS,
    clock_nanosleep=CLOCKS,
)
# ... and which must have none of these bits.
NONE_OF = dict(open=(1, WRITING), openat=(2, WRITING), mmap=(3, 0x2000 | 0x40000))  # mmap: LOCKED, HUGETLB


def _seccomp_filter():
    """Classic BPF over struct seccomp_data: allows CALLS with the arguments above; all else fails with EACCES. Only the
    lower half of an argument is looked at: these calls read no more of it."""
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    if sys.platform != "linux" or platform.machine() not in machines:
        raise OSError(errno.ENOSYS, f"no system call table for {sys.platform} on {platform.machine()}")
    column, architecture = machines[platform.machine()]
    load, if_equal, if_any_bit, answer = 0x20, 0x15, 0x45, 0x06  # jumps count rows, for true and for false
    allow, deny, kill = ((answer, 0, 0, code) for code in (0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000))
    rows = [(load, 0, 0, 4), (if_equal, 1, 0, architecture), kill, (load, 0, 0, 0)]  # then: the number of the call
    for name, numbers in CALLS.items():
        if numbers[column] < 0:
            continue
        body = [allow]
        if name in ONE_OF:
            position, values = ONE_OF[name]
            body = [(load, 0, 0, 16 + 8 * position)]
            for value in values:
                body += [(if_equal, 0, 1, value), allow]
            body.append(deny)
        elif name in NONE_OF:
            position, bits = NONE_OF[name]
            body = [(load, 0, 0, 16 + 8 * position), (if_any_bit, 0, 1, bits), deny, allow]
        rows += [(if_equal, 0, len(body), numbers[column]), *body]
    rows.append(deny)
    return b"".join(struct.pack("HBBI", *row) for row in rows)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
