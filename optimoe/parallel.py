"""Several GPUs with PyTorch's engines: DistributedDataParallel with sharded optimiser states, or FSDP2 where the model does not fit.

    ddp    every rank holds all weights; gradients are averaged while the backward pass runs. A rank updates 1/world of each tensor (slices of
           dimension 0: whole experts, rows of matrices) with only that part's optimiser states, then the slices are gathered (ZeRO-1).
    fsdp   weights, gradients and states are all sharded; a block's weights are gathered, in the compute dtype, when it runs.
    ep     as ddp, but every rank holds only E/world experts and tokens travel to them (experts_all_to_all): pays where the weights of the experts
           are more bytes than the tokens of a step, that is where E is large; the exchange waits for the host, so it is not the default.

torch's ZeroRedundancyOptimizer deals out whole tensors: with a few large expert tensors that is uneven, and its states are pickled to one rank for a
checkpoint. Slices are even, and a checkpoint here has the format of one process, so a run goes on with any number of ranks and any engine.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model import MoE
from moe_kernels import moe_experts
from optimoe.config import require
from optimoe.optim import Together, make_optimizer


def wrap(model, cfg, device, world):
    """Move the model to the device and spread it over the ranks; returns what the training loop calls in its place."""
    if world == 1:
        return model.to(device)
    if cfg.parallel == "ep":
        mesh = init_device_mesh(device.type, (world,))
        require(
            cfg.n_experts % world == 0,
            "n_experts",
            cfg.n_experts,
            f"parallel=ep deals out whole experts: use a multiple of {world} ranks",
        )
        for moe in (module for module in model.modules() if isinstance(module, MoE)):
            for name in ("w_in", "w_out"):
                own = getattr(moe, name).detach().chunk(world)[dist.get_rank()].to(device, copy=True)
                setattr(moe, name, torch.nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)])))
            moe.experts = experts_all_to_all
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        )
    if cfg.parallel != "fsdp":
        # Buffers stay out of it: the router bias is the same everywhere because the counts are. Always call the wrapper, never its module.
        return DistributedDataParallel(model.to(device), broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world,))
    # Every use in a block casts to the compute dtype anyway: doing so before the gather halves its bytes and changes no bit. Not so
    # the embedding, whose gradient is a sum over tokens and stays float32; nor the inputs, among which are float32 RoPE tables.
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


class Exchange(torch.autograd.Function):
    """Rows to other ranks: sent[r] of them, in order, to rank r; received[r] arrive from it. Their gradients travel back."""

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
    """`moe_experts` with w_in and w_out sharded by expert (DTensors): pairs are sorted by the rank of their expert, sent there, and come back.

    Any split of the tokens works, also none for a rank. The numbers of rows are needed on the host: one wait per layer and pass."""
    (T, K), w_in, w_out = experts_TK.shape, w_in.to_local(), w_out.to_local()
    world, own = dist.get_world_size(), len(w_in)
    for w in (w_in, w_out):
        if w.requires_grad:
            w.register_hook(
                lambda grad: grad / world
            )  # a sum over all ranks' tokens, while DDP makes all other gradients means over ranks
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


def grad_norm(model):
    """Norm of all gradients, a float32 scalar tensor. Every rank gets the same: shards count once."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    plain = [grad for grad in grads if not isinstance(grad, DTensor)]
    if not shards:
        return total_norm(plain)
    square = total_norm(shards).square()
    dist.all_reduce(square)
    return (square + total_norm(plain).square()).sqrt() if plain else square.sqrt()


def total_norm(tensors):
    """Norm of all of them together, in float32: one of bfloat16 has three digits. torch's kernel takes a list of one dtype."""
    lists = ([t for t in tensors if t.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors))
    return torch.stack([norm for each in lists for norm in torch._foreach_norm(each, 2, dtype=torch.float32)]).norm()


def sync_gradients(net, now):
    """Whether the next forward and backward pass averages gradients over the ranks: only the last micro-batch of a step does."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = now
    elif is_fsdp(net):
        net.set_requires_gradient_sync(now)


class Sharded(Together):
    """The optimiser of one rank of several. Its state_dict is that of one process: all ranks take it together, and rank 0 gets all of it."""

    def __init__(self, model, cfg, rank, world):
        self.rank, self.world = rank, world
        self.full = {}  # slice -> the parameter it is a slice of (ddp; FSDP2's parameters are slices by themselves)
        super().__init__(*make_optimizer(model, cfg, self._slice if world > 1 else None).parts)

    def _slice(self, p):
        if isinstance(p, DTensor) or p.shape[0] % self.world:
            return p  # undivided: every rank updates the whole of it, and all of them alike
        piece = torch.nn.Parameter(p.detach().chunk(self.world)[self.rank])
        self.full[piece] = p
        return piece

    @torch.no_grad()
    def step(self, skip=None, scale=None):
        for piece, p in self.full.items():
            piece.grad = p.grad.chunk(self.world)[self.rank]
        super().step(skip, scale)
        gathers = [dist.all_gather_into_tensor(p, piece.clone(), async_op=True) for piece, p in self.full.items()]
        for gather in gathers:
            gather.wait()

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for p in self.full.values():
            p.grad = None

    def state_dict(self):
        return self._map(super().state_dict(), self._gather)

    def load_state_dict(self, states):
        super().load_state_dict(self._map(states, self._cut))

    def _map(self, states, change):
        mapped = []
        for part, state in zip(self.parts, states, strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            mapped.append(
                state
                | {
                    "state": {
                        i: {name: change(params[i], t) for name, t in values.items()}
                        for i, values in state["state"].items()
                    }
                }
            )
        return mapped

    def _gather(self, p, t):
        if isinstance(t, DTensor):
            out = t.full_tensor()
        elif p in self.full and t.shape == p.shape:
            out = t.new_empty(self.full[p].shape)
            dist.all_gather_into_tensor(out, t.contiguous())
        else:
            return t
        return out.cpu() if self.rank == 0 else None  # one tensor at a time: all of them might not fit on a GPU

    def _cut(self, p, t):
        if isinstance(p, DTensor):
            return shard_like(p, t) if t.shape == p.shape else t
        return t.chunk(self.world)[self.rank].clone() if p in self.full and t.shape == self.full[p].shape else t


def shard_like(p, t):
    """The full tensor t, known to every rank, sharded like DTensor p; a copy, so that the rest of t can go."""
    part = distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def full_state(model, optimizer, rank):
    """(optimizer.weights(model) in the format of one process, their norm); all ranks must take it together, rank 0 gets all of it."""
    state, norms = optimizer.weights(model), []
    for name, t in state.items():
        if isinstance(t, DTensor):
            t = t.full_tensor()
            state[name] = t.cpu() if rank == 0 else None
        norms.append(t.norm(dtype=torch.float32))
    return state, float(torch.stack(norms).norm())


def is_fsdp(model):
    return isinstance(model, FSDPModule)
