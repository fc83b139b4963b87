"""The ground truth: every op of `moe_kernels` in plain PyTorch, differentiable, in any floating dtype (tests use
float64).

Shapes: T tokens, D model width, F expert hidden width, G = 2F (gate rows, then up rows), E experts, K experts per
token, S = T*K routed rows. A slot is token * K + k; the rows are the slots sorted by expert, then by token.
"""

import torch
import torch.nn.functional as F_
from torch import Tensor

from moe_kernels.activation import gated
from moe_kernels.ops import INTEGERS, autocast_off, described, no_autocast


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@no_autocast
def route(logits_TE, top_k, score="softmax", normalize=True, bias_E=None):
    """Twin of `routing.route`: (gates_TK, experts_TK, counts_E, probs_E, z)."""
    logits, (T, E) = _wide(logits_TE), logits_TE.shape
    if score == "softmax":
        scores = probs = logits.softmax(1)
    else:
        scores = logits.sigmoid()
        probs = scores / scores.sum(1, keepdim=True)
    # Without a bias, logits have the order of the scores and do not underflow. The stable sort
    # puts the lower id of equal ones first.
    ranking = logits if bias_E is None else scores + bias_E
    experts_TK = ranking.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    gates_TK = gates_of(logits, experts_TK, score, normalize)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=E).int()
    z = logits.logsumexp(1).square().sum() / max(T, 1)
    return gates_TK, experts_TK.int(), counts_E, probs.sum(0) / max(T, 1), z


@no_autocast
def gates_of(logits_TE, experts_TK, score="softmax", normalize=True):
    """Gates (T, K) as in `route`, but of given experts (T, K): a recorded choice can be replayed. float32, or float64
    for float64 logits (T, E). Raises ValueError for other shapes, dtypes or scores."""
    fits = logits_TE.ndim == experts_TK.ndim == 2 and logits_TE.shape[0] == experts_TK.shape[0]
    fits = fits and logits_TE.is_floating_point() and experts_TK.dtype in INTEGERS
    if not fits or score not in ("softmax", "sigmoid"):
        got = f"{described(logits=logits_TE, experts=experts_TK)}, score={score!r}"
        raise ValueError(f"{got}: expected floats (T, E), integers (T, K), 'softmax' or 'sigmoid'")
    logits, experts_TK = _wide(logits_TE), experts_TK.long()
    if score == "softmax" and normalize:
        return logits.gather(1, experts_TK).softmax(1)
    gates_TK = (logits.softmax(1) if score == "softmax" else logits.sigmoid()).gather(1, experts_TK)
    return gates_TK / gates_TK.sum(1, keepdim=True) if normalize else gates_TK


def dispatch(experts_TK, n_experts):
    """Twin of `dispatch.dispatch`: offsets (E+1), the slot of each routed row (S), and the row of each slot (T, K)."""
    flat = experts_TK.flatten()
    row_slot_S = flat.argsort(stable=True)
    slot_row = torch.empty_like(row_slot_S)
    slot_row[row_slot_S] = torch.arange(flat.numel(), device=flat.device)
    # Not the cumulative sum of a bincount: inductor of torch 2.11 compiles that to wrong numbers on CUDA.
    offsets = torch.searchsorted(flat[row_slot_S], torch.arange(n_experts + 1, device=flat.device, dtype=flat.dtype))
    return offsets.int(), row_slot_S.int(), slot_row.view_as(experts_TK).int()


@no_autocast
def experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, activation="swiglu", native=False):
    """Twin of `experts.moe_experts`: y[t] = sum_k gates[t,k] * W_out[e] a, with a = f(gate) * up of W_in[e] x[t].

    native: use `torch.nn.functional.grouped_mm`, PyTorch's fastest grouped product. On CUDA it takes only bfloat16."""
    offsets, row_slot_S, slot_row_TK = dispatch(experts_TK, w_in_EGD.shape[0])
    x_SD = x_TD[row_slot_S // experts_TK.shape[1]]
    h_SG = _product(x_SD, w_in_EGD.mT, offsets, native)
    y_SD = _product(gated(h_SG, activation), w_out_EDF.mT, offsets, native)
    return combine(y_SD, slot_row_TK, gates_TK)


def grouped_product(a, b, offsets):
    """b (E, R, N): each expert's rows of a (S, R) times its matrix of b, (S, N). b (S, N): a^T b over the rows of each
    expert, (E, R, N)."""
    sizes = offsets.diff().tolist()
    if b.ndim == 3:
        return torch.cat([x @ w for x, w in zip(a.split(sizes), b.unbind(), strict=True)])
    return torch.stack([x.T @ y for x, y in zip(a.split(sizes), b.split(sizes), strict=True)])


def _product(a, b, offsets, native):
    # torch.compile traces no loop over unknown row counts, and grouped_mm in bfloat16 only.
    if native and not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.contiguous()  # grouped_mm takes no other strides
    if torch.compiler.is_compiling() and not (native and a.dtype == torch.bfloat16):
        return product_op(a, b, offsets, native)
    return F_.grouped_mm(a, b, offs=offsets[1:]) if native else grouped_product(a, b, offsets)


@torch.library.custom_op("moe_kernels::grouped_product", mutates_args=())
def product_op(a: Tensor, b: Tensor, offsets: Tensor, native: bool) -> Tensor:
    """`grouped_product` as an op for torch.compile; native: computed by grouped_mm."""
    with autocast_off(a.device.type):
        if native:
            return F_.grouped_mm(a if b.ndim == 3 else a.T, b, offs=offsets[1:])
        return grouped_product(a, b, offsets)


@product_op.register_fake
def _(a, b, offsets, native):
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1])


def _setup_context(ctx, inputs, output):
    a, b, offsets, ctx.native = inputs
    ctx.save_for_backward(a, b, offsets)


def _backward(ctx, dy):
    (a, b, offsets), dy = ctx.saved_tensors, dy.contiguous()  # grouped_mm takes no expanded gradient
    return product_op(dy, b.mT, offsets, ctx.native), product_op(a, dy, offsets, ctx.native), None, None


product_op.register_autograd(_backward, setup_context=_setup_context)


@no_autocast
def linear_cross_entropy(x_TD, w_VD, targets_T):
    """Twin of `cross_entropy.linear_cross_entropy`: mean over targets >= 0, float32, or float64 for float64 inputs."""
    logits = _wide(x_TD @ w_VD.to(x_TD.dtype).T)
    targets_T = targets_T.long().clamp(min=-1)
    return F_.cross_entropy(logits, targets_T, ignore_index=-1, reduction="sum") / (targets_T >= 0).sum().clamp(min=1)


@no_autocast
def add_rms_norm(x, add, weight, eps=1e-5):
    """Twin of `rms_norm.add_rms_norm`."""
    total = x + add
    return total, F_.rms_norm(total, weight.shape, weight.to(x.dtype), eps)


@no_autocast
def rope(qkv_BLNd, cos, sin, n_heads, q_weight=None, k_weight=None, eps=1e-5):
    """Twin of `rotary.rope`: (q, k, v)."""
    H, Hkv, d = n_heads, (qkv_BLNd.shape[2] - n_heads) // 2, qkv_BLNd.shape[3]
    qk, v = qkv_BLNd[:, :, : H + Hkv], qkv_BLNd[:, :, H + Hkv :]
    if q_weight is not None:
        heads = (qk[:, :, :H], q_weight), (qk[:, :, H:], k_weight)
        qk = torch.cat([F_.rms_norm(x, (d,), weight.to(x.dtype), eps) for x, weight in heads], 2)
    x = _wide(qk)
    q, k = torch.addcmul(x * cos, x.roll(d // 2, -1), sin).to(qk.dtype).split((H, Hkv), 2)
    return q, k, v


# One twin per grouped GEMM kernel; `row_slot_S` and `offsets` come from `dispatch`.


def up(x_TD, w_in_EGD, row_slot_S, offsets, top_k, activation="swiglu"):
    """Pre-activations h (S, 2F) and activations a = f(gate) * up (S, F)."""
    h_SG = grouped_product(x_TD[row_slot_S // top_k], w_in_EGD.mT, offsets)
    return h_SG, gated(h_SG, activation)


def combine(y_SD, slot_row_TK, gates_TK=None):
    """sum_k gates[t,k] * y[row of (t,k)] (T, D); gates_TK=None means gates of 1."""
    y_TKD = y_SD[slot_row_TK.flatten()].view(*slot_row_TK.shape, y_SD.shape[1])
    return (y_TKD if gates_TK is None else y_TKD * gates_TK[..., None].to(y_SD.dtype)).sum(1)


def dswiglu(dy_TD, w_out_EDF, h_SG, gates_TK, row_slot_S, offsets, activation="swiglu"):
    """From dL/dy: dh (S, 2F), router gate * a (S, F), and dL/dgate of each routed row (S,).

    The router gate's gradient <dy, W_out a> equals <da, a> with da = W_out^T dy, so W_out a need not be kept."""
    da = grouped_product(dy_TD[row_slot_S // gates_TK.shape[1]], w_out_EDF, offsets)
    g = gates_TK.flatten()[row_slot_S, None].to(h_SG.dtype)
    with torch.enable_grad():
        h = h_SG.detach().requires_grad_()
        a = gated(h, activation)
    (dh,) = torch.autograd.grad(a, h, da * g)
    return dh, g * a.detach(), (da * a.detach()).sum(1)


def down(a_SF, w_out_EDF, offsets):
    """Expert outputs before the router's gates (S, D)."""
    return grouped_product(a_SF, w_out_EDF.mT, offsets)


def dx(dh_SG, w_in_EGD, offsets):
    """Gradient of each routed row's input (S, D), to be summed over a token's rows by `combine`."""
    return grouped_product(dh_SG, w_in_EGD, offsets)


def dw(a_TM, b_SN, transposed, row_slot_S, offsets, top_k):
    """(E, M, N), or (E, N, M) when `transposed`: dW_out from dy and ga = router gate * a, dW_in from x and dh."""
    dw_EMN = grouped_product(a_TM[row_slot_S // top_k], b_SN, offsets)
    return dw_EMN.mT if transposed else dw_EMN


def adamw(weight, grad, exp_avg, exp_avg_sq, step, lr, scale, skip, beta1, beta2, eps, weight_decay, copy, seed):
    """Twin of `adamw.adamw_step`, in place; step, lr, scale and skip are scalar tensors."""
    g, m, v, w = grad.float() * scale, exp_avg.float(), exp_avg_sq.float(), weight.float()
    bias1, bias2 = ((1 - beta ** step.double()).float() for beta in (beta1, beta2))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    w = w * (1 - lr * weight_decay) - lr / bias1 * m / (v.sqrt() * (1 / bias2.sqrt()) + eps)
    noise = random_bits(seed, step, w.numel(), w.device).view(w.shape)
    new = [(weight, round_to(weight.dtype, w, noise & 0xFFFF)), (exp_avg, round_to(exp_avg.dtype, m, noise >> 16)),
           (exp_avg_sq, round_to(exp_avg_sq.dtype, v, mix(noise ^ 0x9E3779B9) & 0xFFFF))]  # fmt: skip
    for old, value in [*new, (copy, w.bfloat16())] if copy is not None else new:
        old.copy_(torch.where(skip != 0, old, value))


def mix(x):
    """Twin of `adamw.mix` on uint32 held in int64."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def random_bits(seed, step, n, device):
    """32 bits for each of the n values of a tensor, in int64."""
    at = torch.arange(n, device=device)
    seed = torch.tensor(seed, device=device)
    return mix((at & 0xFFFFFFFF) ^ mix(mix(mix(seed) ^ step.long()) ^ at >> 32))


def round_to(dtype, x, noise):
    """float32 x in dtype. For bfloat16, add `noise`, an integer below 2^16, to the bits of x, then cut off 16 bits."""
    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32)
    # The bits of a float, read as an integer, grow with it. A carry could turn a NaN into a number.
    bits = torch.where(x.isnan(), bits, bits + noise.int())
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
