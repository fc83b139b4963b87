"""Runs model-written Python against the tests it must pass, in a process that can compute and nothing else.

    run("def f(x):\n    return x + 1", "assert f(1) == 2").passed        # True
    run_many([(program, check), ...])                                    # several at once, results in order

Every program gets its own process (eval/jail.py), started with an empty environment in an empty temporary directory. Before the
program runs, the process gives up, irrevocably and without needing root or user namespaces (which containers often forbid):
  seccomp   all system calls but a short list: no sockets, no processes or threads, no signals, no opening for writing
  Landlock  reading anything but Python, its packages and the system libraries (kernel 5.13 and later; see `confinement`)
  rlimits   CPU time, memory, core dumps, open files
Its output goes to /dev/null; past the deadline its whole process group is killed.

A pass must be proven: the tests and a fresh random token are sent only after the program's top level has finished, and the token
comes back only behind the last assert. So exiting early, printing, or replacing `check`, `exec` or `print` fails the item.
What this cannot stop, as in every harness whose asserts share an interpreter with the tested function: code written to attack
this very protocol from inside. Such a program can fake its own pass, and nothing else.
Without Landlock a program could also read files of the same user, but has no way to send them anywhere.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from eval import jail


class Result(NamedTuple):
    passed: bool
    reason: str  # "passed", "timeout", or what went wrong, at most 200 characters


def run(program: str, check: str, seconds: float = 5.0, memory: int = 2**30) -> Result:
    """Executes `program`, then `check` in the same namespace; passed when both end without an exception.

    seconds bounds the CPU time, in whole seconds (the wall clock gets 4 times as much, for busy machines); memory the address
    space in bytes. Raises OSError where a process cannot be confined: not Linux, not x86-64 or ARM64, or no seccomp.
    """
    _, result = _session(program, check, False, seconds, memory)
    return result


def values(program: str, expressions: list[str], seconds: float = 5.0, memory: int = 2**30) -> list[str] | None:
    """Executes `program`, then evaluates the expressions in its namespace: their reprs, or None where anything fails.

    For programs that are trained to pass: judged by values compared outside, they never meet what they are expected to return. Limits and
    errors as in `run`; together the reprs may have 64 kB."""
    said, _ = _session(program, json.dumps(expressions), True, seconds, memory)
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return (
        found
        if isinstance(found, list) and len(found) == len(expressions) and all(isinstance(text, str) for text in found)
        else None
    )


def _session(program, message, values, seconds, memory):
    """One process: (what it said behind the token, Result)."""
    cpu = max(1, round(seconds))
    job = {
        "program": program,
        "values": values,
        "cpu": cpu,
        "memory": memory,
        "prefixes": [sys.prefix, sys.base_prefix],
        "packages": [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
    }
    ours, theirs = socket.socketpair()
    directory, process = tempfile.mkdtemp(prefix="sandbox-"), None
    ours.settimeout(4 * seconds)  # a program that says it is ready, and is not, need not read what it is sent
    deadline, token, said, stage = time.monotonic() + 4 * seconds, secrets.token_bytes(16), b"", "program"
    try:
        with theirs:
            # -I -S -B: no user settings, no .pth files, no bytecode files
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", jail.__file__, str(theirs.fileno())],
                env={},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        _send(ours, json.dumps(job).encode())
        said = _receive(ours, deadline)
        if said.startswith(
            jail.UNCONFINED
        ):  # of the child itself: the program has not run yet, and cannot say this later
            raise OSError(
                f"code execution needs Linux with seccomp on x86-64 or ARM64 ({said[len(jail.UNCONFINED) :].decode()}): "
                "leave out what runs programs (humaneval, mbpp, answers by program), or run it elsewhere"
            )
        if said == jail.CONFINED:
            said = _receive(ours, deadline)
        if said == jail.READY:
            stage = "tests"
            _send(ours, token + message.encode())
            said = _receive(ours, deadline)
    except TimeoutError:
        return b"", Result(False, "timeout")
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status = os.waitstatus_to_exitcode(status)
        ours.close()
        shutil.rmtree(directory, ignore_errors=True)
    if secrets.compare_digest(said[:16], token):
        return said[16:], Result(True, "passed")
    if said:
        return b"", Result(False, said.decode(errors="replace")[:200])
    if (
        status == -signal.SIGXCPU or usage.ru_utime + usage.ru_stime >= cpu
    ):  # who ignores SIGXCPU gets SIGKILL a second later
        return b"", Result(False, "timeout")
    return b"", Result(
        False, f"the process ended during the {stage}" + (f" ({signal.Signals(-status).name})" if status < 0 else "")
    )


def run_many(jobs, workers: int | None = None, **limits) -> list[Result]:
    """`run` for each (program, check), `workers` at a time (default: one per CPU)."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(*job, **limits), jobs))


def confinement() -> str:
    """What holds programs on this machine: "seccomp + Landlock" or "seccomp". Raises OSError where there is neither."""
    result = run("", f"assert not open({str(Path(__file__))!r})")
    return "seccomp + Landlock" if result.reason.startswith("PermissionError") else "seccomp"


def _send(sock, data):
    sock.sendall(struct.pack("!I", len(data)) + data)


def _receive(sock, deadline):
    """One message, cut at 64 kB; b"" when the other side is gone. Raises TimeoutError."""
    data, need = b"", 4
    while len(data) < need:
        if not select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = sock.recv(need - len(data))
        if not part:
            return b""
        data += part
        if need == 4 == len(data):
            need += min(struct.unpack("!I", data)[0], 2**16)
    return data[4:]
