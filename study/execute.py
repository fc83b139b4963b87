"""One run of the study: train a small model on memory and reasoning at once, and measure both. `study/sweep.py` runs many.

    row = execute(Run(n_experts=16, top_k=2, tokens=2**24, lr=6e-3), "runs/study", "cuda")      # a line of the results file

The mixture (data/procedural.py) holds biographies (memory), word problems with worked solutions, and mental arithmetic without any
steps (reasoning). All its windows lie on the device, and so does the order of the samples: on CUDA a whole training step, choice of its data
included, is one CUDA graph.
"""

import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
import torch._inductor.config

from data import files, procedural, reasoning, shards, tokenizer
from data.facts import FactsConfig
from data.loader import parse_sources
from data.reasoning import ReasoningConfig
from data.tokenizer import tiktoken_tokens
from eval import probes, tasks
from eval.sources import Source
from eval.taskloss import encode_pair, score
from model import GPT
from optimoe import checkpoint
from optimoe.config import require
from optimoe.guard import BAD
from optimoe.optim import lr_at, make_optimizer
from optimoe.sizes import count_params, flops_per_token
from train import GraphedStep, TrainConfig, new_window, optimizer_step

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"facts": 0.35, "problem": 0.55, "mano": 0.10}  # of the training tokens
REAL_TASKS = ("triviaqa", "hellaswag", "gsm8k", "humaneval")  # the paper's: two of memory, two of reasoning
COMPILED = 2**22  # tokens from which a run repays compiling on CUDA
POINTS = (0.25, 0.5, 1.0)  # shares of the training at which everything is measured


@dataclass(frozen=True)
class Run:
    """What distinguishes one run from another. Two equal Runs are the same run, and are run once."""

    # Model
    d_model: int = 128
    n_layers: int = 4
    n_experts: int = 16
    top_k: int = 2
    d_expert: int = 64
    init_std: float = 0.05  # of the matrices; the embeddings keep their 0.5
    # Training
    tokens: int = 2**24
    optimizer: str = "muon"  # or adamw, the paper's
    lr: float = (
        0.0  # peak; 0 in plans only: study/sweep.py puts the best rate of the nearest (E, k) here before it runs
    )
    batch: int = 32  # windows per step
    seq_len: int = 256
    seed: int = 0  # of weights, order, people and problems
    # Data
    people: int = 4_000  # 29 biographies of each in 2^24 tokens (docs/STUDY.md, calibration)
    unique: int = 4_000  # this many different problems, repeated; 0: every one is new
    max_steps: int = 8  # operations of a word problem
    mano_length: int = 3  # operations of an expression
    modulus: int = 7  # of all arithmetic
    data_tokens: int = 2**24  # of the data directory that runs share; they train on its first `tokens`
    data: str = (
        ""  # prepared text instead, as for train.py: DIR or DIR:0.7,DIR:0.3; people .. data_tokens then mean nothing
    )

    def __post_init__(self):
        for name in ("tokens", "batch", "seq_len", "people", "max_steps", "mano_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        require(self.optimizer in ("muon", "adamw"), "optimizer", self.optimizer, "use muon or adamw")
        require(
            self.tokens >= 10 * self.batch * self.seq_len,
            "tokens",
            self.tokens,
            f"use 10 steps or more: {10 * self.batch * self.seq_len}",
        )
        require(
            self.data or self.tokens <= self.data_tokens,
            "tokens",
            self.tokens,
            f"data_tokens={self.data_tokens} must be as many",
        )

    @property
    def steps(self):
        return self.tokens // (self.batch * self.seq_len)


def form(run):
    """What runs must share to be trained side by side: as many steps, each as long."""
    return (
        run.d_model,
        run.n_layers,
        run.n_experts,
        run.top_k,
        run.d_expert,
        run.tokens,
        run.optimizer,
        run.batch,
        run.seq_len,
        run.data,
    )


def key(run):
    """Names a run in a results file: 12 hex digits of its fields."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(run), sort_keys=True).encode()).hexdigest()[:12]


def train_config(run, vocab_size, lr=0.0):
    """The TrainConfig of a run: the recipe that makes tiny models learn (docs/LOG.md) for its sizes."""
    heads = max(1, run.d_model // 32)
    recipe = dict(qk_norm=True, rope_theta=500.0, embed_init_std=0.5, beta2=0.99) if not run.data else dict(beta2=0.95)
    return TrainConfig(
        preset="",
        data=run.data,
        vocab_size=-(-vocab_size // 64) * 64,
        d_model=run.d_model,
        n_layers=run.n_layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=run.d_model // heads,
        n_experts=run.n_experts,
        top_k=run.top_k,
        d_expert=run.d_expert,
        init_std=run.init_std,
        seq_len=run.seq_len,
        batch_size=run.batch,
        steps=run.steps,
        lr=lr or run.lr,
        seed=run.seed,
        warmup_steps=max(2, run.steps // 20),
        compile="false",
        optimizer=run.optimizer,
        bad_steps="skip",
        **recipe,
    )


def mixture(run):
    """The MixtureConfig whose training split has run.data_tokens tokens or a few percent more, by SHARES."""
    facts = FactsConfig(
        n_people=run.people,
        first_names=100,
        middle_names=100,
        last_names=200,
        cities=200,
        universities=100,
        majors=100,
        employers=100,
        seed=run.seed,
    )
    reasoning = ReasoningConfig(
        max_steps=run.max_steps,
        modulus=run.modulus,
        names=max(40, 2 * run.max_steps + 1),
        mano_length=run.mano_length,
        seed=run.seed,
    )
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
    return procedural.MixtureConfig(
        facts,
        reasoning,
        exposures=math.ceil(biographies / run.people),
        n_problems=n_problems,
        repeats=math.ceil(problems / n_problems),
        n_mano=n_mano,
        window=run.seq_len,
        seed=run.seed,
    )


def data_dir(run, cache):
    cfg = mixture(run)
    return (
        Path(cache)
        / f"data-{hashlib.sha256(json.dumps(dataclasses.asdict(cfg), sort_keys=True).encode()).hexdigest()[:12]}"
    )


def prepare_data(run, cache, workers=1):
    """Build the data directory of a run where it is missing. Returns [(directory, weight)]."""
    if run.data:
        return parse_sources(run.data)
    directory = data_dir(run, cache)
    if not (directory / shards.META).exists():
        began = time.perf_counter()
        if (
            workers > 1
        ):  # a program of its own: its many processes would otherwise each import everything that this one has
            file = directory.resolve().with_suffix(".json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(dataclasses.asdict(mixture(run))))
            yielding = (
                ["nice", "-n", "10"] if shutil.which("nice") else []
            )  # runs that compile and measure meanwhile go first
            subprocess.run(
                [
                    *yielding,
                    sys.executable,
                    "-m",
                    "data.procedural",
                    f"--out={directory.resolve()}",
                    f"--config={file}",
                    f"--workers={workers}",
                ],
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )  # Ctrl-C is for the sweep: it finishes this directory
        else:
            procedural.build(directory, mixture(run))
        tokens = shards.read_meta(directory)["splits"]["train"]["tokens"]
        print(f"{directory}: {tokens:,} tokens made in {time.perf_counter() - began:.1f} s", flush=True)
    return [(str(directory), 1.0)]


class Samples:
    """All windows of a training split on a device, and which of them each step takes: rows_SB of starts into ids, S steps of B."""

    def __init__(self, run, sources, device):
        flats = [
            np.concatenate([np.asarray(shard) for shard in shards.open_shards(directory, "train")])
            for directory, _ in sources
        ]
        total = sum(weight for _, weight in sources)
        rng, starts, offset, needed = np.random.default_rng(run.seed), [], 0, run.steps * run.batch
        for flat, (directory, weight) in zip(flats, sources, strict=True):
            windows = (len(flat) - 1) // run.seq_len
            want = needed if len(flats) == 1 else math.ceil(needed * weight / total)
            require(
                windows >= 1, "data", directory, f"its {len(flat):,} tokens hold no window of seq_len={run.seq_len}"
            )
            if (
                not run.data
            ):  # the first part of a mixture is a mixture with fewer exposures; the last window lacks its last target
                require(
                    windows >= want - 1,
                    "data_tokens",
                    run.data_tokens,
                    f"the mixture came out at {len(flat):,} tokens; lower tokens",
                )
                windows = min(windows, want)
                flats = [flat[: windows * run.seq_len + 1]]
            order = np.concatenate([rng.permutation(windows) for _ in range(math.ceil(want / windows))])[:want]
            starts.append(offset + order.astype(np.int64) * run.seq_len)
            offset += len(flat)
        self.ids = torch.from_numpy(np.concatenate(flats).astype(np.int32)).to(device)
        starts = (
            np.concatenate(starts)[:needed] if len(flats) == 1 else rng.permutation(np.concatenate(starts))[:needed]
        )
        self.starts_SB = torch.from_numpy(starts).view(run.steps, run.batch).to(device)
        self.span = torch.arange(run.seq_len + 1, device=device)

    def batch(self, step):
        """Tokens and targets (B, L) of a step, given as a device tensor (1,)."""
        windows = self.ids[self.starts_SB.index_select(0, step).view(-1, 1) + self.span].long()
        return windows[:, :-1], windows[:, 1:]


def compile_parts(model):
    """torch.compile of attention and norms, where half of a small step's kernels are, but not of whole blocks: no E, k or F changes the shapes of
    these parts, so a process compiles them once for all its runs of one width, and others find them in inductor's cache on disk."""
    torch._inductor.config.compile_threads = 1  # several processes compile at once: no pool of helpers for each
    torch._inductor.config.deterministic = (
        True  # reductions chosen by rule, not by timing in each process: one reason less for other bits (docs/LOG.md)
    )
    torch._dynamo.config.recompile_limit = 64  # of widths and batches that one process may see
    for block in model.blocks:
        for part in (block.attn_norm, block.attn, block.mlp_norm):
            part.compile(fullgraph=True, dynamic=False)


class Trainer:
    """Models of one shape in training, in step with one another: `[(loss, load_cv), ...] = trainer.advance(step)`.

    The kernels of one small model leave most of a GPU idle. On CUDA one graph holds a step of each model, on branches that run at the same time."""

    def __init__(self, cfgs, samples, device):
        self.cfgs, self.samples, self.done, self.models = cfgs, samples, 0, []
        for cfg in cfgs:
            torch.manual_seed(cfg.seed)
            self.models.append(GPT(cfg).to(device))
        self.optimizers = [make_optimizer(model, cfg) for model, cfg in zip(self.models, cfgs, strict=True)]
        self.windows = [new_window(cfg, device) for cfg in cfgs]
        self.positions = [
            torch.zeros(1, dtype=torch.int64, device=device) for _ in cfgs
        ]  # `done` on the device: a recorded step reads it
        self.run_step, self.streams = self._step, [None] * len(cfgs)
        if torch.device(device).type == "cuda":
            if cfgs[0].steps * cfgs[0].batch_size * cfgs[0].seq_len >= COMPILED:
                for model in self.models:
                    compile_parts(model)
            self.run_step, self.streams = GraphedStep(self._step), [torch.cuda.Stream() for _ in cfgs]

    def _step(self, _):
        start = torch.cuda.current_stream() if self.streams[0] else None
        for parts in zip(
            self.models,
            self.optimizers,
            self.cfgs,
            self.windows,
            self.samples,
            self.positions,
            self.streams,
            strict=True,
        ):
            model, optimizer, cfg, window, samples, position, stream = parts
            if stream:
                stream.wait_stream(start)
            with torch.cuda.stream(stream):  # does nothing for None
                optimizer_step(model, optimizer, cfg, window, [samples.batch(position)])
                position += 1
        for stream in self.streams:
            if stream:
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
        """Train up to this step. Returns for each model the mean loss of the last twentieth of all steps so far, which is smooth enough to compare
        runs, and the coefficient of variation of the experts' loads over it (mean of the layers). Waits for the device."""
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
            found.append(
                (
                    loss / steps if steps else math.nan,
                    float((load.std(1, correction=0) / load.mean(1).clamp(min=1)).mean()),
                )
            )
        return found


@torch.no_grad()
def validation_loss(model, sources, seq_len, device, limit=256):
    """Mean cross-entropy over the first `limit` validation windows (of each source, by weight), in nats per token.

    Of a mixture with repeated problems it tells little: a model that knows these by heart is surprised by the random wording of any other
    question, which is most of this number and nothing that could be known (docs/LOG.md). results.answer_loss is about answers only."""
    model.eval()
    losses = []
    for directory, weight in sources:
        flat = np.concatenate([np.asarray(shard) for shard in shards.open_shards(directory, "val")])
        n = min(limit, (len(flat) - 1) // seq_len)
        ids = torch.from_numpy(flat[: n * seq_len + 1].astype(np.int64)).to(device)
        sums = [
            model(
                ids[i * seq_len : j * seq_len].view(-1, seq_len),
                ids[i * seq_len + 1 : j * seq_len + 1].view(-1, seq_len),
            ).loss
            * (j - i)
            for i in range(0, n, 64)
            for j in [min(n, i + 64)]
        ]
        losses.append((weight, float(sum(sums)) / n))
    return sum(weight * loss for weight, loss in losses) / sum(weight for weight, _ in losses)


def measure(model, directory, n, final):
    """Both abilities of a model trained on a mixture. n: items per kind and number of steps; unless final, without bits and untrained lengths.

    Nothing is generated: whether greedy decoding would write an answer is read off one forward pass."""
    cfg, enc = procedural.read_config(directory), tokenizer.load(directory)
    most = cfg.reasoning.max_steps
    facts = probes.fact_recall(model, enc, cfg.facts, 5 * n)
    facts["by_attribute"] = {name: row["recall"] for name, row in facts["by_attribute"].items()}
    problems = probes.solutions_written(model, enc, cfg.reasoning, range(1, (most * 3 // 2 if final else most) + 1), n)
    known, beyond = (
        [share for s, share in problems["accuracy"].items() if (s <= most) == trained] for trained in (True, False)
    )
    seen = [reasoning.problem(cfg.reasoning, i) for i in range(min(4 * n, cfg.n_problems))]
    seen = probes.graded(model, enc, [(p.question, p.solution) for p in seen])
    mano = probes.mano_accuracy(model, enc, cfg.reasoning, 2 * n)
    within = [right for length, right in mano["accuracy"].items() if length <= cfg.reasoning.mano_length]
    return {
        "facts": facts,
        "bits": probes.stored_bits(model, enc, cfg.facts, 5 * n) if final else None,
        "problems": {
            "loss": problems["loss"],
            "loss_seen": probes.loss_of(seen),
            "accuracy": sum(known) / len(known),
            "accuracy_seen": sum(right for *_, right in seen) / len(seen),
            "beyond": sum(beyond) / len(beyond) if beyond else None,
            "by_steps": {str(s): share for s, share in problems["accuracy"].items()},
        },
        "mano": {
            "loss": mano["loss"],
            "chance": mano["chance"],
            "accuracy": sum(within) / max(1, len(within)),
            "by_length": {str(length): right for length, right in mano["accuracy"].items()},
        },
    }


def measure_text(model, directory, limit):
    """Task loss of the gold answers (bits per byte, mean over items) and accuracy where it is a matter of choice; no examples in front."""
    tokens, source, results = tiktoken_tokens(tokenizer.load(directory)), Source(), {}
    for name in REAL_TASKS:
        items = tasks.load(name).items(source, 0)[:limit]
        texts = {(item.loss_prompt or item.prompt, answer) for item in items for answer in (item.answer, *item.choices)}
        pairs = {pair: encode_pair(tokens, *pair)[:2] for pair in sorted(texts)}
        nats = dict(zip(pairs, score(model, list(pairs.values())), strict=True))
        per_byte = [
            nats[item.loss_prompt or item.prompt, item.answer] / math.log(2) / len(item.answer.encode())
            for item in items
        ]
        results[name] = {"loss": sum(per_byte) / len(items), "items": len(items)}
        if items[0].choices:
            costs = [[nats[item.prompt, choice] for choice in item.choices] for item in items]
            results[name]["accuracy"] = sum(
                c.index(min(c)) == item.gold for c, item in zip(costs, items, strict=True)
            ) / len(items)
    return results


@functools.cache
def revision():
    """git revision, "+" when tracked files differ from it, else "none"; and a hash of the sources, which a copy without git has too."""
    digest = hashlib.sha256()
    for path in sorted(
        file
        for pattern in ("*.py", "moe_kernels/*.py", "data/*.py", "eval/**/*.py", "optimoe/*.py", "study/execute.py")
        for file in ROOT.glob(pattern)
    ):
        digest.update(path.read_bytes())
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()  # noqa: E731
    try:
        commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "none"
    return f"{commit} sources:{digest.hexdigest()[:12]}"


def rounded(value):
    """The same JSON value with six significant digits: a results file is kept for good and compared by eye."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def execute(run, cache, device, n=100, keep=None):
    """Train and measure. Returns the row for the results file, JSON types only.

    cache: where data directories are; n: size of the measurements (100: standard errors near 1 %); keep: a directory for the final weights, laid
    out as a run of train.py. A run whose loss is not finite is recorded as diverged."""
    return execute_together([run], cache, device, n, [keep])[0]


def execute_together(runs, cache, device, n=100, keep=()):
    """`execute` for runs of one `form`, trained side by side. A row's seconds are its share of what all took, tokens_per_s the speed of all."""
    began, device = time.perf_counter(), torch.device(device)
    keep = keep or [None] * len(runs)
    for run in runs:
        require(run.lr, "lr", run.lr, "give one; study/sweep.py finds one for every (E, k)")
    sources = [prepare_data(run, cache) for run in runs]
    cfgs = [train_config(run, tokenizer.load(source[0][0]).n_vocab) for run, source in zip(runs, sources, strict=True)]
    trainer = Trainer(cfgs, [Samples(run, source, device) for run, source in zip(runs, sources, strict=True)], device)
    points, loads, seconds = [[] for _ in runs], [math.nan] * len(runs), 0.0
    for share in POINTS:
        done, clock = trainer.done, time.perf_counter()
        found = trainer.advance(max(1, round(share * runs[0].steps)))
        spent = time.perf_counter() - clock
        tokens = trainer.done * runs[0].batch * runs[0].seq_len
        seconds, speed = (
            seconds + spent,
            len(runs) * tokens * (1 - done / trainer.done) / spent,
        )  # the last part's: nothing is compiled in it
        for i, (run, source, model, (loss, load_cv)) in enumerate(
            zip(runs, sources, trainer.models, found, strict=True)
        ):
            loads[i] = load_cv
            if math.isfinite(loss):
                points[i].append(
                    {
                        "step": trainer.done,
                        "tokens": tokens,
                        "train_loss": loss,
                        **measured(run, source, model, device, n, share == 1),
                    }
                )
        if not any(math.isfinite(loss) for loss, _ in found):
            break
    rows = []
    for i, (run, cfg) in enumerate(zip(runs, cfgs, strict=True)):
        params, flops = count_params(cfg), flops_per_token(cfg)
        last = points[i][-1] if points[i] and points[i][-1]["step"] == run.steps else {}
        rows.append(
            {
                "key": key(run),
                "run": dataclasses.asdict(run),
                "lr": cfg.lr,
                "diverged": not last,
                "tokens": run.tokens,
                "tpp": run.tokens / params.total,
                "params": params._asdict(),
                "flops": run.tokens * flops,
                **last,
                "points": points[i][:-1] if last else points[i],
                "load_cv": loads[i],
                "skipped_steps": int(trainer.windows[i]["steps"][BAD]),
                "together": len(runs),
                "tokens_per_s": round(speed),
                "device": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads",
                "torch": torch.__version__,
                "revision": revision(),
                "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            }
        )
    for row in rows:
        row |= {
            "train_seconds": round(seconds / len(runs), 3),
            "seconds": round((time.perf_counter() - began) / len(runs), 3),
        }
    for run, cfg, source, model, optimizer, row, path in zip(
        runs, cfgs, sources, trainer.models, trainer.optimizers, rows, keep, strict=True
    ):
        if path and not row["diverged"]:
            os.makedirs(path, exist_ok=True)
            saved = dataclasses.replace(cfg, data=run.data or source[0][0], out_dir=str(path))
            files.write_json(Path(path) / "config.json", dataclasses.asdict(saved))
            checkpoint.save(
                path,
                run.steps,
                {"step": run.steps, "config": dataclasses.asdict(cfg), "model": optimizer.weights(model)},
                keep=1,
            )
            checkpoint.replace_file(Path(path) / "results.json", json.dumps(row, indent=1) + "\n")
    del trainer, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [rounded(row) for row in rows]


def measured(run, sources, model, device, n, final):
    """Everything that is measured of a model at one point of its training."""
    with torch.compiler.set_stance("force_eager"):  # the compiled parts are for the shapes of training
        val_loss = validation_loss(model, sources, run.seq_len, device)
        found = (
            measure_text(model, sources[0][0], 10 * n)
            if run.data
            else measure(model, sources[0][0], n if final else n // 2 or 1, final)
        )
    return {"val_loss": val_loss, **found}
