"""Training steps on several GPUs of one machine against the same step on one GPU.

    torchrun --nproc-per-node=2 -m bench.node --preset=paper-d1024-e16-k2 --vocab_size=50304 --seq_len=2048 --batch_size=16

All flags of train.py are understood; --batch_size counts the sequences of one GPU, so the work of a GPU is the same on any number
of them. Every rank first trains alone, all at the same time and equally hot, then all together. Printed are the median step time,
the share of as many single GPUs, the time that NCCL's kernels take in all and while nothing else runs, and the peak memory.
"""

import dataclasses
import json
import os
import statistics
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from model import GPT
from optimoe import config, parallel
from optimoe.sizes import count_params, flops_per_token, preset_fields
from train import GraphedStep, TrainConfig, compile_blocks, new_window, optimizer_step

WARM, STEPS = 12, 24


def exposed(events):
    """(milliseconds of NCCL's kernels, of these while no other kernel runs) of a list of profiler events."""
    if os.environ.get("BY_NAME"):
        import collections

        by = collections.Counter()
        for e in events:
            if "nccl" in e.name:
                by[e.name[:60]] += (e.time_range.end - e.time_range.start) / 3e3
        print(dict(by), flush=True)
    kernels = [(e.time_range.start, e.time_range.end, "nccl" in e.name) for e in events]
    total = sum(end - start for start, end, nccl in kernels if nccl)
    marks = sorted([(t, nccl, d) for start, end, nccl in kernels for t, d in ((start, 1), (end, -1))])
    alone, running, last = 0.0, [0, 0], None
    for t, nccl, d in marks:
        if last is not None and running[1] and not running[0]:
            alone += t - last
        running[nccl] += d
        last = t
    return total / 1e3, alone / 1e3


def measure(cfg, rank, world, device):
    """Median milliseconds of a step, what NCCL takes of it, and peak GiB."""
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        model = GPT(cfg).train()
    model = parallel.wrap(model, cfg, device, world)
    optimizer = parallel.Sharded(model, cfg, rank, world)
    optimizer.set_lr(0.0)
    if world == 1 or cfg.parallel == "ddp":
        compile_blocks(model, cfg)
    step = partial(optimizer_step, model, optimizer, cfg, new_window(cfg, device), world=world)
    if cfg.cuda_graph and (world == 1 or cfg.parallel == "ddp"):
        step = GraphedStep(step)
    generator = torch.Generator(device).manual_seed(rank)
    draw = lambda: torch.randint(0, cfg.vocab_size, (cfg.batch_size, cfg.seq_len), device=device, generator=generator)  # noqa: E731
    for _ in range(WARM):
        step([(draw(), draw())])
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for mark in marks:
        step([(draw(), draw())])
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(3):
            step([(draw(), draw())])
        torch.cuda.synchronize()
    kernels = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    nccl, alone = exposed(kernels)
    peak = torch.cuda.max_memory_allocated() / 2**30
    del step, optimizer, model
    torch.cuda.empty_cache()
    return {"ms": statistics.median(times), "nccl_ms": nccl / 3, "exposed_ms": alone / 3, "peak_gib": peak}


def main(argv=None):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    cfg = config.parse(TrainConfig, sys.argv[1:] if argv is None else argv, __doc__)
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or preset_fields(cfg.preset).get("vocab_size", 320))
    dist.init_process_group("nccl", device_id=device)
    tokens = cfg.batch_size * cfg.seq_len
    rows = {}
    for name, size in (("one GPU", 1),)[: not os.environ.get("SKIP_ONE")] + ((f"{world} GPUs, {cfg.parallel}", world),):
        dist.barrier()
        rows[name] = measure(cfg, rank, size, device)
    alone = torch.tensor([rows["one GPU"]["ms"] if "one GPU" in rows else 0.0], device=device)
    dist.all_reduce(alone)  # the mean of the single GPUs
    if rank == 0:
        share = alone.item() / world / rows[f"{world} GPUs, {cfg.parallel}"]["ms"]
        print(
            f"{torch.cuda.get_device_name()} x {world}, {count_params(cfg).total / 1e9:.2f} G parameters, {tokens:,} tokens a GPU,"
            f" {flops_per_token(cfg):.3g} FLOPs a token, share {share:.3f}"
        )
        for name, row in rows.items():
            print(f"  {name:<16}" + "  ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
        print(json.dumps({"argv": sys.argv[1:], "share": share, **rows}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
