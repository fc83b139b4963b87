"""Post-train a model by reinforcement learning on answers that can be verified: GRPO (arXiv 2402.03300).

    python grpo.py --model=runs/NAME  # reasoning problems of the model's own procedural data
    python grpo.py --model=runs/NAME --task=gsm8k --evaldata=evaldata --questions=0
    python grpo.py --model=ORG/NAME --task=gsm8k  # a published model, asked by its chat template if it has one
    torchrun --nproc-per-node=8 grpo.py --model=runs/NAME  # data parallel on one node
    python grpo.py --resume=runs/NAME-grpo  # continue, bit for bit; other flags override

One step: questions -> group_size sampled answers each -> rewards of 1 or 0 (eval/tasks) -> advantages within each group
-> one pass over the answers in mini-batches, an optimiser step for each, with the loss of optimoe/policy.py. Defaults
are those of arXiv 2508.18672. The run directory is like that of train.py: `python -m eval --run=DIR` evaluates it.

Shapes as in optimoe/policy.py; V is the vocabulary.
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optimoe.threads  # before torch

import torch
import torch.distributed as dist
import torch.nn.functional as F_

from data import tokenizer
from data.tokenizer import Tokens
from eval import report, tasks
from eval.generate import any_shape, check_sampling, generate
from eval.sources import Source
from model import GPT
from optimoe import checkpoint, guard, hub, start
from optimoe.config import check_range, require
from optimoe.curves import Curves
from optimoe.load import cast_once
from optimoe.optim import Together
from optimoe.policy import Sample, advantages, collate, draw_questions, micro_batches, policy_loss
from optimoe.run import CPU, Clock, Progress, Run, Stopping, check_rates, launch
from optimoe.sizes import require_memory


@dataclass(frozen=True)
class GRPOConfig:
    # Run
    model: str = ""  # start model: run directory, checkpoint, Hugging Face folder or ORG/NAME
    task: str = "reasoning"  # a file in eval/tasks with training questions
    data: str = ""  # data directory of the start model (empty: where its config says), or in a published model's tokens
    evaldata: str = ""  # folder of evaluation sets, see eval/sources.py; empty: $OPTIMOE_EVALDATA, else ./evaldata
    out_dir: str = ""  # run directory; empty: that of the start model with "-grpo"
    resume: str = ""  # run directory to continue
    seed: int = 0  # of the order of questions and of sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one; mps is untested
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: bfloat16 on CUDA, else float32
    impl: Literal["auto", "reference", "grouped_mm", "triton"] = "auto"  # expert kernels; auto: by device
    # Sampling
    questions: int = 7500  # training questions; 0: all (not for procedural tasks, which have no end)
    batch_prompts: int = 1024  # questions per step, over all ranks
    group_size: int = 5  # answers per question
    temperature: float = 1.0
    prompt_tokens: int = 512  # questions longer than this or half of seq_len are left out
    answer_tokens: int = 1024  # longest answer; less if questions leave less of seq_len
    rollout_batch: int = 1024  # answers sampled at a time, per rank
    # Optimisation
    steps: int = 105  # each samples answers, then trains on them
    mini_batch: int = 256  # questions per optimiser step
    micro_tokens: int = 16384  # tokens in one forward and backward pass, padding included, per rank
    lr: float = 5e-6  # constant
    clip: float = 0.2  # clips the probability ratio to 1 - clip .. 1 + clip
    kl_coef: float = 1e-3  # weight of the KL term; 0: no start model is loaded
    normalize: Literal["token", "sample"] = "token"  # what has equal weight in the loss
    replay: bool = False  # train with the experts that sampling chose (docs/STUDY.md)
    beta1: float = 0.9  # AdamW, mean of gradients
    beta2: float = 0.999  # AdamW, mean of squares
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.01  # on matrices
    clip_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    # Reports
    eval_every: int = 5  # steps between greedy tests on unseen questions; 0: only before and after
    eval_questions: int = 500  # unseen questions in each test
    checkpoint_every: int = 20  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 1  # how many of the newest are kept
    curves: bool = True  # redraw curves.png at tests and checkpoints
    log: str = ""  # also log to tensorboard or wandb, or to both: tensorboard,wandb; torchrun needs --logger

    def __post_init__(self):
        check_range(self, "batch_prompts prompt_tokens answer_tokens rollout_batch steps mini_batch micro_tokens", 1)
        check_range(self, "eval_questions keep_checkpoints", 1)
        check_range(self, "questions lr kl_coef eps weight_decay clip_norm eval_every checkpoint_every seed")
        check_rates(self, "beta1 beta2")
        require(self.model or self.resume, "model", "", "name the run directory of a trained model, or one to --resume")
        trains = [name for name in tasks.NAMES if tasks.load(name).trains]
        remedy = f"use one with training questions: {', '.join(trains)}"
        require(tasks.load(self.task).trains, "task", self.task, remedy)
        require(self.group_size >= 2, "group_size", self.group_size, "answers are compared in groups: use 2 or more")
        check_sampling(self.rollout_batch, self.temperature, 1.0, greedy="greedy answers are equal")
        require(0 < self.clip < 1, "clip", self.clip, "use a number between 0 and 1")
        whole = self.batch_prompts % self.mini_batch == 0
        require(whole, "batch_prompts", self.batch_prompts, f"use a multiple of mini_batch={self.mini_batch}")


def sample_answers(model, tokens, prompts, streams, answer_tokens, cfg, seed, watch=None):
    """A Sample for each prompt (token ids); it depends on the prompt, the seed and its stream only."""
    experts, ended, samples = [], [], []
    options = dict(batch_size=cfg.rollout_batch, n_vocab=tokens.n_vocab, streams=streams, watch=watch, seed=seed)
    options |= dict(experts=experts, ended=ended)
    answers = generate(model, prompts, answer_tokens, tokens.eos, cfg.temperature, **options)
    for prompt, ids, end, chosen in zip(prompts, answers, ended, experts, strict=True):
        whole = prompt + ids + ([] if end is None else [end])
        samples.append(Sample(whole, len(prompt), chosen, tokens.decode(ids)))
    return samples


@any_shape
def answer_logprobs(model, batch, cfg, n_vocab, replay=False):
    """(log-probabilities of the answers' tokens at the sampling temperature, float32 (A,); numbers (2,) of experts that
    the routers chose, and of those among them that sampling had not chosen for the same token)."""
    out = model(batch.tokens_BL, replay_NTK=batch.sampled_NTK if replay else None)
    logits_AV = out.logits.flatten(0, 1)[batch.index_A, :n_vocab].float() / cfg.temperature
    routed = logits_AV.new_zeros(2)
    if out.experts:
        real = batch.sampled_NTK >= 0
        known = (torch.stack(out.experts)[..., :, None] == batch.sampled_NTK[..., None, :]).any(-1)
        routed = torch.stack([real.sum(), (real & ~known).sum()]).float()
    return -F_.cross_entropy(logits_AV, batch.target_A, reduction="none"), routed


@torch.no_grad()
def look_back(batch, model, start_model, cfg, n_vocab):
    """The batch with log-probabilities by the present model and by the start model, either of which may be None."""
    old_A = answer_logprobs(model, batch, cfg, n_vocab, cfg.replay)[0] if model else None
    start_A = answer_logprobs(start_model, batch, cfg, n_vocab)[0] if start_model else None
    return batch._replace(old_A=old_A, start_A=start_A)


@dataclass
class Training:
    """The state of a run, and what its steps share."""

    model: GPT
    start_model: GPT | None  # None: there is no KL term
    tokens: Tokens
    asked: list  # [(question, its prompt's token ids)] to train on
    held_out: list  # the same for tests
    answer_tokens: int  # longest answer
    optimizer: torch.optim.Optimizer
    step: int = 0
    read: int = 0  # questions drawn so far
    row: dict = dataclasses.field(default_factory=dict)  # what was logged of the latest step
    tokenizer_sha256: str = ""  # of its file


def load_start(cfg, device):
    """(checkpoint file or published model, GPT, data directory, tokenizer, source of questions) of cfg.model."""
    options = dict(dtype=cfg.dtype, impl=cfg.impl)
    if start.released(cfg.model):
        folder = Path(cfg.data).is_dir() and start.released(cfg.data)  # a resumed run without --data names the model's
        data = checkpoint.training_data("", cfg.data) if cfg.data and not folder else None
        source, model = Source(cfg.evaldata or None, data), start.load_any(cfg.model, device, **options)
        tokens = start.tokens_of(cfg.model, "model", model, data)
        return cfg.model, model, str(data or hub.folder(cfg.model, "model")), tokens, source
    path = checkpoint.newest(cfg.model)
    data = str(checkpoint.training_data(path.parent, cfg.data))
    model = start.load_any(path, device, **options)
    return path, model, data, checkpoint.run_tokens(data, model), Source(cfg.evaldata or None, data)


def load_questions(cfg, start_path, model, data, tokens, source):
    """(training questions, test questions, longest answer), of prompts that leave room for an answer."""
    limit, task = min(cfg.prompt_tokens, model.cfg.seq_len // 2), tasks.load(cfg.task)
    found, prompt_ids = [], start.prompt_ids(start_path, tokens, data)
    for split, n in (("train", cfg.questions), ("test", cfg.eval_questions)):
        pairs = [(q, prompt_ids(q.prompt)) for q in task.questions(source, split, n)]
        found.append([(question, ids) for question, ids in pairs if len(ids) <= limit])
    require(all(found), "prompt_tokens", limit, "no question is that short; use more (at most half of seq_len counts)")
    longest = max(len(ids) for pairs in found for _, ids in pairs)
    return *found, min(cfg.answer_tokens, model.cfg.seq_len - longest)


def set_up(cfg, run, start_path, model, tokens, questions):
    """(Training of a fresh run, or of its newest checkpoint; that checkpoint or None)."""
    options = dict(dtype=cfg.dtype, impl=cfg.impl)
    start_model = cast_once(start.load_any(start_path, run.device, **options)) if cfg.kl_coef else None
    matrices, norms = ([p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    job = Training(model, start_model, tokens, *questions, adamw)
    state = run.resume("grpo")
    if state:
        old, new = ({name: w.shape for name, w in weights.items()} for weights in (state["model"], model.state_dict()))
        require(old == new, "model", cfg.model, "its sizes are not those of this run; resume without this flag")
        job.step, job.row = state["step"], state["row"]
        job.read = state.get("read", state["step"] * state["grpo"]["batch_prompts"])
        job.model.load_state_dict(state.pop("model"))
        Together(adamw).load_state_dict([state.pop("optimizer")])  # flags override its rates
    return job, state


def roll_out(cfg, run, job):
    """(questions, samples) of this rank, which has a part of every mini-batch. The number of ranks changes no answer.

    Raises Stopping after a signal."""
    drawn = draw_questions(len(job.asked), job.read, cfg.batch_prompts, cfg.seed)
    share = cfg.mini_batch // run.world
    places = [m + i for m in range(run.rank * share, cfg.batch_prompts, cfg.mini_batch) for i in range(share)]
    streams = [place * cfg.group_size + i for place in places for i in range(cfg.group_size)]
    questions, prompts = zip(*(job.asked[drawn[stream // cfg.group_size]] for stream in streams), strict=True)
    n_tokens = len(prompts) * job.row.get("answer_tokens", job.answer_tokens)  # estimate: as long as in the last step
    progress = Progress(run, f"step {job.step + 1}/{cfg.steps}, sampling", n_tokens, stops=True)
    watch, seed = (lambda i, ids: progress(i, len(ids))), cfg.seed * 1_000_000 + job.step
    samples = sample_answers(job.model, job.tokens, list(prompts), streams, job.answer_tokens, cfg, seed, watch)
    return questions, samples


def make_batches(cfg, run, job, samples, advantage):
    """Mini-batches as lists of micro-batches, with log-probabilities by the weights before the step.

    Raises Stopping after a signal."""
    share = cfg.mini_batch // run.world * cfg.group_size
    minis = [range(start, start + share) for start in range(0, len(samples), share)]
    counts = run.sum([sum(samples[i].length for i in mini) for mini in minis])  # tokens of each, over all ranks
    progress = Progress(run, f"step {job.step + 1}/{cfg.steps}, looking back", len(samples), stops=True)
    batches = []
    for m, (mini, count) in enumerate(zip(minis, counts, strict=True)):
        # The first mini-batch trains the weights that sampled, so its forward pass gives p_old.
        model_before = job.model if m else None
        used = [i for i in mini if cfg.kl_coef or advantage[i]]  # equal rewards without a KL term teach nothing
        batches.append([])
        for rows in micro_batches(used, [len(sample.ids) - 1 for sample in samples], cfg.micro_tokens):
            chosen, n_answers = [samples[i] for i in rows], share * run.world
            weight = [1 / (count if cfg.normalize == "token" else n_answers * sample.length) for sample in chosen]
            batch = collate(chosen, [advantage[i] for i in rows], weight, run.device)
            batches[-1].append(look_back(batch, model_before, job.start_model, cfg, job.tokens.n_vocab))
            progress(rows[0], len(rows))
    return batches


def update(cfg, run, job, batches):
    """An optimiser step for each mini-batch. Returns float64 (mini-batches, 6), summed over all ranks, and the mean
    gradient norm. The six are the loss, the sum of KL estimates, and the numbers of clipped tokens, all tokens, experts
    chosen, and experts that sampling had not chosen."""
    stats, norms = torch.zeros(len(batches), 6, device=run.device), []
    progress = Progress(run, f"step {job.step + 1}/{cfg.steps}, update", sum(map(len, batches)))
    for sums, mini in zip(stats, batches, strict=True):
        for batch in mini:
            logp_A, routed = answer_logprobs(job.model, batch, cfg, job.tokens.n_vocab, cfg.replay)
            loss, policy = policy_loss(logp_A, batch, cfg.clip, cfg.kl_coef)
            loss.backward()
            sums += torch.cat([loss.detach()[None], policy, routed])
            progress(id(batch), 1)
        for p in job.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # this rank may have had no batch
            if run.world > 1:  # a sum, not a mean: the weights in the loss are those of the whole mini-batch
                dist.all_reduce(p.grad)
        limit = cfg.clip_norm or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(job.model.parameters(), limit, foreach=True))
        job.optimizer.step()
        job.optimizer.zero_grad()
    return torch.tensor(run.sum(stats), dtype=torch.float64), float(torch.stack(norms).mean())


def take_step(cfg, run, job):
    """Sample, reward, update. Returns the row of the step, or None if a signal stopped it before the update."""
    clock, asked, samples, batches = Clock(), [], [], []
    with contextlib.suppress(Stopping):
        asked, samples = roll_out(cfg, run, job)
    if run.stopping():
        return None
    seconds = {"seconds_rollout": clock.read()}
    grades = tasks.load(cfg.task).rewards(asked, [sample.text for sample in samples])
    reward_PG = torch.tensor(grades).view(-1, cfg.group_size)
    seconds["seconds_reward"] = clock.read()
    with contextlib.suppress(Stopping):
        batches = make_batches(cfg, run, job, samples, advantages(reward_PG).flatten().tolist())
    if run.stopping():
        return None
    stats, norm = update(cfg, run, job, batches)  # waits for the device
    seconds["seconds_update"] = clock.read()
    job.step, job.read = job.step + 1, job.read + cfg.batch_prompts
    for name, value in (("loss", float(stats[:, 0].sum())), ("gradient norm", norm)):
        guard.check_finite(name, value, job.step, run.dir, cfg.lr)
    return report.grpo_row(cfg, run, job, samples, reward_PG, batches, stats, norm, seconds)


def test(cfg, run, job):
    """Greedy accuracy on unseen questions."""
    mine = job.held_out[run.rank :: run.world]
    questions, prompts = [question for question, _ in mine], [ids for _, ids in mine]
    options = {"batch_size": cfg.rollout_batch, "n_vocab": job.tokens.n_vocab}
    answers = generate(job.model, prompts, job.answer_tokens, job.tokens.eos, **options)
    right = sum(tasks.load(cfg.task).rewards(questions, [job.tokens.decode(ids) for ids in answers]))
    reward = run.sum([right])[0] / len(job.held_out)
    line = f"step {job.step:>4}/{cfg.steps} | greedy reward on {len(job.held_out)} unseen questions {reward:.4f}"
    run.record({"step": job.step, "test_reward": reward}, line)
    return reward


def grpo(cfg, rank=0, world=1, device=CPU, given=None):
    """One run to its end. Returns the contents of results.json on rank 0, else None."""
    require(cfg.mini_batch % world == 0, "mini_batch", cfg.mini_batch, f"use a multiple of the {world} ranks")
    n_answers = cfg.batch_prompts // world * cfg.group_size
    what = f"{cfg.questions:,} questions and {n_answers:,} answers a step"
    least = 500 * (cfg.questions + cfg.eval_questions + n_answers)  # bytes of Python objects, short texts
    require_memory(what, least, CPU, "use fewer questions, batch_prompts or a smaller group_size")
    start_path, model, data, tokens, source = load_start(cfg, device)
    questions = load_questions(cfg, start_path, model, data, tokens, source)
    name = hub.home(start_path) if start.released(start_path) else start_path.parent
    with Run(cfg, cfg.out_dir or f"{name}-grpo", rank, world, device, given) as run:
        job, state = set_up(cfg, run, start_path, model, tokens, questions)
        cfg = dataclasses.replace(cfg, model=str(start_path), data=data)
        job.tokenizer_sha256 = tokenizer.digest(data)
        run.begin(cfg, job.step, state, "grpo")
        if run.first:
            print(report.grpo_start(cfg, run, job), flush=True)
        pictures = Curves(run.dir) if run.first and cfg.curves else None
        if not state:
            test(cfg, run, job)
        while job.step < cfg.steps:
            row = take_step(cfg, run, job)
            last = job.step == cfg.steps
            if row:
                job.row = row
                run.record(row, report.grpo_line(row, cfg))
                if last or cfg.eval_every and job.step % cfg.eval_every == 0:
                    row["test_reward"] = test(cfg, run, job)
            stopping = run.stopping()
            if stopping or last or cfg.checkpoint_every and job.step % cfg.checkpoint_every == 0:
                save(cfg, run, job)
            if pictures and ("test_reward" in job.row or stopping):
                pictures.refresh()
            if stopping and not last:
                return run.stopped(job.step, "grpo.py")

        if "test_reward" not in job.row:  # resumed after its last step
            job.row["test_reward"] = test(cfg, run, job)
        if pictures:
            pictures.close()
        return run.finish({**job.row, "test_questions": len(job.held_out)}) if run.first else None


def save(cfg, run, job):
    state = {"row": job.row, "read": job.read, "config": dataclasses.asdict(job.model.cfg)}
    state |= {"grpo": dataclasses.asdict(cfg), "model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}
    state["tokenizer"] = {"sha256": job.tokenizer_sha256, "ends": job.tokens.eos}
    run.save(job.step, state, cfg.keep_checkpoints)


def main(argv=None):
    return launch(grpo, GRPOConfig, __doc__, argv)


if __name__ == "__main__":
    main()
