"""Post-train a model by reinforcement learning on answers that can be verified: GRPO (arXiv 2402.03300), defaults of arXiv 2508.18672.

    python grpo.py --model=runs/NAME                                    # reasoning problems of the model's own procedural data
    python grpo.py --model=runs/NAME --task=gsm8k --evaldata=evaldata --questions=0
    torchrun --nproc-per-node=8 grpo.py --model=runs/NAME               # data parallel on one node
    python grpo.py --resume=runs/NAME-grpo                              # continue, bit for bit; other flags override

One step: questions -> group_size sampled answers each -> rewards of 1 or 0 (the task's file in eval/tasks) -> advantages within each group -> one pass over
the answers in mini-batches, an optimiser step for each:

    loss = sum over answer tokens of weight * (-min(r A, clip(r, 1 - clip, 1 + clip) A) + kl_coef * (s - 1 - log s))
    r = p / p_old, s = p_start / p,  A = (reward - mean of the group) / (standard deviation + 1e-6)

p is the model's probability of a token at the sampling temperature; p_old the same before the step, p_start the start model's. The second term is
a never negative estimate of KL(p || p_start) for tokens drawn from p, unbiased but for s being cut off at exp(MAX_LOG_S). weight: 1 / answer tokens
of the mini-batch, or 1 / (samples * tokens of this answer). Prompts and padding have no term at all.

A run directory is that of train.py; `python -m eval --run=DIR` and everything else that reads one works on it.

Shapes: B sequences of a micro-batch, L their longest, T = B*L, A answer tokens of all of them in a row, V vocabulary, N MoE layers, K experts.
"""

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import optimoe as optimoe  # isort: skip  (before torch: how its threads wait)
import torch
import torch.distributed as dist
import torch.nn.functional as F_
from torch import Tensor

from eval import tasks
from eval.generate import any_shape, generate
from eval.sources import Source
from optimoe import checkpoint, config, guard
from optimoe.checkpoint import training_data
from optimoe.config import require
from optimoe.load import frozen, pick_device, run_tokens
from train import STOPPED, Stop


@dataclass(frozen=True)
class GRPOConfig:
    # Run
    model: str = ""  # run directory or checkpoint file of the model to start from; the KL is measured against it
    task: str = "reasoning"  # a file in eval/tasks with training questions
    data: str = ""  # training data directory of the start model, for its tokenizer; empty: where its config says
    evaldata: str = ""  # folder of gsm8k/, math/, mbpp/, see eval/sources.py; empty: $OPTIMOE_EVALDATA, else ./evaldata
    out_dir: str = ""  # run directory; empty: that of the start model with "-grpo"
    resume: str = ""  # run directory to continue
    seed: int = 0  # of the order of the questions and of sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # compute dtype of sampling and training; auto: bfloat16 on CUDA, float32 on CPU
    )
    impl: Literal["auto", "reference", "grouped_mm", "triton"] = "auto"  # expert kernels; auto: by device
    # Sampling
    questions: int = (
        7500  # training questions to go through again and again; 0: all there are (procedural tasks have no end)
    )
    batch_prompts: int = 1024  # questions per step, over all ranks
    group_size: int = 5  # answers per question
    temperature: float = 1.0
    prompt_tokens: int = 512  # questions longer than this, or than half of the model's seq_len, are left out
    answer_tokens: int = 1024  # longest answer, or what the longest question leaves of the model's seq_len
    rollout_batch: int = 1024  # answers sampled at a time, per rank
    # Optimisation
    steps: int = 105  # of sampling
    mini_batch: int = 256  # questions per optimiser step
    micro_tokens: int = 16384  # tokens per forward and backward pass, padding included, per rank
    lr: float = 5e-6  # constant
    clip: float = 0.2  # the probability ratio counts between 1 - clip and 1 + clip
    kl_coef: float = 1e-3  # weight of the KL term; 0: the start model is not even loaded
    normalize: Literal["token", "sample"] = "token"  # every token of a mini-batch weighs the same, or every answer
    replay: bool = False  # train with the experts that sampling chose: steadier where experts are many (docs/STUDY.md)
    beta1: float = 0.9  # AdamW, mean
    beta2: float = 0.999  # AdamW, variance
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.01  # on matrices
    clip_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    # Reports
    eval_every: int = 5  # steps between greedy tests on unseen questions; 0: only before and after
    eval_questions: int = 500  # of these tests
    checkpoint_every: int = 20  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 1  # newest ones kept

    def __post_init__(self):
        for name in (
            "batch_prompts",
            "prompt_tokens",
            "answer_tokens",
            "rollout_batch",
            "steps",
            "mini_batch",
            "micro_tokens",
            "eval_questions",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name in (
            "questions",
            "lr",
            "kl_coef",
            "eps",
            "weight_decay",
            "clip_norm",
            "eval_every",
            "checkpoint_every",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or more")
        require(
            bool(self.model or self.resume),
            "model",
            self.model,
            "name the run directory of a trained model, or one to --resume",
        )
        require(
            tasks.load(self.task).trains,
            "task",
            self.task,
            f"use one with training questions: {', '.join(name for name in tasks.NAMES if tasks.load(name).trains)}",
        )
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "an answer is compared with others of its group: use 2 or more",
        )
        require(
            self.temperature > 0, "temperature", self.temperature, "greedy answers are all equal; use a positive number"
        )
        require(0 < self.clip < 1, "clip", self.clip, "use a number between 0 and 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "use a whole number from 0 to below 2^63")
        require(
            0 <= self.beta1 < 1 and 0 <= self.beta2 < 1,
            "beta1, beta2",
            (self.beta1, self.beta2),
            "use numbers from 0 to below 1",
        )
        require(
            self.batch_prompts % self.mini_batch == 0,
            "batch_prompts",
            self.batch_prompts,
            f"use a multiple of mini_batch={self.mini_batch}",
        )


class Sample(NamedTuple):
    ids: list[int]  # prompt, answer, and the end-of-text token if the answer ended in time
    start: int  # index of the answer's first token
    experts: Tensor  # int16 (N, len(ids) - 1, K): what the routers chose while sampling
    text: str  # of the answer
    length = property(lambda self: len(self.ids) - self.start)  # tokens of the answer


class Batch(NamedTuple):
    tokens_BL: Tensor  # int64, padded on the right
    sampled_NTK: Tensor  # int32 experts chosen while sampling; -1 at padding
    index_A: Tensor  # int64, positions of B*L whose next token is an answer's
    target_A: Tensor  # int64, these next tokens
    advantage_A: Tensor  # float32
    weight_A: Tensor  # float32
    old_A: Tensor | None = None  # float32 log-probabilities before the step; None: as they are now
    start_A: Tensor | None = None  # float32 log-probabilities by the start model; None: there is no KL term


def sample_answers(model, tokens, prompts, streams, answer_tokens, cfg, seed):
    """One answer to each prompt (token ids) as a Sample; what is drawn depends on the prompt, the seed and its stream only."""
    experts = []
    answers = generate(
        model,
        prompts,
        answer_tokens,
        tokens.eos[:1],
        cfg.temperature,
        seed=seed,
        batch_size=cfg.rollout_batch,
        n_vocab=tokens.n_vocab,
        streams=streams,
        experts=experts,
    )
    return [
        Sample(prompt + ids + tokens.eos[:1] * (len(ids) < answer_tokens), len(prompt), chosen, tokens.decode(ids))
        for prompt, ids, chosen in zip(prompts, answers, experts, strict=True)
    ]


def advantages(rewards_PG):
    """(P, G) rewards of P groups -> (reward - mean) / (standard deviation + 1e-6) within each; exactly 0 where all are equal."""
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-6)


def micro_batches(rows, lengths, max_tokens):
    """Rows of like length together, as many as fit into max_tokens, a sixteenth of them padding: finished answers do not wait for long ones."""
    batches, longest, padding = [], 0, 0
    for i in sorted(rows, key=lambda i: -lengths[i]):
        padding += longest - lengths[i]
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens and padding <= max_tokens // 16:
            batches[-1].append(i)
        else:
            batches, longest, padding = [*batches, [i]], lengths[i], 0
    return batches


def collate(samples, advantage_B, weight_B, device):
    L = max(len(s.ids) for s in samples) - 1
    tokens = torch.tensor([s.ids[:-1] + [0] * (L + 1 - len(s.ids)) for s in samples])
    N, _, K = samples[0].experts.shape
    sampled = torch.full((N, len(samples), L, K), -1, dtype=torch.int32, device=device)
    for b, s in enumerate(samples):
        sampled[:, b, : len(s.ids) - 1] = s.experts
    index = torch.cat([torch.arange(b * L + s.start - 1, b * L + len(s.ids) - 1) for b, s in enumerate(samples)])
    target = torch.tensor([token for s in samples for token in s.ids[s.start :]])
    lengths = torch.tensor([s.length for s in samples])
    advantage, weight = (torch.tensor(values).repeat_interleave(lengths) for values in (advantage_B, weight_B))
    return Batch(tokens.to(device), sampled.flatten(1, 2), *(t.to(device) for t in (index, target, advantage, weight)))


@any_shape
def answer_logprobs(model, batch, cfg, n_vocab, replay=False):
    """Log-probabilities of the answers' tokens at the sampling temperature, float32 (A,); and (2,): how many experts the routers chose, and how
    many of these they had not chosen for the same token while sampling."""
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
    """The batch with the log-probabilities of its answers by the model as it is now and by the start model, where these are given."""
    old_A = answer_logprobs(model, batch, cfg, n_vocab, cfg.replay)[0] if model else None
    return batch._replace(
        old_A=old_A, start_A=answer_logprobs(start_model, batch, cfg, n_vocab)[0] if start_model else None
    )


# A token drawn with one choice of experts may be all but impossible with the choice made in training: s is then up to 1e8, and a thousandth of it
# outweighs all other tokens. It happens in sparse models above all (docs/LOG.md). Beyond e^5 such a token adds no gradient.
MAX_LOG_S = 5.0


def policy_loss(logp_A, batch, clip, kl_coef):
    """The loss at the top of this file; and (3,): sums over tokens of the KL estimate and of clipped ones, and the number of tokens."""
    old_A = logp_A.detach() if batch.old_A is None else batch.old_A
    ratio_A = (logp_A - old_A).clamp(max=20).exp()  # e^89 would be infinite, and its gradient no number
    surrogate = ratio_A * batch.advantage_A
    gain = torch.minimum(surrogate, ratio_A.clamp(1 - clip, 1 + clip) * batch.advantage_A)
    log_s = torch.zeros_like(logp_A) if batch.start_A is None else (batch.start_A - logp_A).clamp(max=MAX_LOG_S)
    kl = torch.expm1(log_s) - log_s
    loss = (batch.weight_A * (kl_coef * kl - gain)).sum()
    return loss, torch.stack([kl.sum(), (gain < surrogate).sum(), torch.ones_like(gain).sum()]).detach()


def draw_questions(n_questions, start, count, seed):
    """Indices start .. start + count - 1 of an endless stream that goes through all questions in a new order each time: a function of the seed."""
    epochs = range(start // n_questions, (start + count - 1) // n_questions + 1)
    order = torch.cat(
        [
            torch.randperm(n_questions, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))
            for epoch in epochs
        ]
    )
    return order[start % n_questions :][:count].tolist()


def load_start(cfg, device):
    """(checkpoint file, model, its tokenizer, source of questions)."""
    path = Path(cfg.model)
    if path.is_dir():
        require(bool(checkpoint.find(path)), "model", cfg.model, "there is no checkpoint (ckpt-*.pt) in it")
        path = checkpoint.find(path)[-1][1]
    model = checkpoint.load_model(path, device, dtype=cfg.dtype, impl=cfg.impl)
    data = cfg.data or str(training_data(path.parent))
    return path, model, data, run_tokens(data, model), Source(cfg.evaldata or None, data)


def grpo(cfg, rank=0, world=1, device=torch.device("cpu")):
    """One run from the start model, or from its own newest checkpoint, to the end. Returns the contents of results.json (rank 0) or None."""
    lead = rank == 0
    require(cfg.mini_batch % world == 0, "mini_batch", cfg.mini_batch, f"use a multiple of the {world} ranks")

    # ---- model, questions, run directory
    start_path, model, data, tokens, source = load_start(cfg, device)
    task = tasks.load(cfg.task)
    limit = min(cfg.prompt_tokens, model.cfg.seq_len // 2)
    asked, held_out = (
        [
            (question, ids)
            for question in task.questions(source, split, n)
            if len(ids := tokens.bos + tokens.encode(question.prompt)) <= limit
        ]
        for split, n in (("train", cfg.questions), ("test", cfg.eval_questions))
    )
    require(
        bool(asked) and bool(held_out),
        "prompt_tokens",
        limit,
        "no question is that short (at most half of seq_len counts)",
    )
    answer_tokens = min(cfg.answer_tokens, model.cfg.seq_len - max(len(ids) for _, ids in asked + held_out))
    run_dir = lock = None
    if lead:
        run_dir, lock = checkpoint.open_run(cfg.out_dir or f"{start_path.parent}-grpo", cfg.resume)
    if world > 1:
        dist.broadcast_object_list(shared := [run_dir])
        run_dir = shared[0]
    cfg = dataclasses.replace(cfg, model=str(start_path), data=data)
    start_model = (
        frozen(checkpoint.load_model(start_path, device, dtype=cfg.dtype, impl=cfg.impl)) if cfg.kl_coef else None
    )
    options = [
        {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "weight_decay": cfg.weight_decay * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if (p.ndim >= 2) == matrix], **option}
            for matrix, option in zip((True, False), options, strict=True)
        ],
        fused=True,
    )
    step, row = 0, {}
    if cfg.resume and checkpoint.find(run_dir):  # none: the run ended before its first one and starts again
        state = checkpoint.read(run_dir)
        step, row = state["step"], state["row"]
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.update(option)
    if lead:
        config.save(cfg, run_dir / "config.json")
        checkpoint.rewind_metrics(run_dir / "metrics.jsonl", step or -1)  # step 0 is logged again
        print(
            f"{run_dir}: from {start_path}, {len(asked):,} questions, answers of up to {answer_tokens} tokens, "
            f"{cfg.steps - step} step{'s' * (cfg.steps - step != 1)} of {cfg.batch_prompts} x {cfg.group_size} answers, "
            f"{str(model.dtype)[6:]} on {device.type} x {world}",
            flush=True,
        )

    def record(row, line):
        if lead:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(line, flush=True)

    def save(step):
        norm = float(torch.nn.utils.get_total_norm(list(model.parameters())))
        guard.check_finite("norm of the weights", norm, step, run_dir)
        if lead:
            checkpoint.save(
                run_dir,
                step,
                {
                    "step": step,
                    "row": row,
                    "config": dataclasses.asdict(model.cfg),
                    "grpo": dataclasses.asdict(cfg),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                cfg.keep_checkpoints,
            )

    def summed(values):
        """Sums over the ranks, as a list; waits for the device."""
        values = torch.as_tensor(values, dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def test(step):
        """Greedy accuracy on unseen questions."""
        mine = held_out[rank::world]
        found = generate(
            model,
            [ids for _, ids in mine],
            answer_tokens,
            tokens.eos,
            batch_size=cfg.rollout_batch,
            n_vocab=tokens.n_vocab,
        )
        right = summed([sum(task.rewards([question for question, _ in mine], [tokens.decode(ids) for ids in found]))])[
            0
        ] / len(held_out)
        record(
            {"step": step, "test_reward": right},
            f"step {step:>4}/{cfg.steps} | greedy reward on {len(held_out)} unseen questions {right:.4f}",
        )
        return right

    # ---- the loop
    if step == 0:
        test(0)
    with Stop() as stop:
        while step < cfg.steps:
            clock = [time.perf_counter()]

            # Answers. Rank r has the r-th part of every mini-batch: what a step learns from does not depend on the number of ranks.
            drawn, share = (
                draw_questions(len(asked), step * cfg.batch_prompts, cfg.batch_prompts, cfg.seed),
                cfg.mini_batch // world,
            )
            mine = [
                m + rank * share + i
                for m in range(0, cfg.batch_prompts, cfg.mini_batch)
                for i in range(share)
                for _ in range(cfg.group_size)
            ]
            streams = [at * cfg.group_size + i % cfg.group_size for i, at in enumerate(mine)]
            questions, prompts = zip(*(asked[drawn[at]] for at in mine), strict=True)
            samples = sample_answers(
                model, tokens, list(prompts), streams, answer_tokens, cfg, cfg.seed * 1_000_000 + step
            )
            clock.append(time.perf_counter())

            # Rewards
            reward_PG = torch.tensor(task.rewards(questions, [s.text for s in samples])).view(-1, cfg.group_size)
            advantage = advantages(reward_PG).flatten().tolist()
            clock.append(time.perf_counter())

            # Mini-batches of micro-batches, and what the weights say of their answers before they change
            minis = torch.arange(len(samples)).view(-1, share * cfg.group_size).tolist()
            counts = summed([sum(samples[i].length for i in mini) for mini in minis])
            batches, n_read = [], 0
            for m, (mini, count) in enumerate(zip(minis, counts, strict=True)):
                used = [i for i in mini if cfg.kl_coef or advantage[i]]  # without the KL, equal rewards teach nothing
                weight = {
                    i: 1 / count if cfg.normalize == "token" else 1 / (len(mini) * world * samples[i].length)
                    for i in used
                }
                parts = micro_batches(used, [len(s.ids) - 1 for s in samples], cfg.micro_tokens)
                parts = [
                    collate([samples[i] for i in part], [advantage[i] for i in part], [weight[i] for i in part], device)
                    for part in parts
                ]
                n_read += sum(len(samples[i].ids) - 1 for i in used)
                # The first mini-batch meets the weights that sampled: its own forward pass gives p_old.
                batches.append(
                    [look_back(batch, model if m else None, start_model, cfg, tokens.n_vocab) for batch in parts]
                )

            # Updates
            stats, grad_norms = [], []
            for mini in batches:
                stats.append(
                    torch.zeros(6, device=device)
                )  # loss; KL, clipped tokens, tokens; choices of the routers, changed ones
                for batch in mini:
                    logp_A, routed = answer_logprobs(model, batch, cfg, tokens.n_vocab, cfg.replay)
                    loss, sums = policy_loss(logp_A, batch, cfg.clip, cfg.kl_coef)
                    loss.backward()
                    stats[-1] += torch.cat([loss.detach()[None], sums, routed])
                for p in model.parameters():
                    p.grad = (
                        torch.zeros_like(p) if p.grad is None else p.grad
                    )  # there may have been nothing to learn here
                    if world > 1:  # a sum, not a mean: the weights in the loss are those of the whole mini-batch
                        dist.all_reduce(p.grad)
                grad_norms.append(
                    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf, foreach=True)
                )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1

            # Report; waits for the device
            stats = torch.tensor(summed(torch.stack(stats))).double()
            loss, kl, clipped, n_tokens, routed, changed = stats.sum(0).tolist()
            guard.check_finite("loss", loss, step, run_dir)
            clock.append(time.perf_counter())
            seconds = [b - a for a, b in zip(clock, clock[1:], strict=False)]
            mixed = (reward_PG.amin(1) < reward_PG.amax(1)).sum()
            ended, right, mixed, n_read, padded = summed(
                [
                    sum(s.ids[-1] in tokens.eos for s in samples),
                    reward_PG.sum(),
                    mixed,
                    n_read,
                    sum(batch.tokens_BL.numel() for mini in batches for batch in mini),
                ]
            )
            n = cfg.batch_prompts * cfg.group_size
            row = {
                "step": step,
                "reward": right / n,
                "mixed_groups": mixed / cfg.batch_prompts,
                "ended": ended / n,
                "answer_tokens": sum(counts) / n,
                "loss": loss / len(minis),
                "kl": kl / max(1, n_tokens),
                "clipped": clipped / max(1, n_tokens),
                "grad_norm": float(torch.stack(grad_norms).mean()),
                "router_changed": changed / max(1, routed),
                "router_changed_same_weights": float(stats[0, 5] / stats[0, 4].clamp(min=1)),
                "seconds_rollout": seconds[0],
                "seconds_reward": seconds[1],
                "seconds_update": seconds[2],
                "rollout_tokens_per_s": sum(counts) / seconds[0],
                "padding": 1 - n_read / max(1, padded),
                "memory_gb": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
            }
            record(
                row,
                f"step {step:>4}/{cfg.steps} | reward {row['reward']:.4f} | {row['answer_tokens']:.1f} tokens | KL {row['kl']:.2e} | "
                f"clipped {row['clipped']:.2%} | other experts {row['router_changed']:.2%} | grad {row['grad_norm']:.3f} | rollout "
                f"{seconds[0]:.1f} s at {row['rollout_tokens_per_s']:,.0f} tokens/s, reward {seconds[1]:.1f} s, update {seconds[2]:.1f} s",
            )
            if step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0:
                row["test_reward"] = test(step)
            stopping = bool(summed([stop.asked])[0])  # ranks hear a signal at different times
            if stopping or step == cfg.steps or cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
                save(step)
            if stopping and step < cfg.steps:
                if lead:
                    print(f"stopped and saved at step {step}; continue with: python grpo.py --resume={run_dir}")
                return None

    if "test_reward" not in row:  # resumed to end where it had been stopped
        row["test_reward"] = test(step)
    if not lead:
        return None
    results = {**row, "test_questions": len(held_out)}
    checkpoint.replace_file(run_dir / "results.json", json.dumps(results, indent=2) + "\n")
    lock.close()
    return results


def main(argv=None):
    """Entry point of `python grpo.py` and torchrun; returns what `grpo` returns."""
    try:
        cfg = config.parse_run(GRPOConfig, sys.argv[1:] if argv is None else argv, __doc__)
        rank, world, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        device = pick_device(cfg, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return grpo(cfg, rank, world, device)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if argv is not None or "DEBUG" in os.environ:
            raise
        sys.exit(STOPPED if isinstance(error, KeyboardInterrupt) else f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
