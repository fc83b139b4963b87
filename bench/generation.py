"""Tokens per second of generation: with the KV cache (eval/generate.py), recomputing every position, and transformers with the same weights.

    python -m bench.generation --csv generate.csv                          batches of 1, 16, 256; prompts of 128 tokens, 128 new ones
    python -m bench.generation --preset paper-d1024-e16-k2 --batch 1,64 --prompt 1024 --new 256 --impl cache,hf

kernel "generate"; T is the batch. The times are per step, one token of every row, the whole call with its prompts divided by the new tokens;
"recompute" is the mean over eight lengths. gb_s counts the weights that a step must read and the cache; ceiling is the time of reading them at the
speed of a copy. "hf" is generate() of transformers 5 as it comes, "hf+moe_kernels" the same with these kernels as its experts.
The weights are random, so every text has the full length; they reach transformers through optimoe/hf.py.
"""

import tempfile
import time
from functools import partial

import torch

from bench.compare import begin, finish
from bench.problem import Cost, Shape
from bench.results import DTYPES, HEADER, arguments, cli
from bench.timing import quantiles, skipping
from eval.generate import any_shape, generate
from eval.kv_cache import KVCache
from model import GPT
from optimoe import hf
from optimoe.load import frozen
from optimoe.sizes import count_params, preset

IMPLS = ("cache", "recompute", "hf", "hf+moe_kernels")


def step_cost(cfg, batch, length, itemsize):
    """Cost of one token for each of `batch` rows that have `length` tokens: 2 FLOPs per active weight and 4 H d per cached token and layer;
    weights of the parts that always run, of as many experts as batch * K can reach, and keys and values."""
    params = count_params(cfg)
    expert = 3 * cfg.d_model * cfg.d_expert * cfg.n_layers
    always = (
        params.active - params.embedding - cfg.top_k * expert + cfg.vocab_size * cfg.d_model
    )  # with the head, without the lookup
    cached = batch * length * cfg.n_layers * cfg.head_dim
    flops = 2 * batch * (always + cfg.top_k * expert) + 4 * cached * cfg.n_heads
    return Cost(
        flops, itemsize * (always + min(cfg.n_experts, batch * cfg.top_k) * expert + 2 * cached * cfg.n_kv_heads)
    )


def seconds(fn):
    """(duration, result) of fn(), waiting for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
@any_shape
def recompute(model, prompts, new, samples=8):
    """Mean seconds of a step that runs the model over prompt and answer so far, over `samples` lengths of the answer."""
    total, steps = 0.0, sorted({round(i * (new - 1) / max(1, samples - 1)) for i in range(samples)})
    for step in steps:
        ids = torch.nn.functional.pad(prompts, (0, step), value=1)
        forward = lambda: (
            model(ids, cache=KVCache(model.cfg, *ids.shape, ids.device, model.dtype)).logits[:, 0].argmax(1)
        )  # noqa: B023, E731
        forward()  # a new shape
        total += seconds(forward)[0]
    return total / len(steps)


def load_theirs(model, dtype, device):
    """The same weights in transformers."""
    import transformers

    from moe_kernels.transformers import register

    register()
    with tempfile.TemporaryDirectory() as directory:
        hf.save_model(model, directory, dtype)
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device)


def runner(name, model, theirs, prompts, new):
    """A function that generates `new` tokens for every prompt and returns them as lists."""
    if name == "cache":
        rows = prompts.tolist()
        return lambda: generate(model, rows, new, batch_size=len(rows))
    theirs.set_experts_implementation(name.partition("+")[2] or "grouped_mm")
    options = dict(attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new, min_new_tokens=new)
    return lambda: theirs.generate(prompts, **options)[:, prompts.shape[1] :].tolist()


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--preset", default="paper-d512-e64-k4" if cuda else "tiny")
    parser.add_argument("--batch", default="1,16,256" if cuda else "1,3")
    parser.add_argument("--prompt", type=int, default=128 if cuda else 8, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128 if cuda else 6, help="tokens generated for each prompt")
    parser.add_argument("--impl", default=",".join(IMPLS), help="comma-separated, of " + ", ".join(IMPLS))
    parser.add_argument("--repeats", type=int, default=3)
    args, results = begin(parser, argv)
    dtype, failures, device, names = DTYPES[args.dtype], [], "cuda" if cuda else "cpu", args.impl.split(",")
    if unknown := set(names) - set(IMPLS):
        parser.error(f"--impl {','.join(unknown)}: known are {', '.join(IMPLS)}")
    torch.manual_seed(0)
    cfg = preset(args.preset, seq_len=args.prompt + args.new, dtype=str(dtype)[6:])
    cfg = cfg if cfg.vocab_size else preset(args.preset, seq_len=cfg.seq_len, dtype=cfg.dtype, vocab_size=320)
    with torch.device(device):
        model = frozen(GPT(cfg).eval())
    theirs = None
    with skipping("transformers", failures):
        theirs = load_theirs(model, dtype, device) if any(name.startswith("hf") for name in names) else None
    print(HEADER)
    machine = results.add_ceilings()
    for batch in map(int, args.batch.split(",")):
        shape = Shape(batch, cfg.d_model, cfg.d_expert, cfg.n_experts, cfg.top_k)
        cost = step_cost(cfg, batch, args.prompt + args.new // 2, dtype.itemsize)
        add = partial(
            results.add, "generate", shape=shape, mode="step", cost=cost, ceiling_ms=cost.bytes / machine.tb_s * 1e-9
        )
        prompts = torch.randint(cfg.vocab_size, (batch, args.prompt), device=device)
        first = None
        for name in names:
            if name.startswith("hf") and theirs is None:
                continue
            with skipping(f"{name}, batch {batch}", failures):
                if name == "recompute":
                    times, note = [recompute(model, prompts, args.new) for _ in range(args.repeats)], ""
                else:
                    run = runner(name, model, theirs, prompts, args.new)
                    tokens = run()  # compiles
                    times = [seconds(run)[0] / args.new for _ in range(args.repeats)]
                    first = first or (name, tokens)
                    same = sum(a[0] == b[0] for a, b in zip(tokens, first[1], strict=True)) / batch
                    note = f"; {same:.0%} of the first tokens are those of {first[0]}"
                times = quantiles([1e3 * t for t in times])
                add(implementation=name, times=times, note=f"{batch / times.p50 * 1e3:,.0f} tokens/s{note}")
    return finish(args, results, failures)


if __name__ == "__main__":
    raise SystemExit(cli(main))
