"""A training step by part (data, forward, backward, optimiser) and by family of kernels.

    python -m bench.step --preset=paper-d512-e64-k4 --batch-size=8 --csv bench/h100.csv
    python -m bench.step --preset=paper-d512-e64-k4 --batch-size=8 --compile=false
    python -m bench.step --preset=paper-d1024-e64-k2 --vocab-size=50304 --seq-len=2048 --batch-size=8 --optimizer=adamw --weights=bfloat16  # 6.6 G

All flags of train.py are understood; the step is train.py's with its optimiser, on one GPU, with one micro-batch of --batch-size sequences and
random tokens read through the loader. Parts are GPU time between events, so they contain the gaps in which the GPU waits for Python; families are
the kernels alone, from torch.profiler, and what is missing from their sum to the whole step is those gaps.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.compare import begin, finish
from bench.problem import Cost, Shape
from bench.results import DTYPES, HEADER, arguments, cli
from bench.timing import MIB, Times, quantiles
from data import shards, tokenizer
from data.loader import Loader
from model import GPT
from optimoe import config
from optimoe.optim import make_optimizer
from optimoe.sizes import flops_per_token, peak_flops, preset_fields
from train import GraphedStep, TrainConfig, compile_blocks, new_window, optimizer_step

PARTS = ("data", "forward", "backward", "optimiser")
EXPERT_KERNELS = {name + "_kernel" for name in ("count", "scan", "place", "up", "rows", "combine", "dswiglu", "dw")}


def random_tokens(directory, n):
    """A data directory of n random tokens, vocabulary 257."""
    enc = tokenizer.word_tokenizer([])
    with shards.ShardWriter(directory, enc) as writer:
        writer.add("train", np.append(np.random.default_rng(0).integers(0, 256, n), enc.eot_token))
    return str(directory)


def balance(model, loader, steps):
    """Train the routers alone until the experts' loads are about even, as in any run after its first hundred steps: at initialisation one expert may
    get four times its share, and such a step is slower. Returns the largest load / mean load."""
    routers = [p for name, p in model.named_parameters() if "router" in name]
    if not routers:
        return 1.0
    optimizer = torch.optim.AdamW(routers, weight_decay=0.0)
    for step in range(steps):
        out = model(*loader.next())
        optimizer.param_groups[0]["lr"] = (
            0.25 / model.cfg.d_model * (1 - step / steps)
        )  # a logit moves by about that times d_model
        for p, grad in zip(routers, torch.autograd.grad(out.balance, routers), strict=True):
            p.grad = grad
        optimizer.step()
    optimizer.zero_grad()
    return float((out.counts_NE.amax(1) / out.counts_NE.float().mean(1)).max())


def part_times(run, repeats, cuda):
    """Times of PARTS and of the whole step, by name. run(mark) is one step that calls mark at its start and after each part."""
    marks = []

    def mark(part=None):
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    for _ in range(repeats):
        run(mark)
    if cuda:
        torch.cuda.synchronize()
    between = lambda a, b: a.elapsed_time(b) if cuda else (b - a) * 1e3  # noqa: E731
    n = len(PARTS) + 1
    steps = [marks[i : i + n] for i in range(0, len(marks), n)]
    times = {part: quantiles([between(s[i], s[i + 1]) for s in steps]) for i, part in enumerate(PARTS)}
    # From the end of one step to the end of the next: with whatever the GPU waits for in between.
    return times | {"full": quantiles([between(a[-1], b[-1]) for a, b in zip(steps, steps[1:], strict=False)])}


def step_times(run, repeats):
    """Times from the end of one run() to the end of the next, on the GPU."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks:
        run()
        mark.record()
    torch.cuda.synchronize()
    return quantiles([a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)])


def family(kernel, ops, sizes, cfg, weights):
    """The family of a kernel, from the operators around it (innermost first), the shapes of the innermost one's inputs and the weights' shapes."""
    inside = lambda *words: any(word in op for op in ops for word in words)  # noqa: E731
    dims = {n for size in sizes for n in size}
    if inside("Optimizer.step") or kernel == "adamw_kernel":
        return "optimiser"
    if inside("part: data"):
        return "data"
    if inside("_foreach_norm", "linalg_vector_norm"):
        return "gradient norm"
    if inside("linear_cross_entropy"):
        return "lm head and loss"
    if kernel in EXPERT_KERNELS or inside("grouped_mm"):
        return (
            "experts: "
            + (kernel.removesuffix("_kernel") if kernel in EXPERT_KERNELS else "grouped_mm")
            + " (backward)" * inside("bwd", "Backward")
        )
    if kernel.startswith("route_"):
        return "router"
    if inside("embedding"):
        return "embedding"
    if inside("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"):
        return "attention"
    if cfg.vocab_size in dims or inside("nll_loss", "log_softmax"):
        return "lm head and loss"
    if ops[0].startswith(("aten::mm", "aten::addmm", "aten::bmm")):
        if cfg.n_experts in dims and not cfg.dense:
            return "router"
        return "experts: torch products" if 2 * cfg.d_expert in dims else "attention projections"
    if ops[0] == "aten::copy_" and any(tuple(size) in weights for size in sizes):
        return "weight casts"
    return "norms, rotations, elementwise"


def family_times(run, cfg, model, repeats, cuda):
    """Milliseconds per step of each family; on the CPU of operators, on a GPU of kernels."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, record_shapes=True) as prof:
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize()
    weights, total, unlinked = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}, Counter(), Counter()
    for event in prof.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            # Kernels come a second time as events of their own: what is left of these at the end belongs to no operator.
            if not getattr(event, "is_user_annotation", False):
                unlinked[event.name] += event.time_range.elapsed_us()
            continue
        launched = (
            [(kernel.name, kernel.duration) for kernel in event.kernels]
            if cuda
            else [(event.name, event.self_cpu_time_total)]
        )
        if launched:
            ops, parent = [], event
            while parent is not None:
                ops.append(parent.name)
                parent = parent.cpu_parent
            for kernel, microseconds in launched:
                total[family(kernel, ops, [s for s in event.input_shapes or [] if s], cfg, weights)] += microseconds
                unlinked[kernel] -= microseconds
    if cuda:
        for name, microseconds in unlinked.items():
            if microseconds > 100 * repeats:
                total["optimiser" if name == "adamw_kernel" else f"no operator: {name[:22]}"] += microseconds
    return {name: microseconds / 1e3 / repeats for name, microseconds in total.most_common()}


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    args, results = begin(parser, argv, rest=True)
    small = [] if cuda else ["--batch-size=2", "--seq-len=64"]
    cfg = config.parse(TrainConfig, [*small, *args.rest, f"--dtype={str(DTYPES[args.dtype])[6:]}"])
    if not cfg.vocab_size:
        # Of the paper's models theirs; else the 257 of random_tokens, rounded up as train.py does.
        cfg = dataclasses.replace(
            cfg, vocab_size=preset_fields(cfg.preset).get("vocab_size", 320) if cfg.preset else 320
        )
    print(HEADER)
    device = "cuda" if cuda else "cpu"
    tokens = cfg.batch_size * cfg.seq_len
    with tempfile.TemporaryDirectory() as tmp:
        loader = Loader(
            [(random_tokens(Path(tmp) / "data", 8 * tokens + 1), 1.0)],
            "train",
            cfg.batch_size,
            cfg.seq_len,
            device=device,
        )
        torch.manual_seed(cfg.seed)
        with torch.device(device):  # billions of random numbers take a CPU a minute
            model = GPT(cfg).train()
        optimizer = make_optimizer(model, cfg)
        optimizer.set_lr(
            0.0
        )  # the weights stay as they are: random tokens teach nothing, and a model that has fallen apart routes all tokens alike
        if cuda:
            compile_blocks(model, cfg)
        train_step = partial(optimizer_step, model, optimizer, cfg, new_window(cfg, device))

        def run(mark=lambda part=None: None):
            mark()
            with record_function("part: data"):
                batch = loader.next()
            mark()
            train_step([batch], mark=mark)

        start = time.perf_counter()
        for _ in range(3):
            run()
        warm = time.perf_counter() - start
        load = balance(model, loader, 60 if cuda else 2)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = part_times(run, args.repeats, cuda)
        peak = torch.cuda.max_memory_allocated() / MIB if cuda else None
        families = family_times(run, cfg, model, 3, cuda)
        if (
            cuda and cfg.cuda_graph and cfg.impl in ("auto", "triton")
        ):  # the others count rows on the host, as in train.py
            graphed = GraphedStep(train_step)
            for _ in range(GraphedStep.WARM_UP + 2):
                graphed([loader.next()])
            times["full-graph"] = step_times(lambda: graphed([loader.next()]), args.repeats)
    shape = Shape(tokens, cfg.d_model, cfg.d_expert, cfg.n_experts, cfg.top_k)
    name = f"{'dense' if cfg.dense else cfg.preset}:{cfg.impl}" + ":bfloat16-weights" * (cfg.weights == "bfloat16")
    flops, best = (
        flops_per_token(cfg) * tokens,
        peak_flops(torch.cuda.get_device_name()) if cuda and cfg.dtype == "bfloat16" else None,
    )
    add = partial(results.add, implementation=name, shape=shape)
    for part in PARTS:
        add("step", mode=part, times=times[part])
    for mode in ("full", "full-graph"):
        if mode in times:
            mfu = flops / (times[mode].p50 / 1e3) / best if best else None
            add("step", mode=mode, times=times[mode], cost=Cost(flops, 0), ceiling=mfu, peak_mib=peak)
            print(f"{mode}: {tokens / times[mode].p50 * 1e3:,.0f} tokens/s, MFU {f'{mfu:.1%}' if mfu else 'n/a'}")
    print(f"the first three steps took {warm:.1f} s; the fullest expert of any layer has {load:.2f} times its share")
    print(f"\n{'family':<36}{'ms/step':>10}{'share':>8}")
    believed = (
        not cuda or sum(families.values()) < 1.05 * times["full"].p50
    )  # else the profiler slowed or counted something twice
    why = (
        " (the profiler makes a CPU's operators slower)"
        if not cuda
        else " (more than the step: not written to the CSV)"
        if not believed
        else ""
    )
    for what, ms in families.items():
        if believed:
            add("step-family", mode=what, times=Times(ms, ms, ms), quiet=True)
        print(f"{what:<36}{ms:>10.3f}{ms / times['full'].p50:>8.1%}")
    print(
        f"{'sum, of the step':<36}{sum(families.values()):>10.3f}{sum(families.values()) / times['full'].p50:>8.1%}{why}"
    )
    return finish(args, results, [])


if __name__ == "__main__":
    raise SystemExit(cli(main))
