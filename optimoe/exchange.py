"""Expert parallelism: tokens travel to the rank that holds their expert, and back.

This pays where the weights of the experts are more bytes than the tokens of a step. The numbers of rows are needed on
the host: one wait per layer and pass, so it is not the default.
"""

import torch
import torch.distributed as dist

from moe_kernels import moe_experts


class Exchange(torch.autograd.Function):
    """Send sent[r] rows, in order, to each rank r; received[r] arrive from it. Their gradients travel back."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        ctx.counts = sent, received
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.counts
        return Exchange.apply(grad, received, sent), None, None


def experts_all_to_all(x_TD, w_in, w_out, gates_TK, experts_TK, impl=None, activation="swiglu"):
    """`moe_experts` for w_in and w_out sharded by expert (DTensors). Pairs are sorted by the rank of their expert.

    Any split of the tokens over the ranks works, also none for a rank."""
    (T, K), w_in, w_out = experts_TK.shape, w_in.to_local(), w_out.to_local()
    world, own = dist.get_world_size(), len(w_in)
    for w in (w_in, w_out):
        if w.requires_grad:
            # These are sums over all ranks' tokens, while all other gradients become means over the ranks.
            w.register_hook(lambda grad: grad / world)
    to_rank_S, order_S = (experts_TK.flatten() // own).sort(stable=True)
    sent = torch.bincount(to_rank_S, minlength=world)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    sent, received = sent.tolist(), received.tolist()
    ids = Exchange.apply((experts_TK.flatten() % own)[order_S], sent, received)
    rows = Exchange.apply(x_TD[order_S // K], sent, received)
    ones = torch.ones(len(rows), 1, device=rows.device)
    y_SD = Exchange.apply(moe_experts(rows, w_in, w_out, ones, ids[:, None], impl, activation), received, sent)
    y_TKD = y_SD[order_S.argsort()].view(T, K, -1)
    return (gates_TK[..., None] * y_TKD.float()).sum(1).to(x_TD.dtype)
