"""The ground truth: every op of `moe_kernels` in plain PyTorch, differentiable, in any floating dtype (float64 is what tests compare with).

Shapes: T tokens, D model width, F expert hidden width, G = 2F (gate rows, then up rows), E experts, K experts per token,
S = T*K routed rows: the (token, slot) pairs sorted by expert, ties in token order.
"""

import torch
import torch.nn.functional as F_


def route(logits_TE, top_k, score="softmax", normalize=True, bias_E=None):
    """Twin of `routing.route`: (gates_TK, experts_TK, counts_E, probs_E, z)."""
    logits = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    E = logits.shape[1]
    if score == "softmax":
        scores = probs = logits.softmax(1)
    else:
        scores = logits.sigmoid()
        probs = scores / scores.sum(1, keepdim=True)
    # Without a bias the logits order like the scores and do not underflow; the stable sort gives ties to the lower expert id.
    ranking = logits if bias_E is None else scores + bias_E
    experts_TK = ranking.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    gates_TK = gates_of(logits, experts_TK, score, normalize)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=E).int()
    T = max(logits.shape[0], 1)
    return gates_TK, experts_TK.int(), counts_E, probs.sum(0) / T, logits.logsumexp(1).square().sum() / T


def gates_of(logits_TE, experts_TK, score="softmax", normalize=True):
    """Gates (T, K), float32 or float64, that `route` gives the experts (T, K) it chose; here of any choice, to replay a recorded one."""
    logits = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    experts_TK = experts_TK.long()
    if score == "softmax" and normalize:
        return logits.gather(1, experts_TK).softmax(1)
    gates_TK = (logits.softmax(1) if score == "softmax" else logits.sigmoid()).gather(1, experts_TK)
    return gates_TK / gates_TK.sum(1, keepdim=True) if normalize else gates_TK


def dispatch(experts_TK, n_experts):
    """Twin of `dispatch.dispatch`: offsets (E+1), the flat (token, slot) index of each routed row (S), and its inverse (T, K)."""
    flat = experts_TK.flatten()
    row_slot_S = flat.argsort(stable=True)
    slot_row = torch.empty_like(row_slot_S)
    slot_row[row_slot_S] = torch.arange(flat.numel(), device=flat.device)
    # Not the cumulative sum of a bincount: inductor of torch 2.11 compiles that to wrong numbers on CUDA.
    offsets = torch.searchsorted(flat[row_slot_S], torch.arange(n_experts + 1, device=flat.device, dtype=flat.dtype))
    return offsets.int(), row_slot_S.int(), slot_row.view_as(experts_TK).int()


def swiglu(h_SG):
    """Twin of `activation.swiglu`."""
    gate, up = h_SG.chunk(2, dim=1)
    return F_.silu(gate) * up


def experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK):
    """Twin of `experts.moe_experts`: y[t] = sum_k gate[t,k] * W_out[e] swiglu(W_in[e] x[t])."""
    offsets, row_slot_S, slot_row_TK = dispatch(experts_TK, w_in_EGD.shape[0])
    _, a_SF = up(x_TD, w_in_EGD, row_slot_S, offsets, experts_TK.shape[1])
    return combine(down(a_SF, w_out_EDF, offsets), slot_row_TK, gates_TK)


def experts_grouped_mm(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK):
    """The same layer composed of PyTorch ops around `torch.nn.functional.grouped_mm`: the fastest that stock PyTorch offers.

    On CUDA, grouped_mm takes bfloat16 only (compute capability 8.0 or newer)."""
    T, K = experts_TK.shape
    offsets, row_slot_S, slot_row_TK = dispatch(experts_TK, w_in_EGD.shape[0])
    x_SD = x_TD[row_slot_S // K]
    h_SG = F_.grouped_mm(x_SD, w_in_EGD.transpose(1, 2), offs=offsets[1:])
    y_SD = F_.grouped_mm(swiglu(h_SG), w_out_EDF.transpose(1, 2), offs=offsets[1:])
    y_TKD = y_SD[slot_row_TK.flatten()].view(T, K, x_TD.shape[1])
    return (y_TKD * gates_TK[..., None].to(y_TKD.dtype)).sum(1)


def linear_cross_entropy(x_TD, w_VD, targets_T):
    """Twin of `cross_entropy.linear_cross_entropy`: mean over targets other than -1, in float32 (float64 stays)."""
    logits = x_TD @ w_VD.to(x_TD.dtype).T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F_.cross_entropy(logits, targets_T, ignore_index=-1, reduction="sum") / (targets_T >= 0).sum().clamp(min=1)


def rope(qkv_BLNd, cos, sin, n_heads, q_weight=None, k_weight=None, eps=1e-5):
    """Twin of `rotary.rope`: (q, k, v)."""
    H, Hkv, d = n_heads, (qkv_BLNd.shape[2] - n_heads) // 2, qkv_BLNd.shape[3]
    qk, v = qkv_BLNd[:, :, : H + Hkv], qkv_BLNd[:, :, H + Hkv :]
    if q_weight is not None:
        heads = (qk[:, :, :H], q_weight), (qk[:, :, H:], k_weight)
        qk = torch.cat([F_.rms_norm(x, (d,), weight.to(x.dtype), eps) for x, weight in heads], 2)
    x = qk if qk.dtype == torch.float64 else qk.float()
    q, k = torch.addcmul(x * cos, x.roll(d // 2, -1), sin).to(qk.dtype).split((H, Hkv), 2)
    return q, k, v


# One twin per grouped GEMM kernel; `row_slot_S` and `offsets` come from `dispatch`.


def _by_expert(rows_SX, offsets):
    return rows_SX.split(offsets.diff().tolist())


def up(x_TD, w_in_EGD, row_slot_S, offsets, top_k):
    """Pre-activations h (S, 2F) and activations swiglu(h) (S, F)."""
    x_SD = x_TD.index_select(0, row_slot_S // top_k)
    h_SG = torch.cat([x @ w.T for x, w in zip(_by_expert(x_SD, offsets), w_in_EGD.unbind(), strict=True)])
    return h_SG, swiglu(h_SG)


def down(a_SF, w_out_EDF, offsets):
    """Expert outputs before the gates (S, D)."""
    return torch.cat([a @ w.T for a, w in zip(_by_expert(a_SF, offsets), w_out_EDF.unbind(), strict=True)])


def combine(y_SD, slot_row_TK, gates_TK=None):
    """sum_k gates[t,k] * y[row of (t,k)] (T, D); gates of one when None."""
    y_TKD = y_SD.index_select(0, slot_row_TK.flatten()).view(*slot_row_TK.shape, y_SD.shape[1])
    return y_TKD.sum(1) if gates_TK is None else (gates_TK.to(y_SD.dtype)[:, None] @ y_TKD)[:, 0]


def dswiglu(dy_TD, w_out_EDF, h_SG, gates_TK, row_slot_S, offsets):
    """From dL/dy: dh (S, 2F), gate * swiglu(h) (S, F), and dL/dgates by routed row (S,).

    With a = swiglu(h) and da = W_out^T dy, the gate's gradient <dy, W_out a> equals <da, a>, so W_out a need not be kept."""
    g = gates_TK.flatten()[row_slot_S, None].to(h_SG.dtype)
    dy_SD = dy_TD[row_slot_S // gates_TK.shape[1]]
    da = torch.cat([dy @ w for dy, w in zip(_by_expert(dy_SD, offsets), w_out_EDF.unbind(), strict=True)])
    gate, up_ = h_SG.chunk(2, dim=1)
    sig = gate.sigmoid()
    silu = gate * sig
    dgate = da * g * up_ * (sig + silu * (1 - sig))
    return torch.cat([dgate, da * g * silu], 1), g * silu * up_, (da * silu * up_).sum(1)


def dx(dh_SG, w_in_EGD, offsets):
    """Gradient of each routed row's input (S, D), to be summed over a token's rows by `combine`."""
    return torch.cat([dh @ w for dh, w in zip(_by_expert(dh_SG, offsets), w_in_EGD.unbind(), strict=True)])


def dw_in(dh_SG, x_TD, row_slot_S, offsets, top_k):
    """(E, 2F, D)."""
    x_SD = x_TD[row_slot_S // top_k]
    return torch.stack([dh.T @ x for dh, x in zip(_by_expert(dh_SG, offsets), _by_expert(x_SD, offsets), strict=True)])


def dw_out(dy_TD, ga_SF, row_slot_S, offsets, top_k):
    """(E, D, F), from ga = gate * swiglu(h)."""
    dy_SD = dy_TD[row_slot_S // top_k]
    return torch.stack(
        [dy.T @ ga for dy, ga in zip(_by_expert(dy_SD, offsets), _by_expert(ga_SF, offsets), strict=True)]
    )


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
    """float32 x in dtype; in bfloat16 cut off after adding `noise`, an integer below 2^16, to the bits of x."""
    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32)
    # Between two numbers of one sign integers order like the floats; a carry could make a number of a NaN.
    bits = torch.where(x.isnan(), bits, bits + noise.int())
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
