"""Hostile programs fail their item and harm nothing; honest ones pass. Run: python -m pytest tests/test_sandbox.py
(Linux, 15 s)
"""

import contextlib
import os
import signal
import socket
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
    assert [result.passed for result in sandbox.run_many(jobs)] == [False, True] * 3


def test_a_process_left_behind_is_noticed():
    before = set(children())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert set(children()) - before == {process.pid}
    assert set(children()) <= before


@pytest.mark.parametrize(
    "program, seconds",
    [
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
    """Printing gigabytes, sleeping, ignoring every signal, and a loop inside the tested function. Whichever comes first
    says timeout: the wall clock, the soft limit of CPU time (SIGXCPU), or where that is ignored the hard one (SIGKILL).
    """
    start = time.monotonic()
    assert run(program, seconds=seconds) == (False, "timeout")
    assert time.monotonic() - start < 60


def test_a_program_that_does_not_read_its_tests():
    """It says that it is ready and sleeps; the tests are more than the channel holds."""
    program = "import os, time\nfor d in range(3, 1024):\n    try: os.write(d, b'\\0\\0\\0\\5ready')\n"
    program += "    except OSError: pass\ntime.sleep(20)\n"
    start = time.monotonic()
    assert run(program, "x = 1\n" * 10**6, seconds=0.5) == (False, "timeout")
    assert time.monotonic() - start < 60


def test_memory_bomb(monkeypatch):
    assert run("x = []\nwhile True:\n    x.append(bytearray(10**7))\n").reason == "MemoryError: "
    assert run("x = bytearray(2 * 10**8)\n" + RIGHT).passed  # the check can fail: the limit is what stops the next one
    monkeypatch.setattr(sandbox, "MEMORY", 2**27)
    assert run("x = bytearray(2 * 10**8)\n" + RIGHT).reason == "MemoryError: "


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
    program = "import os\nfound = 'HF_TOKEN' in os.environ or 'hunter2' in str(os.environ)"
    assert run(program, "assert found").reason == "AssertionError: "
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
    program = "import os\nfor fd in range(1024):\n    try:\n"
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
    said += "os.read(int(sys.argv[1]), 2**20)\n"  # an end that leaves its job unread would reset the channel
    fake_child(monkeypatch, tmp_path, said + "os.write(int(sys.argv[1]), struct.pack('!I', len(said)) + said)\n")
    with pytest.raises(OSError, match="did not start .no seccomp here.*needs Linux.*run this elsewhere, or leave out"):
        run(RIGHT)


@pytest.mark.parametrize(
    "lines, message",
    [
        ("echo cannot load libpython >&2; exit 127", "exit code 127: cannot load libpython"),
        ("exit 0", "exit code 0: no message"),
        ("kill -SEGV $$", "exit code -11"),
        ("sleep 100", "not ready after 1 seconds"),
    ],
)
def test_a_child_that_cannot_start_is_an_error_and_no_wrong_answer(monkeypatch, tmp_path, lines, message):
    if "sleep" in lines:
        monkeypatch.setattr(sandbox, "START_SECONDS", 1)
    fake_interpreter(monkeypatch, tmp_path, lines)
    with pytest.raises(OSError, match="did not start ." + message):
        run(RIGHT)


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
    """A child that confines itself and then fails every program gives an error."""
    text = Path(jail.__file__).read_text()
    begin = "        execute(make_code(job"
    assert text.count(begin) == 1
    fake_child(monkeypatch, tmp_path, text.replace(begin, f"        {broken}\n{begin}"))
    monkeypatch.setattr(sandbox, "HONEST_SECONDS", 0.5)
    sandbox.confinement.cache_clear()
    with pytest.raises(OSError, match=f"an honest one failed .{message}"):
        run(RIGHT)


def test_limits_that_no_program_can_hold(monkeypatch):
    monkeypatch.setattr(sandbox, "MEMORY", 10**6)
    sandbox.confinement.cache_clear()
    with pytest.raises(OSError, match="with 1,000,000 bytes of memory|did not start .*MemoryError"):
        run(RIGHT)


def test_lower_limits_of_the_user_stay():
    """Raising them would be refused to an ordinary user, and every program would fail."""
    count = "import os\nn = 0\ntry:\n    while True: n = os.dup(0)\nexcept OSError: pass"
    code = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\nfrom eval import sandbox\n"
    code += f"print(sandbox.run({count!r}, 'assert n == 31').passed)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.stdout == "True\n", found
    assert run(count, "assert n == 63").passed


def running_child():
    """The number of the one process of the sandbox, once a program runs in it."""
    for _ in range(5000):
        for pid in children():
            with contextlib.suppress(OSError):
                ours = jail.__file__ in Path(f"/proc/{pid}/cmdline").read_text()
                if ours and "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text():
                    return pid
        time.sleep(0.01)
    raise AssertionError("no confined child")


def test_what_the_process_gives_up():
    thread = threading.Thread(target=run, args=("import time\ntime.sleep(100)",), kwargs={"seconds": 15})
    thread.start()
    status = Path(f"/proc/{(pid := running_child())}/status").read_text()
    os.kill(pid, signal.SIGKILL)
    thread.join()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    assert "Seccomp:\t2" not in Path("/proc/self/status").read_text()  # the check can fail


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "program", ["import time\ntime.sleep(1000)", "while True: pass", "import threading\nthreading.Event().wait()"]
)
def test_no_child_outlives_its_evaluator(number, program):
    code = (
        f"from eval import sandbox\nsandbox.confinement()\nprint(flush=True)\nsandbox.run({program!r}, '', seconds=600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as evaluator:
        evaluator.stdout.readline()
        for _ in range(5000):
            if found := children(evaluator.pid):
                break
            time.sleep(0.01)
        time.sleep(0.3)  # some of them are still starting
        evaluator.send_signal(number)
        evaluator.wait()
    for _ in range(5000):
        if not any(Path(f"/proc/{pid}").exists() for pid in found):
            break
        time.sleep(0.01)
    assert found and not any(Path(f"/proc/{pid}").exists() for pid in found)
