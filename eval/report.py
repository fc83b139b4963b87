"""The output of train.py and grpo.py: their first lines, the row and line of a step, the closing report."""

import math
import resource
import shlex

import torch

from data import shards
from eval import probes
from eval.generate import generate
from model import compute_dtype
from optimoe import guard, parallel
from optimoe.run import duration
from optimoe.sizes import count_params, flops_per_token, peak_flops


def first_lines(cfg, run, data, step):
    """What will be trained, where, and warnings."""
    params, tokens = count_params(cfg), cfg.batch_size * cfg.seq_len
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    size = f"{params.total:,} parameters ({params.active:,} active), {steps_left(cfg, step)} of {tokens:,} tokens"
    lines = [f"{run.dir}: {size}, {str(compute_dtype(cfg, run.device))[6:]} on {name} x {run.world}"]
    if cfg.steps < cfg.warmup_steps:
        what = f"steps={cfg.steps} ends within the warm-up, before lr={cfg.lr:g} is reached"
        lines.append(f"{what}; lower warmup_steps={cfg.warmup_steps}")
    passes = cfg.batch_size / max(1, sum(data.loader.n_windows))
    if passes > 1:
        lines.append(f"batch_size={cfg.batch_size}: each step reads the data {passes:.1f} times")
    without = [str(directory) for directory, weight in data.sources if (directory, weight) not in data.val_sources]
    if without and cfg.val_batches:
        lines.append(f"no validation on {', '.join(without)}: there is no validation data")
    return "\n".join(lines)


def steps_left(cfg, step):
    left = cfg.steps - step
    return f"{left} step" if left == 1 else f"{left} steps"


def read_window(window):
    """The row of a window of steps: means over batches and ranks. Waits for the device.

    By layer: load_max and load_min, relative to an even share; router_entropy of the mean probabilities, in nats."""
    loss, balance, z, batches = window["sums"].tolist()
    skipped, counts_NE = int(window["steps"][guard.BAD]), window["counts_NE"].float()
    row, layers = {}, max(1, len(counts_NE)) * batches
    if batches:  # else all steps were skipped
        row |= {"loss": loss / batches, "balance": balance / layers, "z": z / layers}
    row |= {"skipped_steps": skipped} if skipped else {}
    if batches and len(counts_NE):
        load_NE = counts_NE / counts_NE.mean(1, keepdim=True)
        p_NE = window["probs_NE"] / window["probs_NE"].sum(1, keepdim=True)
        row |= {"load_max": load_NE.amax(1).tolist(), "load_min": load_NE.amin(1).tolist()}
        row |= {"dead_experts": int((counts_NE == 0).sum()), "router_entropy": torch.special.entr(p_NE).sum(1).tolist()}
        row |= {"load": [[round(x, 3) for x in layer] for layer in load_NE.tolist()]}
    return row


def gpu_memory(device):
    """Peak memory in GiB, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def speed(tokens_per_s, cfg, device, world):
    """Tokens per second, their share of the GPUs' peak FLOP/s (None where unknown) and peak memory in GiB."""
    known = device.type == "cuda" and compute_dtype(cfg, device) == torch.bfloat16
    peak = peak_flops(torch.cuda.get_device_name(device)) if known else None
    mfu = tokens_per_s * flops_per_token(cfg) / (peak * world) if peak else None
    memory = gpu_memory(device) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens_per_s": tokens_per_s, "mfu": mfu, "memory_gb": memory}


def log_line(row, cfg):
    left = duration((cfg.steps - row["step"]) * cfg.batch_size * cfg.seq_len / row["tokens_per_s"])
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    load = f"{max(row['load_max']):.2f}" if "load_max" in row else "n/a"
    loss = f"{row['loss']:.4f}" if "loss" in row else "skipped"
    norm, rate = f"norm {float(row['grad_norm'] or 'nan'):.2f}", f"{row['tokens_per_s']:,.0f} tok/s | mfu {mfu}"
    head = f"step {row['step']:>6}/{cfg.steps} | loss {loss} | lr {row['lr']:.2e}"
    again = f" | repeated {row['repeated_steps']}" if "repeated_steps" in row else ""  # see docs/multi-gpu.md
    return f"{head} | {norm} | {rate} | load {load}{again} | eta {left}"


def val_row(loss, step, tokens, sources):
    """The row of a validation, with bits per byte where every data directory counts the bytes of its text."""
    row = {"step": step, "tokens": tokens, "val_loss": loss}
    splits = [(weight, shards.read_meta(directory)["splits"]["val"]) for directory, weight in sources]
    if all(meta.get("bytes") and "marks" not in meta["shards"][0] for _, meta in splits):  # answers' bytes are unknown
        per_token = sum(weight * meta["bytes"] / meta["tokens"] for weight, meta in splits)
        row["val_bits_per_byte"] = loss / math.log(2) / per_token * sum(weight for weight, _ in splits)
    return row


def val_line(row, cfg):
    bits = f" | {row['val_bits_per_byte']:.4f} bits/byte" if "val_bits_per_byte" in row else ""
    return f"step {row['step']:>6}/{cfg.steps} | validation loss {row['val_loss']:.4f}{bits}"


def grpo_start(cfg, run, job):
    return (
        f"{run.dir}: from {cfg.model}, {len(job.asked):,} questions, answers of up to {job.answer_tokens} tokens, "
        f"{steps_left(cfg, job.step)} of {cfg.batch_prompts} x {cfg.group_size} answers, "
        f"{str(job.model.dtype)[6:]} on {run.device.type} x {run.world}"
    )


def grpo_row(cfg, run, job, samples, reward_PG, batches, stats, norm, seconds):
    """The row of a step of grpo.py over all ranks, which wait for one another here. stats, norm: of grpo.update."""
    loss, kl, clipped, n_tokens, routed, changed = stats.sum(0).tolist()
    mixed_P = reward_PG.amin(1) < reward_PG.amax(1)
    # Without the KL term, a group of equal rewards teaches nothing.
    taught = mixed_P.repeat_interleave(cfg.group_size) | bool(cfg.kl_coef)
    ended = sum(sample.ids[-1] in job.tokens.eos for sample in samples)
    real = sum(len(sample.ids) - 1 for sample, used in zip(samples, taught, strict=True) if used)
    padded = sum(batch.tokens_BL.numel() for mini in batches for batch in mini)
    length = sum(sample.length for sample in samples)
    ended, right, mixed, real, padded, length = run.sum([ended, reward_PG.sum(), mixed_P.sum(), real, padded, length])
    n = cfg.batch_prompts * cfg.group_size
    row = {"step": job.step, "reward": right / n, "mixed_groups": mixed / cfg.batch_prompts, "ended": ended / n}
    row |= {"answer_tokens": length / n, "loss": loss / len(batches), "kl": kl / max(1, n_tokens)}
    row |= {"clipped": clipped / max(1, n_tokens), "grad_norm": norm, "router_changed": changed / max(1, routed)}
    row |= {"router_changed_same_weights": float(stats[0, 5] / stats[0, 4].clamp(min=1)), **seconds}
    row |= {"rollout_tokens_per_s": length / seconds["seconds_rollout"], "padding": 1 - real / max(1, padded)}
    return row | {"memory_gb": gpu_memory(run.device)}


def grpo_line(row, cfg):
    seconds = row["seconds_rollout"] + row["seconds_reward"] + row["seconds_update"]
    return (
        f"step {row['step']:>4}/{cfg.steps} | reward {row['reward']:.4f} | {row['answer_tokens']:.1f} tokens | "
        f"KL {row['kl']:.2e} | clipped {row['clipped']:.2%} | other experts {row['router_changed']:.2%} | "
        f"grad {row['grad_norm']:.3f} | rollout {row['seconds_rollout']:.1f} s at "
        f"{row['rollout_tokens_per_s']:,.0f} tokens/s, reward {row['seconds_reward']:.1f} s, "
        f"update {row['seconds_update']:.1f} s | eta {duration(seconds * (cfg.steps - row['step']))}"
    )


TABLE = dict(
    loss=("training loss, nats per token", ".4f"),
    val_loss=("validation loss", ".4f"),
    val_bits_per_byte=("validation bits per byte", ".4f"),
    balance=("balance loss (1: balanced)", ".3f"),
    tokens_per_s=("tokens per second", ",.0f"),
    mfu=("model FLOPs utilisation", ".1%"),
    parameters=("parameters", ",d"),
    active_parameters=("active parameters per token", ",d"),
    tokens_per_parameter=("training tokens per parameter", ".3g"),
    epochs=("passes over the most read data", ".2f"),
    memory_gb=("peak memory, GiB", ".2f"),
    seconds=("seconds", ".0f"),
)


def final_report(model, cfg, data, results):
    """Print the table and samples; return what evaluation adds to results.json. data: a train.Data."""
    model.eval()
    print()
    for name, (title, form) in TABLE.items():
        value = format(results[name], form) if results.get(name) is not None else "n/a"
        print(f"{title:<32} {value if name != 'val_loss' or data.val_loader else 'no validation':>14}")
    directory = data.sources[0][0]
    if "procedural" in shards.read_meta(directory):
        text, scores = probes.report(model, directory)
        print(text)
        return scores
    split, loader = ("validation", data.val_loader) if data.val_loader else ("training", data.loader)
    rows_BL, targets_BL, *_ = loader.next()
    answers_B = (targets_BL >= 0).int().argmax(1).tolist()  # where the first example's answer begins; 0 in text
    length = min(max(1, cfg.seq_len // 2), 32)
    prompts = [tuple(row[: at + 1 if at else length].tolist()) for row, at in zip(rows_BL, answers_B, strict=True)]
    prompts = [list(ids) for ids in dict.fromkeys(prompts)][:2]
    new_tokens = min(cfg.sample_tokens, cfg.seq_len - max(map(len, prompts)))
    if not new_tokens:
        return {}
    options = dict(temperature=0.8, top_p=0.95, seed=cfg.seed, n_vocab=data.enc.n_vocab)
    ends = [data.enc.eot_token, *getattr(data.enc, "ends", [])]
    new, decode = generate(model, prompts, new_tokens, ends, **options), data.enc.decode
    samples = [{"prompt": decode(before), "text": decode(ids)} for before, ids in zip(prompts, new, strict=True)]
    for sample in samples:
        print(f"\nprompt from {split}: {sample['prompt']}\nsample: {sample['text']}")
    return {"samples": samples}


def next_steps(run_dir, cfg, data, results):
    """What to try after a run, as commands that fit this machine, the number of ranks and the model."""
    run_dir, start = shlex.quote(str(run_dir)), parallel.runner()
    commands = {f"{start} train.py --resume={run_dir} --steps={2 * cfg.steps}": "train longer"}
    again = f"{start} train.py --config={run_dir}/config.json --out_dir={run_dir}-experts"
    if cfg.dense:
        commands[f"{again} --dense=false"] = "experts instead of dense layers, on the same data"
    elif cfg.n_experts < 1024 and not cfg.init_from:
        more = f"{again} --n_experts={min(1024, 4 * cfg.n_experts)}"
        commands[more] = "more experts on the same data; --dense: without experts"
    left = any(row["solution"] < 0.95 for row in results.get("reasoning", {}).values())  # something to learn
    if left and probes.fits_grpo(data.sources[0][0], cfg.seq_len):
        small = " --steps=10 --batch_prompts=64 --mini_batch=32 --eval_questions=100"
        small = "" if torch.cuda.is_available() else small
        commands[f"{start} grpo.py --model={run_dir}{small}"] = "reinforcement learning on the reasoning problems"
    commands[f"python -m study.show {run_dir}"] = "its curves; several runs in one picture"
    commands["python -m data.prepare --help"] = "text of your own"
    return "\n".join(["", "what to try next:", *(f"  {command}  # {what}" for command, what in commands.items())])
