"""Runs train.py on several gloo ranks, job after job, for test_parallel.py.

    python -m tests.ranks '[[RANKS, [FLAG, ...]], [RANKS, [FLAG, ...], {HOW: VALUE}], ...]'

One process imports torch once and forks the ranks of every job, so a job costs only its training. The exit status is
the number of jobs that failed.

room: of ep, whose ranks then show each other shared files as their memory.
sliced_from: for this job in place of 4096.
die_at: rank 1 is killed when it writes so many tensors of checkpoints, in the middle of this one."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  optimisers import it: a second that no rank has to spend
import torch.distributed as dist

import train
from moe_kernels import remote
from optimoe import checkpoint, exchange, parallel
from tests import interpreter
from tests.trainrun import free_port, gloo_threads, wait_for


def show_memories(room, directory):
    """Let ep use its kernels, on memory that all ranks map."""

    def open_memory(size, device, groups):
        map_file = lambda rank: torch.from_file(
            str(Path(directory, f"{groups.copy}-{rank}")), shared=True, size=size, dtype=torch.uint8
        )
        own, barrier = map_file(groups.index).fill_(0xFF), lambda: dist.barrier(groups.experts)
        barrier()
        return [own if rank == groups.index else map_file(rank) for rank in range(groups.size)], barrier

    interpreter.take_numbers_from_arrays()
    sys.modules["moe_kernels.dispatch"].CHUNK = 32  # Triton's interpreter would spend most of its time in the sort
    exchange.ROOM, exchange.open_memory, exchange.reachable = room, open_memory, lambda *_: True


def die_in_write(die_at):
    """Be killed in the middle of this write of a tensor of a checkpoint."""
    writes, write = [], checkpoint._write

    def dying(file, place, data):
        writes.append(place)
        if len(writes) == die_at:
            write(file, place, bytes(data)[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, place, data)

    checkpoint._write = dying


def rank_main(rank, world, port, flags, directory, room=None, die_at=None, sliced_from=4096):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    status = 1
    parallel.SLICED_FROM = sliced_from  # so that the tests' small models have tensors of both kinds
    if room:
        show_memories(room, directory)
    if die_at and rank == 1:
        die_in_write(die_at)
    try:
        train.main(flags)
        remote.LAYERS.clear()  # their barriers know the groups here, which those of symmetric memory do not
        assert wait_for(lambda: not gloo_threads()), gloo_threads()  # they would outlive the interpreter
        status = 0
    except BaseException as error:
        print(f"rank {rank} of {world}, {flags}: {error!r}", flush=True)
    finally:
        os._exit(status)


def main():
    failed = 0
    for world, flags, *how in json.loads(sys.argv[1]):
        port = free_port()
        with tempfile.TemporaryDirectory() as directory:
            children = []
            for rank in range(world):
                children.append(os.fork())
                if not children[-1]:
                    rank_main(rank, world, port, flags, directory, **dict(*how))
            failed += any([os.waitpid(child, 0)[1] for child in children])
    sys.exit(failed)


if __name__ == "__main__":
    main()
