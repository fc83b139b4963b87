"""Hostile programs fail their item and harm nothing; honest ones pass. Run: python -m pytest tests/test_sandbox.py
(Linux, 15 s)
"""

import contextlib
import errno
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval import jail, sandbox

RIGHT, WRONG, CHECK = (
    "def f(x):\n    return x + 1\n",
    "def f(x):\n    return 0\n",
    "assert f(1) == 2\nassert f(-1) == 0",
)


@pytest.fixture(scope="module", autouse=True)
def confinement():
    try:
        return sandbox.confinement()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def leaves_nothing():
    """After every test no process of the sandbox is left. Other test files may have left children of their own."""
    before = set(children())
    yield
    assert set(children()) <= before


def children(parent=None):
    """Numbers of the processes that this process, or another one, has started and not reaped."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now
            name, after = (folder / "stat").read_text().rsplit(")", 1)
            if int(after.split()[1]) == (parent or os.getpid()):
                found.append(int(folder.name))
    return found


def run(program, check=CHECK, **limits):
    return sandbox.run(program, check, **limits)


def test_honest_programs():
    assert run(RIGHT) == (True, "passed")
    assert run(WRONG) == (False, "AssertionError: ")
    assert run("def f(x:") == (False, "SyntaxError: '(' was never closed (program, line 1)")
    assert run("f = undefined").reason == "NameError: name 'undefined' is not defined"
    assert run(RIGHT, "assert g(1)").reason == "NameError: name 'g' is not defined"
    imports = (
        "import collections, dataclasses, functools, heapq, itertools, math, random, re, statistics, string, typing\n"
    )
    assert run(
        imports + "@dataclasses.dataclass\nclass P:\n    x: int\n" + RIGHT, "assert P(1) == P(1)\n" + CHECK
    ).passed
    assert run("x = 'é→'", "assert len(x) == 2").passed
    assert run("import numpy as np", "assert np.arange(5).sum() == 10 and (np.eye(9) @ np.eye(9)).trace() == 9").passed


def test_many_keep_their_order():
    jobs = [(RIGHT, f"assert f({i}) == {i + i % 2}") for i in range(6)]
    assert [result.passed for result in sandbox.run_many(jobs, workers=3)] == [False, True] * 3


def test_a_process_left_behind_is_noticed():
    before = set(children())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert set(children()) - before == {process.pid}
    assert set(children()) <= before


@pytest.mark.parametrize(
    "program, seconds",
    [
        ("while True:\n    pass\n", 0.5),
        ("while True:\n    print('x' * 10**6)\n", 0.5),
        ("import time\ntime.sleep(1000)\n", 0.25),
        (
            "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass\n",
            1,
        ),
        ("def f(x):\n    while True:\n        x += 1\n", 0.5),
    ],
)
def test_endless(program, seconds):
    """Endless loop, printing gigabytes, sleeping, ignoring every signal, and a loop inside the tested function.
    Whichever comes first says timeout: the wall clock, the soft limit of CPU time (SIGXCPU), or where that is ignored
    the hard one (SIGKILL).
    """
    start = time.monotonic()
    assert run(program, seconds=seconds) == (False, "timeout")
    assert time.monotonic() - start < 10


def test_a_program_that_does_not_read_its_tests():
    """It says that it is ready and sleeps; the tests are more than the channel holds."""
    program = "import os, time\nfor d in range(3, 64):\n    try: os.write(d, b'\\0\\0\\0\\5ready')\n"
    program += "    except OSError: pass\ntime.sleep(20)\n"
    start = time.monotonic()
    assert run(program, "x = 1\n" * 10**6, seconds=0.5) == (False, "timeout")
    assert time.monotonic() - start < 10


def test_memory_bomb():
    assert run("x = []\nwhile True:\n    x.append(bytearray(10**7))\n").reason == "MemoryError: "
    assert run("x = bytearray(2 * 10**8)\n" + RIGHT, memory=2**27).reason == "MemoryError: "
    assert run("x = bytearray(2 * 10**8)\n" + RIGHT).passed  # the check can fail: the limit is what stopped it


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(4):\n    os.fork()\n",  # bounded: 16 processes if nothing stopped it
        "import subprocess\nsubprocess.run(['true'])\n",
        "import os\nos.execv('/bin/true', ['true'])\n",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})\n",
        "import threading\nthreading.Thread(target=print).start()\n",
        "import os\nos.kill(os.getpid(), 0)\n",
        "import os\nos.setsid()\n",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))\n",
    ],
)
def test_no_processes_and_no_way_out_of_the_limits(program):
    result = run(program + RIGHT)
    assert not result.passed and result.reason.split(":")[0] in ("PermissionError", "RuntimeError", "ValueError")


def test_cannot_write(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    attempts = [
        "open({0!r}, 'w')",
        "open({0!r}, 'a')",
        "open({0!r}, 'r+')",
        "os.truncate({0!r}, 0)",
        "os.remove({0!r})",
        "os.rename({0!r}, {0!r} + '2')",
        "os.chmod({0!r}, 0)",
        "os.symlink({0!r}, 'link')",
        "os.mkdir({0!r} + '-dir')",
        "os.mkdir('here')",
        "open('here', 'x')",
        "open('/dev/shm/optimoe-test', 'w')",
        "os.open('.', os.O_RDWR | os.O_TMPFILE)",
        "os.memfd_create('x')",
        "os.mkfifo('pipe')",
    ]
    for attempt in attempts:
        result = run("import os\n" + attempt.format(str(victim)) + "\n" + RIGHT)
        assert result.reason.startswith("PermissionError"), (attempt, result)
    assert victim.read_text() == "precious" and set(os.listdir(tmp_path)) == {"victim"}


def test_no_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    assert (
        run("import os\nfound = 'HF_TOKEN' in os.environ or 'hunter2' in str(os.environ)", "assert found").reason
        == "AssertionError: "
    )
    assert run("import os", "assert set(os.environ) <= {'LC_CTYPE', 'OPENBLAS_NUM_THREADS'}").passed


def test_cannot_read_files_of_the_user(tmp_path, confinement):
    if "Landlock" not in confinement:
        pytest.skip("this kernel has no Landlock: files of the user can be read, as eval/sandbox.py says")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for path in (
        secret,
        f"/proc/{os.getpid()}/environ",
        f"/proc/{os.getpid()}/maps",
        Path(sandbox.__file__),
        "/etc/passwd",
    ):
        assert Path(path).read_bytes()
        assert run(f"open({str(path)!r}).read()\n" + RIGHT).reason.startswith("PermissionError"), path


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for program in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}))\n",
            "import socket\nsocket.socketpair()\n",
            "import socket\nsocket.socket(socket.AF_UNIX)\n",
            "import socket\nsocket.socket(fileno=3).send(b'x')\n",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')\n",
        ):
            assert not run(program + RIGHT).passed
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "prelude",
    [
        "import os\nos._exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "raise SystemExit\n",
        "exit = quit = print\nraise KeyboardInterrupt\n",
        "import ctypes\nctypes.string_at(0)\n",
        "import os\nos.abort()\n",
        "import atexit\natexit.register(print, 'passed')\nraise ValueError\n",
    ],
)
def test_leaving_before_the_tests_is_no_pass(prelude):
    assert not run(prelude + RIGHT).passed
    inside = "def f(x):\n" + "".join(f"    {line}\n" for line in prelude.splitlines())
    assert not run(inside).passed


TRICKS = [
    "check = lambda candidate: None\n",
    "print('passed')\n",
    "__name__ = '__main__'\n",
    "import builtins\n"
    "for name in ('exec', 'eval', 'compile', 'print', 'AssertionError', 'BaseException', 'Exception'):\n"
    "    setattr(builtins, name, lambda *a, **k: None)\n",
    "import os, sys, struct, json, types\n"
    "os.write = os.read = struct.pack = struct.unpack = json.loads = lambda *a, **k: b''\n",
    "import sys\n"
    "for name in list(sys.modules):\n"
    "    if name not in ('sys', 'program', 'builtins'):\n        del sys.modules[name]\n",
    "import sys\nsys.settrace(None)\nsys.setrecursionlimit(10**5)\n"
    "sys.excepthook = sys.exit = sys.unraisablehook = print\n",
]


@pytest.mark.parametrize("trick", TRICKS)
def test_overriding_the_check(trick):
    tests = "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"
    assert not run(trick + WRONG, tests).passed
    assert run(trick + RIGHT, tests).passed  # and the trick alone does not break an honest answer


@pytest.mark.parametrize(
    "message",
    ["b'passed'", "b'x' * 16", "b'\\0\\0\\0\\x10' + b'x' * 16", "b'\\xff' * 2**20", "b'\\0\\0\\0\\x0eunconfined: no'"],
)
def test_writing_to_the_channel_is_no_pass(message):
    program = "import os\nfor fd in range(64):\n    try:\n"
    program += f"        os.write(fd, {message})\n    except OSError:\n        pass\n"
    assert not run(program + WRONG, seconds=0.25).passed


def fake_child(monkeypatch, tmp_path, lines):
    child = tmp_path / "jail.py"
    child.write_text(lines)
    monkeypatch.setattr(jail, "__file__", str(child))


def fake_interpreter(monkeypatch, tmp_path, lines):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n{lines}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_unconfined_is_an_error(monkeypatch, tmp_path):
    """What the child says where it cannot confine itself; it has run nothing then."""
    said = "import os, struct, sys\nsaid = b'unconfined: no seccomp here'\n"
    fake_child(monkeypatch, tmp_path, said + "os.write(int(sys.argv[1]), struct.pack('!I', len(said)) + said)\n")
    with pytest.raises(OSError, match="did not start .no seccomp here.*needs Linux.*run this elsewhere, or leave out"):
        run(RIGHT)


@pytest.mark.parametrize("judge", [run, lambda program: sandbox.values(program, ["f(1)"])])
@pytest.mark.parametrize(
    "lines, message",
    [
        ("echo cannot load libpython >&2; exit 127", "exit code 127: cannot load libpython"),
        ("exit 0", "exit code 0: no message"),
        ("kill -SEGV $$", "exit code -11"),
        ("sleep 100", "not ready after 1 seconds"),
    ],
)
def test_a_child_that_cannot_start_is_an_error_and_no_wrong_answer(monkeypatch, tmp_path, judge, lines, message):
    monkeypatch.setattr(sandbox, "START_SECONDS", 1)
    fake_interpreter(monkeypatch, tmp_path, lines)
    with pytest.raises(OSError, match="did not start ." + message):
        judge(RIGHT)


def test_an_interpreter_that_needs_its_libraries(monkeypatch, tmp_path):
    fake_interpreter(monkeypatch, tmp_path, '[ -n "$LD_LIBRARY_PATH" ] || { echo no libpython >&2; exit 127; }')
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(OSError, match="no libpython"):
        run(RIGHT)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert run("import os\n" + RIGHT, CHECK + "\nassert 'LD_LIBRARY_PATH' not in os.environ").passed


def test_starting_is_not_the_program_s_time(monkeypatch, tmp_path):
    fake_interpreter(monkeypatch, tmp_path, "sleep 2")
    assert run(RIGHT, seconds=0.25).passed


def test_waiting_for_a_processor_is_not_the_program_s_time(monkeypatch):
    program = "import time\ntime.sleep(1.5)\n" + RIGHT
    assert run(program, seconds=0.25) == (False, "timeout")
    began, real = time.monotonic(), sandbox.waited
    monkeypatch.setattr(sandbox, "waited", lambda pid: time.monotonic() - began)  # as on a machine with many others
    assert run(program, seconds=0.25).passed
    found = real(os.getpid())
    assert 0 <= found < 10**5 and real(2**30) == 0
    for _ in range(100):
        time.sleep(0)
    assert real(os.getpid()) >= found


@pytest.mark.parametrize(
    "broken, message",
    [
        ("raise ImportError('no math')", "ImportError: no math"),
        ("while True: pass", "timeout"),
        ("os._exit(0)", "the process ended during the program"),
    ],
)
def test_an_honest_program_must_pass_first(monkeypatch, tmp_path, broken, message):
    """A child that confines itself and then fails every program gives an error, in both ways of judging."""
    text = Path(jail.__file__).read_text()
    begin = "        execute(make_code(job"
    assert text.count(begin) == 1
    fake_child(monkeypatch, tmp_path, text.replace(begin, f"        {broken}\n{begin}"))
    monkeypatch.setattr(sandbox, "HONEST_SECONDS", 0.5)
    sandbox.confinement.cache_clear()
    for judge in (run, lambda program: sandbox.values(program, ["1"])):
        with pytest.raises(OSError, match=f"an honest one failed .{message}"):
            judge(RIGHT)


def test_limits_that_no_program_can_hold():
    with pytest.raises(OSError, match="with 1,000,000 bytes of memory|did not start .*MemoryError"):
        run(RIGHT, memory=10**6)


def test_lower_limits_of_the_user_stay():
    """Raising them would be refused to an ordinary user, and every program would fail."""
    count = "import os\nn = 0\ntry:\n    while True: n = os.dup(0)\nexcept OSError: pass"
    code = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\nfrom eval import sandbox\n"
    code += f"print(sandbox.values({count!r}, ['n']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == "['31']\n", found
    assert sandbox.values(count, ["n"]) == ["63"]


# ---- what must not get out

NUMBERS = dict(  # on x86-64 and ARM64
    kill=(62, 129),
    tkill=(200, 130),
    tgkill=(234, 131),
    rt_sigqueueinfo=(129, 138),
    rt_tgsigqueueinfo=(297, 240),
    pidfd_open=(434, 434),
    pidfd_send_signal=(424, 424),
    ptrace=(101, 117),
    process_vm_writev=(311, 271),
    process_madvise=(440, 440),
    setpriority=(141, 140),
    ioprio_set=(251, 30),
    prlimit64=(302, 261),
    sched_setaffinity=(203, 122),
    sched_setscheduler=(144, 119),
    sched_setattr=(314, 274),
    sched_getaffinity=(204, 123),
    move_pages=(279, 239),
    migrate_pages=(256, 238),
    setpgid=(109, 154),
    setsid=(112, 157),
    ioctl=(16, 29),
    flock=(73, 32),
    prctl=(157, 167),
    seccomp=(317, 277),
    personality=(135, 92),
    capset=(126, 91),
    setuid=(105, 146),
    unshare=(272, 97),
    clone=(56, 220),
    clone3=(435, 435),
    fork=(57, None),
    vfork=(58, None),
    execve=(59, 221),
    execveat=(322, 281),
    timer_create=(222, 107),
    timer_settime=(223, 110),
    timerfd_create=(283, 85),
    signalfd4=(289, 74),
    eventfd2=(290, 19),
    inotify_init1=(294, 26),
    mq_open=(240, 180),
    mq_notify=(244, 184),
    msgget=(68, 186),
    semget=(64, 190),
    shmget=(29, 194),
    io_uring_setup=(425, 425),
    bpf=(321, 280),
    perf_event_open=(298, 241),
    userfaultfd=(323, 282),
    keyctl=(250, 219),
    add_key=(248, 217),
    socket=(41, 198),
    socketpair=(53, 199),
    sendto=(44, 206),
    sendmsg=(46, 211),
    setrlimit=(160, 164),
    memfd_create=(319, 279),
    unlinkat=(263, 35),
    mount=(165, 40),
    reboot=(169, 142),
    fcntl=(72, 25),
    madvise=(28, 233),
    mmap=(9, 222),
    futex=(202, 98),
    clock_gettime=(228, 113),
    open=(2, None),
    openat=(257, 56),
)
F_SETFL, F_SETLK, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY = 4, 6, 8, 10, 15, 1024, 1026
# (call, arguments): "victim" is the number of another process, "clock" that of its clock, "page" a page of memory.
ATTACKS = [
    ("kill", "victim", 15),
    ("kill", -1, 15),
    ("tkill", "victim", 15),
    ("tgkill", "victim", "victim", 15),
    ("rt_sigqueueinfo", "victim", 15, "page"),
    ("rt_tgsigqueueinfo", "victim", "victim", 15, "page"),
    ("pidfd_open", "victim", 0),
    ("pidfd_send_signal", 3, 15, 0, 0),
    ("ptrace", 16, "victim", 0, 0),
    ("process_vm_writev", "victim", "page", 1, "page", 1, 0),
    ("setpriority", 0, "victim", 19),
    ("ioprio_set", 1, "victim", 3 << 13),
    ("prlimit64", "victim", 0, "page", 0),
    ("prlimit64", 0, 0, "page", 0),
    ("sched_setaffinity", "victim", 8, "page"),
    ("sched_setscheduler", "victim", 3, "page"),
    ("sched_setattr", "victim", "page", 0),
    ("sched_getaffinity", "victim", 8, "page"),
    ("move_pages", "victim", 0, 0, 0, 0, 0),
    ("migrate_pages", "victim", 0, 0, 0),
    ("setpgid", 0, "victim"),
    ("setsid",),
    *(
        ("ioctl", fd, request, "page") for fd in (0, 3) for request in (0x8901, 0x8902, 0x5452, 0x5412)
    ),  # owners, TIOCSTI
    ("flock", 3, 2),
    ("prctl", 1, 0, 0, 0, 0),
    ("prctl", 59, 1, 0, 0, 0),
    ("seccomp", 0, 0, 0),
    ("personality", 0x0400000),
    ("capset", "page", "page"),
    ("setuid", 1),
    ("unshare", 0x10000000),
    ("clone", 17, 0, 0, 0, 0),
    ("clone3", "page", 64),
    ("fork",),
    ("execve", "page", 0, 0),
    ("timer_create", 0, "page", "page"),
    ("timerfd_create", 0, 0),
    ("signalfd4", -1, "page", 8, 0),
    ("eventfd2", 0, 0),
    ("inotify_init1", 0),
    ("mq_open", "page", 0o102, 0o600, 0),
    ("mq_notify", 3, "page"),
    ("msgget", 1, 0o1666),
    ("semget", 1, 1, 0o1666),
    ("shmget", 1, 4096, 0o1666),
    ("io_uring_setup", 8, "page"),
    ("bpf", 0, "page", 64),
    ("perf_event_open", "page", "victim", -1, -1, 0),
    ("userfaultfd", 0),
    ("keyctl", 0, -3, 0),
    ("add_key", "page", "page", 0, 0, -3),
    ("sendto", 3, "page", 1, 0, 0, 0),
    ("sendmsg", 3, "page", 0),
    ("memfd_create", "page", 0),
    *(
        ("fcntl", fd, command, argument)
        for fd in (0, 1, 2, 3, "channel")
        for command, argument in (
            (F_SETOWN, "victim"),
            (F_SETOWN_EX, "page"),
            (F_SETSIG, 9),
            (F_SETFL, os.O_ASYNC),
            (F_SETLK, "page"),
            (37, "page"),  # F_OFD_SETLK
            (F_SETLEASE, 0),
            (F_NOTIFY, 1 << 31),
            (1031, 1 << 20),  # F_SETPIPE_SZ
            (1033, 1),  # F_ADD_SEALS
        )
    ),
    ("fcntl", 1, F_SETOWN | 1 << 32, "victim"),  # the kernel reads the lower half of this argument
    ("madvise", "page", 4096, 100),  # HWPOISON takes memory from the machine for good
    ("madvise", "page", 4096, 101),
    ("madvise", "page", 4096, 12),
    ("mmap", 0, 1 << 21, 3, 0x40022, -1, 0),  # HUGETLB
    ("mmap", 0, 4096, 3, 0x2022, -1, 0),  # LOCKED
    ("futex", "page", 6, 0, 0, 0, 0),  # LOCK_PI names another owner
    ("futex", "page", 1, 1, 0, 0, 0),  # WAKE in shared memory
    ("clock_gettime", "clock", "page"),
]
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
    found = sandbox.values(CALLER, [f"call({NUMBERS[name][column]}, *{args})" for name, args in calls])
    assert dict(zip(map(repr, calls), found, strict=True)) == {repr(call): f"(-1, {errno.EACCES})" for call in calls}
    own = sandbox.values(CALLER, [f"call({NUMBERS['fcntl'][column]}, 0, 1)", f"call({jail.CALLS['getuid'][column]})"])
    assert own == ["(0, 0)", f"({os.getuid()}, 0)"]  # the check can fail: what is allowed works


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1])
@pytest.mark.parametrize("judge", ["run", "values"])
def test_the_parent_s_token_sends_no_signal(victim, judge, number):
    """The attack of a public report: the owner of the channel is signalled when tests and token arrive on it."""
    attack = f"""
import fcntl, os, time
for descriptor in range(64):
    for command, argument in ((fcntl.F_SETOWN, {victim}), (fcntl.F_SETSIG, {int(number)}), (fcntl.F_SETFL, os.O_ASYNC)):
        try:
            fcntl.fcntl(descriptor, command, argument)
        except OSError:
            pass
"""
    early = """
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b"\\0\\0\\0\\5ready")
    except OSError:
        pass
time.sleep(0.2)  # a process that waits for data already gets no signal
"""
    for program in (attack + RIGHT, attack + early + RIGHT):
        honest = program == attack + RIGHT
        if judge == "run":
            assert run(program, CHECK + "\n" + "#" * 10**5).passed == honest
        else:
            assert (sandbox.values(program, ["f(1)"]) == ["2"]) == honest
    assert "\nState:\tS" in Path(f"/proc/{victim}/status").read_text()  # neither ended nor stopped


def running_child():
    """The number of the one process of the sandbox, once a program runs in it."""
    for _ in range(1000):
        for pid in children():
            with contextlib.suppress(OSError):
                ours = jail.__file__ in Path(f"/proc/{pid}/cmdline").read_text()
                if ours and "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text():
                    return pid
        time.sleep(0.01)
    raise AssertionError("no confined child")


def test_what_the_process_gives_up():
    thread = threading.Thread(target=run, args=("import time\ntime.sleep(100)",), kwargs={"seconds": 0.5})
    thread.start()
    status = Path(f"/proc/{running_child()}/status").read_text()
    thread.join()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    assert "Seccomp:\t2" not in Path("/proc/self/status").read_text()  # the check can fail


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "program", ["import time\ntime.sleep(1000)", "while True: pass", "import signal\nsignal.pause()"]
)
def test_no_child_outlives_its_evaluator(number, program):
    code = (
        f"from eval import sandbox\nsandbox.confinement()\nprint(flush=True)\nsandbox.run({program!r}, '', seconds=600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as evaluator:
        evaluator.stdout.readline()
        for _ in range(1000):
            if found := children(evaluator.pid):
                break
            time.sleep(0.01)
        time.sleep(0.3)  # some of them are still starting
        evaluator.send_signal(number)
        evaluator.wait()
    for _ in range(500):
        if not any(Path(f"/proc/{pid}").exists() for pid in found):
            break
        time.sleep(0.01)
    assert found and not any(Path(f"/proc/{pid}").exists() for pid in found)


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
