"""Models of Hugging Face transformers with these kernels as their experts, against transformers' own implementations of the experts.

    python -m bench.hf_layer --csv hf.csv                               Qwen3-MoE, T,D,F,E,K = 16384,2048,768,128,8 (the layer of Qwen3-30B-A3B)
    python -m bench.hf_layer --family mixtral --shape 16384,4096,14336,8,2

"hf-block" is one MoE block, router included; "hf-model" is a whole model of --layers layers with attention and norms, without embeddings
and head, on sequences of 4096 tokens. Needs transformers 5 (pip install transformers). implementation: moe_kernels, grouped_mm (the default
of transformers), eager (a loop over experts), batched_mm (gathers a weight matrix for every routed row: for small shapes only).
"""

from functools import partial

import torch

from bench.compare import begin, finish
from bench.problem import TINY, Cost, Shape, layer_cost, parse_shape, require_accuracy, rms
from bench.results import DTYPES, HEADER, arguments, cli, typed
from bench.timing import memory_mib, skipping, times_ms
from moe_kernels.transformers import NAME, register

SEQ_LEN = 4096


def make_model(family, shape, layers, dtype, device):
    """A random model of transformers without its head; small vocabulary, 128 wide heads where the width allows."""
    import transformers

    _, D, F, E, K = shape
    head_dim = 128 if D >= 512 else 16
    heads = D // head_dim
    common = dict(
        vocab_size=128,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_dim,
        num_experts_per_tok=K,
        max_position_embeddings=SEQ_LEN,
        norm_topk_prob=True,
    )
    cfg = {
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **common, num_experts=E, moe_intermediate_size=F, intermediate_size=F
        ),
        "mixtral": lambda: transformers.MixtralConfig(**common, num_local_experts=E, intermediate_size=F),
        "olmoe": lambda: transformers.OlmoeConfig(
            **common | dict(num_key_value_heads=heads), num_experts=E, intermediate_size=F
        ),
    }[family]()
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModel.from_config(cfg, dtype=dtype, attn_implementation="sdpa")


def passes(module, inputs, dy):
    """(forward, backward, full) as functions without arguments; full returns the output and the gradients of input and parameters."""
    result = lambda out: out if torch.is_tensor(out) else getattr(out, "last_hidden_state", out[0])  # noqa: E731
    leaves = [*inputs.values(), *(p for p in module.parameters() if p.requires_grad)]

    def forward():
        return result(module(**inputs))

    def backward(y):
        return torch.autograd.grad(y, leaves, dy, allow_unused=True)  # a model's embedding takes no part

    def full():
        y = forward()
        return y.detach(), *backward(y)

    return forward, backward, full


def bench(results, kernel, model, module, inputs, args, shape, layers, failures):
    y = passes(module, inputs, None)[0]()
    dy = torch.randn_like(y)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        truth = passes(module, inputs, dy)[0]()
    for name in args.impl.split(","):
        with skipping(f"{kernel} {name}", failures):
            model.set_experts_implementation(name)
            forward, backward, full = passes(module, inputs, dy)
            y, *_ = full()
            # Both sides round to bfloat16 at each of several steps, and in a model every layer adds to that.
            error = require_accuracy({"y": rms(y, truth)}, y.dtype, slack=4 * layers)
            del y
            with torch.no_grad():
                first = times_ms(forward)
            both = times_ms(full)
            peak, saved = memory_mib(forward, backward)
            add = partial(results.add, kernel, name, shape=shape, routing="softmax")
            forward_cost, full_cost = (
                Cost(layers * layer_cost(shape, mode).flops, 0) for mode in ("forward", "full")
            )  # of the experts alone
            add(mode="forward", times=first, cost=forward_cost, note=f"error {error:.1e}")
            add(mode="full", times=both, cost=full_cost, peak_mib=peak, saved_mib=saved)


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--family", choices=("qwen3_moe", "mixtral", "olmoe"), default="qwen3_moe")
    parser.add_argument(
        "--shape",
        type=typed(parse_shape),
        default=Shape(16384, 2048, 768, 128, 8) if cuda else TINY[0],
        metavar="T,D,F,E,K",
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--impl", default=f"{NAME},grouped_mm,eager")
    args, results = begin(parser, argv)
    shape, dtype, failures, device = args.shape, DTYPES[args.dtype], [], "cuda" if cuda else "cpu"
    register()
    print(HEADER)
    model = make_model(args.family, shape, args.layers, dtype, device)
    length = min(shape.T, SEQ_LEN)
    x = torch.randn(max(1, shape.T // length), length, shape.D, device=device, dtype=dtype, requires_grad=True)
    shape = shape._replace(T=x.shape[0] * length)
    bench(results, "hf-block", model, model.layers[0].mlp, {"hidden_states": x}, args, shape, 1, failures)
    bench(results, "hf-model", model, model, {"inputs_embeds": x}, args, shape, args.layers, failures)
    full = {(row["kernel"], row["implementation"]): row["p50_ms"] for row in results.rows if row["mode"] == "full"}
    for (kernel, name), ms in full.items():
        if name != NAME and (kernel, NAME) in full:
            print(f"{kernel}: {NAME} is {ms / full[kernel, NAME]:.2f} times as fast as {name} (forward + backward)")
    return finish(args, results, failures)


if __name__ == "__main__":
    raise SystemExit(cli(main))
