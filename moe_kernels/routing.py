"""From router logits to gates, expert ids, counts and the statistics of the auxiliary losses, in one pass.

Shapes: T tokens, E experts, K experts per token. Everything except the ids and counts is float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.language import launch, tl, triton
from moe_kernels.ops import define, described, use_kernels
from moe_kernels.tiles import cdiv, eager, pow2

MAX_EXPERTS, MAX_TOP_K = 1024, 32


class Routing(NamedTuple):
    gates_TK: Tensor  # float32, weights of the chosen experts; differentiable
    experts_TK: Tensor  # int32, chosen experts in order of falling score; a tie goes to the lower id
    counts_E: Tensor  # int32, routed rows per expert
    probs_E: Tensor  # float32, mean over tokens of the distribution over all experts; differentiable
    z: Tensor  # float32 scalar, mean over tokens of logsumexp(logits)^2; differentiable


def route(logits_TE, top_k, score="softmax", normalize=True, bias_E=None, impl=None):
    """Choose `top_k` experts for each token.

    logits_TE: (T, E) float tensor of any dtype; the computation is in float32.
    score: "softmax" over all experts, or "sigmoid" of each logit (DeepSeek-V3, arXiv 2412.19437), whose
    probabilities for the balance loss are the scores divided by their sum.
    normalize: divide a token's gates by their sum over its K experts. With "softmax" this is Mixtral's "top-k, then
    softmax". Without it the gates are the scores.
    bias_E: (E,), added to the scores for the choice, but not to the gates: loss-free balancing (arXiv 2408.15664).
    impl: "reference", "grouped_mm" (the same PyTorch ops), "triton", or None to choose by device.
    Returns a `Routing`. Raises ValueError unless E <= 1024 and 1 <= K <= min(E, 32), for other dtypes or devices, and
    for float64 with "triton"."""
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits {tuple(logits_TE.shape)} {logits_TE.dtype}: expected (T, E), floats")
    E = logits_TE.shape[1]
    if not isinstance(top_k, int) or not 1 <= top_k <= min(E, MAX_TOP_K) or E > MAX_EXPERTS:
        raise ValueError(
            f"top_k={top_k}, E={E}: expected integers, 1 <= top_k <= min(E, {MAX_TOP_K}), E <= {MAX_EXPERTS}"
        )
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score={score!r}: expected 'softmax' or 'sigmoid'")
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"bias_E {tuple(bias_E.shape)}: expected ({E},)")
    if use_kernels(impl, logits_TE, bias_E=bias_E):
        return Routing(*run_route(logits_TE, bias_E, top_k, score == "sigmoid", normalize))
    return Routing(*reference.route(logits_TE, top_k, score, normalize, bias_E))


def balance_loss(counts_E, probs_E):
    """Load-balancing loss E * sum_e f_e p_e (Switch Transformer, arXiv 2101.03961); f_e is expert e's share of
    the routed rows, p_e its mean probability.

    Returns a float32 scalar, differentiable in `probs_E`: 1.0 at perfect balance, E / K if the same K experts take all
    tokens. Raises ValueError unless both arguments are (E,)."""
    if eager(counts_E) and (counts_E.ndim != 1 or counts_E.shape != probs_E.shape):  # a traced bincount has no size
        raise ValueError(f"{described(counts=counts_E, probs=probs_E)}: expected (E,), (E,)")
    f_E = counts_E.float() / counts_E.sum().clamp(min=1)
    return counts_E.shape[0] * (f_E * probs_E).sum()


@triton.jit
def _logits(logits_ptr, T, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's tokens, their mask, the mask of their logits, and the logits in float32. Logits past E are minus
    infinity. Rows past T are 0: nothing is stored there, but exp must not make NaN."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_e < E)[None, :]
    logits = tl.load(logits_ptr + offs_t[:, None] * E + offs_e[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    return offs_t, mask_t, mask, tl.where(mask_t[:, None], logits, 0.0)


@triton.jit
def _exps(logits):
    top = tl.max(logits, 1)
    exps = tl.exp(logits - top[:, None])
    return top, exps, tl.sum(exps, 1)


@triton.jit
def choose(
    logits, bias_ptr, E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From rows of logits, minus infinity past E: gates and ids (BLOCK_T, BLOCK_K); which experts are chosen, and all
    probabilities (BLOCK_T, BLOCK_E); logsumexp (BLOCK_T,)."""
    offs_e, offs_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    top, exps, denom = _exps(logits)
    lse = top + tl.log(denom)
    if SIGMOID:
        scores = tl.where((offs_e < E)[None, :], tl.sigmoid(logits), 0.0)
        probs = scores / tl.sum(scores, 1)[:, None]
    else:
        scores = exps / denom[:, None]
        probs = scores
    # Rank by logits: they have the order of the softmax, but do not underflow.
    ranking = logits
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
        ranking = scores + bias[None, :]
    # Minus infinity marks experts that are taken or do not exist; a score of minus infinity becomes finite.
    ranking = tl.where((offs_e < E)[None, :], tl.where(ranking == float("-inf"), -3e38, ranking), float("-inf"))

    # `taken` is summed over tokens only after the loop: that sum crosses warps.
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in range(K):
        value, best = tl.max(ranking, 1, return_indices=True)
        best = tl.minimum(best, E - 1)  # a row of NaN must choose an expert that exists
        hit = offs_e[None, :] == best[:, None]
        if bias_ptr is not None or SIGMOID or not NORMALIZE:  # else value is the logit already
            value = tl.sum(tl.where(hit, scores if SIGMOID or not NORMALIZE else logits, 0.0), 1)
        chosen = tl.where(offs_k[None, :] == k, value[:, None], chosen)
        ids = tl.where(offs_k[None, :] == k, best[:, None], ids)
        taken = taken | hit
        ranking = tl.where(hit, float("-inf"), ranking)
    if NORMALIZE:
        valid = (offs_k < K)[None, :]
        if not SIGMOID:
            chosen = tl.where(valid, chosen, float("-inf"))
            chosen = tl.exp(chosen - tl.max(chosen, 1)[:, None])
        chosen = tl.where(valid, chosen, 0.0)
        chosen = chosen / tl.sum(chosen, 1)[:, None]
    return chosen, ids, taken, probs, lse


@triton.jit(do_not_specialize=["T"])
def route_fwd_kernel(
    logits_ptr, bias_ptr, gates_ptr, experts_ptr, part_counts_ptr, part_stats_ptr, T,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_t, mask_t, _mask, logits = _logits(logits_ptr, T, E, BLOCK_T, BLOCK_E)
    pid, offs_e, offs_k = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    chosen, ids, taken, probs, lse = choose(logits, bias_ptr, E, K, SIGMOID, NORMALIZE, BLOCK_T, BLOCK_E, BLOCK_K)
    slots = offs_t[:, None] * K + offs_k[None, :]
    mask_slots = mask_t[:, None] & (offs_k < K)[None, :]
    tl.store(gates_ptr + slots, chosen, mask=mask_slots)
    tl.store(experts_ptr + slots, ids, mask=mask_slots)
    # Each program stores partial sums. route_stats_kernel adds them in a fixed order: the same bits every time.
    tl.store(part_counts_ptr + pid * E + offs_e, tl.sum((taken & mask_t[:, None]).to(tl.int32), 0), mask=offs_e < E)
    tl.store(part_stats_ptr + pid * (E + 1) + offs_e, tl.sum(tl.where(mask_t[:, None], probs, 0.0), 0), mask=offs_e < E)
    tl.store(part_stats_ptr + pid * (E + 1) + E, tl.sum(tl.where(mask_t, lse * lse, 0.0), 0))


@triton.jit(do_not_specialize=["T", "n_blocks"])
def route_stats_kernel(
    part_counts_ptr, part_stats_ptr, counts_ptr, probs_ptr, z_ptr, T, n_blocks,
    E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    stats = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, n_blocks, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask_b = (offs_b < n_blocks)[:, None]
        count_ptrs = part_counts_ptr + offs_b[:, None] * E + offs_e[None, :]
        stat_ptrs = part_stats_ptr + offs_b[:, None] * (E + 1) + offs_e[None, :]
        counts += tl.sum(tl.load(count_ptrs, mask=mask_b & (offs_e < E)[None, :], other=0), 0)
        stats += tl.sum(tl.load(stat_ptrs, mask=mask_b & (offs_e < E + 1)[None, :], other=0.0), 0)
    tl.store(counts_ptr + offs_e, counts, mask=offs_e < E)
    tl.store(probs_ptr + offs_e, stats / T, mask=offs_e < E)
    tl.store(z_ptr + offs_e - E, stats / T, mask=offs_e == E)


@triton.jit(do_not_specialize=["T"])
def route_bwd_kernel(
    logits_ptr, experts_ptr, gates_ptr, dgates_ptr, dprobs_ptr, dz_ptr, dlogits_ptr, T,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_t, mask_t, mask, logits = _logits(logits_ptr, T, E, BLOCK_T, BLOCK_E)
    offs_e, offs_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    top, exps, denom = _exps(logits)
    softmax = exps / denom[:, None]

    # Gradient through z = mean of logsumexp^2, and through the mean probabilities.
    dz = tl.load(dz_ptr).to(tl.float32) / T
    dprobs = tl.load(dprobs_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)[None, :] / T
    dlogits = softmax * ((top + tl.log(denom)) * (2.0 * dz))[:, None]
    if SIGMOID:
        scores = tl.where((offs_e < E)[None, :], tl.sigmoid(logits), 0.0)
        slope = scores * (1.0 - scores)
        total = tl.sum(scores, 1)
        mean_dprobs = tl.sum(scores * dprobs, 1) / total
        dlogits += slope * (dprobs - mean_dprobs[:, None]) / total[:, None]
    else:
        dlogits += softmax * (dprobs - tl.sum(softmax * dprobs, 1)[:, None])

    # Gradient through the gates of the chosen experts.
    slots = offs_t[:, None] * K + offs_k[None, :]
    mask_slots = mask_t[:, None] & (offs_k < K)[None, :]
    gates = tl.load(gates_ptr + slots, mask=mask_slots, other=0.0)
    dgates = tl.load(dgates_ptr + slots, mask=mask_slots, other=0.0).to(tl.float32)
    mean_dgates = tl.sum(gates * dgates, 1)
    # spread: gradients at the chosen experts: of their logits with normalised softmax, else of their scores.
    spread = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    for k in range(K):
        expert = tl.load(experts_ptr + offs_t * K + k, mask=mask_t, other=-1)
        dgate = tl.load(dgates_ptr + offs_t * K + k, mask=mask_t, other=0.0).to(tl.float32)
        if NORMALIZE:
            dgate = dgate - mean_dgates
            if not SIGMOID:
                dgate *= tl.load(gates_ptr + offs_t * K + k, mask=mask_t, other=0.0)
        hit = offs_e[None, :] == expert[:, None]
        spread = tl.where(hit, dgate[:, None], spread)
        chosen = chosen | hit
    if SIGMOID:
        if NORMALIZE:
            spread = spread / tl.sum(tl.where(chosen, scores, 0.0), 1)[:, None]
        dlogits += slope * spread
    elif NORMALIZE:
        dlogits += spread
    else:
        dlogits += softmax * (spread - mean_dgates[:, None])
    tl.store(dlogits_ptr + offs_t[:, None] * E + offs_e[None, :], dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _blocks(E, K):
    block_e = pow2(E)  # about 2048 logits per program: a (BLOCK_T, BLOCK_E) array takes 16 registers a thread
    return dict(BLOCK_T=max(1, 2048 // block_e) if block_e > 32 else 64, BLOCK_E=block_e, BLOCK_K=pow2(K))


def route_fwd(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, sigmoid: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Routing`."""
    logits, (T, E) = logits_TE.contiguous(), logits_TE.shape
    blocks = _blocks(E, top_k)
    n_blocks = cdiv(T, blocks["BLOCK_T"])
    gates, experts, counts, probs, z = _fake_fwd(logits, bias_E, top_k, sigmoid, normalize)
    if T == 0:
        return gates, experts, counts.zero_(), probs.zero_(), z.zero_()
    parts = counts.new_empty(n_blocks, E), probs.new_empty(n_blocks, E + 1)
    launch(
        route_fwd_kernel, (n_blocks,), (logits, bias_E, gates, experts, *parts), (T,),
        E=E, K=top_k, SIGMOID=sigmoid, NORMALIZE=normalize, **blocks,
    )  # fmt: skip
    outputs = *parts, counts, probs, z
    launch(route_stats_kernel, (cdiv(E + 1, 8),), outputs, (T, n_blocks), E=E, BLOCK_B=512, BLOCK_E=8)
    return gates, experts, counts, probs, z


def _fake_fwd(logits_TE, bias_E, top_k, sigmoid, normalize):
    (T, E), new = logits_TE.shape, logits_TE.new_empty
    gates, experts = new(T, top_k, dtype=torch.float32), new(T, top_k, dtype=torch.int32)
    return gates, experts, new(E, dtype=torch.int32), new(E, dtype=torch.float32), new((), dtype=torch.float32)


def route_bwd(
    logits_TE: Tensor, experts_TK: Tensor, gates_TK: Tensor, dgates_TK: Tensor, dprobs_E: Tensor, dz: Tensor,
    sigmoid: bool, normalize: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the logits (T, E), in their dtype, from the gradients of gates, probs and z."""
    logits, (T, E), K = logits_TE.contiguous(), logits_TE.shape, experts_TK.shape[1]
    dlogits, blocks = torch.empty_like(logits), _blocks(E, K)
    if T > 0:
        grads = (grad.contiguous() for grad in (dgates_TK, dprobs_E, dz))
        launch(
            route_bwd_kernel, (cdiv(T, blocks["BLOCK_T"]),), (logits, experts_TK, gates_TK, *grads, dlogits), (T,),
            E=E, K=K, SIGMOID=sigmoid, NORMALIZE=normalize, **blocks,
        )  # fmt: skip
    return dlogits


def _setup_context(ctx, inputs, output):
    logits, _, _, ctx.sigmoid, ctx.normalize = inputs
    ctx.save_for_backward(logits, output[1], output[0])


def _derivative(ctx, run, dgates, _dexperts, _dcounts, dprobs, dz):
    return run(*ctx.saved_tensors, dgates, dprobs, dz, ctx.sigmoid, ctx.normalize), None, None, None, None


route_op, route_bwd_op, run_route = define(
    "route", route_fwd, route_bwd, _fake_fwd,
    lambda logits_TE, *_: torch.empty_like(logits_TE, memory_format=torch.contiguous_format),
    _setup_context, _derivative,
)  # fmt: skip
