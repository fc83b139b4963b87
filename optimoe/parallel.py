"""Several GPUs, one process each.

    ddp    Every rank holds all weights in the compute dtype. As soon as the backward pass has the gradient of a large
           tensor, it is averaged over the ranks and each rank keeps one slice of dimension 0 (reduce-scatter). The rank
           updates this slice, for which alone it holds float32 weights and optimiser states (ZeRO-2). The next step
           gathers the new slices while its forward pass runs. Small tensors are averaged together and updated
           everywhere. Nothing waits for the host, so a whole step can be one CUDA graph, collectives included.
    fsdp   Weights, gradients and states are all sharded (FSDP2), for models that do not fit. A block's weights are
           gathered, in the compute dtype, when it runs.
    ep     As ddp, but every rank holds only E/world experts, and tokens travel to them (optimoe/exchange.py).

Gradients and gathered weights travel in the dtype that they have on one GPU. A checkpoint has the format of one
process, so a run goes on with any number of ranks and any engine.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model import MoE
from optimoe.config import require
from optimoe.exchange import experts_all_to_all
from optimoe.optim import Together, local, make_optimizer, total_norm

# torch 2.13 renamed these two.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SLICED_FROM = 2**20  # values of a tensor whose update is divided among the ranks
AHEAD = 2  # layers whose weights are gathered while one runs


def wrap(model, cfg, device, world):
    """The model on the device, spread over the ranks with fsdp and ep. All ranks must have drawn the same weights."""
    if world == 1:
        return model.to(device)
    if cfg.parallel == "ep":
        mesh = init_device_mesh(device.type, (world,))
        remedy = f"parallel=ep deals out whole experts: use a multiple of {world} ranks"
        require(cfg.n_experts % world == 0, "n_experts", cfg.n_experts, remedy)
        for moe in (module for module in model.modules() if isinstance(module, MoE)):
            for name in ("w_in", "w_out"):
                own = getattr(moe, name).detach().chunk(world)[dist.get_rank()].to(device, copy=True)
                setattr(moe, name, torch.nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)])))
            moe.experts = experts_all_to_all
    if cfg.parallel != "fsdp":
        return model.to(device)
    mesh = init_device_mesh(device.type, (world,))
    # Casting before the gather halves its bytes and changes no bit, as every use in a block casts anyway. The embedding
    # stays float32, because its gradient is a sum over tokens; so do inputs, which include the float32 RoPE tables.
    half = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def average(tensors):
    """Replace tensors by their means over all ranks, in one collective for each dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(
            same, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in same]), same, strict=True)]
        )


def sync_gradients(model, optimizer, now):
    """Whether the next backward pass averages gradients over the ranks: only the last micro-batch of a step does."""
    optimizer.synchronize = now
    if is_fsdp(model):
        model.set_requires_gradient_sync(now)


def layer_of(name, cfg):
    """The block before which a weight of model.GPT is needed; n_layers for those of the output layer."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else 0 if name.startswith("embed.") else cfg.n_layers


class Sharded(Together):
    """The optimiser of one rank. state_dict has the format of one process: all ranks take it, and rank 0 gets it.

    synchronize: whether backward passes average gradients over the ranks; only the last micro-batch of a step does."""

    synchronize = True

    def __init__(self, model, cfg, rank, world):
        self.model, self.rank, self.world = model, rank, world
        self.full = {}  # this rank's slice of a parameter, in the same memory -> the parameter
        self.reduced = {}  # parameter -> (gradient of this rank's slice, the collective that brings it)
        self.gathers = {}  # layer -> collectives that bring its weights
        self.next_layer = cfg.n_layers + 1  # the first layer whose weights have not been asked for in this step
        self.divided = world > 1 and not is_fsdp(model)
        super().__init__(*make_optimizer(model, cfg, self._slice if self.divided else None).parts)
        for p in self.full.values():
            p.register_post_accumulate_grad_hook(self._reduce)
        if self.full:
            self.pieces = [[] for _ in range(cfg.n_layers + 1)]  # of each layer: (slice, parameter)
            for name, p in model.named_parameters():
                self.pieces[layer_of(name, cfg)] += [(piece, of) for piece, of in self.full.items() if of is p]
            model.before_layer = self._wait

    def _slice(self, p):
        if isinstance(p, DTensor) or p.numel() < SLICED_FROM or p.shape[0] % self.world:
            return p
        piece = torch.nn.Parameter(p.detach().chunk(self.world)[self.rank])
        self.full = {other: of for other, of in self.full.items() if of is not p} | {piece: p}
        return piece

    def _reduce(self, p):
        if self.synchronize:
            grad = p.grad.contiguous()
            own = grad.new_empty(grad.shape[0] // self.world, *grad.shape[1:])
            self.reduced[p] = own, reduce_scatter(own, grad, async_op=True)

    def average_gradients(self):
        """Finish what the backward pass began; then the gradients of a step are means over all ranks' tokens."""
        if not self.divided:
            return
        for piece, p in self.full.items():
            own, work = self.reduced.pop(p)
            work.wait()
            piece.grad, p.grad = own, None
        means = [piece.grad for piece in self.full]
        if means:
            torch._foreach_div_(means, self.world)
        average([p.grad for p in self.model.parameters() if p.grad is not None and not isinstance(p, DTensor)])

    def grad_norm(self):
        """Norm of all gradients, a float32 scalar tensor. Every rank gets the same: slices count once."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        own = [piece.grad for piece in self.full] + [grad for grad in grads if isinstance(grad, DTensor)]
        plain = [grad for grad in grads if not isinstance(grad, DTensor)]
        if not own:
            return total_norm(plain)
        square = total_norm([local(grad) for grad in own]).square()
        dist.all_reduce(square)
        return (square + total_norm(plain).square()).sqrt() if plain else square.sqrt()

    def begin_step(self):
        """From here on the weights are old: the model asks for those of each layer before it runs."""
        self.next_layer = 0

    def _wait(self, layer):
        """Wait for the weights of a layer, and ask for those of the next ones.

        Asked for all at once, they did not overlap with anything in a CUDA graph (8 ms of 163 on two H200s)."""
        while self.next_layer <= min(layer + AHEAD, len(self.pieces) - 1):
            gathers = self.gathers[self.next_layer] = []
            for piece, p in self.pieces[self.next_layer]:
                own = piece.detach() if piece.is_cuda else piece.detach().clone()  # NCCL gathers in place
                gathers.append(all_gather(p.detach(), own, async_op=True))
            self.next_layer += 1
        for gather in self.gathers.pop(layer, ()):
            gather.wait()

    def gather_weights(self):
        """Bring all weights up to date; between two steps a rank has only its slices of large tensors."""
        self.begin_step()
        for layer in range(len(self.pieces) if self.full else 0):
            self._wait(layer)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for piece, p in self.full.items():
            piece.grad = p.grad = None

    def state_dict(self):
        return self._map(super().state_dict(), self._gather)

    def load_state_dict(self, states):
        super().load_state_dict(self._map(states, self._cut))

    def _map(self, states, change):
        mapped = []
        for part, state in zip(self.parts, states, strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            values = {
                i: {name: change(self._whole(part, params[i]), t) for name, t in values.items()}
                for i, values in state["state"].items()
            }
            mapped.append(state | {"state": values})
        return mapped

    def _whole(self, part, p):
        """The parameter of the model of which p is this rank's slice, or p itself."""
        piece = getattr(part, "copies", {}).get(p, p)
        return self.full.get(piece, p)

    def _gather(self, p, t):
        """A state of parameter p on the CPU of rank 0, one tensor at a time: all of them might not fit on a GPU."""
        if isinstance(t, DTensor):
            out = t.full_tensor()
        elif t.ndim and t.shape != p.shape:
            out = t.new_empty(p.shape)
            all_gather(out, t.contiguous())
        else:
            return t
        return out.cpu() if self.rank == 0 else None

    def _cut(self, p, t):
        if isinstance(p, DTensor):
            return shard_like(p, t) if t.shape == p.shape else t
        sliced = any(p is whole for whole in self.full.values())
        return t.chunk(self.world)[self.rank].clone() if sliced and t.shape == p.shape else t

    def weights(self, model):
        self.gather_weights()
        state = super().weights(model)
        names = {p: name for name, p in model.named_parameters()}
        for part in self.parts:
            for own, piece in getattr(part, "copies", {}).items():
                if piece in self.full:
                    p = self.full[piece]
                    state[names[p]] = self._gather(p, own.detach())
        return state


def shard_like(p, t):
    """The full tensor t, known to every rank, sharded like DTensor p; a copy, so that the rest of t can go."""
    part = distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def full_state(model, optimizer, rank):
    """(optimizer.weights(model), their norm) in the format of one process. All ranks take it, and rank 0 gets it."""
    state, norms = optimizer.weights(model), []
    for name, t in state.items():
        if isinstance(t, DTensor):
            t = t.full_tensor()
            state[name] = t.cpu() if rank == 0 else None
        if t is not None:
            norms.append(t.norm(dtype=torch.float32).cpu())
    norm = torch.stack(norms).norm()
    if dist.is_initialized() and dist.get_world_size() > 1:
        box = [norm]
        dist.broadcast_object_list(box)
        norm = box[0]
    return state, float(norm)


def is_fsdp(model):
    return isinstance(model, FSDPModule)
