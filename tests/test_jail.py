"""System calls that a confined program must not get, on both processors: pytest tests/test_jail.py (Linux, seconds)"""

import errno
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import jail, sandbox
from tests.test_sandbox import CHECK, RIGHT, confinement  # noqa: F401  the last is a fixture
from tests.trainrun import wait_for

# System calls with their numbers on x86-64 and ARM64 (-: not there).
WORDS = """
    kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
    pidfd_open 434 434  pidfd_send_signal 424 424  ptrace 101 117  process_vm_writev 311 271
    process_madvise 440 440  setpriority 141 140  ioprio_set 251 30  prlimit64 302 261  sched_setaffinity 203 122
    sched_setscheduler 144 119  sched_setattr 314 274  sched_getaffinity 204 123  move_pages 279 239
    migrate_pages 256 238  setpgid 109 154  setsid 112 157  ioctl 16 29  flock 73 32  prctl 157 167  seccomp 317 277
    personality 135 92  capset 126 91  setuid 105 146  unshare 272 97  clone 56 220  clone3 435 435  fork 57 -
    vfork 58 -  execve 59 221  execveat 322 281  timer_create 222 107  timer_settime 223 110  timerfd_create 283 85
    signalfd4 289 74  eventfd2 290 19  inotify_init1 294 26  mq_open 240 180  mq_notify 244 184  msgget 68 186
    semget 64 190  shmget 29 194  io_uring_setup 425 425  bpf 321 280  perf_event_open 298 241  userfaultfd 323 282
    keyctl 250 219  add_key 248 217  socket 41 198  socketpair 53 199  sendto 44 206  sendmsg 46 211
    setrlimit 160 164  memfd_create 319 279  unlinkat 263 35  mount 165 40  reboot 169 142  fcntl 72 25
    madvise 28 233  mmap 9 222  futex 202 98  clock_gettime 228 113  open 2 -  openat 257 56
""".split()
ROWS = zip(WORDS[::3], WORDS[1::3], WORDS[2::3], strict=True)
NUMBERS = {name: tuple(None if n == "-" else int(n) for n in pair) for name, *pair in ROWS}
# Calls and arguments. victim: the number of another process; clock: that of its clock; page: a page of memory. The
# last two lines take memory from the machine for good (HWPOISON, SOFT_OFFLINE), merge it, take HUGETLB and LOCKED
# pages, name another owner of a futex or use one in shared memory, and read another process's clock.
LINES = """
    kill victim 15; kill -1 15; tkill victim 15; tgkill victim victim 15; rt_sigqueueinfo victim 15 page;
    rt_tgsigqueueinfo victim victim 15 page; pidfd_open victim 0; pidfd_send_signal 3 15 0 0; ptrace 16 victim 0 0;
    process_vm_writev victim page 1 page 1 0; setpriority 0 victim 19; ioprio_set 1 victim 0x6000;
    prlimit64 victim 0 page 0; prlimit64 0 0 page 0; sched_setaffinity victim 8 page;
    sched_setscheduler victim 3 page; sched_setattr victim page 0; sched_getaffinity victim 8 page;
    move_pages victim 0 0 0 0 0; migrate_pages victim 0 0 0; setpgid 0 victim; setsid; flock 3 2; prctl 1 0 0 0 0;
    prctl 59 1 0 0 0; seccomp 0 0 0; personality 0x400000; capset page page; setuid 1; unshare 0x10000000;
    clone 17 0 0 0 0; clone3 page 64; fork; execve page 0 0; timer_create 0 page page; timerfd_create 0 0;
    signalfd4 -1 page 8 0; eventfd2 0 0; inotify_init1 0; mq_open page 0o102 0o600 0; mq_notify 3 page; msgget 1 0o1666;
    semget 1 1 0o1666; shmget 1 4096 0o1666; io_uring_setup 8 page; bpf 0 page 64; perf_event_open page victim -1 -1 0;
    userfaultfd 0; keyctl 0 -3 0; add_key page page 0 0 -3; sendto 3 page 1 0 0 0; sendmsg 3 page 0;
    memfd_create page 0;
    madvise page 4096 100; madvise page 4096 101; madvise page 4096 12; mmap 0 0x200000 3 0x40022 -1 0;
    mmap 0 4096 3 0x2022 -1 0; futex page 6 0 0 0 0; futex page 1 1 0 0 0; clock_gettime clock page
"""
ATTACKS = [tuple(word if word.isidentifier() else int(word, 0) for word in line.split()) for line in LINES.split(";")]
ATTACKS += [("ioctl", fd, request, "page") for fd in (0, 3) for request in (0x8901, 0x8902, 0x5452, 0x5412)]  # owners
F_SETFL, F_SETLK, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY = 4, 6, 8, 10, 15, 1024, 1026
F_OFD_SETLK, F_SETPIPE_SZ, F_ADD_SEALS = 37, 1031, 1033
COMMANDS = {F_SETOWN: "victim", F_SETOWN_EX: "page", F_SETSIG: 9, F_SETFL: os.O_ASYNC, F_SETLK: "page"}
COMMANDS |= {F_OFD_SETLK: "page", F_SETLEASE: 0, F_NOTIFY: 1 << 31, F_SETPIPE_SZ: 1 << 20, F_ADD_SEALS: 1}
ATTACKS += [("fcntl", fd, *command) for fd in (0, 1, 2, 3, "channel") for command in COMMANDS.items()]
ATTACKS += [("fcntl", 1, F_SETOWN | 1 << 32, "victim")]  # the kernel reads the lower half of this argument
CALLER = """
import ctypes
libc, page = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(4096)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(number, *(ctypes.c_long(ctypes.addressof(page) if arg == "page" else arg) for arg in args))
    return (result, ctypes.get_errno())
"""


@pytest.fixture
def victim():
    """A process that any signal ends, as long as it runs."""
    with subprocess.Popen([sys.executable, "-c", "import time\ntime.sleep(100)"], stdin=subprocess.DEVNULL) as process:
        state = os.sched_getaffinity(process.pid), os.getpriority(os.PRIO_PROCESS, process.pid)
        try:
            yield process.pid
            time.sleep(0.1)
            assert process.poll() is None
            assert (os.sched_getaffinity(process.pid), os.getpriority(os.PRIO_PROCESS, process.pid)) == state
        finally:
            process.kill()


def test_calls_that_reach_out_are_refused(victim):
    """Made directly, by a program in the sandbox, without Python's own checks."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    names = dict(victim=victim, clock=~victim << 3 | 2, channel=4)
    calls = [(name, [names.get(arg, arg) for arg in args]) for name, *args in ATTACKS if NUMBERS[name][column]]
    made = [(name, NUMBERS[name][column], *args) for name, args in calls]
    refused = f"assert not (found := [args for args in {made} if call(*args[1:]) != (-1, {errno.EACCES})]), found"
    assert sandbox.run(CALLER, refused) == (True, "passed")
    own = f"assert call({NUMBERS['fcntl'][column]}, 0, 1) == (0, 0)\n"  # the check can fail: what is allowed works
    own += f"assert call({jail.CALLS['getuid'][column]}) == ({os.getuid()}, 0)"
    assert sandbox.run(CALLER, own) == (True, "passed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1])
def test_the_parent_s_token_sends_no_signal(victim, number):
    """The attack of a public report: the owner of the channel is signalled when tests and token arrive on it."""
    attack = f"""
import fcntl, os, time
for descriptor in range(1024):
    for command, argument in ((fcntl.F_SETOWN, {victim}), (fcntl.F_SETSIG, {int(number)}), (fcntl.F_SETFL, os.O_ASYNC)):
        try:
            fcntl.fcntl(descriptor, command, argument)
        except OSError:
            pass
"""
    early = """
for descriptor in range(3, 1024):
    try:
        os.write(descriptor, b"\\0\\0\\0\\5ready")
    except OSError:
        pass
time.sleep(0.2)  # a process that waits for data already gets no signal
"""
    for program in (attack + RIGHT, attack + early + RIGHT):
        assert sandbox.run(program, CHECK + "\n" + "#" * 10**5).passed == (program == attack + RIGHT)
    asleep = lambda: "\nState:\tS" in Path(f"/proc/{victim}/status").read_text()
    assert wait_for(asleep, 10)  # neither ended nor stopped


def simulate(program, number, arguments=(0,) * 6, architecture=0xC000003E):
    """Runs a classic BPF program on struct seccomp_data."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(argument % 2**64 for argument in arguments))
    rows = [struct.unpack_from("HBBI", program, i) for i in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        code, yes, no, value = rows[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(value, "deny")
        else:
            at += yes if (accumulator == value if code == 0x15 else accumulator & value) else no


@pytest.mark.parametrize("machine, column, architecture", [("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7)])
def test_system_call_filter(monkeypatch, machine, column, architecture):
    """Both tables, the one of the other machine too."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = jail._seccomp_filter()

    def answer(name, *arguments, of=architecture, bits=0):
        arguments = [arg if isinstance(arg, int) else 12345 for arg in arguments] + [0] * (6 - len(arguments))
        return simulate(program, (jail.CALLS | NUMBERS)[name][column] | bits, arguments, of)

    for name, *arguments in ATTACKS:
        if NUMBERS[name][column]:
            assert answer(name, *(-98 if arg == "clock" else arg for arg in arguments)) == "deny", (name, arguments)
    flags = dict(open=1, openat=2)
    for name in [name for name in flags if NUMBERS[name][column]]:
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, 0o20000000):
            assert answer(name, *[0] * flags[name], flag) == "deny"
        assert answer(name, *[0] * flags[name], os.O_CLOEXEC | os.O_DIRECTORY) == "allow"
    for name, *arguments in (
        ("read", 3),
        ("write", 3),
        ("fcntl", 3, 1),
        ("fcntl", 3, 1030),
        ("madvise", 0, 4096, 4),
        ("mmap", 0, 4096, 3, 0x22, -1, 0),
        ("futex", 0, 128 | 256 | 9),
        ("clock_gettime", 1),
    ):
        assert answer(name, *arguments) == "allow"
        assert answer(name, *arguments, bits=0x40000000) == "deny"  # the x32 numbers
        assert answer(name, *arguments, of=architecture ^ 1) == "kill"
    allowed = {numbers[column] for numbers in jail.CALLS.values()}
    assert not [
        number
        for number in range(600)
        if number not in allowed and simulate(program, number, architecture=architecture) != "deny"
    ]
    assert all(0 <= numbers[column] < 600 for numbers in jail.CALLS.values() if numbers[column] >= 0)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        jail._seccomp_filter()
