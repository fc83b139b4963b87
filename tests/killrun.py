"""Kills training runs with SIGKILL and resumes them, for test_reliability.py: python -m tests.killrun KILLS FLAGS...

One process imports torch once and forks every attempt, so an attempt costs only its training. Kills alternate between a
random moment (during start-up or some steps later) and the middle of writing a checkpoint (a random write call of one).
Prints one JSON line of what happened.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  optimisers import it: a second that no attempt has to spend

import train
from optimoe import checkpoint


def attempt(flags, die_at_write):
    """In the child: train. With die_at_write, die by SIGKILL in that write call of a checkpoint, half of it written."""
    write = checkpoint._write
    calls = 0

    def dying_write(file, place, data):
        nonlocal calls
        calls += 1
        if calls == die_at_write:
            write(file, place, bytes(data)[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, place, data)

    if die_at_write:
        checkpoint._write = dying_write
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        train.main(flags)


def main():
    kills, flags = int(sys.argv[1]), sys.argv[2:]
    out = Path(next(flag.split("=")[1] for flag in flags if flag.startswith("--out-dir=")))
    rng = random.Random(0)
    seen = {"kills": 0, "in_write": 0, "torn": 0, "fresh_starts": 0, "steps": []}
    newest = lambda: max((step for step, _ in checkpoint.find(out)), default=0)
    while True:
        resuming = (out / "config.json").exists()
        seen["fresh_starts"] += not resuming
        spare, start = seen["kills"] >= kills, newest()
        die_at_write = 0 if spare or seen["kills"] % 2 else rng.randint(1, 300)  # within about four checkpoints
        child = os.fork()
        if not child:
            try:
                attempt([f"--resume={out}"] if resuming else flags, die_at_write)
            except BaseException as error:
                print(f"attempt failed: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if not spare and not die_at_write:
            steps = rng.randint(0, 4)
            while newest() < start + steps and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05 if steps else 0.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            seen["kills"] += 1
            seen["in_write"] += bool(die_at_write)
            seen["torn"] += (out / "ckpt.tmp").exists()
            seen["steps"].append(newest())
        elif os.WEXITSTATUS(status) or spare:
            print(json.dumps(seen))
            sys.exit(os.WEXITSTATUS(status))
        else:  # finished before its kill: take its newest checkpoints away, and go on killing
            (out / "results.json").unlink(missing_ok=True)
            for _, path in checkpoint.find(out)[1:]:
                path.unlink()


if __name__ == "__main__":
    main()
