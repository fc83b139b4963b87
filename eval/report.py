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
    if is_procedural(sources):
        longest = longest_probe(sources[0][0])
        remedy = f"the closing report has texts of {longest} tokens, on which it tests the model: use as many or more"
        require(cfg.seq_len >= longest, "seq_len", cfg.seq_len, remedy)


def longest_probe(directory):
    """Tokens of the longest text of probes.report that does not adapt to the model's seq_len."""
    cfg, enc = procedural.read_config(directory), tokenizer.load(directory)
    texts = []
    if cfg.exposures:
        people = facts.people(cfg.facts)[:N_PEOPLE]
        texts += [probe.prompt + probe.value + "." for probe in facts.probes(people, cfg.facts.seed)]
        texts += ["".join(facts.segments(cfg.facts, person, 10**6)) for person in people]
    if cfg.n_problems:
        problems = [reasoning.problem(cfg.reasoning, i, "test", 1) for i in range(N_PROBLEMS)]
        shown = reasoning.problem(cfg.reasoning, N_PROBLEMS, "test", min(3, cfg.reasoning.max_steps))
        texts += [p.question + p.solution for p in problems] + [shown.question]
    if cfg.n_mano:
        longest = cfg.reasoning.mano_length + 2
        problems = [reasoning.mano(cfg.reasoning, i, "test", longest) for i in range(N_PROBLEMS)]
        texts += [p.question + p.solution for p in problems]
    return max((len(prompt(enc, text)) for text in texts), default=0) + 4


def bytes_per_token(sources, split):
    """UTF-8 bytes of text per token of the mixture, for bits per byte; None where a directory counts no bytes."""
    splits = [(weight, shards.read_meta(directory)["splits"][split]) for directory, weight in sources]
    if not all(meta.get("bytes") for _, meta in splits):
        return None
    return sum(weight * meta["bytes"] / meta["tokens"] for weight, meta in splits) / sum(weight for weight, _ in splits)


def first_lines(cfg, run, data, step):
    """What is going to be trained, where, and what should be known about it before."""
    params = count_params(cfg)
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    lines = [
        f"{run.dir}: {params.total:,} parameters ({params.active:,} active), {cfg.steps - step} "
        f"step{'s' * (cfg.steps - step != 1)} of {cfg.batch_size * cfg.seq_len:,} tokens, "
        f"{str(compute_dtype(cfg, run.device))[6:]} on {name} x {run.world}"
    ]
    if cfg.steps < cfg.warmup_steps:
        lines.append(
            f"steps={cfg.steps} ends within the warm-up, before lr={cfg.lr:g} is reached; "
            f"lower warmup_steps={cfg.warmup_steps}"
        )
    without = [str(directory) for directory, weight in data.sources if (directory, weight) not in data.val_sources]
    if without and cfg.val_batches:
        lines.append(f"no validation on {', '.join(without)}: there is no validation data")
    return "\n".join(lines)


def read_window(window):
    """Means over batches and ranks, the load of the experts (1: an even share) and the entropy of the mean router
    probabilities in nats; waits for the device. load_max and load_min are lists by layer, load by layer and expert."""
    loss, balance, z, batches = window["sums"].tolist()
    skipped = int(window["steps"][guard.BAD])
    row = {"skipped_steps": skipped} if skipped else {}
    if not batches:  # all steps were skipped
        return row
    counts_NE = window["counts_NE"].float()
    layers = max(1, len(counts_NE)) * batches  # balance and z are reported per layer: 1 is balance
    row = {"loss": loss / batches, "balance": balance / layers, "z": z / layers, **row}
    if len(counts_NE):
        load_NE = counts_NE / counts_NE.mean(1, keepdim=True)
        p_NE = window["probs_NE"] / window["probs_NE"].sum(1, keepdim=True)
        row |= {
            "load_max": load_NE.amax(1).tolist(),
            "load_min": load_NE.amin(1).tolist(),
            "dead_experts": int((counts_NE == 0).sum()),
            "router_entropy": torch.special.entr(p_NE).sum(1).tolist(),
            "load": [[round(x, 3) for x in layer] for layer in load_NE.tolist()],
        }
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
    return (
        f"step {row['step']:>6}/{cfg.steps} | loss {loss} | lr {row['lr']:.2e} | "
        f"norm {float(row['grad_norm'] or 'nan'):.2f} | {row['tokens_per_s']:,.0f} tok/s | mfu {mfu} | "
        f"load {load} | eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )


def val_row(loss, step, tokens, sources):
    """The row of a validation, with bits per byte where the data counts its bytes."""
    per_token = bytes_per_token(sources, "val")
    bits = {"val_bits_per_byte": loss / math.log(2) / per_token} if per_token else {}
    return {"step": step, "tokens": tokens, "val_loss": loss, **bits}


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
    ended = sum(sample.ids[-1] in job.tokens.eos for sample in samples)
    mixed_P = reward_PG.amin(1) < reward_PG.amax(1)
    taught = mixed_P.repeat_interleave(cfg.group_size) | bool(
        cfg.kl_coef
    )  # without the KL, equal rewards teach nothing
    real = sum(len(sample.ids) - 1 for sample, used in zip(samples, taught, strict=True) if used)
    padded = sum(batch.tokens_BL.numel() for mini in batches for batch in mini)
    length = sum(sample.length for sample in samples)
    mine = [ended, reward_PG.sum(), mixed_P.sum(), real, padded, length]
    ended, right, mixed, real, padded, length = run.sum(mine)
    n, cuda = cfg.batch_prompts * cfg.group_size, run.device.type == "cuda"
    return {
        "step": job.step,
        "reward": right / n,
        "mixed_groups": mixed / cfg.batch_prompts,
        "ended": ended / n,
        "answer_tokens": length / n,
        "loss": loss / len(batches),
        "kl": kl / max(1, n_tokens),
        "clipped": clipped / max(1, n_tokens),
        "grad_norm": norm,
        "router_changed": changed / max(1, routed),
        "router_changed_same_weights": float(stats[0, 5] / stats[0, 4].clamp(min=1)),
        **seconds,
        "rollout_tokens_per_s": length / seconds["seconds_rollout"],
        "padding": 1 - real / max(1, padded),
        "memory_gb": torch.cuda.max_memory_allocated(run.device) / 2**30 if cuda else None,
    }


def grpo_line(row, cfg):
    return (
        f"step {row['step']:>4}/{cfg.steps} | reward {row['reward']:.4f} | {row['answer_tokens']:.1f} tokens | "
        f"KL {row['kl']:.2e} | clipped {row['clipped']:.2%} | other experts {row['router_changed']:.2%} | "
        f"grad {row['grad_norm']:.3f} | rollout {row['seconds_rollout']:.1f} s at "
        f"{row['rollout_tokens_per_s']:,.0f} tokens/s, reward {row['seconds_reward']:.1f} s, "
        f"update {row['seconds_update']:.1f} s"
    )


TABLE = [
    ("training loss, nats per token", "loss", ".4f"),
    ("validation loss", "val_loss", ".4f"),
    ("validation bits per byte", "val_bits_per_byte", ".4f"),
    ("balance loss (1: balanced)", "balance", ".3f"),
    ("tokens per second", "tokens_per_s", ",.0f"),
    ("model FLOPs utilisation", "mfu", ".1%"),
    ("parameters", "parameters", ",d"),
    ("of these active per token", "active_parameters", ",d"),
    ("training tokens per parameter", "tokens_per_parameter", ".3g"),
    ("passes over the most read data", "epochs", ".2f"),
    ("peak memory, GB", "memory_gb", ".2f"),
    ("seconds", "seconds", ".0f"),
]


def final_report(model, cfg, data, results):
    """Print the table and samples; return what evaluation adds to results.json. data: a train.Data."""
    model.eval()
    print()
    for title, name, form in TABLE:
        value = format(results[name], form) if results.get(name) is not None else "n/a"
        if name == "val_loss" and not data.val_loader:
            value = "no validation"
        print(f"{title:<32} {value:>14}")
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
    prompts = [row[:length].tolist() for row in tokens_BL[:2]]
    end, n_vocab = [data.enc.eot_token], data.enc.n_vocab
    new = generate(model, prompts, new_tokens, end, temperature=0.8, top_p=0.95, seed=cfg.seed, n_vocab=n_vocab)
    texts = [(data.enc.decode(prompt), data.enc.decode(ids)) for prompt, ids in zip(prompts, new, strict=True)]
    for before, after in texts:
        print(f"\nprompt from {split}: {before}\nsample: {after}")
    return {"samples": [{"prompt": before, "text": after} for before, after in texts]}


def own_flags(cfg, without=()):
    """The flags that make this configuration, as words of a command line."""
    usual = {field.name: field.default for field in dataclasses.fields(cfg)} | cfg.preset_fields(cfg.preset)
    left_out = {"preset", "out_dir", "resume", "data", "vocab_size", *without}
    flags = [] if cfg.preset == "tiny" else [f"--preset={cfg.preset}"]
    for name, default in usual.items():
        value = getattr(cfg, name)
        if name not in left_out and value != default:
            flags.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(["", *flags])


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
        small = (
            "" if torch.cuda.is_available() else " --steps=10 --batch_prompts=64 --mini_batch=32 --eval_questions=100"
        )
        commands.append(
            (f"python grpo.py --model={run_dir}{small}", "reinforcement learning on the reasoning problems")
        )
    commands += [
        (f"python -m study.show {run_dir} RUN...", "runs over one another"),
        ("python -m data.prepare --help", "text of your own"),
    ]
    return "\n".join(["", "what to try next:", *(f"  {command}  # {what}" for command, what in commands)])
