"""Expert parallelism: tokens travel to the ranks that hold their experts, and back (docs/multi-gpu.md).

They travel by kernels (moe_kernels/remote.py), or on the exact path by two all-to-all collectives per layer and pass
(before them, the forward pass exchanges the numbers of rows and the ids of experts in two more). For these the host
must know the numbers of rows.
"""

import math
import os
import time
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from model import MoE, compute_dtype
from moe_kernels import moe_experts, remote
from optimoe.config import require

RUN_MINUTES = 30  # how long ranks wait for one another: rank 0 may be writing a large checkpoint
ROOM = 1.5  # rows that a rank has buffers for, as a multiple of its share


class Groups(NamedTuple):
    """The two groups of ranks that a rank belongs to."""

    experts: dist.ProcessGroup | None  # ranks that hold all experts together; None: all ranks
    index: int  # this rank's number there
    size: int
    copies: dist.ProcessGroup | None  # ranks that hold the same experts; None: no other rank
    copy: int
    n_copies: int


def group_size(cfg, world):
    """How many ranks divide the experts. ValueError unless groups and experts come out even."""
    if world == 1 or cfg.parallel != "ep":
        return 1
    size = cfg.ep_size or world
    require(world % size == 0, "ep_size", cfg.ep_size, f"use a divisor of the {world} ranks")
    common = math.gcd(cfg.n_experts, world)
    other = f"--ep_size={common}" if common > 1 else "--parallel=ddp"
    remedy = f"{size} ranks divide the experts: use a multiple of {size}, or {other}"
    require(cfg.dense or cfg.n_experts % size == 0, "n_experts", cfg.n_experts, remedy)
    return size


def make_groups(size, rank, world):
    """The Groups of this rank: every `size` consecutive ranks hold all experts. All ranks must call it."""
    if size == world:
        return Groups(None, rank, world, None, 0, 1)
    ranks = torch.arange(world, device="cpu").view(-1, size)
    wait = timedelta(minutes=RUN_MINUTES)
    experts, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=wait)
    copies, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=wait)
    return Groups(experts, rank % size, size, copies, rank // size, world // size)


class Exchange(torch.autograd.Function):
    """Send sent[r] rows, in order, to each rank r of a group; received[r] come from it. Their gradients travel back."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.how = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        sent, received, group = ctx.how
        return Exchange.apply(grad, received, sent, group), None, None, None


def experts_all_to_all(
    x_TD, w_in, w_out, gates_TK, experts_TK, impl=None, activation="swiglu", add_TD=None, group=None
):
    """`moe_experts` for this rank's part of w_in and w_out. (Token, expert) pairs are sorted by their expert's rank.

    Any split of the tokens over the ranks of the group works, also none for a rank."""
    (T, K), n_own = experts_TK.shape, len(w_in)
    to_rank_S, order_S = (experts_TK.flatten() // n_own).sort(stable=True)
    sent = torch.bincount(to_rank_S, minlength=dist.get_world_size(group))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    sent, received = sent.tolist(), received.tolist()
    ids = Exchange.apply((experts_TK.flatten() % n_own)[order_S], sent, received, group)
    rows = Exchange.apply(x_TD[order_S // K], sent, received, group)
    ones = torch.ones(len(rows), 1, device=rows.device)
    y_SD = moe_experts(rows, w_in, w_out, ones, ids[:, None], impl, activation)
    y_SD = Exchange.apply(y_SD, received, sent, group)
    y_TKD = y_SD[order_S.argsort()].view(T, K, -1)
    y_TD = (gates_TK[..., None] * y_TKD.float()).sum(1)
    return (y_TD if add_TD is None else y_TD + add_TD).to(x_TD.dtype)


def experts_nearby(moe, x_TD, w_in, w_out, gates_TK, experts_TK, impl=None, activation="swiglu", add_TD=None):
    """`moe_experts` by kernels in training mode, else (validation, repeated steps) on the exact path."""
    if not moe.training:
        group = moe.groups.experts
        return experts_all_to_all(x_TD, w_in, w_out, gates_TK, experts_TK, impl, activation, add_TD, group)
    y_TD = remote.remote_experts(x_TD, w_in, w_out, gates_TK.float(), experts_TK.int(), activation, moe.number)[0]
    return y_TD if add_TD is None else y_TD + add_TD


def deal_out(model, cfg, device, world, tokens):
    """With parallel=ep, keep in each layer only the experts of this rank, on the device. All ranks must have drawn the
    same weights. Sets model.limit where tokens travel by kernels.

    tokens: number in a micro-batch of one rank. ValueError unless the experts can be dealt out."""
    size = group_size(cfg, world)
    if size == 1:
        return
    groups = make_groups(size, dist.get_rank(), world)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in layers:
        for name in ("w_in", "w_out"):
            own = getattr(moe, name).detach().chunk(size)[groups.index].to(device, copy=True)
            setattr(moe, name, torch.nn.Parameter(own))
        moe.groups, moe.experts = groups, partial(experts_all_to_all, group=groups.experts)
    if not layers or not reachable(cfg, device, groups):
        return
    # No rank gets more than the second product: all tokens of its group, each with as many of its experts as possible.
    n_rows = int(min(ROOM * cfg.top_k, size * min(cfg.top_k, cfg.n_experts // size)) * tokens)
    sizes = remote.Sizes(len(layers), size, tokens, cfg.top_k, cfg.d_model, n_rows, compute_dtype(cfg, device))
    memories, barrier = open_memory(sizes.lay_out(), device, groups)
    ranks = remote.Ranks(groups.index, sizes, memories, barrier)
    remote.LAYERS[:] = [(ranks, layer) for layer in range(len(layers))]
    for layer, moe in enumerate(layers):
        moe.number, moe.experts = torch.tensor(layer, device="cpu"), partial(experts_nearby, moe)
    model.limit = Limit(groups, n_rows, device)


def reachable(cfg, device, groups):
    """Whether the kernels can run: each group is on GPUs of one machine that read each other's memory."""
    if device.type != "cuda" or cfg.impl not in ("auto", "triton"):
        return False
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) % groups.size == 0
    first = device.index - groups.index
    others = (other for other in range(first, first + groups.size) if other != device.index)
    near = here and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    near = torch.tensor(int(near), device=device)
    dist.all_reduce(near, dist.ReduceOp.MIN)  # on different paths they would wait for one another for ever
    if not near and dist.get_rank() == 0:
        reason = "some GPUs cannot read each other's memory" if here else "a group of ranks is on several machines"
        print(f"parallel=ep: {reason}; tokens travel by all-to-all, and every layer waits for the host", flush=True)
    return bool(near)


def open_memory(size, device, groups):
    """(memories, barrier) for remote.Ranks: `size` bytes of every rank of the group."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here needs it
    from torch.distributed import _symmetric_memory as symmetric

    own = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, groups.experts or dist.group.WORLD)
    return [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(groups.size)], handle.barrier


class Limit:
    """Finds steps in which a rank gets more rows than fit, and reports them to the host while the step still runs."""

    def __init__(self, groups, n_rows, device):
        self.groups, self.n_rows, self.asked, self.repeated = groups, n_rows, 0, 0
        self.over = None  # bool scalar, of the present step
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self.report = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=pinned)  # 2 * steps + over

    def look(self, counts_CNE, first, last):
        """To be called once in every micro-batch, with the counts of each of the C groups that hold all experts."""
        rows_CNW = counts_CNE.unflatten(-1, (self.groups.size, -1)).sum(-1)
        over = (rows_CNW > self.n_rows).any()
        self.over = over if first else self.over | over
        if last:
            self.steps += 1
            self.report.copy_(2 * self.steps + self.over, non_blocking=True)

    def exceeded(self):
        """Whether the last launched step must be repeated; to be called once for each step."""
        self.asked += 1
        while int(self.report) // 2 < self.asked:
            # Sleep, or a core would be busy all the time; query() raises what went wrong on the device.
            time.sleep(2e-4)
            if self.report.is_pinned():
                torch.cuda.current_stream().query()
        return bool(self.report % 2)


def count(model, counts_NE, first, last):
    """Sum the expert counts of a micro-batch over all ranks, in place. Returns None, or a bool scalar: whether a rank
    has got too many rows in this step so far. To be called for every micro-batch of a step."""
    limit = model.limit if model.training else None
    if limit is None or limit.groups.copies is None:
        dist.all_reduce(counts_NE)
        counts_CNE = counts_NE[None]
    else:  # a rank's rows come from its own group
        counts_CNE = counts_NE.new_zeros(limit.groups.n_copies, *counts_NE.shape)
        counts_CNE[limit.groups.copy] = counts_NE
        dist.all_reduce(counts_CNE)
        counts_NE.copy_(counts_CNE.sum(0))
    if limit is None:
        return None
    limit.look(counts_CNE, first, last)
    return limit.over


def repeating(run_step, exact_step, model):
    """run_step(batches), followed by exact_step(batches) where a rank got too many rows."""

    def step(batches):
        result = run_step(batches)
        if model.limit.exceeded():
            model.eval()
            result = exact_step(batches)
            model.train()
            model.limit.repeated += 1
        return result

    return step


def repeated(model):
    """{"repeated_steps": number since the last call}, or {} without any."""
    found = model.limit.repeated if model.limit else 0
    if found:
        model.limit.repeated = 0
    return {"repeated_steps": found} if found else {}
