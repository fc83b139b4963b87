"""Training steps on several GPUs of one machine against the same step on one of them.

    torchrun --nproc-per-node=2 -m bench.node --preset=paper-d1024-e16-k2 --vocab_size=50304 --seq_len=2048 \\
        --batch_size=16 --optimizer=adamw --compile=true --csv=node.csv

All flags of train.py are understood; --batch_size counts the sequences of one GPU, so the work of a GPU is the same on
any number of them. Every rank first trains alone, all at the same time and equally hot, then all of them together. The
share is that of the mean of the single GPUs; the slowest is printed too. nccl_ms is the time of NCCL's kernels in a
step, exposed_ms that part of it in which nothing else runs.
"""

import os

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from bench.problem import Cost
from bench.results import Results, cli
from bench.step import graphed, make_step, model_shape, parse, step_times
from bench.timing import MIB
from optimoe.sizes import count_params, flops_per_token

WARM_UP = 12  # steps: compilation, capture and the first replays


def communication(kernels):
    """(ms of NCCL's kernels, ms of these while no other kernel runs); kernels: [(name, start, end)] in microseconds."""
    marks = []
    for name, start, end in kernels:
        marks += [(start, "nccl" in name, 1), (end, "nccl" in name, -1)]
    total, alone, running, last = 0.0, 0.0, {True: 0, False: 0}, 0.0
    for now, nccl, change in sorted(marks):
        total += (now - last) * running[True]
        alone += (now - last) * (running[True] > 0 and not running[False])
        running[nccl] += change
        last = now
    return total / 1e3, alone / 1e3


def measure(cfg, rank, world, device):
    """(Times of a step, other columns of its row)."""
    cuda, steps = device.type == "cuda", 3
    _, step, draw = make_step(cfg, device, rank, world)
    step = graphed(step, cfg, world) or step
    run = lambda: step([draw()])  # noqa: E731
    for _ in range(WARM_UP if cuda else 1):
        run()
    if not cuda:
        return step_times(run, cfg.repeats), {}
    torch.cuda.reset_peak_memory_stats()
    times = step_times(run, cfg.repeats)
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    events = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    total, alone = communication([(e.name, e.time_range.start, e.time_range.end) for e in events])
    peak = torch.cuda.max_memory_allocated() / MIB
    return times, {"nccl_ms": total / steps, "exposed_ms": alone / steps, "peak_mib": peak}


def main(argv=None):
    cfg = parse(argv, __doc__)
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        results = Results(cfg) if rank == 0 else None
        measured = []
        for size in (1, world):
            dist.barrier()
            measured.append(measure(cfg, rank, size, device))
            if cuda:
                torch.cuda.empty_cache()
        single = torch.zeros(world, device=device)
        single[rank] = measured[0][0].p50
        dist.all_reduce(single)
        if rank:
            return 0
        (one, columns), (all_of_them, more) = measured
        share = single.mean().item() / all_of_them.p50
        cost = Cost(flops_per_token(cfg) * cfg.batch_size * cfg.seq_len, 0)
        results.add("node", "one GPU", "1", model_shape(cfg), one, cost, **columns)
        results.add("node", cfg.parallel, str(world), model_shape(cfg), all_of_them, cost, share=share, **more)
        print(
            f"{count_params(cfg).total / 1e9:.2f} G parameters, {model_shape(cfg).T:,} tokens a GPU; single GPUs take"
            f" {single.mean():.2f} ms, the slowest {single.max():.2f}; share of {world} of them {share:.3f},"
            f" of the slowest {single.max().item() / all_of_them.p50:.3f};"
            f" NCCL {more.get('nccl_ms', 0):.2f} ms, exposed {more.get('exposed_ms', 0):.2f}"
        )
        return results.finish()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(cli(main))
