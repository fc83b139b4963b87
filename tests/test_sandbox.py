"""Hostile programs fail their item and harm nothing; honest ones pass. Run: python -m pytest tests/test_sandbox.py (Linux, 15 s)"""

import contextlib
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
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
def leaves_nothing(tmp_path, monkeypatch):
    """After every test: no temporary directory and no process of the sandbox is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("sandbox-*"))
    assert not processes_in(tmp_path)


def processes_in(folder):
    """Links to the current directories of the processes that are, or were before it was deleted, in this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
            found += [link] if os.readlink(link).startswith(str(folder)) else []
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


def test_a_process_left_behind_is_noticed(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=folder, stdin=subprocess.PIPE):
        folder.rmdir()
        assert len(processes_in(tmp_path)) == 1
    assert not processes_in(tmp_path)


@pytest.mark.parametrize(
    "program, seconds",
    [
        ("while True:\n    pass\n", 0.5),
        ("while True:\n    print('x' * 10**6)\n", 0.5),
        ("import time\ntime.sleep(1000)\n", 0.25),
        (
            "import signal\nfor s in range(1, 32):\n    if s not in (9, 19):\n        signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass\n",
            1,
        ),
        ("def f(x):\n    while True:\n        x += 1\n", 0.5),
    ],
)
def test_endless(program, seconds):
    """Endless loop, printing gigabytes, sleeping, ignoring every signal, and a loop inside the tested function. Whichever comes first says
    timeout: the wall clock, the soft limit of CPU time (SIGXCPU), or where that is ignored the hard one (SIGKILL)."""
    start = time.monotonic()
    assert run(program, seconds=seconds) == (False, "timeout")
    assert time.monotonic() - start < 10


def test_a_program_that_does_not_read_its_tests():
    """It says that it is ready and sleeps; the tests are more than the channel holds."""
    program = "import os, time\nfor d in range(3, 64):\n    try: os.write(d, b'\\0\\0\\0\\5ready')\n    except OSError: pass\ntime.sleep(20)\n"
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
    assert run("import os", "assert os.listdir('.') == []").passed  # where it runs there is nothing


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
    "import builtins\nfor name in ('exec', 'eval', 'compile', 'print', 'AssertionError', 'BaseException', 'Exception'):\n"
    "    setattr(builtins, name, lambda *a, **k: None)\n",
    "import os, sys, struct, json, types\nos.write = os.read = struct.pack = struct.unpack = json.loads = lambda *a, **k: b''\n",
    "import sys\nfor name in list(sys.modules):\n    if name not in ('sys', 'program', 'builtins'):\n        del sys.modules[name]\n",
    "import sys\nsys.settrace(None)\nsys.setrecursionlimit(10**5)\nsys.excepthook = sys.exit = sys.unraisablehook = print\n",
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
    program = f"import os\nfor fd in range(64):\n    try:\n        os.write(fd, {message})\n    except OSError:\n        pass\n"
    assert not run(program + WRONG, seconds=0.25).passed


def test_unconfined_is_an_error(monkeypatch, tmp_path):
    """What the child says where it cannot confine itself, it has run nothing then."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, struct, sys\nsaid = b'unconfined: no seccomp here'\n"
        "os.write(int(sys.argv[1]), struct.pack('!I', len(said)) + said)\n"
    )
    monkeypatch.setattr(jail, "__file__", str(child))
    with pytest.raises(OSError, match="needs Linux.*no seccomp here.*leave out what runs programs"):
        run(RIGHT)


def simulate(program, number, flags=0, architecture=0xC000003E):
    """Runs a classic BPF program on struct seccomp_data; flags are put into every argument."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *[flags] * 6)
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


@pytest.mark.parametrize(
    "machine, architecture, numbers",
    [
        (
            "x86_64",
            0xC000003E,
            dict(
                read=0,
                write=1,
                openat=257,
                socket=41,
                clone=56,
                fork=57,
                execve=59,
                kill=62,
                ptrace=101,
                unlink=87,
                io_uring=425,
            ),
        ),
        (
            "aarch64",
            0xC00000B7,
            dict(
                read=63,
                write=64,
                openat=56,
                socket=198,
                clone=220,
                execve=221,
                kill=129,
                ptrace=117,
                unlinkat=35,
                io_uring=425,
            ),
        ),
    ],
)
def test_system_call_filter(monkeypatch, machine, architecture, numbers):
    """Both tables, the one of the other machine too."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = jail._seccomp_filter()
    for name, number in numbers.items():
        assert simulate(program, number, 0, architecture) == (
            "allow" if name in ("read", "write", "openat") else "deny"
        ), name
        assert simulate(program, number | 0x40000000, 0, architecture) == "deny"  # the x32 numbers
        assert simulate(program, number, 0, architecture ^ 1) == "kill"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, 0o20000000):
        assert simulate(program, numbers["openat"], flags, architecture) == "deny"
    assert simulate(program, numbers["openat"], os.O_CLOEXEC | os.O_DIRECTORY, architecture) == "allow"
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        jail._seccomp_filter()
