"""Train a mixture-of-experts language model.

    python train.py                                                     # the default model on procedural data: facts and reasoning
    python train.py --data=DIR --preset=paper-d512-e16-k2 --seq-len=1024  # own data, prepared with `python -m data.prepare`
    python train.py --data=DIR:0.7,DIR2:0.3                             # a mixture
    torchrun --nproc-per-node=8 train.py --data=DIR                     # eight GPUs (docs/multi-gpu.md)
    python train.py --data=DIR --upcycle-from=runs/DENSE                # experts that start as a dense model trained with --dense
    python train.py --resume=runs/NAME                                  # continue, bit for bit; other flags override

A run directory holds config.json, metrics.jsonl (every logged number), checkpoints, curves.png, and results.json at the end.
Ctrl-C or SIGTERM saves a checkpoint and ends the run.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import optimoe as optimoe  # isort: skip  (before torch: how its threads wait)
import torch
import torch.distributed as dist

from data import shards, tokenizer
from data.loader import Loader, parse_sources
from eval import report
from model import GPT, UNTAUGHT, ModelConfig, update_router_bias
from moe_kernels import balance_loss
from optimoe import checkpoint, config, guard, parallel, sizes
from optimoe.config import require
from optimoe.curves import Curves
from optimoe.load import pick_device
from optimoe.optim import clip_factor, lr_at
from optimoe.sizes import count_params, flops_per_token, peak_flops
from optimoe.upcycle import upcycle


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    # Run
    preset: str = "tiny"  # model fields start from this one of model.PRESETS (the vocabulary comes from the data)
    data: str = ""  # data directory, or a mixture DIR:weight,DIR:weight; empty: procedural data, written under the run directory
    out_dir: str = ""  # run directory; empty: runs/<preset>-<time>
    resume: str = ""  # run directory to continue
    upcycle_from: str = ""  # run directory of a dense model to start from, exactly (upcycle.py)
    upcycle_noise: float = 0.0  # added to its copies, as a share of each weight's standard deviation
    seed: int = 0  # of the weights and of the data order
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    compile: Literal["auto", "true", "false"] = (
        "auto"  # torch.compile of each block, on CUDA; auto: where the run is long enough to repay it
    )
    cuda_graph: bool = True  # on one CUDA GPU, replay the whole optimiser step as one graph
    parallel: Literal["ddp", "fsdp", "ep"] = (
        "ddp"  # on several GPUs: optimiser states, everything, or experts too are sharded (parallel.py)
    )
    deterministic: bool = (
        False  # on CUDA, too, the same bits in every run (attention's backward then sums in a fixed order, slower)
    )
    # Optimisation
    steps: int = 1700  # optimiser steps
    batch_size: int = 8  # sequences per step, over all ranks and micro-batches
    grad_accum: int = 1  # micro-batches per step (the balance loss is that of a micro-batch over all ranks)
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for experts and attention, AdamW for the rest (optim.py)
    lr: float = 6e-3  # peak learning rate (found for Muon; with AdamW the default job learns best near 2e-3)
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear decay
    warmup_steps: int = 100  # linear, from 0
    decay_frac: float = 0.2  # wsd: share of the steps spent decaying
    min_lr_frac: float = 0.1  # final learning rate / peak
    beta1: float = 0.9  # AdamW, mean
    beta2: float = 0.99  # AdamW, variance
    eps: float = 1e-8  # AdamW
    muon_momentum: float = 0.95  # Muon
    weight_decay: float = 0.1  # on matrices, the router and embeddings among them; never on norms
    weights: Literal["float32", "bfloat16"] = (
        "float32"  # of experts, attention and dense layers, with AdamW's states: 8 bytes each, not 16
    )
    clip_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    bad_steps: Literal["stop", "skip"] = "stop"  # what a NaN or an exploded loss does to the run (guard.py)
    max_loss: float = 0.0  # cross-entropy of a step that counts as exploded; 0: 1.5 ln V + 1
    balance_coef: float = 1e-2  # weight of the load-balancing loss
    z_coef: float = 1e-3  # weight of the router z-loss
    # Reports
    log_every: int = 100  # steps between lines
    val_every: int = 500  # steps between validations; 0: only at the end
    val_batches: int = 20  # batches of batch_size / grad_accum sequences per validation
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # newest ones kept
    curves: bool = True  # redraw curves.png at validations and checkpoints, in a process of its own
    sample_tokens: int = 64  # length of the samples at the end; 0: none

    @staticmethod
    def preset_fields(name):
        return {field: value for field, value in sizes.preset_fields(name).items() if field != "vocab_size"}

    def validate(self):
        super().validate()
        require(self.router_learns or self.resume, "top_k", self.top_k, UNTAUGHT)
        for name in ("steps", "batch_size", "grad_accum", "log_every", "val_batches", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name in (
            "warmup_steps",
            "weight_decay",
            "clip_norm",
            "balance_coef",
            "z_coef",
            "val_every",
            "checkpoint_every",
            "sample_tokens",
            "lr",
            "eps",
            "max_loss",
            "upcycle_noise",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or more")
        for name in ("decay_frac", "min_lr_frac"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "use a number from 0 to 1")
        for name in ("beta1", "beta2", "muon_momentum"):  # at 1 nothing new would enter the mean
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "use a number from 0 to below 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to below 2^63")
        require(
            self.batch_size % self.grad_accum == 0,
            "batch_size",
            self.batch_size,
            f"use a multiple of grad_accum={self.grad_accum}",
        )
        if self.weights == "bfloat16":
            require(
                self.optimizer == "adamw",
                "weights",
                self.weights,
                "only AdamW rounds stochastically: add --optimizer=adamw",
            )
            require(
                self.grad_accum <= 64,
                "grad_accum",
                self.grad_accum,
                "sums of bfloat16 gradients lose what is below 1/256 of them: use 64 or less",
            )


def compile_blocks(model, cfg):
    """torch.compile of each block. It takes half a minute: "auto" wants at least a minute of training at 20 % of an H100's peak."""
    if (
        cfg.compile == "true"
        or cfg.compile == "auto"
        and cfg.steps * cfg.batch_size * cfg.seq_len * flops_per_token(cfg) > 1e16
    ):
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)


def optimizer_step(model, optimizer, cfg, window, batches, world=1, mark=lambda part: None):
    """One step on micro-batches [(tokens_BL, targets_BL)]: forward, backward, clipped update. Adds to the window's sums; returns the gradient norm,
    a tensor: nothing here waits for the device. mark(part) is called at the end of each part (bench/step.py times them)."""
    counts_NE = probs_NE = sums = 0
    optimizer.begin_step()
    for micro, (tokens_BL, targets_BL) in enumerate(batches):
        parallel.sync_gradients(model, optimizer, micro == len(batches) - 1)
        out = model(tokens_BL, targets_BL)
        balance = out.balance
        if world > 1:  # the balance loss of the global batch: everyone's counts, own probabilities
            dist.all_reduce(out.counts_NE)
            balance = sum(
                (balance_loss(c, p) for c, p in zip(out.counts_NE, out.probs_NE, strict=True)), 0 * out.balance
            )
        loss = out.loss + cfg.balance_coef * balance + cfg.z_coef * out.z
        mark("forward")
        (loss / len(batches)).backward()
        mark("backward")
        sums = sums + torch.stack([out.loss, balance, out.z, torch.ones_like(out.loss)]).detach()
        counts_NE = counts_NE + out.counts_NE
        probs_NE = probs_NE + out.probs_NE.detach()
    if world > 1:  # means over ranks, so that all of them log, judge and save the same
        shared = torch.cat([sums, probs_NE.flatten()])
        dist.all_reduce(shared)
        sums, probs_NE = (shared[:4] / world, (shared[4:] / world).view_as(probs_NE))
    optimizer.average_gradients()
    grad_norm = optimizer.grad_norm()
    skip = guard.judge(window, sums[0] / len(batches), grad_norm, cfg)
    optimizer.step(skip, clip_factor(grad_norm, cfg.clip_norm))
    optimizer.zero_grad()
    sums, counts_NE, probs_NE = (
        torch.where(skip > 0, 0, t) for t in (sums, counts_NE, probs_NE)
    )  # not times 0: they may be NaN
    if cfg.router_bias_rate:
        update_router_bias(model, counts_NE)
    window["sums"] += sums
    window["counts_NE"] += counts_NE
    window["probs_NE"] += probs_NE
    mark("optimiser")
    return grad_norm


class GraphedStep:
    """step(batches) as one CUDA graph launch instead of a thousand kernel launches.

    The first WARM_UP calls run `step` itself, on the stream of the capture, and count as training steps like all others; the call after
    them records the graph and replays it, and so do all that follow. Batches must keep their shapes."""

    WARM_UP = 3

    def __init__(self, step):
        self.step, self.calls, self.graph, self.stream = step, 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, batches):
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(batches)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.WARM_UP + 1:
            self.inputs = [tuple(t.clone() for t in batch) for batch in batches]
            # thread_local: meanwhile the loader's thread may pin memory for its next batches.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.step(self.inputs)
        for mine, batch in zip(self.inputs, batches, strict=True):
            for buffer, t in zip(mine, batch, strict=True):
                buffer.copy_(t)
        self.graph.replay()
        return self.result


def new_window(cfg, device):
    """Sums since the last log line: they stay on the device, in place, until a line is due, and are part of a checkpoint."""
    shape = (0 if cfg.dense else cfg.n_layers, cfg.n_experts)
    return {
        "sums": torch.zeros(4, device=device),  # cross-entropy, balance, z, batches
        "steps": torch.zeros(3, device=device, dtype=torch.int64),  # see guard.py
        "counts_NE": torch.zeros(shape, device=device, dtype=torch.int64),
        "probs_NE": torch.zeros(shape, device=device),
    }


@torch.no_grad()
def validate(model, loader, n_batches, world):
    """Mean cross-entropy in nats over the same first batches of the validation stream every time; the router losses are not in it."""
    if not parallel.is_fsdp(
        model
    ):  # whose blocks must run as modules; nothing but the choice of compiled blocks depends on the mode
        model.eval()
    loader.load_state_dict(loader.state_dict() | {"drawn": [0] * len(loader.sources)})
    total = sum(model(*loader.next()).loss for _ in range(n_batches)) / n_batches
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return float(total) / world


STOPPED = (
    "stopped; --resume goes on from the last checkpoint, and the same command starts again where training had not begun"
)


class Stop:
    """Inside `with Stop() as stop`, the first SIGINT or SIGTERM sets stop.asked; a second one acts as usual."""

    asked = False

    def __enter__(self):
        self.old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number, frame):
        self.asked = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def train(cfg, rank=0, world=1, device=torch.device("cpu")):
    """One run from start, or from its newest checkpoint, to the end. Returns the contents of results.json (rank 0) or None."""
    lead = rank == 0
    require(
        cfg.batch_size % (world * cfg.grad_accum) == 0,
        "batch_size",
        cfg.batch_size,
        f"use a multiple of ranks * grad_accum = {world} * {cfg.grad_accum}",
    )
    require(
        world == 1 or cfg.weights == "float32" or cfg.parallel == "ddp",
        "weights",
        cfg.weights,
        f"parallel={cfg.parallel} keeps float32 weights; use --parallel=ddp",
    )
    micro_batch = cfg.batch_size // (world * cfg.grad_accum)

    # ---- run directory and data
    run_dir = lock = None
    sources = parse_sources(cfg.data) if cfg.data else []
    for directory, _ in sources:
        shards.read_meta(directory)  # a wrong path should not leave a run directory behind
    if lead:
        name = cfg.out_dir or f"runs/{'dense' if cfg.dense else cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir, lock = checkpoint.open_run(name, cfg.resume)
        if not sources:
            sources = [(str(run_dir / "data"), 1.0)]
            if not (run_dir / "data" / shards.META).exists():
                from data import procedural  # only this run needs it

                procedural.build(run_dir / "data", seed=cfg.seed)
    if world > 1:
        shared = [run_dir, sources]
        dist.broadcast_object_list(shared)
        run_dir, sources = shared
    loader = Loader(sources, "train", micro_batch, cfg.seq_len, cfg.seed, rank, world, device)
    val_loader = Loader(sources, "val", micro_batch, cfg.seq_len, 0, rank, world, device)
    n_val = min(cfg.val_batches, max(1, sum(val_loader.n_windows) // (micro_batch * world)))
    enc = tokenizer.load(sources[0][0])
    if not cfg.vocab_size:
        cfg = dataclasses.replace(cfg, vocab_size=-(-enc.n_vocab // 64) * 64)  # tensor cores like multiples of 64
    require(
        cfg.vocab_size >= enc.n_vocab,
        "vocab_size",
        cfg.vocab_size,
        f"the tokenizer of {sources[0][0]} has {enc.n_vocab} tokens",
    )

    # ---- model, optimiser, state
    model = GPT(cfg)
    state, start = None, 0
    if cfg.resume and checkpoint.find(run_dir):  # none: the run ended before its first one and starts again
        state = checkpoint.read(run_dir)
        for name in ("optimizer", *(field.name for field in dataclasses.fields(ModelConfig))):
            if name not in ("dtype", "impl", "loss_chunk", "seq_len"):
                saved, value = state["config"][name], getattr(cfg, name)
                require(saved == value, name, value, f"the checkpoint has {saved!r}; resume without this flag")
        model.load_state_dict(state["model"])
        start = state["step"]
        require(start <= cfg.steps, "steps", cfg.steps, f"the checkpoint is that of step {start}; use as many or more")
    elif cfg.upcycle_from:
        upcycle(model, cfg.upcycle_from, cfg.upcycle_noise, cfg.seed)
    model = parallel.wrap(model, cfg, device, world)
    optimizer = parallel.Sharded(model, cfg, rank, world)
    window = new_window(cfg, device)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        for name, sums in state["window"].items():
            window[name].copy_(sums)
        window["steps"][guard.BAD] *= cfg.bad_steps == "skip"  # what was skipped by option is no reason to stop
        torch.set_rng_state(state["rng"])
        del state
    if device.type == "cuda" and (world == 1 or cfg.parallel == "ddp"):
        compile_blocks(model, cfg)
    pictures = Curves(run_dir) if lead and cfg.curves else None

    params, flops = count_params(cfg), flops_per_token(cfg)
    peak = (
        peak_flops(torch.cuda.get_device_name(device))
        if device.type == "cuda" and model.dtype == torch.bfloat16
        else None
    )
    tokens_per_step = cfg.batch_size * cfg.seq_len
    per_token = report.bytes_per_token(sources, "val")
    if lead:
        config.save(cfg, run_dir / "config.json")
        logged = checkpoint.rewind_metrics(run_dir / "metrics.jsonl", start)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(
            f"{run_dir}: {params.total:,} parameters ({params.active:,} active), {cfg.steps - start} step{'s' * (cfg.steps - start != 1)} of "
            f"{tokens_per_step:,} tokens, {str(model.dtype)[6:]} on {where} x {world}",
            flush=True,
        )
        if cfg.steps < cfg.warmup_steps:
            print(
                f"steps={cfg.steps} ends within the warm-up, before lr={cfg.lr:g} is reached; lower warmup_steps={cfg.warmup_steps}",
                flush=True,
            )

    def record(row):
        if lead:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def save(step):
        if (
            cfg.bad_steps == "stop"
        ):  # a skipped step changed nothing, and how many in a row are too many is known at the next line
            check_steps(step)
        (weights, norm), states = (
            parallel.full_state(model, optimizer, rank),
            optimizer.state_dict(),
        )  # all ranks take part
        guard.check_finite("norm of the weights", norm, step, run_dir)
        if lead:
            checkpoint.save(
                run_dir,
                step,
                {
                    "step": step,
                    "config": dataclasses.asdict(cfg),
                    "model": weights,
                    "optimizer": states,
                    "loader": loader.state_dict(),
                    "window": window,
                    "rng": torch.get_rng_state(),
                },
                cfg.keep_checkpoints,
            )

    def check_steps(step):
        """Raises if a step since the last line was bad and the run shall stop for it, or if all were; waits for the device."""
        nonlocal run_step
        steps, bad, first = window["steps"].tolist()
        if bad and (cfg.bad_steps == "stop" or bad == steps):
            run_step = None  # and with it the memory of the graph, for the repeated step
            back = min(steps - first + 1, len(cursors))  # the run may have been resumed in the middle of skipped steps
            path = run_dir / f"bad-step-{step - back + 1:08d}-rank{rank}.json"
            optimizer.gather_weights()
            loss, where = guard.dump(path, model, loader, cursors[-back], cfg, step - back + 1)
            raise ValueError(
                f"loss={loss} at step {step - back + 1}, first in {where} (layers and batch: {path}): {guard.remedy(run_dir)}"
            )

    def run_validation(step):
        optimizer.gather_weights()
        loss = validate(model, val_loader, n_val, world)
        bits = {"val_bits_per_byte": loss / math.log(2) / per_token} if per_token else {}
        if lead:
            tail = f" | {bits['val_bits_per_byte']:.4f} bits/byte" if bits else ""
            print(f"step {step:>6}/{cfg.steps} | validation loss {loss:.4f}{tail}", flush=True)
        return {"step": step, "val_loss": loss, **bits}

    # ---- the loop
    model.train()
    run_step = partial(optimizer_step, model, optimizer, cfg, window, world=world)
    if (
        cfg.cuda_graph
        and device.type == "cuda"
        and (world == 1 or cfg.parallel == "ddp")
        and cfg.impl in ("auto", "triton")
    ):  # the others count rows on the host
        run_step = GraphedStep(run_step)
    step, row, val_row, began = start, {}, {}, time.perf_counter()
    cursors = []  # of the loader, before each step since the last line
    clock, clock_step = began, start  # of the last line; the clock stands still during validation and saving
    timed_seconds, timed_steps = 0.0, 0  # all intervals but the first, which compiles
    with Stop() as stop:
        while step < cfg.steps:
            lr = lr_at(step, cfg)
            optimizer.set_lr(lr)
            cursors.append(loader.state_dict())
            grad_norm = run_step([loader.next() for _ in range(cfg.grad_accum)])
            step += 1

            stopping = stop.asked and world == 1
            if step % cfg.log_every == 0 or step == cfg.steps:
                check_steps(step)
                means = report.read_window(window)  # waits for the device, so the clock is right
                now = time.perf_counter()
                if row:
                    timed_seconds, timed_steps = timed_seconds + now - clock, timed_steps + step - clock_step
                norm = float(grad_norm) if grad_norm.isfinite() else None  # of a skipped step
                row = {"step": step, "tokens": step * tokens_per_step, "lr": lr, "grad_norm": norm, **means}
                for sums in window.values():
                    sums.zero_()
                cursors.clear()
                rate = (step - clock_step) * tokens_per_step / (now - clock)
                row |= {
                    "tokens_per_s": rate,
                    "mfu": rate * flops / (peak * world) if peak else None,
                    "memory_gb": report.peak_memory_gb(device),
                }
                clock, clock_step = now, step
                record(row)
                if lead:
                    print(report.log_line(row, cfg, tokens_per_step), flush=True)
                if world > 1:  # ranks hear a signal at different steps: agree where they wait for one another anyway
                    asked = torch.tensor(int(stop.asked), device=device)
                    dist.all_reduce(asked)
                    stopping = bool(asked)
            pause = time.perf_counter()
            validating = step == cfg.steps or cfg.val_every and step % cfg.val_every == 0
            saving = stopping or step == cfg.steps or cfg.checkpoint_every and step % cfg.checkpoint_every == 0
            if validating:
                val_row = run_validation(step)
                record(val_row)
            if saving:
                save(step)
            if pictures and (validating or saving):
                pictures.refresh()
            clock += time.perf_counter() - pause
            if stopping and step < cfg.steps:
                if lead:
                    print(f"stopped and saved at step {step}; continue with: python train.py --resume={run_dir}")
                return None

    del run_step  # and with it the memory of the graph
    val_row = val_row or run_validation(step)  # none yet: the checkpoint was the last one
    if not lead:
        return None
    row = row or next((r for r in reversed(logged) if "loss" in r), {})
    results = {
        **row,
        **val_row,
        "parameters": params.total,
        "active_parameters": params.active,
        "seconds": time.perf_counter() - began,
        "tokens_per_parameter": cfg.steps * tokens_per_step / params.total,
        "epochs": max(loader.epochs),
    }
    if timed_steps:
        rate = timed_steps * tokens_per_step / timed_seconds
        results |= {"tokens_per_s": rate, "mfu": rate * flops / (peak * world) if peak else None}
    if world > 1 and cfg.parallel != "ddp":  # generating takes the whole model on one GPU, and now there is room for it
        optimizer = model = None
        model = checkpoint.load_model(run_dir, device)
    results |= report.final_report(model, cfg, sources, enc, val_loader, results)
    checkpoint.replace_file(run_dir / "results.json", json.dumps(results, indent=2) + "\n")
    print(report.next_steps(run_dir, cfg, sources))
    if pictures:
        pictures.close()
    lock.close()
    return results


def main(argv=None):
    """Entry point of `python train.py` and torchrun; returns what `train` returns."""
    rank, world, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    try:
        cfg = config.parse_run(TrainConfig, sys.argv[1:] if argv is None else argv, __doc__)
        device = pick_device(cfg, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # the tests do that; a run need not pay for it
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return train(cfg, rank, world, device)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if argv is not None or "DEBUG" in os.environ:
            raise
        sys.exit(STOPPED if isinstance(error, KeyboardInterrupt) else f"error: {error}")
    except RuntimeError as error:
        if world == 1 or not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
            raise
        # Not sys.exit: communication threads may still wait for the rank that is gone.
        print(
            f"error: rank {rank} lost its connection to another rank, which died (its own message says why); "
            f"continue from the last checkpoint with --resume\n{error}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
