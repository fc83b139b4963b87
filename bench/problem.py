"""What the benchmarks compute: shapes, FLOP and byte counts, random inputs, and the float64 truth of results.

A full float64 reference of a large layer takes seconds and tens of GB, so checks compare slices: all outputs of some
tokens, and the weight gradients of some experts. Slices are exact, because a token's output depends on its K experts
alone and a weight's gradient on its own rows alone.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.experts import experts_bwd, experts_fwd
from moe_kernels.routing import route_bwd, route_fwd

# RMS ratio ||a - b|| / ||b|| that a correct result stays under, on unit-scale data.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


class Shape(NamedTuple):
    T: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self):
        return ",".join(map(str, self))


TARGETS = (
    Shape(32768, 2048, 768, 128, 8),
    Shape(24576, 1536, 256, 128, 8),
    Shape(65536, 512, 1024, 64, 4),
    Shape(32768, 4096, 512, 128, 8),
    Shape(8192, 2048, 768, 128, 8),
    Shape(1024, 2048, 768, 128, 8),
    Shape(16384, 2880, 2880, 128, 4),
    Shape(32768, 2048, 512, 512, 10),
)
TINY = (Shape(64, 32, 48, 4, 2),)  # for a CPU


def parse_shape(text):
    """ "T,D,F,E,K" as a Shape; ValueError for anything else."""
    numbers = [int(word) for word in text.split(",")] if re.fullmatch(r"\d+(,\d+){4}", text) else []
    if not numbers or min(numbers) < 1 or numbers[4] > numbers[3]:
        raise ValueError(f"shape {text!r}: expected T,D,F,E,K with 1 <= K <= E, such as {TARGETS[0]}")
    return Shape(*numbers)


def chosen(texts):
    """The shapes of a command line. If there are none, the targets, or on a CPU the tiny one."""
    usual = TARGETS if torch.cuda.is_available() else TINY
    return [parse_shape(text) for text in texts] or list(usual)


class Cost(NamedTuple):
    flops: int
    bytes: int  # the fewest that must cross device memory: each input read once, each output written once

    def floor_ms(self, tflops, tb_s):
        """The roofline: no kernel takes less on a machine of `tflops` TFLOP/s and `tb_s` TB/s."""
        return max(self.flops / tflops, self.bytes / tb_s) * 1e-9


FORWARD = ("dispatch", "up", "down", "combine")
BACKWARD = ("dswiglu", "dw_out", "dx", "combine_dx", "dw_in")


def kernel_costs(shape, itemsize=2):
    """The Cost of each kernel, by name. `itemsize`: bytes per element of activations, weights and router logits."""
    T, D, F, E, K = shape
    S, b = T * K, itemsize
    token, row = b * T * D, b * S * D  # one (T, D) and one (S, D) tensor
    hidden = b * S * F
    w_out = b * min(E, S) * D * F  # weights of experts that have rows
    w_in = 2 * w_out
    x = min(token, row)  # gathered rows: a token is read again from L2
    return {
        "route_fwd": Cost(0, b * T * E + 8 * S),
        "route_bwd": Cost(0, 2 * b * T * E + 12 * S),
        "dispatch": Cost(0, 12 * S),
        "up": Cost(4 * S * D * F, x + w_in + 3 * hidden),
        "down": Cost(2 * S * D * F, hidden + w_out + row),
        "combine": Cost(0, row + token),
        "dswiglu": Cost(2 * S * D * F, x + w_out + 5 * hidden),
        "dw_out": Cost(2 * S * D * F, x + hidden + w_out),
        "dx": Cost(4 * S * D * F, 2 * hidden + w_in + row),
        "combine_dx": Cost(0, row + token),
        "dw_in": Cost(4 * S * D * F, x + 2 * hidden + w_in),
    }


def layer_cost(shape, mode, itemsize=2):
    """Cost of the expert layer in mode forward (6 S D F FLOPs), backward (12 S D F) or full (18 S D F)."""
    costs = kernel_costs(shape, itemsize)
    names = {"forward": FORWARD, "backward": BACKWARD, "full": FORWARD + BACKWARD}[mode]
    return Cost(*map(sum, zip(*(costs[name] for name in names), strict=True)))


ROUTINGS = ("softmax", "zipf1.5")


def router_logits(shape, routing, generator):
    """Logits (T, E) float32 whose top-k makes the routing: "softmax" (independent normal logits) or "zipf1.5" (expert e
    is drawn in proportion to (e + 1)^-1.5, without replacement)."""
    T, E, device = shape.T, shape.E, generator.device
    if routing == "softmax":
        return torch.randn(T, E, generator=generator, device=device)
    # Adding Gumbel noise to log-probabilities and taking the top k samples k without replacement.
    gumbel = -torch.empty(T, E, device=device).exponential_(generator=generator).log()
    return gumbel - 1.5 * torch.arange(1, E + 1, device=device).log()


class Inputs(NamedTuple):
    x_TD: Tensor
    w_in_EGD: Tensor
    w_out_EDF: Tensor
    gates_TK: Tensor  # float32
    experts_TK: Tensor  # int32
    dy_TD: Tensor
    logits_TE: Tensor  # float32; gates and experts come from them


def make_inputs(shape, dtype, device, routing="softmax"):
    """Random inputs: x and dy ~ N(0, 1), weights ~ N(0, 1) / sqrt(their fan-in), so everything has unit scale."""
    generator = torch.Generator(device).manual_seed(0)
    T, D, F, E, K = shape
    randn = lambda *size: torch.randn(size, generator=generator, device=device, dtype=dtype)
    logits = router_logits(shape, routing, generator)
    gates, experts, *_ = reference.route(logits, K)
    x, w_in, w_out, dy = randn(T, D), randn(E, 2 * F, D) * D**-0.5, randn(E, D, F) * F**-0.5, randn(T, D)
    return Inputs(x, w_in, w_out, gates.contiguous(), experts.contiguous(), dy, logits)


def run_kernels(inputs):
    """Launches every kernel of the layer once, forward and backward: (y, dx, dw_in, dw_out, dgates)."""
    x, w_in, w_out, gates, experts, dy, _ = inputs
    out = experts_fwd(x, w_in, w_out, gates, experts)
    return out[0], *experts_bwd(dy, x, w_in, w_out, gates, *out[1:])


def empty_inputs(shape, dtype):
    """Inputs of the real sizes on the CPU; they are never touched and take no memory."""
    T, D, F, E, K = shape
    sizes = (T, D), (E, 2 * F, D), (E, D, F), (T, K), (T, K), (T, D), (T, E)
    types = dtype, dtype, dtype, torch.float32, torch.int32, dtype, torch.float32
    return Inputs(*(torch.empty(size, dtype=kind) for size, kind in zip(sizes, types, strict=True)))


def compile_layer(shape, dtype):
    """A task of moe_kernels.precompile: launches every kernel of the layer and of routing once."""
    inputs = empty_inputs(shape, dtype)
    run_kernels(inputs)
    logits, gates = inputs.logits_TE.to(dtype), inputs.gates_TK
    route_fwd(logits, None, shape.K, False, True)
    route_bwd(logits, inputs.experts_TK, gates, gates, gates.new_empty(shape.E), gates.new_empty(()), False, True)


def rms(got, want):
    """||got - want|| / ||want||; NaN stays NaN, so that no comparison with a tolerance passes."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-300)).item()


def sample(experts_TK, n_experts):
    """(tokens, experts) to check: 256 random tokens; the busiest expert, the least busy one and a random one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randperm(experts_TK.shape[0], generator=generator)[:256].to(experts_TK.device)
    counts = torch.bincount(experts_TK.flatten(), minlength=n_experts)
    some = torch.randint(n_experts, (1,), generator=generator).item()
    return tokens, sorted({counts.argmax().item(), counts.argmin().item(), some})


def expert_alone(inputs, e, token, slot):
    """What expert e alone contributes to (y, dx, dw_in, dw_out, dgates), in float64. token, slot (n,): its rows."""
    x, w_in, w_out, gates, _, dy, _ = inputs
    slices = x[token], w_in[e : e + 1], w_out[e : e + 1], gates[token, slot, None]
    leaves = [t.double().requires_grad_() for t in slices]
    y = reference.experts(*leaves, torch.zeros_like(token[:, None]))
    return y.detach(), *torch.autograd.grad(y, leaves, dy[token].double())


def layer_errors(inputs, outputs):
    """{name: RMS ratio on sampled slices} of `outputs`, {name: tensor} for y, dx, dw_in, dw_out and dgates. ValueError
    if one is not finite."""
    for name, output in outputs.items():
        if not output.isfinite().all():
            raise ValueError(f"wrong result: {name} holds values that are not finite")
    tokens, some_experts = sample(inputs.experts_TK, inputs.w_in_EGD.shape[0])
    like = lambda t: torch.zeros_like(t[tokens], dtype=torch.float64)
    want = {"y": like(inputs.x_TD), "dx": like(inputs.x_TD), "dgates": like(inputs.gates_TK)}
    for e in inputs.experts_TK[tokens].unique().tolist():  # one expert at a time: E experts in float64 may not fit
        n, slot = torch.where(inputs.experts_TK[tokens] == e)
        y, dx, _, _, dgates = expert_alone(inputs, e, tokens[n], slot)
        want["y"].index_add_(0, n, y)
        want["dx"].index_add_(0, n, dx)
        want["dgates"][n, slot] = dgates[:, 0]
    errors = {name: rms(outputs[name][tokens], truth) for name, truth in want.items()}
    for e in some_experts:  # without rows, both gradients must be zero
        _, _, dw_in, dw_out, _ = expert_alone(inputs, e, *torch.where(inputs.experts_TK == e))
        for name, truth in (("dw_in", dw_in), ("dw_out", dw_out)):
            errors[name] = max(errors.get(name, 0.0), rms(outputs[name][e], truth[0]))
    return errors


def require_accuracy(errors, dtype, slack=1):
    """The largest of `errors`, {name: error}. ValueError unless each is within `slack` times the dtype's tolerance."""
    allowed = slack * TOLERANCE[dtype]
    for name, error in errors.items():
        if not error <= allowed:
            raise ValueError(f"wrong result: {name} has RMS ratio {error:.1e}, allowed is {allowed:.0e}")
    return max(errors.values())
