"""Runs model-written Python against the tests it must pass, in a process that can only compute.

    run("def f(x):\n    return x + 1", "assert f(1) == 2").passed  # True
    run_many([(program, check), ...])  # several at once, results in order

Every program gets a process of its own (eval/jail.py), which needs no root and first gives up for good:
  seccomp       all system calls but a short list: no sockets, processes, threads, signals or opening for writing
  Landlock      reading anything but Python, its packages and the system libraries (kernel 5.13 and later)
  capabilities  what root may do and others may not
  rlimits       CPU time, memory, core dumps, open files
It sees nothing of the user's environment and writes to /dev/null. Its process group is killed at the deadline, and the
kernel kills it with the evaluator.

A pass must be proven: the tests are sent with a fresh random token after the program's top level has finished, and the
token comes back after the last assert. So exiting early, printing, or replacing `check`, `exec` or `print` fails. A
failure must be the program's own: an honest program has to pass first, the clock starts when the process is confined,
and a process that does not get that far is an OSError. Asserts share an interpreter with the tested function, so code
written against this very protocol can fake its own pass, but no other.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from eval import jail

MEMORY = 2**30  # bytes of address space
START_SECONDS, HONEST_SECONDS = 120, 30  # long, for busy machines and slow disks
LEAVE_OUT = "leave out humaneval and mbpp"
HONEST = "import collections, decimal, hashlib, heapq, math, random, re\ndef f(x):\n    return math.floor(x) + 1\n"


class Result(NamedTuple):
    passed: bool
    reason: str  # "passed", "timeout", or what went wrong, at most 200 characters


def run(program: str, check: str, seconds: float = 5.0) -> Result:
    """Executes `program`, then `check` in the same namespace; passed when both end without an exception.

    seconds: of CPU time, rounded; by the clock 4 times as much, not counting waits for a processor. OSError where no
    program can be judged: no seccomp, not x86-64 or ARM64, or an interpreter that cannot run an honest program."""
    confinement()
    return _run(program, check, seconds)


def run_many(jobs) -> list[Result]:
    """`run` for each (program, check), one at a time per CPU."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(*job), jobs))


@functools.cache
def confinement() -> str:
    """What confines programs here: "seccomp + Landlock" or "seccomp". OSError where an honest program does not pass."""
    result = _run(HONEST, "assert f(1.5) == 2", HONEST_SECONDS)
    if not result.passed:
        where = f"in {sys.executable} with {MEMORY:,} bytes of memory; repair that, or {LEAVE_OUT}"
        raise OSError(f"no program can be judged here: an honest one failed ({result.reason}) {where}")
    result = _run("", f"assert not open({str(Path(__file__))!r})", HONEST_SECONDS)
    return "seccomp + Landlock" if result.reason.startswith("PermissionError") else "seccomp"


def _run(program, check, seconds):
    readable = [f"{root}/{library}" for root in {sys.prefix, sys.base_prefix} for library in ("lib", "lib64")]
    readable += [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    job = dict(program=program, cpu=max(1, round(seconds)), memory=MEMORY, readable=readable, packages=packages)
    token, stage = secrets.token_bytes(16), "program"
    with _process() as (process, channel):
        _start(process, channel, job)
        end = time.monotonic() + 4 * seconds
        left = lambda: end + waited(process.pid) - time.monotonic()  # called at every message
        try:
            said = _ask(channel, None, left)
            if said == jail.READY:
                stage, said = "tests", _ask(channel, token + check.encode(), left)
        except TimeoutError:
            return Result(False, "timeout")
        status, usage = _kill(process)
    if secrets.compare_digest(said, token):
        return Result(True, "passed")
    if said:
        return Result(False, said.decode(errors="replace")[:200])
    # A program that ignores SIGXCPU gets SIGKILL a second later.
    if status == -signal.SIGXCPU or usage.ru_utime + usage.ru_stime >= job["cpu"]:
        return Result(False, "timeout")
    ending = f" ({signal.Signals(-status).name})" if status < 0 else ""
    return Result(False, f"the process ended during the {stage}{ending}")


@contextlib.contextmanager
def _process():
    """(a fresh process of eval/jail.py, our end of the channel to it); it is gone afterwards."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # -I -S -B: no user settings, no .pth files, no bytecode files.
        command = [sys.executable, "-I", "-S", "-B", jail.__file__, str(theirs.fileno()), str(os.getpid())]
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        pipes |= dict(pass_fds=[theirs.fileno()], start_new_session=True, cwd="/")
        # Some interpreters do not start without their libraries.
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        with subprocess.Popen(command, env=env, **pipes) as process:
            try:
                theirs.close()  # so that the end of the process is the end of the channel
                yield process, ours
            finally:
                _kill(process)


def _kill(process):
    """(exit status, resources used) of the process, which is killed if it still runs."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
        _, status, process.usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, process.usage


def _start(process, channel, job):
    """Has the process confine itself; OSError with its message where it does not."""
    end = time.monotonic() + START_SECONDS
    try:
        said = _ask(channel, json.dumps(job).encode(), lambda: end - time.monotonic())
    except TimeoutError:
        said = f"not ready after {START_SECONDS} seconds".encode()
    if said == jail.CONFINED:
        return
    _kill(process)
    last = (process.stderr.read(2**16).decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    why = said.removeprefix(jail.UNCONFINED).decode(errors="replace") or f"exit code {process.returncode}: {last}"
    raise OSError(
        f"programs cannot be run here: the confined process of {sys.executable} did not start ({why}). "
        f"It needs Linux with seccomp on x86-64 or ARM64; run this elsewhere, or {LEAVE_OUT}"
    )


def waited(pid: int) -> float:
    """Seconds for which a process was ready but another one ran; 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _ask(channel, data, left):
    """Sends data, if any. Returns the next message, of at most 64 kB, or b"" where the other side is gone.
    TimeoutError when no seconds are left: a program may neither read nor write."""
    try:
        if data is not None:
            channel.settimeout(max(0.01, left()))
            channel.sendall(struct.pack("!I", len(data)) + data)
        received, need = b"", 4
        while len(received) < need:
            channel.settimeout(max(0.01, left()))
            try:
                part = channel.recv(need - len(received))
            except TimeoutError:
                if left() > 0:  # it had to wait for a processor meanwhile
                    continue
                raise
            if not part:
                return b""
            received += part
            if need == 4 == len(received):
                need += min(struct.unpack("!I", received)[0], 2**16)
        return received[4:]
    except (BrokenPipeError, ConnectionResetError):
        return b""
