"""Train a mixture-of-experts language model.

    python train.py                                       # the default model on procedural data
    python train.py --data=DIR --preset=paper-d512-e16-k2 # data of `python -m data.prepare`
    python train.py --data=DIR:0.7,DIR2:0.3               # a mixture
    torchrun --nproc-per-node=8 train.py --data=DIR       # eight GPUs (docs/multi-gpu.md)
    python train.py --data=DIR --init-from=ORG/NAME       # fine-tune a Mixtral, Qwen3-MoE or OLMoE
    python train.py --upcycle-from=runs/DENSE             # make experts of a --dense run's weights, on its data
    python train.py --resume=runs/NAME                    # continue, bit for bit; other flags change its settings

A run directory holds config.json, metrics.jsonl (every logged number), checkpoints, curves.png, and at the end
results.json. Ctrl-C or SIGTERM saves a checkpoint and ends the run.
"""

import dataclasses
import os
import shlex
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import optimoe.threads  # before torch

import torch
import torch.distributed as dist

from data import procedural, shards, tokenizer
from data.loader import Loader, parse_sources
from eval import report
from model import GPT, UNTAUGHT, ModelConfig, update_router_bias
from moe_kernels import balance_loss
from optimoe import checkpoint, exchange, guard, hub, parallel, sizes, start, upcycle
from optimoe.config import check_range, require
from optimoe.curves import Curves
from optimoe.faststep import fast_step
from optimoe.guard import new_window
from optimoe.optim import clip_factor, lr_at
from optimoe.run import CPU, Clock, Run, check_rates, check_trace, launch
from optimoe.sizes import count_params, least_memory, require_memory


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    # Run
    preset: str = "tiny"  # name of a model's sizes (optimoe/sizes.py); the vocabulary comes from the data
    data: str = ""  # data directory or mixture DIR:weight,DIR:weight; empty: procedural data
    document_mask: bool = False  # a token sees its document and the eos before it; always so for examples (--sft)
    out_dir: str = ""  # run directory; empty: runs/<preset>-<time>
    resume: str = ""  # run directory to continue
    init_from: str = ""  # a Mixtral, Qwen3-MoE or OLMoE to fine-tune: folder or ORG/NAME[@REVISION] (optimoe/start.py)
    upcycle_from: str = ""  # dense run to make experts from, with its sizes and data (optimoe/upcycle.py)
    seed: int = 0  # of the weights and of the data order
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one; mps is untested
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile of blocks on CUDA; auto: in long runs
    cuda_graph: bool = True  # replay the whole step as one CUDA graph
    parallel: Literal["ddp", "ep"] = "ddp"  # divided among GPUs: optimiser states; ep: experts too
    ep_size: int = 0  # ep: ranks that divide the experts; 0: all. Such groups are data parallel
    deterministic: bool = False  # the same bits in every run on CUDA too; slower
    # Optimisation
    steps: int = 1700  # optimiser steps
    batch_size: int = 8  # sequences per step, over all ranks and micro-batches
    grad_accum: int = 1  # micro-batches per step
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: with AdamW for embeddings, routers, norms
    lr: float = 6e-3  # peak learning rate; with AdamW the default run learns best near 2e-3
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: constant, then linear decay
    warmup_steps: int = 100  # of linear warm-up
    decay_frac: float = 0.2  # wsd: share of the steps in the decay
    min_lr_frac: float = 0.1  # final learning rate / peak
    beta1: float = 0.9  # AdamW: decay of the gradient's mean
    beta2: float = 0.99  # AdamW: decay of the mean square
    eps: float = 1e-8  # AdamW: added to the denominator
    muon_momentum: float = 0.95  # Muon: decay of the gradient's mean
    weight_decay: float = 0.1  # on matrices, never on norms
    weights: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory for matrices in blocks; needs AdamW
    clip_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    bad_steps: Literal["stop", "skip"] = "stop"  # what to do at a NaN or an exploded loss
    max_loss: float = 0.0  # cross-entropy above this counts as exploded; 0: 1.5 ln V + 1
    balance_coef: float = 1e-2  # weight of the load-balancing loss
    z_coef: float = 1e-3  # weight of the router z-loss
    # Reports
    log_every: int = 100  # steps between log lines
    val_every: int = 500  # steps between validations; 0: only at the end
    val_batches: int = 20  # batches of batch_size sequences per validation, or all there are; 0: no validation
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # how many of the newest to keep
    curves: bool = True  # redraw curves.png at validations and checkpoints
    trace: str = ""  # write a profiler trace of steps 6 to 8 to this file
    log: str = ""  # also log to tensorboard or wandb, or to both: tensorboard,wandb; with torchrun write --logger
    sample_tokens: int = 64  # length of the samples at the end; 0: no samples

    @staticmethod
    def preset_fields(name):
        return {field: value for field, value in sizes.preset_fields(name).items() if field != "vocab_size"}

    @staticmethod
    def start_fields(flags):
        if flags.get("upcycle_from"):
            return upcycle.training_fields(flags["upcycle_from"])
        if flags.get("init_from"):
            remedy = "the sizes are those of init_from; leave it out"
            require("preset" not in flags, "preset", flags.get("preset"), remedy)
            return start.training_fields(flags["init_from"])
        return {}

    def validate(self):
        super().validate()
        remedy = f"name text in its tokens: python -m data.prepare ... --tokenizer={shlex.quote(self.init_from)}"
        require(self.data or not self.init_from, "data", "", remedy)
        remedy = "the weights come from one place: give init_from or upcycle_from"
        require(not (self.init_from and self.upcycle_from), "init_from", self.init_from, remedy)
        require(self.router_learns or self.resume, "top_k", self.top_k, UNTAUGHT)
        check_range(self, "steps batch_size grad_accum log_every keep_checkpoints", 1)
        check_range(self, "warmup_steps weight_decay clip_norm balance_coef z_coef val_every val_batches")
        check_range(self, "checkpoint_every sample_tokens lr eps max_loss seed")
        remedy = (
            f"with batch_size={self.batch_size} and seq_len={self.seq_len} these are 2^63 tokens or more; use fewer"
        )
        require(self.steps * self.batch_size * self.seq_len < 2**63, "steps", self.steps, remedy)
        check_range(self, "decay_frac min_lr_frac", 0, 1)
        check_rates(self, "beta1 beta2 muon_momentum")
        remedy = "use 0 for all ranks, or 2 or more with --parallel=ep"
        require(not self.ep_size or self.ep_size > 1 and self.parallel == "ep", "ep_size", self.ep_size, remedy)
        remedy = f"use a multiple of grad_accum={self.grad_accum}"
        require(self.batch_size % self.grad_accum == 0, "batch_size", self.batch_size, remedy)
        if self.weights == "bfloat16":
            adamw = self.optimizer == "adamw"
            require(adamw, "weights", self.weights, "only AdamW rounds stochastically: add --optimizer=adamw")
            remedy = "sums of bfloat16 gradients lose what is below 1/256 of them: use 64 or less"
            require(self.grad_accum <= 64, "grad_accum", self.grad_accum, remedy)


def optimizer_step(model, optimizer, cfg, window, batches, world=1, mark=lambda part: None):
    """One step on micro-batches [(tokens_BL, targets_BL[, doc_ids_BL])]: forward, backward, clipped update.

    The loss is the mean over all targets of the step, however many of them a micro-batch or a rank has.
    Adds to the sums in `window`. Returns the gradient norm as a tensor: nothing here waits for the device. mark(part)
    is called at the end of each part, for bench/step.py."""
    counts_NE, probs_NE, sums, discard = 0, 0, 0, None
    targets = torch.stack([(batch[1] >= 0).sum() for batch in batches])
    total = targets.sum()
    if world > 1:
        dist.all_reduce(total)
    shares = targets * (len(batches) * world) / total.clamp(min=1)  # exactly 1 if all have equally many targets
    if world > 1:
        optimizer.begin_step()
    for micro, batch in enumerate(batches):
        first, last = micro == 0, micro == len(batches) - 1
        optimizer.synchronize = last
        out = model(*batch)
        balance, ce = out.balance, shares[micro] * out.loss
        if world > 1:  # the balance of the global batch: counts of all ranks, probabilities of this one
            discard = exchange.count(model, out.counts_NE, first, last)
            layers = zip(out.counts_NE, out.probs_NE, strict=True)
            balance = sum((balance_loss(counts_E, probs_E) for counts_E, probs_E in layers), 0 * out.balance)
        loss = ce + cfg.balance_coef * balance + cfg.z_coef * out.z
        mark("forward")
        (loss / len(batches)).backward()
        mark("backward")
        sums = sums + torch.stack([ce, balance, out.z, torch.ones_like(ce)]).detach()
        counts_NE = counts_NE + out.counts_NE
        probs_NE = probs_NE + out.probs_NE.detach()
    if world > 1:  # means over ranks, so that all log, judge and save the same numbers
        shared = torch.cat([sums, probs_NE.flatten()])
        dist.all_reduce(shared)
        sums, probs_NE = shared[:4] / world, (shared[4:] / world).view_as(probs_NE)
        optimizer.average_gradients()
    grad_norm = optimizer.grad_norm()
    skip = guard.judge(window, sums[0] / len(batches), grad_norm, cfg, discard)
    optimizer.step(skip, clip_factor(grad_norm, cfg.clip_norm))
    optimizer.zero_grad()
    added = {"sums": sums, "counts_NE": counts_NE, "probs_NE": probs_NE}
    added = {name: torch.where(skip > 0, 0, t) for name, t in added.items()}  # a product with 0 would keep NaN
    if cfg.router_bias_rate:
        update_router_bias(model, added["counts_NE"])
    for name, t in added.items():
        window[name] += t
    mark("optimiser")
    return grad_norm


class Data(NamedTuple):
    sources: list  # [(directory, weight)]
    val_sources: list  # those with validation data
    loader: Loader
    val_loader: Loader | None  # None: there is no validation
    val_samples: int  # of a validation, over all ranks
    enc: object  # tokenizer


@dataclass
class Training:
    model: GPT
    optimizer: parallel.Sharded
    window: dict
    step: int = 0
    tokens: int = 0  # read so far
    state: dict | None = None  # checkpoint that the run continues from


def make_data(cfg, directory):
    """The sources of a run: cfg.data, or procedural data under the run directory."""
    if not cfg.data and not (directory / "data" / shards.META).exists():
        procedural.build(directory / "data", seed=cfg.seed)
    return parse_sources(cfg.data) if cfg.data else [(str(directory / "data"), 1.0)]


def open_data(cfg, run):
    """(cfg with the vocabulary of the data, Data). Raises ValueError for data that this run cannot use."""
    sources, micro_batch = run.prepared, cfg.batch_size // (run.world * cfg.grad_accum)
    metas = [shards.read_meta(directory) for directory, _ in sources]
    marked = any(meta["version"] == shards.MARKED for meta in metas)
    cfg = dataclasses.replace(cfg, document_mask=cfg.document_mask or marked)
    place = (run.rank, run.world, run.device, cfg.document_mask)
    loader = Loader(sources, "train", micro_batch, cfg.seq_len, cfg.seed, *place)
    has_val = [cfg.val_batches and meta["splits"].get("val", {}).get("tokens") for meta in metas]
    val_sources = [source for source, found in zip(sources, has_val, strict=True) if found]
    val_loader = Loader(val_sources, "val", micro_batch, cfg.seq_len, 0, *place) if val_sources else None
    val_samples = min(cfg.val_batches * cfg.batch_size, sum(val_loader.n_windows)) if val_loader else 0
    enc = tokenizer.load(sources[0][0])
    if cfg.init_from and not cfg.resume:
        start.check_tokenizer(cfg.init_from, enc, sources[0][0])
    if not cfg.vocab_size:
        cfg = dataclasses.replace(cfg, vocab_size=-(-enc.n_vocab // 64) * 64)  # multiples of 64 are faster
    remedy = f"the tokenizer of {sources[0][0]} has {enc.n_vocab} tokens"
    require(cfg.vocab_size >= enc.n_vocab, "vocab_size", cfg.vocab_size, remedy)
    return cfg, Data(sources, val_sources, loader, val_loader, val_samples, enc)


def check_start(cfg, world):
    """Raises ValueError for what can be refused without a run directory."""
    remedy = f"use a multiple of ranks * grad_accum = {world} * {cfg.grad_accum}"
    require(cfg.batch_size % (world * cfg.grad_accum) == 0, "batch_size", cfg.batch_size, remedy)
    again = cfg.recompute != "none" and world > 1 and cfg.parallel == "ep"  # tokens would travel a second time
    require(not again, "recompute", cfg.recompute, "not with parallel=ep; use --parallel=ddp")
    exchange.group_size(cfg, world)


def set_up(cfg, run, data):
    """The Training of a fresh run, or of its newest checkpoint. Raises ValueError if the memory is too small."""
    tokens = cfg.batch_size // (run.world * cfg.grad_accum) * cfg.seq_len
    n_params = count_params(cfg).total
    what = f"{n_params:,} parameters and {tokens:,} tokens at a time"
    remedy = "use a smaller model, a smaller batch_size or more grad_accum"
    least = least_memory(cfg, tokens, run.world, exchange.group_size(cfg, run.world))
    require_memory(what, least, run.device, remedy)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each makes the weights in the memory of this machine
    require_memory(what, 4 * n_params * ranks, CPU, remedy)
    state = run.resume()
    model = start.load(cfg.init_from, "init_from", cfg) if cfg.init_from and not state else GPT(cfg)
    if state:
        fixed = {"optimizer", "init_from", "upcycle_from", *(field.name for field in dataclasses.fields(ModelConfig))}
        for name in sorted(fixed - {"dtype", "impl", "loss_chunk", "recompute", "seq_len"}):
            saved, value = state["config"][name], getattr(cfg, name)
            require(saved == value, name, value, f"the checkpoint has {saved!r}; resume without this flag")
        remedy = f"the checkpoint is that of step {state['step']}; use as many or more"
        require(state["step"] <= cfg.steps, "steps", cfg.steps, remedy)
        model.load_state_dict(state.pop("model"))
    elif cfg.upcycle_from:
        upcycle.upcycle(model, cfg.upcycle_from)
    exchange.deal_out(model, cfg, run.device, run.world, tokens)
    model = model.to(run.device)
    optimizer, window = parallel.Sharded(model, cfg, run.rank, run.world), new_window(cfg, run.device)
    job = Training(model, optimizer, window, state=state)
    if state:
        optimizer.load_state_dict(state.pop("optimizer"))
        data.loader.load_state_dict(state["loader"])
        for name, sums in state.pop("window").items():
            window[name].copy_(sums[:2] if name == "steps" else sums)  # earlier versions kept a third number
        if cfg.bad_steps == "stop":  # steps that were skipped before are no reason to stop
            window["steps"][guard.BAD] = window["skipped_in_a_row"][...] = 0
        read = state["step"] * state["config"]["batch_size"] * state["config"]["seq_len"]
        job.step, job.tokens = state["step"], state.get("tokens", read)
    return job


@torch.no_grad()
def validate(job, data, world):
    """Mean cross-entropy in nats over the targets of the first val_samples of the validation data, the same every time
    and for any micro-batch and number of ranks."""
    job.optimizer.gather_weights()
    job.model.eval()
    loader = data.val_loader
    loader.load_state_dict(loader.state_dict() | {"drawn": [0] * len(loader.sources)})
    sums, rows = 0, loader.batch_size
    for first in range(0, data.val_samples, rows * world):
        tokens_BL, targets_BL, *documents = loader.next()
        left = min(max(0, data.val_samples - first - loader.rank * rows), rows)
        targets_BL[left:] = -1  # these rows only fill the last batch up, so that all ranks have one
        n_targets = (targets_BL >= 0).sum()
        sums = sums + torch.stack([job.model(tokens_BL, targets_BL, *documents).loss * n_targets, n_targets])
    if world > 1:
        dist.all_reduce(sums)
    job.model.train()
    return float(sums[0] / sums[1].clamp(min=1))


def record_validation(cfg, run, job, data):
    row = report.val_row(validate(job, data, run.world), job.step, job.tokens, data.val_sources)
    run.record(row, report.val_line(row, cfg))
    return row


def save(cfg, run, job, data):
    state = {"model": job.optimizer.weights(job.model), "optimizer": job.optimizer.state_dict(), "window": job.window}
    state |= {"config": dataclasses.asdict(cfg), "loader": data.loader.state_dict(), "tokens": job.tokens}
    run.save(job.step, state, cfg.keep_checkpoints)


def train(cfg, rank=0, world=1, device=CPU, given=None):
    """One run to its end. Returns results.json as a dict on rank 0, or None."""
    check_start(cfg, world)
    kind = hub.title(cfg.init_from) if cfg.init_from else "dense" if cfg.dense else cfg.preset
    name = cfg.out_dir or f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Run(cfg, name, rank, world, device, given, partial(make_data, cfg)) as run:
        cfg, data = open_data(cfg, run)
        job = set_up(cfg, run, data)
        if cfg.trace:
            check_trace(cfg.trace, cfg.steps - job.step)
        run.begin(cfg, job.step, job.state)
        if run.first:
            print(report.first_lines(cfg, run, data, job.step), flush=True)
        if (cfg.init_from or cfg.upcycle_from) and not job.state and data.val_loader:
            record_validation(cfg, run, job, data)  # the loss that training starts from
        run_step = partial(optimizer_step, job.model, job.optimizer, cfg, job.window, world=world)
        run_step = fast_step(run_step, job.model, cfg, device, world)
        if cfg.trace and run.first:
            run_step = run.traced(run_step, cfg.trace)
        watch = guard.Watch(cfg, run, job.model, data.loader, job.window)
        pictures = Curves(run.dir) if run.first and cfg.curves else None
        clock, logged, row, val_row = Clock(), job.tokens, {}, {}
        job.model.train()
        while job.step < cfg.steps:
            lr = lr_at(job.step, cfg)
            job.optimizer.set_lr(lr)
            watch.remember()
            grad_norm = run_step([data.loader.next() for _ in range(cfg.grad_accum)])
            job.step, job.tokens = job.step + 1, job.tokens + cfg.batch_size * cfg.seq_len

            last = job.step == cfg.steps
            intervals = (cfg.log_every, cfg.val_every, cfg.checkpoint_every)
            logging, validating, saving = (last or n > 0 and job.step % n == 0 for n in intervals)
            stopping = (logging or world == 1) and run.stopping()
            saving = saving or stopping
            if (logging or saving and cfg.bad_steps == "stop") and watch.must_stop():
                run_step = None  # its graph's memory is needed to repeat the step
                job.optimizer.gather_weights()
                watch.explain(job.step)
            if logging:
                means = report.read_window(job.window)  # waits for the device, so the clock is right
                speed = report.speed((job.tokens - logged) / clock.read(), cfg, device, world)
                norm = float(grad_norm) if grad_norm.isfinite() else None  # the step was skipped
                row = {"step": job.step, "tokens": job.tokens, "lr": lr, "grad_norm": norm, **means, **speed}
                row |= exchange.repeated(job.model)
                run.record(row, report.log_line(row, cfg))
                watch.forget()
                logged = job.tokens
            with clock.paused():
                if validating and data.val_loader:
                    val_row = record_validation(cfg, run, job, data)
                if saving:
                    save(cfg, run, job, data)
                if pictures and (validating or saving):
                    pictures.refresh()
            if stopping and not last:
                return run.stopped(job.step, "train.py")
        del run_step, watch  # frees the graph's memory and the model
        results = finish(cfg, run, job, data, row, val_row)
        if pictures:
            pictures.close()
        return results


def finish(cfg, run, job, data, row, val_row):
    job.optimizer.gather_weights()
    job.model.before_layer = None  # all weights are here; with a hook generation is slower
    if data.val_loader and not val_row:  # the run was resumed at its end
        val_row = report.val_row(validate(job, data, run.world), job.step, job.tokens, data.val_sources)
    if not run.first:
        return None
    row = row or next((row for row in reversed(run.rows) if "loss" in row), {})
    total, active, _ = count_params(cfg)
    results = {**row, **val_row, "parameters": total, "active_parameters": active}
    results |= {"seconds": time.perf_counter() - run.began, "epochs": max(data.loader.epochs)}
    results["tokens_per_parameter"] = job.tokens / total
    if run.world > 1 and cfg.parallel != "ddp":  # the report generates with the whole model on one GPU
        job.optimizer = job.model = None
        job.model = checkpoint.load_model(run.dir, run.device)
    if cfg.deterministic:  # sampling's cumulative sums need not be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
    results |= report.final_report(job.model, cfg, data, results)
    run.finish(results)
    print(report.next_steps(run.dir, cfg, data, results))
    return results


def main(argv=None):
    return launch(train, TrainConfig, __doc__, argv)


if __name__ == "__main__":
    main()
