"""What runs of train.py and grpo.py tell people: their first lines, the row and line of a step, the closing report."""

import dataclasses
import math
import resource

import torch

from data import facts, procedural, reasoning, shards, tokenizer
from data.procedural import prompt
from eval import probes
from eval.generate import generate
from model import compute_dtype
from optimoe import guard
from optimoe.config import require
from optimoe.sizes import count_params, flops_per_token, peak_flops

N_PEOPLE, N_PROBLEMS = 200, 50  # of the closing report on procedural data


def is_procedural(sources):
    return "procedural" in shards.read_meta(sources[0][0])


def check(cfg, sources):
    """ValueError where the closing report of a run on these sources would not fit its seq_len."""
    longest = longest_probe(sources[0][0]) if is_procedural(sources) else 0
    remedy = f"the closing report has texts of {longest} tokens, on which it tests the model: use as many or more"
    require(cfg.seq_len >= longest, "seq_len", cfg.seq_len, remedy)


def longest_probe(directory):
    """Tokens of the longest text of probes.report that does not adapt to the model's seq_len."""
    cfg, enc = procedural.read_config(directory), tokenizer.load(directory)
    texts, problems = [], []
    if cfg.exposures:
        people = facts.people(cfg.facts)[:N_PEOPLE]
        texts += [probe.prompt + probe.value + "." for probe in facts.probes(people, cfg.facts.seed)]
        texts += ["".join(facts.segments(cfg.facts, person, 10**6)) for person in people]
    if cfg.n_problems:
        problems += [reasoning.problem(cfg.reasoning, i, "test", 1) for i in range(N_PROBLEMS)]
        texts.append(reasoning.problem(cfg.reasoning, N_PROBLEMS, "test", min(3, cfg.reasoning.max_steps)).question)
    if cfg.n_mano:
        longest = cfg.reasoning.mano_length + 2
        problems += [reasoning.mano(cfg.reasoning, i, "test", longest) for i in range(N_PROBLEMS)]
    texts += [p.question + p.solution for p in problems]
    return max((len(prompt(enc, text)) for text in texts), default=0) + 4


def first_lines(cfg, run, data, step):
    """What is going to be trained, where, and what should be known about it before."""
    params, steps = count_params(cfg), cfg.steps - step
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    dtype, tokens = str(compute_dtype(cfg, run.device))[6:], cfg.batch_size * cfg.seq_len
    size = f"{params.total:,} parameters ({params.active:,} active), {steps} step{'s' * (steps != 1)}"
    lines = [f"{run.dir}: {size} of {tokens:,} tokens, {dtype} on {name} x {run.world}"]
    if cfg.steps < cfg.warmup_steps:
        what = f"steps={cfg.steps} ends within the warm-up, before lr={cfg.lr:g} is reached"
        lines.append(f"{what}; lower warmup_steps={cfg.warmup_steps}")
    without = [str(directory) for directory, weight in data.sources if (directory, weight) not in data.val_sources]
    if without and cfg.val_batches:
        lines.append(f"no validation on {', '.join(without)}: there is no validation data")
    return "\n".join(lines)


def read_window(window):
    """The row of a window of steps: means over batches and ranks. Waits for the device.

    load_NE is relative to an even share; router_entropy is that of the mean router probabilities, in nats; load_max and
    load_min are lists by layer."""
    loss, balance, z, batches = window["sums"].tolist()
    skipped, counts_NE = int(window["steps"][guard.BAD]), window["counts_NE"].float()
    row, layers = {}, max(1, len(counts_NE)) * batches
    if batches:  # else all steps were skipped
        row |= {"loss": loss / batches, "balance": balance / layers, "z": z / layers}  # 1 is balance, in every layer
    row |= {"skipped_steps": skipped} if skipped else {}
    if batches and len(counts_NE):
        load_NE = counts_NE / counts_NE.mean(1, keepdim=True)
        p_NE = window["probs_NE"] / window["probs_NE"].sum(1, keepdim=True)
        row |= {"load_max": load_NE.amax(1).tolist(), "load_min": load_NE.amin(1).tolist()}
        row |= {"dead_experts": int((counts_NE == 0).sum())}
        row |= {"router_entropy": torch.special.entr(p_NE).sum(1).tolist()}
        row |= {"load": [[round(x, 3) for x in layer] for layer in load_NE.tolist()]}
    return row


def speed(tokens_per_s, cfg, device, world):
    """Tokens per second, the share of the GPUs' peak that they need (None where unknown) and peak memory in GB."""
    peak, memory = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        if compute_dtype(cfg, device) == torch.bfloat16:
            peak = peak_flops(torch.cuda.get_device_name(device))
    mfu = tokens_per_s * flops_per_token(cfg) / (peak * world) if peak else None
    return {"tokens_per_s": tokens_per_s, "mfu": mfu, "memory_gb": memory}


def log_line(row, cfg):
    left = int((cfg.steps - row["step"]) * cfg.batch_size * cfg.seq_len / row["tokens_per_s"])
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    load = f"{max(row['load_max']):.2f}" if "load_max" in row else "n/a"
    loss = f"{row['loss']:.4f}" if "loss" in row else "skipped"
    norm, rate = f"norm {float(row['grad_norm'] or 'nan'):.2f}", f"{row['tokens_per_s']:,.0f} tok/s | mfu {mfu}"
    eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    head = f"step {row['step']:>6}/{cfg.steps} | loss {loss} | lr {row['lr']:.2e}"
    return f"{head} | {norm} | {rate} | load {load} | eta {eta}"


def val_row(loss, step, tokens, sources):
    """The row of a validation, with bits per byte where every data directory counts the bytes of its text."""
    row = {"step": step, "tokens": tokens, "val_loss": loss}
    splits = [(weight, shards.read_meta(directory)["splits"]["val"]) for directory, weight in sources]
    if all(meta.get("bytes") for _, meta in splits):
        per_token = sum(weight * meta["bytes"] / meta["tokens"] for weight, meta in splits)
        row["val_bits_per_byte"] = loss / math.log(2) / per_token * sum(weight for weight, _ in splits)
    return row


def val_line(row, cfg):
    bits = f" | {row['val_bits_per_byte']:.4f} bits/byte" if "val_bits_per_byte" in row else ""
    return f"step {row['step']:>6}/{cfg.steps} | validation loss {row['val_loss']:.4f}{bits}"


def grpo_start(cfg, run, job):
    left = cfg.steps - job.step
    return (
        f"{run.dir}: from {cfg.model}, {len(job.asked):,} questions, answers of up to {job.answer_tokens} tokens, "
        f"{left} step{'s' * (left != 1)} of {cfg.batch_prompts} x {cfg.group_size} answers, "
        f"{str(job.model.dtype)[6:]} on {run.device.type} x {run.world}"
    )


def grpo_row(cfg, run, job, samples, reward_PG, batches, stats, norm, seconds):
    """The row of a step of grpo.py, over all ranks, which wait for one another. stats, norm: of grpo.update."""
    loss, kl, clipped, n_tokens, routed, changed = stats.sum(0).tolist()
    mixed_P = reward_PG.amin(1) < reward_PG.amax(1)
    # Without the KL term, a group of equal rewards teaches nothing.
    taught = mixed_P.repeat_interleave(cfg.group_size) | bool(cfg.kl_coef)
    ended = sum(sample.ids[-1] in job.tokens.eos for sample in samples)
    real = sum(len(sample.ids) - 1 for sample, used in zip(samples, taught, strict=True) if used)
    padded = sum(batch.tokens_BL.numel() for mini in batches for batch in mini)
    length = sum(sample.length for sample in samples)
    ended, right, mixed, real, padded, length = run.sum([ended, reward_PG.sum(), mixed_P.sum(), real, padded, length])
    n, memory = cfg.batch_prompts * cfg.group_size, None
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device) / 2**30
    row = {"step": job.step, "reward": right / n, "mixed_groups": mixed / cfg.batch_prompts, "ended": ended / n}
    row |= {"answer_tokens": length / n, "loss": loss / len(batches), "kl": kl / max(1, n_tokens)}
    row |= {"clipped": clipped / max(1, n_tokens), "grad_norm": norm, "router_changed": changed / max(1, routed)}
    row |= {"router_changed_same_weights": float(stats[0, 5] / stats[0, 4].clamp(min=1)), **seconds}
    row |= {"rollout_tokens_per_s": length / seconds["seconds_rollout"], "padding": 1 - real / max(1, padded)}
    return row | {"memory_gb": memory}


def grpo_line(row, cfg):
    return (
        f"step {row['step']:>4}/{cfg.steps} | reward {row['reward']:.4f} | {row['answer_tokens']:.1f} tokens | "
        f"KL {row['kl']:.2e} | clipped {row['clipped']:.2%} | other experts {row['router_changed']:.2%} | "
        f"grad {row['grad_norm']:.3f} | rollout {row['seconds_rollout']:.1f} s at "
        f"{row['rollout_tokens_per_s']:,.0f} tokens/s, reward {row['seconds_reward']:.1f} s, "
        f"update {row['seconds_update']:.1f} s"
    )


TABLE = dict(
    loss=("training loss, nats per token", ".4f"),
    val_loss=("validation loss", ".4f"),
    val_bits_per_byte=("validation bits per byte", ".4f"),
    balance=("balance loss (1: balanced)", ".3f"),
    tokens_per_s=("tokens per second", ",.0f"),
    mfu=("model FLOPs utilisation", ".1%"),
    parameters=("parameters", ",d"),
    active_parameters=("of these active per token", ",d"),
    tokens_per_parameter=("training tokens per parameter", ".3g"),
    epochs=("passes over the most read data", ".2f"),
    memory_gb=("peak memory, GB", ".2f"),
    seconds=("seconds", ".0f"),
)


def final_report(model, cfg, data, results):
    """Print the table and samples; return what evaluation adds to results.json. data: a train.Data."""
    model.eval()
    print()
    for name, (title, form) in TABLE.items():
        value = format(results[name], form) if results.get(name) is not None else "n/a"
        print(f"{title:<32} {value if name != 'val_loss' or data.val_loader else 'no validation':>14}")
    if is_procedural(data.sources):
        text, scores = probes.report(model, data.sources[0][0], N_PEOPLE, N_PROBLEMS)
        print(text)
        return scores
    length = min(max(1, cfg.seq_len // 2), 32)
    new_tokens = min(cfg.sample_tokens, cfg.seq_len - length)
    if not new_tokens:
        return {}
    split, loader = ("validation", data.val_loader) if data.val_loader else ("training", data.loader)
    tokens_BL, _ = loader.next()
    prompts, samples = [row[:length].tolist() for row in tokens_BL[:2]], []
    options = dict(temperature=0.8, top_p=0.95, seed=cfg.seed, n_vocab=data.enc.n_vocab)
    new = generate(model, prompts, new_tokens, [data.enc.eot_token], **options)
    for before, after in zip(prompts, new, strict=True):
        samples.append({"prompt": data.enc.decode(before), "text": data.enc.decode(after)})
        print(f"\nprompt from {split}: {samples[-1]['prompt']}\nsample: {samples[-1]['text']}")
    return {"samples": samples}


def own_flags(cfg, without=()):
    """The flags that make this configuration, as words of a command line."""
    usual = {field.name: field.default for field in dataclasses.fields(cfg)} | cfg.preset_fields(cfg.preset)
    left_out = {"preset", "out_dir", "resume", "data", "vocab_size", *without}
    values = {name: getattr(cfg, name) for name, value in usual.items() if getattr(cfg, name) != value}
    values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
    flags = [f"--{name}={value}" for name, value in values.items() if name not in left_out]
    return " ".join(["", *[f"--preset={cfg.preset}"] * (cfg.preset != "tiny"), *flags])


def next_steps(run_dir, cfg, sources, results):
    """What to try after a run, as commands that fit this machine."""
    parts = [f"{directory}:{weight:g}" if len(sources) > 1 else str(directory) for directory, weight in sources]
    commands = [(f"python train.py --resume={run_dir} --steps={2 * cfg.steps}", "go on")]
    again = f"python train.py --data={','.join(parts)}"
    if cfg.dense:
        commands.append((again + own_flags(cfg, ["dense"]), "experts instead of dense layers, on the same data"))
    elif cfg.n_experts < 1024:
        more = min(1024, 4 * cfg.n_experts)
        flags = own_flags(cfg, ["n_experts"])
        commands.append((f"{again}{flags} --n_experts={more}", "more experts on the same data; --dense: none"))
    answers = [row["answer"] for row in results.get("reasoning", {}).values()]
    if answers and min(answers) < 0.95:  # there is something left to learn
        small = " --steps=10 --batch_prompts=64 --mini_batch=32 --eval_questions=100"
        small = "" if torch.cuda.is_available() else small
        commands.append(
            (f"python grpo.py --model={run_dir}{small}", "reinforcement learning on the reasoning problems")
        )
    commands.append((f"python -m study.show {run_dir} RUN...", "runs over one another"))
    commands.append(("python -m data.prepare --help", "text of your own"))
    return "\n".join(["", "what to try next:", *(f"  {command}  # {what}" for command, what in commands)])
