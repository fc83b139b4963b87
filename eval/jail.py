"""The child process of eval/sandbox.py: confines itself, then runs a program and its tests. Imports little: it starts once an item."""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
import types

CONFINED, READY, UNCONFINED = b"confined", b"ready", b"unconfined: "


def main(channel):
    """Speaks over descriptor `channel`, in messages with a 4-byte length: receives the job, says CONFINED, says READY when the program
    has run, receives token + tests, and gives the token back; or says what went wrong. A job that wants values gets a list of expressions
    instead of tests, and their reprs are given back behind the token."""
    # The program may replace builtins and functions of modules; what is needed after it is bound to local names before.
    read, write, pack, unpack, execute, make_code, error, text = (
        os.read,
        os.write,
        struct.pack,
        struct.unpack,
        exec,
        compile,
        BaseException,
        str,
    )
    evaluate, represent, load, dump = eval, repr, json.loads, json.dumps

    def receive():
        n, data = unpack("!I", read(channel, 4))[0], b""
        while len(data) < n:
            data += read(channel, n - len(data))
        return data

    def send(data):
        write(channel, pack("!I", len(data)) + data)

    job = json.loads(receive())
    try:
        confine(job)
    except OSError as problem:
        return send(UNCONFINED + str(problem).encode())
    send(CONFINED)
    module = sys.modules["program"] = types.ModuleType("program")  # a real module: dataclasses and pickle look it up
    try:
        execute(make_code(job["program"], "program", "exec"), module.__dict__)
        send(READY)
        message = receive()
        if job["values"]:
            values = [represent(evaluate(expression, module.__dict__)) for expression in load(message[16:])]
            return send(message[:16] + dump(values).encode())
        execute(make_code(message[16:], "tests", "exec"), module.__dict__)
        send(message[:16])
    except error as problem:
        send((type(problem).__name__ + ": " + text(problem))[:200].encode(errors="replace"))


def confine(job):
    """Limits, Landlock where the kernel has it, seccomp. Raises OSError without seccomp."""
    sys.path += job["packages"]
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start threads
    for limit, soft, hard in (
        ("CPU", job["cpu"], job["cpu"] + 1),
        ("AS", job["memory"], job["memory"]),
        ("CORE", 0, 0),
        ("FSIZE", 0, 0),
        ("NPROC", 0, 0),
        ("NOFILE", 64, 64),
    ):
        resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (soft, hard))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _landlock([*job["prefixes"], *job["packages"], *SYSTEM, "."])
    code = _seccomp_filter()
    buffer = ctypes.create_string_buffer(code)
    _call(
        "prctl",
        PR_SET_SECCOMP,
        SECCOMP_MODE_FILTER,
        struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)),
        0,
        0,
    )


def _call(function, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, function)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


# ---- Landlock (https://docs.kernel.org/userspace-api/landlock.html): which files can be read

PR_SET_NO_NEW_PRIVS = 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
PATH_BENEATH, READ_FILE, READ_DIR, ALL_RIGHTS = 1, 1 << 2, 1 << 3, (1 << 13) - 1  # ALL_RIGHTS: of the first version
SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/dev/null",
    "/dev/urandom",
)


def _landlock(paths):
    try:
        rules = _call("syscall", CREATE_RULESET, struct.pack("=Q", ALL_RIGHTS), 8, 0)
    except OSError as problem:
        if problem.errno in (errno.ENOSYS, errno.EOPNOTSUPP):  # older kernels, or switched off
            return
        raise
    for path in filter(os.path.exists, paths):
        handle = os.open(path, os.O_PATH)
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        _call("syscall", ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)
    _call("syscall", RESTRICT_SELF, rules, 0)
    os.close(rules)


# ---- seccomp: which system calls exist

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# What an interpreter needs to compute, with the numbers on x86-64 and ARM64 (None: not there).
CALLS = dict(
    read=(0, 63),
    write=(1, 64),
    close=(3, 57),
    fstat=(5, 80),
    newfstatat=(262, 79),
    statx=(332, 291),
    stat=(4, None),
    lstat=(6, None),
    lseek=(8, 62),
    access=(21, None),
    faccessat=(269, 48),
    readlink=(89, None),
    readlinkat=(267, 78),
    getcwd=(79, 17),
    getdents64=(217, 61),
    fcntl=(72, 25),
    dup=(32, 23),
    pread64=(17, 67),
    readv=(19, 65),
    writev=(20, 66),
    mmap=(9, 222),
    mprotect=(10, 226),
    munmap=(11, 215),
    mremap=(25, 216),
    madvise=(28, 233),
    brk=(12, 214),
    rt_sigaction=(13, 134),
    rt_sigprocmask=(14, 135),
    rt_sigreturn=(15, 139),
    sigaltstack=(131, 132),
    restart_syscall=(219, 128),
    futex=(202, 98),
    set_robust_list=(273, 99),
    rseq=(334, 293),
    sched_yield=(24, 124),
    sched_getaffinity=(204, 123),
    getrandom=(318, 278),
    clock_gettime=(228, 113),
    clock_getres=(229, 114),
    clock_nanosleep=(230, 115),
    nanosleep=(35, 101),
    gettimeofday=(96, 169),
    times=(100, 153),
    getrusage=(98, 165),
    getpid=(39, 172),
    gettid=(186, 178),
    getuid=(102, 174),
    geteuid=(107, 175),
    getgid=(104, 176),
    getegid=(108, 177),
    uname=(63, 160),
    sysinfo=(99, 179),
    setitimer=(38, 103),
    alarm=(37, None),
    exit=(60, 93),
    exit_group=(231, 94),
)
OPEN = dict(open=(2, None, 1), openat=(257, 56, 2))  # and the position of the flags among the arguments
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last: O_TMPFILE


def _seccomp_filter():
    """Classic BPF over struct seccomp_data: allows CALLS, and OPEN without any WRITING flag; all else fails with EACCES."""
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    if sys.platform != "linux" or platform.machine() not in machines:
        raise OSError(errno.ENOSYS, f"no system call table for {sys.platform} on {platform.machine()}")
    column, architecture = machines[platform.machine()]
    load, if_equal, if_any_bit, answer = (
        0x20,
        0x15,
        0x45,
        0x06,
    )  # instructions; jumps count rows, for true and for false
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000
    rows = [
        (load, 0, 0, 4),
        (if_equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
    ]  # then: the number of the call
    for numbers in CALLS.values():
        if numbers[column] is not None:
            rows += [(if_equal, 0, 1, numbers[column]), (answer, 0, 0, allow)]
    for *numbers, position in OPEN.values():
        if numbers[column] is not None:
            rows += [
                (if_equal, 0, 4, numbers[column]),
                (load, 0, 0, 16 + 8 * position),
                (if_any_bit, 0, 1, WRITING),
                (answer, 0, 0, deny),
                (answer, 0, 0, allow),
            ]
    rows.append((answer, 0, 0, deny))
    return b"".join(struct.pack("HBBI", *row) for row in rows)


if __name__ == "__main__":
    main(int(sys.argv[1]))
