"""Expert parallelism: each rank has its share of the experts, and tokens travel to them and back.

On GPUs of one machine that read each other's memory they travel by kernels (moe_kernels/remote.py). Nothing waits for
the host, but a rank has room for ROOM times its share of the rows. A step in which one gets more discards itself and is
repeated by the exact road, which also serves validation and all other devices: two all-to-all collectives a layer and
pass, for which the host must know the numbers of rows.
"""

import os
import time
from functools import partial

import torch
import torch.distributed as dist

from model import MoE, compute_dtype
from moe_kernels import moe_experts, remote
from optimoe.config import require

ROOM = 1.5  # rows that a rank has buffers for, as a multiple of its share


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
    """`moe_experts` for this rank's part of w_in and w_out. Pairs are sorted by the rank of their expert.

    Any split of the tokens over the ranks works, also none for a rank."""
    (T, K), own = experts_TK.shape, len(w_in)
    to_rank_S, order_S = (experts_TK.flatten() // own).sort(stable=True)
    sent = torch.bincount(to_rank_S, minlength=dist.get_world_size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    sent, received = sent.tolist(), received.tolist()
    ids = Exchange.apply((experts_TK.flatten() % own)[order_S], sent, received)
    rows = Exchange.apply(x_TD[order_S // K], sent, received)
    ones = torch.ones(len(rows), 1, device=rows.device)
    y_SD = Exchange.apply(moe_experts(rows, w_in, w_out, ones, ids[:, None], impl, activation), received, sent)
    y_TKD = y_SD[order_S.argsort()].view(T, K, -1)
    return (gates_TK[..., None] * y_TKD.float()).sum(1).to(x_TD.dtype)


def experts_nearby(moe, x_TD, w_in, w_out, gates_TK, experts_TK, impl=None, activation="swiglu"):
    """The same by kernels while the layer is in training mode: validation and repeated steps are exact."""
    if not moe.training:
        return experts_all_to_all(x_TD, w_in, w_out, gates_TK, experts_TK, impl, activation)
    return remote.remote_experts(x_TD, w_in, w_out, gates_TK.float(), experts_TK.int(), activation, moe.number)[0]


def deal_out(model, cfg, device, rank, world, tokens):
    """Leave each layer of the model its rank's experts. Sets model.limit where tokens travel by kernels.

    tokens: of a rank and micro-batch. ValueError unless the experts can be dealt out."""
    remedy = f"parallel=ep deals out whole experts: use a multiple of {world} ranks"
    require(cfg.n_experts % world == 0, "n_experts", cfg.n_experts, remedy)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in layers:
        for name in ("w_in", "w_out"):
            own = getattr(moe, name).detach().chunk(world)[rank].to(device, copy=True)
            setattr(moe, name, torch.nn.Parameter(own))
        moe.experts = experts_all_to_all
    if not layers or not reachable(cfg, device, world):
        return
    n_rows = int(min(ROOM * cfg.top_k, world * min(cfg.top_k, cfg.n_experts // world)) * tokens)
    sizes = remote.Sizes(len(layers), world, tokens, cfg.top_k, cfg.d_model, n_rows, compute_dtype(cfg, device))
    memories, barrier = open_memory(sizes.lay_out(), device, world)
    ranks = remote.Ranks(rank, sizes, memories, barrier)
    remote.LAYERS[:] = [(ranks, layer) for layer in range(len(layers))]
    for layer, moe in enumerate(layers):
        moe.number, moe.experts = torch.tensor(layer, device="cpu"), partial(experts_nearby, moe)
    model.limit = Limit(world, n_rows, device)


def reachable(cfg, device, world):
    """Whether the kernels can run: on GPUs of one machine that read each other's memory."""
    if device.type != "cuda" or cfg.impl not in ("auto", "triton"):
        return False
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
    others = (other for other in range(world) if other != device.index)
    if here and all(torch.cuda.can_device_access_peer(device.index, other) for other in others):
        return True
    if dist.get_rank() == 0:
        reason = "these GPUs cannot read each other's memory" if here else "the ranks are on several machines"
        print(
            f"parallel=ep: {reason}; tokens travel by all-to-all, for which every layer waits for the host", flush=True
        )
    return False


def open_memory(size, device, world):
    """(memories, barrier) for remote.Ranks: `size` bytes of every rank."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here needs it
    from torch.distributed import _symmetric_memory as symmetric

    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, dist.group.WORLD)
    return [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(world)], handle.barrier


class Limit:
    """Finds steps in which a rank gets more rows than it has room for, and tells the host while the step still runs."""

    def __init__(self, world, n_rows, device):
        self.world, self.n_rows, self.asked = world, n_rows, 0
        self.over = None  # bool scalar, of the present step
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self.report = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=pinned)  # 2 * steps + over

    def look(self, counts_NE, first, last):
        """Once in every micro-batch, with the counts over all ranks."""
        rows_NW = counts_NE.unflatten(1, (self.world, -1)).sum(2)
        over = (rows_NW > self.n_rows).any()
        self.over = over if first else self.over | over
        if last:
            self.steps += 1
            self.report.copy_(2 * self.steps + self.over, non_blocking=True)

    def exceeded(self):
        """Whether the step that was launched last has discarded itself; to be asked once about each step."""
        self.asked += 1
        while int(self.report) // 2 < self.asked:
            # Not at once, or a core would be busy all the time; and query() raises what went wrong on the device.
            time.sleep(2e-4)
            if self.report.is_pinned():
                torch.cuda.current_stream().query()
        return bool(self.report % 2)


def discard(model, counts_NE, first, last):
    """None, or a bool scalar: whether a rank got too many rows in this step so far. For every micro-batch of a step."""
    if model.limit is None or not model.training:
        return None
    model.limit.look(counts_NE, first, last)
    return model.limit.over


def repeating(run_step, exact_step, model):
    """run_step(batches), and exact_step(batches) after it where it has discarded itself."""

    def step(batches):
        result = run_step(batches)
        if model.limit.exceeded():
            model.eval()
            result = exact_step(batches)
            model.train()
        return result

    return step
