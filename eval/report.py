"""What a run tells people: the line of a step, and the table, scores and samples at its end."""

import resource

import torch

from data import shards
from eval.generate import generate
from optimoe import guard


def bytes_per_token(sources, split):
    """UTF-8 bytes of text per token of the mixture, for bits per byte; None where a directory does not count its bytes."""
    splits = [(weight, shards.read_meta(directory)["splits"][split]) for directory, weight in sources]
    if not all(meta.get("bytes") for _, meta in splits):
        return None
    return sum(weight * meta["bytes"] / meta["tokens"] for weight, meta in splits) / sum(weight for weight, _ in splits)


def read_window(window):
    """Means over batches and ranks, the load of the experts (1: an even share) and the entropy of the mean router probabilities in nats; waits
    for the device. load_max and load_min are lists by layer, load by layer and expert."""
    loss, balance, z, batches = window["sums"].tolist()
    counts_NE = window["counts_NE"].float()
    layers = max(1, len(counts_NE)) * batches  # balance and z are reported per layer: 1 is balance
    row = {"loss": loss / batches, "balance": balance / layers, "z": z / layers}
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
    if bad := int(window["steps"][guard.BAD]):
        row["skipped_steps"] = bad
    return row


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def log_line(row, cfg, tokens_per_step):
    eta = int((cfg.steps - row["step"]) * tokens_per_step / row["tokens_per_s"])
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    load = f"{max(row['load_max']):.2f}" if "load_max" in row else "n/a"
    return (
        f"step {row['step']:>6}/{cfg.steps} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {float(row['grad_norm'] or 'nan'):.2f} | "
        f"{row['tokens_per_s']:,.0f} tok/s | mfu {mfu} | load {load} | eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
    )


def next_steps(run_dir, cfg, sources):
    """What to try after a run, as commands."""
    data = ",".join(f"{directory}:{weight:g}" if len(sources) > 1 else str(directory) for directory, weight in sources)
    commands = [
        (f"python train.py --resume={run_dir} --steps={2 * cfg.steps}", "go on"),
        (
            f"python train.py --data={data} --n_experts={4 * cfg.n_experts}",
            "more experts on the same data; --dense: none",
        ),
        (f"python -m study.show {run_dir} RUN...", "runs over one another"),
        ("python -m data.prepare --help", "text of your own"),
    ]
    if "procedural" in shards.read_meta(sources[0][0]):
        commands.insert(2, (f"python grpo.py --model={run_dir}", "reinforcement learning on the reasoning problems"))
    width = max(len(command) for command, _ in commands)
    return "\n".join(["", "what to try next:", *(f"  {command:<{width}}  # {what}" for command, what in commands)])


def final_report(model, cfg, sources, enc, val_loader, results):
    """Print the table and samples; return what evaluation adds to results.json."""
    model.eval()
    lines = [
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
    print()
    for title, name, form in lines:
        print(f"{title:<32} {'n/a' if results.get(name) is None else format(results[name], form):>14}")
    if "procedural" in shards.read_meta(sources[0][0]):
        from eval import probes  # only this data needs it

        text, scores = probes.report(model, sources[0][0])
        print(text)
        return scores
    if not cfg.sample_tokens:
        return {}
    tokens_BL, _ = val_loader.next()
    length = min(cfg.seq_len // 2, 32)
    prompts = [row[:length].tolist() for row in tokens_BL[:2]]
    new = generate(
        model,
        prompts,
        min(cfg.sample_tokens, cfg.seq_len - length),
        [enc.eot_token],
        temperature=0.8,
        top_p=0.95,
        seed=cfg.seed,
        n_vocab=enc.n_vocab,
    )
    samples = [
        {"prompt": enc.decode(prompt), "text": enc.decode(ids)} for prompt, ids in zip(prompts, new, strict=True)
    ]
    for sample in samples:
        print(f"\nprompt from validation: {sample['prompt']}\nsample: {sample['text']}")
    return {"samples": samples}
