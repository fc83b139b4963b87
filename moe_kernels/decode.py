"""One token of each of a few sequences: a block of the model in seven launches, without gradients.

Launches and latencies limit generation at small batches: PyTorch's ops take 18 launches a block. Here the norm is part
of the product after it, and the residual is part of the product before it. A few (token, expert) pairs need no sort: a
program reads some rows of the experts' matrices for one pair or one token.

Shapes: T tokens, one of each sequence; D model width, N outputs, H heads (Hkv for keys and values), d head width, L
tokens that fit the cache, E experts, K experts per token, F expert hidden width. Products accumulate in float32.
"""

import torch

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.experts import experts_fwd
from moe_kernels.language import launch, tl, triton
from moe_kernels.rotary import _rotate
from moe_kernels.routing import choose
from moe_kernels.tiles import cdiv, pow2

FEW_ROWS = 32  # rows up to which linear_kernel is faster than a norm, cuBLAS and an addition (H200)
FEW_PAIRS = 64  # pairs up to which reading an expert's matrix for each is faster than a sort (H200)


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x_ptr, norm_ptr, w_ptr, add_ptr, y_ptr, T, eps,
    D: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_t, offs_n = tl.arange(0, BLOCK_T)[:, None], tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t, mask_n, rstd = offs_t < T, offs_n < N, 1.0
    if norm_ptr is not None:
        square = tl.zeros([BLOCK_T], tl.float32)
        for k in range(0, D, BLOCK_D):
            offs_d = (k + tl.arange(0, BLOCK_D))[None, :]
            x = tl.load(x_ptr + offs_t * D + offs_d, mask=mask_t & (offs_d < D), other=0.0).to(tl.float32)
            square += tl.sum(x * x, 1)
        rstd = tl.rsqrt(square / D + eps)[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_D):
        offs_d = (k + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(x_ptr + offs_t * D + offs_d, mask=mask_t & (offs_d < D), other=0.0)
        if norm_ptr is not None:
            x = (x.to(tl.float32) * rstd * tl.load(norm_ptr + offs_d, mask=offs_d < D, other=0.0)).to(x.dtype)
        w = tl.load(w_ptr + offs_n[:, None] * D + offs_d, mask=mask_n[:, None] & (offs_d < D), other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    mask = mask_t & mask_n[None, :]
    offs = offs_t * N + offs_n[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear(x_TD, w_ND, norm=None, eps=0.0, add=None):
    """x W^T + add (T, N). x is RMS-normalised first if `norm`, the weight of the norm (D,), is given."""
    (T, D), N = x_TD.shape, w_ND.shape[0]
    if T > FEW_ROWS:
        x = x_TD if norm is None else torch.nn.functional.rms_norm(x_TD, norm.shape, norm, eps)
        return x @ w_ND.T if add is None else torch.addmm(add, x, w_ND.T)
    y = x_TD.new_empty(T, N)
    launch(
        linear_kernel, (cdiv(N, 16),), (x_TD, norm, w_ND, add, y), (T, eps),
        D=D, N=N, BLOCK_T=max(16, pow2(T)), BLOCK_N=16, BLOCK_D=min(256, pow2(D)),
    )  # fmt: skip
    return y


@triton.jit
def rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, v_ptr, L, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = tl.arange(0, BLOCK_D)[None, :]
    mask = offs < D // 2
    position = tl.load(position_ptr + t).to(tl.int64)
    x_ptrs = qkv_ptr + (t * (H + 2 * HKV) + head) * D + offs
    at = (t * L + position) * (HKV * D) + offs  # in the cache's first head
    cos = tl.load(cos_ptr + position * D + offs, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * D + D // 2 + offs, mask=mask, other=0.0)
    if head < H:
        _rotate(x_ptrs, q_ptr + (t * H + head) * D + offs, cos, sin, mask, q_norm_ptr, offs, eps, 1, D, NORM)
    elif head < H + HKV:
        _rotate(x_ptrs, k_ptr + at + (head - H) * D, cos, sin, mask, k_norm_ptr, offs, eps, 1, D, NORM)
    else:
        at += (head - H - HKV) * D
        tl.store(v_ptr + at, tl.load(x_ptrs, mask=mask, other=0.0), mask=mask)
        tl.store(v_ptr + at + D // 2, tl.load(x_ptrs + D // 2, mask=mask, other=0.0), mask=mask)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, y_ptr, L, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The G query heads of a key head are the rows of one product.
    G: tl.constexpr = H // HKV
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_g, offs_d, offs_l = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_L)
    offs_q = (t * H + head * G + offs_g[:, None]) * D + offs_d
    mask_q = (offs_g < G)[:, None] & (offs_d < D)
    q = tl.load(q_ptr + offs_q, mask=mask_q, other=0.0)
    length = tl.load(position_ptr + t).to(tl.int32) + 1
    base = (t * L * HKV + head) * D
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_L):
        mask_l = start + offs_l < length
        at = base + (start + offs_l)[:, None] * (HKV * D) + offs_d
        mask = mask_l[:, None] & (offs_d < D)
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        scores = tl.where(mask_l[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp(scores - new_top[:, None]), tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    tl.store(y_ptr + offs_q, (acc / total[:, None]).to(y_ptr.dtype.element_ty), mask=mask_q)


def attend(qkv_TNd, cos, sin, positions_T, k_TLHd, v_TLHd, n_heads, q_norm=None, k_norm=None, eps=0.0):
    """Attention (T, H*d) of one new token per sequence to itself and to the cached tokens before it.

    qkv_TNd (T, H + 2 Hkv, d) is normalised and rotated as in `rope`, at positions_T (T,) int64 of cos and sin (rows
    of d float32). Its keys and values are written into the caches k_TLHd and v_TLHd (T, L, Hkv, d) at these
    positions."""
    (T, N, d), (_, L, n_kv, _) = qkv_TNd.shape, k_TLHd.shape
    q, y = qkv_TNd.new_empty(T, n_heads, d), qkv_TNd.new_empty(T, n_heads * d)
    sizes = dict(H=n_heads, HKV=n_kv, D=d)
    launch(
        rotate_kernel, (T, N), (qkv_TNd, cos, sin, positions_T, q_norm, k_norm, q, k_TLHd, v_TLHd), (L, eps),
        NORM=q_norm is not None, BLOCK_D=pow2(d // 2), num_warps=1, **sizes,
    )  # fmt: skip
    launch(
        attention_kernel, (T, n_kv), (q, k_TLHd, v_TLHd, positions_T, y), (L, d**-0.5),
        BLOCK_G=max(16, pow2(n_heads // n_kv)), BLOCK_L=64, BLOCK_D=max(16, pow2(d)), **sizes,
    )  # fmt: skip
    return y


@triton.jit
def route_few_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, normed_ptr, gates_ptr, experts_ptr, eps,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_d, offs_e, offs_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)[None, :]
    x = tl.load(x_ptr + t * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    normed = x * rstd * tl.load(norm_ptr + offs_d, mask=offs_d < D, other=0.0)
    tl.store(normed_ptr + t * D + offs_d, normed.to(normed_ptr.dtype.element_ty), mask=offs_d < D)
    logits = tl.zeros([BLOCK_E], tl.float32)
    for k in range(0, D, STEP):
        offs = (k + tl.arange(0, STEP))[None, :]
        part = tl.load(x_ptr + t * D + offs, mask=offs < D, other=0.0).to(tl.float32)
        part = part * rstd * tl.load(norm_ptr + offs, mask=offs < D, other=0.0)
        w = tl.load(w_ptr + offs_e[:, None] * D + offs, mask=(offs_e < E)[:, None] & (offs < D), other=0.0)
        logits += tl.sum(w.to(tl.float32) * part.to(normed_ptr.dtype.element_ty).to(tl.float32), 1)
    # Rounded like the router's output, so that the choice is that of model.MoE.
    logits = logits.to(normed_ptr.dtype.element_ty).to(tl.float32)
    logits = tl.where(offs_e < E, logits, float("-inf"))[None, :]
    chosen, ids, _taken, _probs, _lse = choose(logits, bias_ptr, E, K, SIGMOID, NORMALIZE, 1, BLOCK_E, BLOCK_K)
    tl.store(gates_ptr + t * K + offs_k, chosen, mask=offs_k < K)
    tl.store(experts_ptr + t * K + offs_k, ids, mask=offs_k < K)


def route_few(x_TD, norm, eps, w_ED, top_k, sigmoid=False, normalize=True, bias_E=None):
    """RMSNorm of x (T, D), and for it the router's gates (T, K) float32 and experts (T, K) int32, as in `route`."""
    (T, D), E = x_TD.shape, w_ED.shape[0]
    normed, block_e = torch.empty_like(x_TD), pow2(E)
    gates, experts = x_TD.new_empty(T, top_k, dtype=torch.float32), x_TD.new_empty(T, top_k, dtype=torch.int32)
    launch(
        route_few_kernel, (T,), (x_TD, norm, w_ED, bias_E, normed, gates, experts), (eps,),
        D=D, E=E, K=top_k, SIGMOID=sigmoid, NORMALIZE=normalize, BLOCK_D=pow2(D), BLOCK_E=block_e, BLOCK_K=pow2(top_k),
        STEP=min(pow2(D), max(16, 16384 // block_e)), num_warps=8,
    )  # fmt: skip
    return normed, gates, experts


@triton.jit
def up_few_kernel(
    x_ptr, w_in_ptr, experts_ptr, a_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < F)[:, None]
    gate, up = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    w_ptr = w_in_ptr + tl.load(experts_ptr + pair).to(tl.int64) * (2 * F * D)
    for k in range(0, D, BLOCK_D):
        offs_d = (k + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(x_ptr + pair // K * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        w_ptrs, mask = w_ptr + offs_n[:, None] * D + offs_d, mask_n & (offs_d < D)
        gate += x * tl.load(w_ptrs, mask=mask, other=0.0)
        up += x * tl.load(w_ptrs + F * D, mask=mask, other=0.0)
    value, _slope = ACTIVATION(tl.sum(gate, 1))
    a = value * tl.sum(up, 1)
    tl.store(a_ptr + pair * F + offs_n, a.to(a_ptr.dtype.element_ty), mask=offs_n < F)


@triton.jit
def down_few_kernel(
    a_ptr, w_out_ptr, experts_ptr, gates_ptr, add_ptr, y_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < D)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for k in tl.static_range(K):
        w_ptr = w_out_ptr + tl.load(experts_ptr + t * K + k).to(tl.int64) * (D * F)
        gate = tl.load(gates_ptr + t * K + k)
        for f in range(0, F, BLOCK_F):
            offs_f = (f + tl.arange(0, BLOCK_F))[None, :]
            a = gate * tl.load(a_ptr + (t * K + k) * F + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)
            acc += a * tl.load(w_ptr + offs_n[:, None] * F + offs_f, mask=mask_n & (offs_f < F), other=0.0)
    y = tl.sum(acc, 1) + tl.load(add_ptr + t * D + offs_n, mask=offs_n < D, other=0.0)
    tl.store(y_ptr + t * D + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < D)


def experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, add, activation="swiglu"):
    """add (T, D) + moe_experts(x, ...), in two launches for few (token, expert) pairs."""
    (T, D), K, F = x_TD.shape, gates_TK.shape[1], w_out_EDF.shape[2]
    if T * K > FEW_PAIRS:
        return experts_fwd(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, activation, add)[0]
    a, y = x_TD.new_empty(T * K, F), torch.empty_like(x_TD)
    rows = 8 if T * K <= 8 else 16
    launch(
        up_few_kernel, (cdiv(F, rows), T * K), (x_TD, w_in_EGD, experts_TK, a),
        D=D, F=F, K=K, ACTIVATION=ACTIVATIONS[activation].kernel, BLOCK_N=rows, BLOCK_D=min(256, pow2(D)),
    )  # fmt: skip
    rows = 4 if T <= 4 else 16
    launch(
        down_few_kernel, (cdiv(D, rows), T), (a, w_out_EDF, experts_TK, gates_TK, add, y),
        D=D, F=F, K=K, BLOCK_N=rows, BLOCK_F=min(4096 // rows, pow2(F)),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["room"])
def greedy_kernel(logits_ptr, tokens_ptr, written_ptr, step_ptr, V, stride, room, BLOCK_V: tl.constexpr):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_V)
    best, ids = tl.full([BLOCK_V], float("-inf"), tl.float32), offs
    for start in range(0, V, BLOCK_V):
        x = tl.load(logits_ptr + row * stride + start + offs, mask=start + offs < V, other=float("-inf"))
        better = x.to(tl.float32) > best
        best, ids = tl.where(better, x.to(tl.float32), best), tl.where(better, start + offs, ids)
    token = tl.min(tl.where(best == tl.max(best, 0), ids, V), 0)  # the lowest id of equal logits
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(written_ptr + row * room + tl.load(step_ptr), token.to(tl.int64))


def greedy(logits_BV, n_vocab, tokens_B1, written_BN, step):
    """Write each row's most likely token, of the first n_vocab (None: of all), into tokens_B1 and into column step (1,)
    of written_BN. All three are int64."""
    (B, V), block = logits_BV.shape, min(8192, pow2(logits_BV.shape[1]))
    numbers = (min(V, n_vocab or V), logits_BV.stride(0), written_BN.shape[1])
    launch(
        greedy_kernel, (B,), (logits_BV, tokens_B1, written_BN, step), numbers,
        BLOCK_V=block, num_warps=max(1, block // 512),
    )  # fmt: skip
