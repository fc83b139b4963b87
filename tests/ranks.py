"""Runs train.py on several gloo ranks, job after job, for test_parallel.py.

    python -m tests.ranks '[[RANKS, [FLAG, ...]], ...]'

One process imports torch once and forks the ranks of every job, so a job costs only its training. The exit status is
the number of jobs that failed."""

import json
import os
import socket
import sys

import torch._dynamo  # noqa: F401  optimisers import it: a second that no rank has to spend

import train
from optimoe import parallel

parallel.SLICED_FROM = 4096  # so that the tests' small models have tensors of both kinds


def rank_main(rank, world, port, flags):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    status = 1
    try:
        train.main(flags)
        status = 0
    except BaseException as error:
        print(f"rank {rank} of {world}, {flags}: {error!r}", flush=True)
    finally:
        os._exit(status)


def main():
    failed = 0
    for world, flags in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(world):
            children.append(os.fork())
            if not children[-1]:
                rank_main(rank, world, port, flags)
        failed += any([os.waitpid(child, 0)[1] for child in children])
    sys.exit(failed)


if __name__ == "__main__":
    main()
