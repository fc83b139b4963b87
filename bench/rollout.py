"""Post-training: tokens per second of sampling at several batch sizes, what padding costs, and where the time of a GRPO step goes.

    python -m bench.rollout --run=runs/NAME --csv bench/h100.csv --plot rollout.png                 # a trained model, on its own questions
    python -m bench.rollout --preset=paper-d512-e64-k4 --vocab-size=99584 --csv bench/h100.csv      # any size, random weights: sampling only
    python -m bench.rollout --run=runs/NAME --mini-batch=1024 --micro-tokens=65536 ...              # fields of grpo.py's config are for its step

Rows: "rollout", T the batch: p50 is the time in which the batch gains one token per row, so tokens/s = 1000 T / p50.
  full      every row goes on to --new-tokens
  ragged    rows end at random, after an eighth of that on average; only their own tokens count
"update", T the tokens of 1,024 such ragged answers: one forward and backward pass over them all,
  packed    in micro-batches of like lengths (grpo.micro_batches)
  padded    in the order of sampling, each micro-batch padded to the longest answer there is
"grpo", T the answers of a step: rollout, reward, update and full of one whole step (--run only), medians over the steps after the first.
"""

import dataclasses
import json
import random
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import grpo
from bench.compare import begin, finish
from bench.problem import Cost, Shape
from bench.results import DTYPES, HEADER, arguments, cli, latest, read
from bench.timing import quantiles, skipping
from eval.generate import generate
from model import GPT, ModelConfig
from optimoe import checkpoint, config, sizes
from optimoe.sizes import count_params, flops_per_token


@dataclass(frozen=True)
class BenchModel(ModelConfig):
    # Model
    preset: str = "tiny"  # a name of model.PRESETS

    preset_fields = staticmethod(sizes.preset_fields)


def timed(fn, repeats):
    """Quantiles in ms of a call that waits for the device by itself, after one call that compiles."""
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return quantiles(times)


def sampling(model, args, results, shape):
    """Adds the rollout rows."""
    rng, V = random.Random(0), model.cfg.vocab_size
    stops = range(
        V - max(1, 8 * V // args.new_tokens), V
    )  # random weights: a token is one of these once in new_tokens / 8 times
    for batch in args.batches:
        prompts = [[rng.randrange(V) for _ in range(args.prompt_tokens)] for _ in range(batch)]
        flops = flops_per_token(model.cfg, args.prompt_tokens + args.new_tokens) / 3
        cost = Cost(flops * batch, count_params(model.cfg).total * model.dtype.itemsize)
        for mode, stop_ids in (("full", ()), ("ragged", stops)):
            if mode == "ragged" and args.run:
                continue  # a trained model does not end at random
            made = []

            def run():
                made.append(generate(model, prompts, args.new_tokens, stop_ids, temperature=1.0, batch_size=batch))  # noqa: B023

            times = timed(run, args.repeats)
            tokens = sum(map(len, made[-1]))
            per_token = [t * batch / tokens for t in times]
            results.add(
                "rollout",
                model.cfg.impl,
                mode,
                shape(batch),
                type(times)(*per_token),
                cost,
                note=f"{1e3 * batch / per_token[1]:,.0f} tokens/s, {tokens / batch:.0f} tokens a row",
            )


def updating(model, args, results, shape):
    """Adds the rows of the update, over answers of geometric lengths."""
    device, V, rng = model.embed.weight.device, model.cfg.vocab_size, random.Random(0)
    samples = []
    for _ in range(1024 if device.type == "cuda" else 32):
        n = min(args.new_tokens, 1 + int(rng.expovariate(8 / args.new_tokens)))
        ids = [rng.randrange(V) for _ in range(args.prompt_tokens + n)]
        experts = torch.zeros(model.cfg.n_layers, len(ids) - 1, model.cfg.top_k, dtype=torch.int16, device=device)
        samples.append(grpo.Sample(ids, args.prompt_tokens, experts, ""))
    cfg = grpo.GRPOConfig(model="-", micro_tokens=args.micro_tokens)
    lengths = [len(s.ids) - 1 for s in samples]
    longest, ones = max(lengths), [1.0] * len(samples)
    rows = max(1, args.micro_tokens // longest)
    everyone = [list(range(i, min(i + rows, len(samples)))) for i in range(0, len(samples), rows)]
    for mode, parts in (
        ("packed", grpo.micro_batches(range(len(samples)), lengths, args.micro_tokens)),
        ("padded", everyone),
    ):
        padding = [
            samples[0]._replace(
                ids=[0] * (longest + 1),
                experts=samples[0].experts.new_zeros(model.cfg.n_layers, longest, model.cfg.top_k),
            )
        ]

        def run():
            for part in parts:  # noqa: B023
                mine = [samples[i] for i in part]  # noqa: B023
                if mode == "padded":  # noqa: B023  one row of the full length makes the whole micro-batch that long
                    mine[-1] = padding[0]  # noqa: B023
                batch = grpo.collate(mine, ones[: len(mine)], [1 / len(samples)] * len(mine), device)
                loss, _ = grpo.policy_loss(grpo.answer_logprobs(model, batch, cfg, V)[0], batch, cfg.clip, 0.0)
                loss.backward()
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        times = timed(run, args.repeats)
        note = f"{sum(lengths) / times.p50 * 1e3:,.0f} tokens/s in {len(parts)} micro-batches"
        results.add(
            "update",
            model.cfg.impl,
            mode,
            shape(sum(lengths)),
            times,
            Cost(flops_per_token(model.cfg) * sum(lengths), 0),
            note=note,
        )


def stepping(args, results, shape):
    """Adds the rows of whole GRPO steps on the questions that the model was trained on."""
    with tempfile.TemporaryDirectory() as tmp:
        grpo.main(
            [
                f"--model={args.run}",
                f"--out-dir={tmp}/run",
                f"--steps={1 + args.repeats}",
                "--eval-every=0",
                "--eval-questions=64",
                "--checkpoint-every=0",
                *args.rest,
            ]
        )
        rows = [json.loads(line) for line in (Path(tmp) / "run/metrics.jsonl").read_text().splitlines()]
        cfg = json.loads((Path(tmp) / "run/config.json").read_text())
    rows = [row for row in rows if "reward" in row][1:]  # the first step compiles
    parts = {part: [1e3 * row[f"seconds_{part}"] for row in rows] for part in ("rollout", "reward", "update")}
    parts["full"] = [sum(times) for times in zip(*parts.values(), strict=True)]
    whole = quantiles(parts["full"]).p50
    for part, times in parts.items():
        times = quantiles(times)
        results.add(
            "grpo",
            cfg["impl"],
            part,
            shape(cfg["batch_prompts"] * cfg["group_size"]),
            times,
            note=f"{times.p50 / whole:.1%} of the step",
        )
    rate = (
        sum(row["answer_tokens"] for row in rows) / len(rows) * cfg["batch_prompts"] * cfg["group_size"] / whole * 1e3
    )
    print(
        f"answers of {rows[-1]['answer_tokens']:.1f} tokens, {rate:,.0f} answer tokens/s over whole steps, padding {rows[-1]['padding']:.1%}"
    )


def plot(rows, path):
    """Sampling against the batch, padding, and the shares of a step; one colour per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(
        dict.fromkeys(
            tuple(row[letter] for letter in "DFEK") for row in rows if row["kernel"] in ("rollout", "update", "grpo")
        )
    )
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.4, 1, 1)
    )
    for i, size in enumerate(models):
        name = "D {}, F {}, E {}, K {}".format(*size)
        mine = [row for row in rows if tuple(row[letter] for letter in "DFEK") == size]
        for mode, style in (("full", "o-"), ("ragged", "s--")):
            points = sorted(
                (row["T"], 1e3 * row["T"] / row["p50_ms"])
                for row in mine
                if (row["kernel"], row["mode"]) == ("rollout", mode)
            )
            if points:
                left.plot(*zip(*points, strict=True), style, color=f"C{i}", ms=4, label=f"{name}, {mode}")
                for x, y in points if mode == "full" else ():
                    left.annotate(f"{y:,.0f}", (x, y), (-4, 5), textcoords="offset points", fontsize=8, ha="right")
        for j, mode in enumerate(("packed", "padded")):
            for row in mine:
                if (row["kernel"], row["mode"]) == ("update", mode):
                    bar = middle.bar(i + 0.4 * j, row["T"] / row["p50_ms"], 0.36, color=f"C{i}", alpha=1 - 0.5 * j)
                    middle.bar_label(bar, [f"{mode}\n{row['T'] / row['p50_ms']:,.0f}"], fontsize=8)
        step, bottom = {row["mode"]: row["p50_ms"] for row in mine if row["kernel"] == "grpo"}, 0.0
        for part, shade in (("rollout", 1.0), ("reward", 0.65), ("update", 0.35)) if step else ():
            bar = right.bar(i, step[part] / step["full"], 0.6, bottom=bottom, color=f"C{i}", alpha=shade)
            right.bar_label(bar, [f"{part}\n{step[part] / 1e3:.2f} s"], label_type="center", fontsize=8)
            bottom += step[part] / step["full"]
    left.set(xscale="log", yscale="log", xlabel="rows sampled together", ylabel="tokens per second", title="sampling")
    left.set_xticks(
        ticks := sorted({row["T"] for row in rows if row["kernel"] == "rollout"}), [str(tick) for tick in ticks]
    )
    left.minorticks_off()
    left.margins(x=0.15, y=0.1)
    left.legend(fontsize=8)
    middle.set(title="update, real tokens per millisecond", xticks=[])
    middle.margins(y=0.2)
    right.set(title="share of a GRPO step", xticks=[], ylim=(0, 1))
    figure.suptitle(f"{rows[-1]['gpu']}, {rows[-1]['dtype']}, torch {rows[-1]['torch']}", fontsize=11)
    figure.savefig(path, dpi=130)
    print(path)


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument(
        "--run", default="", help="run directory of train.py; without it: random weights of the model flags"
    )
    parser.add_argument(
        "--batches",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[64, 128, 256, 512, 1024] if cuda else [4, 8],
    )
    parser.add_argument("--prompt-tokens", type=int, default=64 if cuda else 8)
    parser.add_argument("--new-tokens", type=int, default=256 if cuda else 16)
    parser.add_argument("--micro-tokens", type=int, default=16384 if cuda else 64)
    parser.add_argument("--repeats", type=int, default=3 if cuda else 1)
    parser.add_argument("--plot", type=Path, help="PNG of all rows of --csv, or of this run's")
    args, results = begin(parser, argv, rest=True)
    device, dtype = "cuda" if cuda else "cpu", str(DTYPES[args.dtype])[6:]
    if args.run:
        model = checkpoint.load_model(args.run, device, dtype=dtype)
        room = model.cfg.seq_len - args.new_tokens
        if room < args.prompt_tokens:  # half and half
            args.prompt_tokens, args.new_tokens = model.cfg.seq_len // 2, model.cfg.seq_len // 2
        args.rest += [f"--micro-tokens={args.micro_tokens}", f"--dtype={dtype}", f"--device={device}"]
    else:
        cfg = config.parse(
            BenchModel, [f"--seq-len={args.prompt_tokens + args.new_tokens}", *args.rest, f"--dtype={dtype}"]
        )
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 512)).to(device).eval()
    shape = lambda T: Shape(T, model.cfg.d_model, model.cfg.d_expert, model.cfg.n_experts, model.cfg.top_k)  # noqa: E731
    failures = []
    print(HEADER)
    for what in (
        partial(sampling, model, args),
        partial(updating, model, args),
        *([partial(stepping, args)] if args.run else []),
    ):
        with skipping(what.func.__name__, failures):
            what(results, shape)
    if args.plot:
        plot(
            [
                row
                for row in latest(read(args.csv) if args.csv else results.rows).values()
                if row["gpu"] == results.environment["gpu"]
            ],
            args.plot,
        )
    return finish(args, results, failures)


if __name__ == "__main__":
    raise SystemExit(cli(main))
