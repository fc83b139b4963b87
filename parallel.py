"""Several GPUs with PyTorch's engines: DistributedDataParallel with sharded optimiser states, or FSDP2 where the model does not fit.

    ddp    every rank holds all weights; gradients are averaged while the backward pass runs. A rank updates 1/world of each tensor (slices of
           dimension 0: whole experts, rows of matrices) with only that part's optimiser states, then the slices are gathered (ZeRO-1).
    fsdp   weights, gradients and states are all sharded; a block's weights are gathered, in the compute dtype, when it runs.

torch's ZeroRedundancyOptimizer deals out whole tensors: with a few large expert tensors that is uneven, and its states are pickled to one rank for a
checkpoint. Slices are even, and a checkpoint here has the format of one process, so a run goes on with any number of ranks and either engine.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from optim import Together, make_optimizer


def wrap(model, cfg, device, world):
    """Move the model to the device and spread it over the ranks; returns what the training loop calls in its place."""
    if world == 1:
        return model.to(device)
    if cfg.parallel == "ddp":
        # Buffers stay out of it: the router bias is the same everywhere because the counts are. Always call the wrapper, never its module.
        return DistributedDataParallel(model.to(device), broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world,))
    # Every use in a block casts to the compute dtype anyway: doing so before the gather halves its bytes and changes no bit. Not so
    # the embedding, whose gradient is a sum over tokens and stays float32; nor the inputs, among which are float32 RoPE tables.
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def sync_gradients(net, now):
    """Whether the next forward and backward pass averages gradients over the ranks: only the last micro-batch of a step does."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = now
    elif is_fsdp(net):
        net.set_requires_gradient_sync(now)


class Sharded(Together):
    """The optimiser of one rank of several. Its state_dict is that of one process; all ranks must take it together."""

    def __init__(self, model, cfg, rank, world):
        self.rank, self.world = rank, world
        self.full = {}  # slice -> the parameter it is a slice of (ddp; FSDP2's parameters are slices by themselves)
        super().__init__(*make_optimizer(model, cfg, self._slice).parts)

    def _slice(self, p):
        if self.world == 1 or isinstance(p, DTensor) or p.shape[0] % self.world:
            return p  # undivided: every rank updates the whole of it, and all of them alike
        piece = torch.nn.Parameter(p.detach().chunk(self.world)[self.rank])
        self.full[piece] = p
        return piece

    @torch.no_grad()
    def step(self, skip=None):
        for piece, p in self.full.items():
            piece.grad = p.grad.chunk(self.world)[self.rank]
        super().step(skip)
        gathers = [dist.all_gather_into_tensor(p, piece.clone(), async_op=True) for piece, p in self.full.items()]
        for gather in gathers:
            gather.wait()

    def zero_grad(self):
        super().zero_grad()
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
            mapped.append(state | {"state": {i: {name: change(params[i], t) for name, t in values.items()} for i, values in state["state"].items()}})
        return mapped

    def _gather(self, p, t):
        if p not in self.full or t.shape != p.shape:
            return whole(t)
        out = t.new_empty(self.full[p].shape)
        dist.all_gather_into_tensor(out, t.contiguous())
        return out

    def _cut(self, p, t):
        if isinstance(p, DTensor):
            return shard_like(p, t) if t.shape == p.shape else t
        return t.chunk(self.world)[self.rank].clone() if p in self.full and t.shape == self.full[p].shape else t


def shard_like(p, t):
    """The full tensor t, known to every rank, sharded like DTensor p."""
    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def full_state(model):
    """model.state_dict() in the format of one process; all ranks must take it together."""
    return {name: whole(t) for name, t in model.state_dict().items()}


def whole(t):
    """A result of collective arithmetic on FSDP2's shards, such as a norm, as a plain tensor."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def is_fsdp(model):
    return isinstance(model, FSDPModule)
