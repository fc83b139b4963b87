"""One run of the study: train a small model on memory and reasoning at once, and measure both.

    (row,) = execute([Run(n_experts=16, top_k=2, tokens=2**24, lr=6e-3)], "runs/study", "cuda")

The mixture (data/procedural.py) holds biographies (memory), word problems with worked solutions, and mental
arithmetic without steps (reasoning). All windows and their order are on the device: on CUDA a whole training step, with
the choice of its data, is one CUDA graph.
"""

import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config

from data import files, procedural, shards, tokenizer, twohop
from data.facts import FactsConfig
from data.reasoning import ReasoningConfig
from model import GPT
from optimoe import checkpoint
from optimoe.config import require
from optimoe.faststep import GraphedStep
from optimoe.guard import BAD, new_window
from optimoe.optim import lr_at, make_optimizer
from optimoe.sizes import count_params, flops_per_token
from study import measure
from train import TrainConfig, optimizer_step

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"facts": 0.35, "problem": 0.55, "mano": 0.10}  # of the training tokens
COMPILED = 2**22  # tokens from which a run repays compiling on CUDA
POINTS = (0.25, 0.5, 1.0)  # shares of the training at which everything is measured
BEFORE = {"paired": False, "kind": "mixture"}  # for runs older than these fields; `key` leaves these values out


@dataclass(frozen=True)
class Run:
    """The fields that distinguish runs."""

    # Model
    d_model: int = 128
    n_layers: int = 4
    n_experts: int = 16
    top_k: int = 2
    d_expert: int = 64
    init_std: float = 0.05  # of the matrices; the embeddings keep their 0.5
    # Training
    tokens: int = 2**24
    optimizer: Literal["muon", "adamw"] = "muon"  # adamw is the paper's
    lr: float = 0.006  # peak
    batch: int = 32  # windows per step
    seq_len: int = 256
    seed: int = 0  # of weights, order, people and problems
    # Data
    people: int = 4_000  # 29 biographies of each in 2^24 tokens; entities or keys if kind is not mixture
    unique: int = 4_000  # different problems (or two-hop questions), repeated; 0: every problem is new
    max_steps: int = 8  # operations of a word problem
    mano_length: int = 3  # operations of an expression
    modulus: int = 7  # of all arithmetic
    data_tokens: int = 2**24  # of the data directory that runs share; they train on its first `tokens`
    data: str = ""  # text that older code trained on
    paired: bool = True  # weights drawn by (seed, name), so that models share what they can; False: the first 683 runs
    kind: Literal["mixture", "twohop", "room"] = "mixture"  # twohop, room: data/twohop.py, questions or 20-bit values

    def __post_init__(self):
        for name in ("tokens", "batch", "seq_len", "people", "max_steps", "mano_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name, known in (("optimizer", ("muon", "adamw")), ("kind", ("mixture", "twohop", "room"))):
            require(getattr(self, name) in known, name, getattr(self, name), f"use one of {', '.join(known)}")
        least = 10 * self.batch * self.seq_len
        require(self.tokens >= least, "tokens", self.tokens, f"use 10 steps or more: {least}")
        enough = self.data or self.tokens <= self.data_tokens
        require(enough, "tokens", self.tokens, f"data_tokens={self.data_tokens} must be as many")

    @property
    def steps(self):
        return self.tokens // (self.batch * self.seq_len)


# Runs with equal values of these are trained side by side: their steps are as many and as long.
form = attrgetter(*"d_model n_layers n_experts top_k d_expert tokens optimizer batch seq_len kind".split())


@functools.cache
def key(run):
    """Names a run in a results file: 12 hex digits of its fields."""
    fields = {name: value for name, value in vars(run).items() if BEFORE.get(name) != value}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def train_config(run, vocab_size):
    """The TrainConfig of a run: the recipe that makes tiny models learn (docs/LOG.md)."""
    heads = max(1, run.d_model // 32)
    same = "d_model n_layers n_experts top_k d_expert init_std seq_len steps lr seed optimizer".split()
    return TrainConfig(
        preset="",
        vocab_size=-(-vocab_size // 64) * 64,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=run.d_model // heads,
        batch_size=run.batch,
        warmup_steps=max(2, run.steps // 20),
        compile="false",
        bad_steps="skip",
        qk_norm=True,
        rope_theta=500.0,
        embed_init_std=0.5,
        beta2=0.99,
        **{name: getattr(run, name) for name in same},
    )


def mixture(run):
    """The MixtureConfig whose training split has run.data_tokens tokens or a few percent more, in these SHARES."""
    hundred = dict.fromkeys(("first_names", "middle_names", "universities", "majors", "employers"), 100)
    facts = FactsConfig(n_people=run.people, last_names=200, cities=200, seed=run.seed, **hundred)
    names = max(40, 2 * run.max_steps + 1)
    arithmetic = dict(modulus=run.modulus, mano_length=run.mano_length, seed=run.seed)
    reasoning = ReasoningConfig(run.max_steps, names=names, **arithmetic)
    wanted = {kind: 1.03 * share * run.data_tokens for kind, share in SHARES.items()}
    second = max(0, run.modulus - 10) / run.modulus  # share of the numbers that have two digits, and so two tokens
    steps, operations = (1 + run.max_steps) / 2, (1 + run.mano_length) / 2
    tokens_of = {
        "facts": 51,
        "problem": 24 + 3.5 * second + (16.7 + 3.7 * second) * steps,  # measured mean lengths, eos included
        "mano": 6.8 + 2 * operations + second * (2 + operations),
    }
    biographies, problems, n_mano = (math.ceil(wanted[kind] / tokens_of[kind]) for kind in SHARES)
    n_problems = min(run.unique or problems, problems)
    counts = dict(n_problems=n_problems, repeats=math.ceil(problems / n_problems), n_mano=n_mano)
    counts["exposures"] = math.ceil(biographies / run.people)
    return procedural.MixtureConfig(facts, reasoning, window=run.seq_len, seed=run.seed, **counts)


def data_config(run):
    """What the data of a run is made from: a MixtureConfig, or a HopConfig with 20-bit values or questions."""
    if run.kind == "mixture":
        return mixture(run)
    hops = dict(entities=run.people, tokens=run.data_tokens, window=run.seq_len, seed=run.seed)
    if run.kind == "room":
        return twohop.HopConfig(relations=0, names=1024, composed=0, **hops)
    return twohop.HopConfig(composed=run.unique, names=max(32, math.isqrt(4 * run.people)), **hops)


def data_dir(run, cache):
    kept = json.dumps(dataclasses.asdict(data_config(run)), sort_keys=True)
    return Path(cache) / f"data-{hashlib.sha256(kept.encode()).hexdigest()[:12]}"


def prepare_data(run, cache, workers=1):
    """Build the data directory of a run where it is missing, and return its path."""
    directory, cfg = data_dir(run, cache), data_config(run)
    if not (directory / shards.META).exists():
        began = time.perf_counter()
        directory.parent.mkdir(parents=True, exist_ok=True)
        if run.kind != "mixture":
            twohop.build(directory, cfg)
        elif workers == 1:
            procedural.build(directory, cfg)
        else:  # a separate program, because its processes would each import torch here
            file = directory.resolve().with_suffix(".json")
            files.write_json(file, dataclasses.asdict(cfg), signed=False)
            command = ["nice", "-n", "10"]  # training goes first
            command += [sys.executable, "-m", "study.child", str(os.getpid()), "data.procedural"]
            command += [f"--out={directory.resolve()}", f"--mixture={file}", f"--workers={workers}"]
            # A new session: Ctrl-C reaches only the sweep, which at its end waits for this directory.
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, start_new_session=True)
        print(f"{directory}: made in {time.perf_counter() - began:.1f} s", flush=True)
    return str(directory)


class Samples:
    """The windows of a training split on a device; starts_SB has the first position in ids of B windows for S steps."""

    def __init__(self, run, directory, device):
        flat, wanted = measure.flat(directory, "train"), run.steps * run.batch
        windows = (len(flat) - 1) // run.seq_len  # the last one may lack a target
        remedy = f"the data came out at {len(flat):,} tokens; lower tokens"
        require(windows >= max(1, wanted - 1), "data_tokens", run.data_tokens, remedy)
        windows = min(windows, wanted)  # the first part of a mixture is a mixture with fewer exposures
        self.ids = torch.from_numpy(flat[: windows * run.seq_len + 1].astype(np.int32)).to(device)
        rng = np.random.default_rng(run.seed)
        order = np.concatenate([rng.permutation(windows) for _ in range(math.ceil(wanted / windows))])[:wanted]
        starts = order.astype(np.int64) * run.seq_len
        self.starts_SB = torch.from_numpy(starts).view(run.steps, run.batch).to(device)
        self.span = torch.arange(run.seq_len + 1, device=device)

    def batch(self, step):
        """Tokens and targets (B, L) int64 of a step; its number is a device tensor (1,)."""
        windows = self.ids[self.starts_SB.index_select(0, step).view(-1, 1) + self.span].long()
        return windows[:, :-1], windows[:, 1:]


def compile_parts(model):
    """torch.compile of attention and its norm, half of the kernels of a small step. Their shapes do not depend on E, k
    and F: a process compiles them once for each width."""
    torch._inductor.config.compile_threads = 1  # several processes compile at once: no pool of helpers for each
    torch._inductor.config.deterministic = True  # reductions chosen by rule, not by timing in each process
    torch._dynamo.config.recompile_limit = 64  # of widths and batches that one process may see
    for block in model.blocks:
        for part in (block.attn_norm, block.attn):
            part.compile(fullgraph=True, dynamic=False)


class Trainer:
    """Models of one shape that train in step. On CUDA one graph holds a step of each, in parallel branches: one small
    model leaves most of a GPU idle."""

    def __init__(self, cfgs, samples, device):
        self.cfgs, self.samples, self.done = cfgs, samples, 0
        self.models = [GPT(cfg).to(device) for cfg in cfgs]  # weights drawn from cfg.seed
        self.optimizers = [make_optimizer(model, cfg) for model, cfg in zip(self.models, cfgs, strict=True)]
        self.windows = [new_window(cfg, device) for cfg in cfgs]
        # `done` on the device, because the CUDA graph reads it.
        self.positions = [torch.zeros(1, dtype=torch.int64, device=device) for _ in cfgs]
        self.run_step, self.streams = self._step, [None] * len(cfgs)
        if torch.device(device).type == "cuda":
            if cfgs[0].steps * cfgs[0].batch_size * cfgs[0].seq_len >= COMPILED:
                for model in self.models:
                    compile_parts(model)
            self.run_step, self.streams = GraphedStep(self._step), [torch.cuda.Stream() for _ in cfgs]

    def _step(self, _):
        start = torch.cuda.current_stream() if self.streams[0] else None
        parts = (self.models, self.optimizers, self.cfgs, self.windows, self.samples, self.positions, self.streams)
        for model, optimizer, cfg, window, samples, position, stream in zip(*parts, strict=True):
            if stream:
                stream.wait_stream(start)
            with torch.cuda.stream(stream):  # does nothing for None
                optimizer_step(model, optimizer, cfg, window, [samples.batch(position)])
                position += 1
        for stream in filter(None, self.streams):
            start.wait_stream(stream)

    def _train(self, n):
        for model in self.models:
            model.train()
        for _ in range(n):
            for optimizer, cfg in zip(self.optimizers, self.cfgs, strict=True):
                optimizer.set_lr(lr_at(self.done, cfg))
            self.run_step([])
            self.done += 1

    def advance(self, step):
        """Train up to this step. Returns for each model (training loss, coefficient of variation of its experts'
        loads as a mean over layers), both over the last twentieth of the steps so far."""
        tail = min(max(1, step // 20), step - self.done)
        self._train(step - tail - self.done)
        for window in self.windows:
            for name in ("sums", "counts_NE", "probs_NE"):  # not "steps": it counts the bad ones of the whole run
                window[name].zero_()
        self._train(tail)
        found = []
        for window in self.windows:
            load = window["counts_NE"].float()
            loss, *_, steps = window["sums"].tolist()  # skipped steps are not in the sums
            load_cv = float((load.std(1, correction=0) / load.mean(1).clamp(min=1)).mean())
            found.append((loss / steps if steps else math.nan, load_cv))
        return found


@functools.cache
def revision():
    """The git revision ("+": changed files; "none" without git) and a hash of the sources."""
    digest = hashlib.sha256()
    folders = ("*.py", "moe_kernels/*.py", "data/*.py", "eval/**/*.py", "optimoe/*.py", "study/*.py")
    for path in sorted(file for pattern in folders for file in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "none"
    return f"{commit} sources:{digest.hexdigest()[:12]}"


def execute(runs, cache, device, n=100, keep=()):
    """Train runs of one `form` side by side and measure them. Returns their rows for the results file; a run whose loss
    is not finite is recorded as diverged. `seconds` is the share of one run, `tokens_per_s` counts all runs.

    cache: where data directories are; n: size of the measurements (100: standard errors near 1 %); keep: where to save
    the final weights."""
    began, device = time.perf_counter(), torch.device(device)
    for run in runs:
        require(run.paired, "paired", run.paired, "only older code drew weights in this way; plan the run with True")
        require(not run.data, "data", run.data, "only older code trained on text")
    data = [prepare_data(run, cache) for run in runs]
    cfgs = [train_config(run, tokenizer.load(path).n_vocab) for run, path in zip(runs, data, strict=True)]
    trainer = Trainer(cfgs, [Samples(run, path, device) for run, path in zip(runs, data, strict=True)], device)
    points, loads, seconds, speed = train_and_measure(trainer, runs, data, device, n)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    together = {"together": len(runs), "tokens_per_s": round(speed), "device": name}
    together |= {"torch": torch.__version__, "revision": revision()}
    rows = []
    for i, (run, cfg) in enumerate(zip(runs, cfgs, strict=True)):
        params = count_params(cfg)
        last = points[i][-1] if points[i] and points[i][-1]["step"] == run.steps else {}
        row = {"key": key(run), "run": dataclasses.asdict(run), "lr": cfg.lr, "diverged": not last} | {
            "tokens": run.tokens,
            "tpp": run.tokens / params.total,
            "params": params._asdict(),
            "flops": run.tokens * flops_per_token(cfg),
            **last,
            "points": points[i][:-1] if last else points[i],
            "load_cv": loads[i],
            "skipped_steps": int(trainer.windows[i]["steps"][BAD]),
            **together,
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "train_seconds": round(seconds / len(runs), 3),
            "seconds": round((time.perf_counter() - began) / len(runs), 3),
        }
        rows.append(json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}")))
    for i, path in enumerate(keep):
        if path and not rows[i]["diverged"]:
            cfg = dataclasses.replace(cfgs[i], data=data[i], out_dir=str(path))
            save_weights(path, cfg, trainer.optimizers[i].weights(trainer.models[i]), rows[i])
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def train_and_measure(trainer, runs, data, device, n):
    """(points of each run, load variation of each, seconds of training, tokens per second once all is compiled)"""
    points, loads, seconds, speed = [[] for _ in runs], [math.nan] * len(runs), 0.0, 0.0
    for share in POINTS:
        done, clock, step = trainer.done, time.perf_counter(), runs[0].batch * runs[0].seq_len
        found = trainer.advance(max(1, round(share * runs[0].steps)))
        spent = time.perf_counter() - clock
        seconds, speed, tokens = seconds + spent, len(runs) * (trainer.done - done) * step / spent, trainer.done * step
        for i, (run, directory, model) in enumerate(zip(runs, data, trainer.models, strict=True)):
            loss, loads[i] = found[i]
            if math.isfinite(loss):
                measured = measure.everything(run, directory, model, device, n, share == 1)
                points[i].append({"step": trainer.done, "tokens": tokens, "train_loss": loss, **measured})
        if not any(math.isfinite(loss) for loss, _ in found):
            break
    return points, loads, seconds, speed


def save_weights(path, cfg, weights, row):
    """Save final weights as a run directory of train.py; results.json, written last, marks it as whole."""
    os.makedirs(path, exist_ok=True)
    files.write_json(Path(path) / "config.json", dataclasses.asdict(cfg))
    checkpoint.save(path, cfg.steps, {"step": cfg.steps, "config": dataclasses.asdict(cfg), "model": weights}, keep=1)
    files.write_json(Path(path) / "results.json", row)
