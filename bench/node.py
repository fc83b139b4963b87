"""Training steps on several GPUs of one machine against the same step on one of them.

    torchrun --nproc-per-node=2 -m bench.node --preset=paper-d1024-e16-k2 --vocab_size=50304 --seq_len=2048 \\
        --batch_size=16 --optimizer=adamw --compile=true --csv=node.csv

All flags of train.py are understood; --batch_size counts the sequences of one GPU, so the work of a GPU is the same on
any number of them. First every rank trains alone, all at the same time and so equally hot; then all train together.
share is the mean time alone divided by the time together; the one of the slowest is printed too. Routers are balanced
before, as they are after the first hundred steps of a run. nccl_ms is the time of the kernels that communicate in a
step, NCCL's and those of moe_kernels/remote.py; exposed_ms is the part of it in which nothing else runs. gb_s counts
the bytes that a rank sends.
"""

import gc
import math
import os

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from bench.problem import Cost
from bench.rows import Results
from bench.step import balance, make_step, model_shape, parse, step_times
from bench.timing import MIB
from optimoe import parallel
from optimoe.config import command_line, require
from optimoe.exchange import group_size
from optimoe.faststep import fast_step
from optimoe.load import pick_device
from optimoe.sizes import count_params, flops_per_token

WARM_UP = 12  # steps: compilation, capture and the first replays
TALKING = "nccl", "fetch_kernel", "collect_kernel", "barrier"  # in names of kernels that communicate


def communication(kernels):
    """(ms of kernels that communicate, ms of them while no other kernel runs); kernels: [(name, start, end)] in us."""
    marks = []
    for name, start, end in kernels:
        talks = any(word in name for word in TALKING)
        marks += [(start, talks, 1), (end, talks, -1)]
    total, alone, running, last = 0.0, 0.0, {True: 0, False: 0}, 0.0
    for now, talks, change in sorted(marks):
        total += (now - last) * running[True]
        alone += (now - last) * (running[True] > 0 and not running[False])
        running[talks] += change
        last = now
    return total / 1e3, alone / 1e3


def bytes_sent(optimizer, cfg, world):
    """Bytes sent by one rank in a step: gradients and weights of divided tensors, gradients of the others, and with ep
    the tokens, their gradients, and results and gradients of rows, if all experts are used equally."""
    sent = sum(2 * piece.nbytes * (optimizer.holders(p)[2] - 1) for piece, p in optimizer.full.items())
    for p in [*optimizer.whole, *(p for p in optimizer.model.parameters() if p not in optimizer.exact)]:
        size = optimizer.holders(p)[2]
        sent += 2 * p.nbytes * (size - 1) / size
    if (size := group_size(cfg, world)) == 1:
        return sent
    E, K = cfg.n_experts, cfg.top_k
    used = 1 - math.comb(E - E // size, K) / math.comb(E, K)  # the share of tokens that use a given rank
    rows = cfg.n_layers * cfg.batch_size * cfg.seq_len * (used * (size - 1) + K * (size - 1) / size)
    return sent + 2 * rows * cfg.d_model * torch.finfo(optimizer.model.dtype).bits // 8  # both passes


def measure(cfg, rank, world, device):
    """(Times of a step, bytes that a rank sends in it, other columns of its row)."""
    cuda, steps = device.type == "cuda", 3
    model, step, draw = make_step(cfg, device, rank, world)
    sent = bytes_sent(step.args[1], cfg, world)
    model.eval()  # here its exchange is exact even if loads are uneven
    balance(model, draw, 60 if cuda else 2, world)
    model.train()
    step = fast_step(step, model, cfg, device, world)
    run = lambda: step([draw()])
    for _ in range(WARM_UP if cuda else 1):
        run()
    if not cuda:
        return step_times(run, cfg.repeats), sent, {}
    torch.cuda.reset_peak_memory_stats()
    times = step_times(run, cfg.repeats)
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    events = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    total, alone = communication([(e.name, e.time_range.start, e.time_range.end) for e in events])
    peak = torch.cuda.max_memory_allocated() / MIB
    return times, sent, {"nccl_ms": total / steps, "exposed_ms": alone / steps, "peak_mib": peak}


def main(argv=None):
    cfg = parse(argv, __doc__)
    remedy = "start it by torchrun --nproc-per-node=N -m bench.node ..."
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        require(name in os.environ, name, None, remedy)
    rank, local, world = parallel.own_place()
    device = pick_device(cfg, local)
    results = Results(cfg) if rank == 0 else None
    parallel.connect(device, device_id=device if device.type == "cuda" else None)
    try:
        measured = []
        for size in (1, world):
            dist.barrier()
            measured.append(measure(cfg, rank, size, device))
            gc.collect()  # models have reference cycles, and the next one needs their memory
            torch.cuda.empty_cache()
        single = torch.zeros(world, device=device)
        single[rank] = measured[0][0].p50
        dist.all_reduce(single)
        if rank:
            return 0
        (one, _, columns), (all_of_them, sent, more) = measured
        share = single.mean().item() / all_of_them.p50
        flops = flops_per_token(cfg) * cfg.batch_size * cfg.seq_len
        results.add("node", "one GPU", "1", model_shape(cfg), one, Cost(flops, 0), **columns)
        cost = Cost(flops, sent)
        results.add("node", cfg.parallel, str(world), model_shape(cfg), all_of_them, cost, share=share, **more)
        print(
            f"{count_params(cfg).total / 1e9:.2f} G parameters, {model_shape(cfg).T:,} tokens a GPU; single GPUs take"
            f" {single.mean():.2f} ms, the slowest {single.max():.2f}; share of {world} of them {share:.3f},"
            f" of the slowest {single.max().item() / all_of_them.p50:.3f};"
            f" {sent / 1e9:.2f} GB sent by each, communication {more.get('nccl_ms', 0):.2f} ms,"
            f" exposed {more.get('exposed_ms', 0):.2f}"
        )
        return results.finish()
    finally:
        parallel.disconnect()


if __name__ == "__main__":
    raise SystemExit(command_line(main))
