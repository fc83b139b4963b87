"""A training step by part (forward, backward, optimiser) and by family of kernels.

    python -m bench.step --preset=paper-d512-e64-k4 --batch_size=8 --csv=step.csv
    python -m bench.step --preset=paper-d1024-e64-k2 --vocab_size=50304 --seq_len=2048 --batch_size=8 \\
        --optimizer=adamw --weights=bfloat16 --trace=step.json  # 6.6 G parameters

All flags of train.py are understood. The step is train.py's with its optimiser, on one GPU, with one micro-batch of
--batch_size random sequences. Times of parts are GPU time between events, with the gaps in which the GPU waits for
Python. Times of families are of the kernels alone, from torch.profiler, without these gaps. Without a GPU and without
--config the default batch is small.
"""

import dataclasses
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import profile, record_function

from bench.problem import Cost, Shape
from bench.rows import BenchConfig, Results
from bench.timing import MIB, Times, quantiles, synchronize, trace, wall_ms
from model import GPT
from optimoe import config, exchange, parallel
from optimoe.faststep import GraphedStep, fast_step
from optimoe.guard import new_window
from optimoe.load import pick_device
from optimoe.sizes import count_params, flops_per_token, least_memory, peak_flops, preset_fields, require_memory
from train import TrainConfig, optimizer_step

PARTS = ("forward", "backward", "optimiser")
EXPERT_OPS = ("count", "scan", "place", "up", "rows", "combine", "dswiglu", "dw")
EXPERT_OPS += tuple(f"{name}_hopper" for name in ("up", "rows", "dswiglu", "dw"))
EXPERT_KERNELS = {f"{name}_kernel" for name in EXPERT_OPS}
UPDATE_KERNELS = {"adamw_kernel": "optimiser", "muon_kernel": "optimiser", "squares_kernel": "gradient norm"}


@dataclass(frozen=True)
class StepConfig(TrainConfig, BenchConfig):
    # Benchmark
    repeats: int = 20  # steps that are timed
    trace: str = ""  # write a trace of a few steps to this file instead of timing

    def validate(self):
        super().validate()
        config.check_range(self, "repeats", 1)


def parse(argv, description):
    """The StepConfig of a command line, small without a GPU, with the vocabulary that its preset has in the paper."""
    argv, cuda = sys.argv[1:] if argv is None else argv, torch.cuda.is_available()
    saved = any(word.startswith("--config") for word in argv)  # then the file sets the sizes
    small = [] if cuda or saved else ["--batch_size=2", "--seq_len=64", "--repeats=3"]
    cfg = config.parse(StepConfig, [*small, *argv], description)
    remedy = "the step runs on the GPU where there is one, else on the CPU; leave it out"
    config.require(cfg.device in ("auto", "cuda" if cuda else "cpu"), "device", cfg.device, remedy)
    remedy = "random weights are timed; use --config=RUN/config.json for the settings of a run"
    config.require(not cfg.resume, "resume", cfg.resume, remedy)
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or preset_fields(cfg.preset).get("vocab_size", 320))


def make_step(cfg, device, rank=0, world=1):
    """(model, step, draw): step(batches) is train.py's with learning rate 0, so that random tokens unbalance no router;
    draw() gives a batch. Billions of random weights take a CPU a minute, so they are drawn on the device."""
    tokens = cfg.batch_size * cfg.seq_len
    what = f"{count_params(cfg).total:,} parameters and {tokens:,} tokens"
    least = least_memory(cfg, tokens, world, exchange.group_size(cfg, world))
    require_memory(what, least, device, "use a smaller model or batch_size")
    torch.manual_seed(cfg.seed)
    with device:
        model = GPT(cfg).train()
        exchange.deal_out(model, cfg, device, world, tokens)
    optimizer = parallel.Sharded(model, cfg, rank, world)
    optimizer.set_lr(0.0)
    generator = torch.Generator(device).manual_seed(rank)
    size = cfg.batch_size, cfg.seq_len
    draw = lambda: torch.randint(cfg.vocab_size, size, device=device, generator=generator)
    step = partial(optimizer_step, model, optimizer, cfg, new_window(cfg, device), world=world)
    return model, step, lambda: (draw(), draw())


def balance(model, draw, steps, world=1):
    """Train the routers alone until the experts' loads are about even, as after the first hundred steps of a run. At
    first one expert may get four times its share, which slows a step. Returns the largest load / mean load."""
    routers = [p for name, p in model.named_parameters() if "router" in name]
    if not routers:
        return 1.0
    optimizer = torch.optim.AdamW(routers, weight_decay=0.0)
    for step in range(steps):
        out = model(*draw())
        # A step moves a logit by about lr * d_model.
        optimizer.param_groups[0]["lr"] = 0.25 / model.cfg.d_model * (1 - step / steps)
        for p, grad in zip(routers, torch.autograd.grad(out.balance, routers), strict=True):
            p.grad = grad
        if world > 1:  # the same on all ranks
            parallel.average([p.grad for p in routers])
        optimizer.step()
    optimizer.zero_grad()
    return float((out.counts_NE.amax(1) / out.counts_NE.float().mean(1)).max())


def intervals(run, repeats):
    """Times in ms on the device between the mark() calls of run(mark): a list per run."""
    cuda, marks = torch.cuda.is_available(), []

    def mark(part=None):
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    for _ in range(repeats):
        run(mark)
    synchronize()
    between = lambda a, b: a.elapsed_time(b) if cuda else (b - a) * 1e3
    times, n = [between(a, b) for a, b in zip(marks, marks[1:], strict=False)], len(marks) // repeats
    return [times[i : i + n] for i in range(0, len(times), n)]


def part_times(step, draw, repeats):
    """Times of PARTS and of the whole step, from the end of one to the end of the next, by name."""

    def run(mark):
        batch = draw()
        mark()
        step([batch], mark=mark)

    runs = intervals(run, repeats + 1)[:-1]  # the last one has no next step
    times = {part: quantiles([run[i] for run in runs]) for i, part in enumerate(PARTS)}
    return times | {"full": quantiles([sum(run) for run in runs])}


def named_parts(step, draw):
    """A step whose PARTS have names in a trace."""
    spans = [record_function(part) for part in PARTS]

    def mark(part):
        spans[PARTS.index(part)].__exit__(None, None, None)
        if part != PARTS[-1]:
            spans[PARTS.index(part) + 1].__enter__()

    spans[0].__enter__()
    step([draw()], mark=mark)


def step_times(run, repeats):
    """Times from the end of one run() to the end of the next."""
    return quantiles([ms for one in intervals(lambda mark: (run(), mark()), repeats + 1) for ms in one])


def family(kernel, ops, sizes, cfg):
    """The family of a kernel, from the operators around it, innermost first, and the sizes of its inputs."""
    inside = lambda *words: any(word in op for op in ops for word in words)
    dims = {n for size in sizes for n in size}
    product = ops[0].startswith(("aten::mm", "aten::addmm", "aten::bmm"))
    ours = kernel in EXPERT_KERNELS
    expert = f"experts: {kernel.removesuffix('_kernel') if ours else 'grouped_mm'}"
    if inside("bwd", "Backward"):
        expert += " (backward)"
    table = (  # the first that holds
        (kernel in UPDATE_KERNELS, UPDATE_KERNELS.get(kernel)),
        (inside("Optimizer.step"), "optimiser"),
        (inside("_foreach_norm", "linalg_vector_norm"), "gradient norm"),
        (inside("linear_cross_entropy"), "lm head and loss"),
        (ours or inside("grouped_mm"), expert),
        (kernel.startswith("route_"), "router"),
        (inside("embedding"), "embedding"),
        (inside("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"), "attention"),
        (cfg.vocab_size in dims or inside("nll_loss", "log_softmax"), "lm head and loss"),
        (product and cfg.n_experts in dims and not cfg.dense, "router"),
        (product and 2 * cfg.d_expert in dims, "experts: torch products"),
        (product, "attention projections"),
        (True, "norms, rotations, elementwise"),
    )
    return next(name for holds, name in table if holds)


def family_times(run, cfg, repeats=3):
    """Milliseconds per step of each family: of kernels on a GPU, of operators on the CPU."""
    cuda, total, unlinked = torch.cuda.is_available(), Counter(), Counter()
    with profile(record_shapes=True) as prof:
        for _ in range(repeats):
            run()
        synchronize()
    for event in prof.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            # Kernels are also events of their own: what is left of their time belongs to no operator.
            if not getattr(event, "is_user_annotation", False):
                unlinked[event.name] += event.time_range.elapsed_us()
            continue
        own = [(kernel.name, kernel.duration) for kernel in event.kernels]
        ops, parent = [], event
        while parent is not None:
            ops.append(parent.name)
            parent = parent.cpu_parent
        for kernel, microseconds in own if cuda else [(event.name, event.self_cpu_time_total)]:
            total[family(kernel, ops, [s for s in event.input_shapes or [] if s], cfg)] += microseconds
            unlinked[kernel] -= microseconds
    for name, microseconds in unlinked.items():
        if cuda and microseconds > 100 * repeats:
            total[UPDATE_KERNELS.get(name, f"no operator: {name[:22]}")] += microseconds
    return {name: microseconds / 1e3 / repeats for name, microseconds in total.most_common()}


def show_families(add, families, whole):
    """Prints the families, and adds their rows unless the profiler has slowed a kernel or counted one twice."""
    total, cuda = sum(families.values()), torch.cuda.is_available()
    believed = not cuda or total < 1.05 * whole
    note = "" if cuda else " (the profiler makes a CPU's operators slower)"
    note = note if believed else " (more than the step: not written to the CSV)"
    print(f"\n{'family':<36}{'ms/step':>10}{'share':>8}")
    for name, ms in families.items():
        if believed:
            add("step-family", mode=name, times=Times(ms, ms, ms), quiet=True)
        print(f"{name:<36}{ms:>10.3f}{ms / whole:>8.1%}")
    print(f"{'sum, of the step':<36}{total:>10.3f}{total / whole:>8.1%}{note}")


def model_shape(cfg):
    return Shape(cfg.batch_size * cfg.seq_len, cfg.d_model, cfg.d_expert, cfg.n_experts, cfg.top_k)


def main(argv=None):
    cfg = parse(argv, __doc__)
    if cfg.trace:
        config.check_file(cfg.trace, "trace", device=False)
    device = pick_device(cfg)
    cuda, results = device.type == "cuda", Results(cfg)
    model, step, draw = make_step(cfg, device)
    fast = fast_step(step, model, cfg, device, world=1)  # compiles the blocks for `step` too
    warm = wall_ms(lambda: [step([draw()]) for _ in range(3)]) / 1e3
    load = balance(model, draw, 60 if cuda else 2)
    print(f"the first three steps took {warm:.1f} s; the fullest expert of any layer has {load:.2f} times its share")
    if cfg.trace:
        trace({"step": lambda: named_parts(step, draw)}, cfg.trace)
        return 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = part_times(step, draw, cfg.repeats)
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else None
    families = family_times(lambda: step([draw()]), cfg)
    if fast is not step:
        for _ in range(GraphedStep.WARM_UP + 2):
            fast([draw()])
        times["full-graph"] = step_times(lambda: fast([draw()]), cfg.repeats)
    flops = flops_per_token(cfg) * cfg.batch_size * cfg.seq_len
    best = peak_flops(results.environment["gpu"]) if results.dtype == torch.bfloat16 else None
    name = f"{'dense' if cfg.dense else cfg.preset}:{cfg.impl}"
    if cfg.weights == "bfloat16":
        name += ":bfloat16-weights"
    add = partial(results.add, implementation=name, shape=model_shape(cfg))
    for mode, t in times.items():
        if mode in PARTS:
            add("step", mode=mode, times=t)
        else:
            mfu = flops / (t.p50 / 1e3) / best if best else None
            note = f"{model_shape(cfg).T / t.p50 * 1e3:,.0f} tokens/s, MFU {f'{mfu:.1%}' if mfu else 'n/a'}"
            add("step", mode=mode, times=t, cost=Cost(flops, 0), note=note, ceiling=mfu, peak_mib=peak)
    show_families(add, families, times["full"].p50)
    return results.finish()


if __name__ == "__main__":
    raise SystemExit(config.command_line(main))
