"""Several GPUs, one process each (docs/multi-gpu.md).

A rank updates one slice of dimension 0 of each large tensor (ZeRO-2). As soon as the backward pass has its gradient, a
reduce-scatter averages it; the next step gathers the new slices while its forward pass runs. Small tensors are averaged
together and updated everywhere. Gradients and weights travel in the dtype that they have on one GPU.
"""

import gc
import os
import sys
import traceback
import weakref

import torch
import torch.distributed as dist

from model import MoE
from optimoe.checkpoint import Piece
from optimoe.config import require
from optimoe.optim import Together, make_optimizer, total_norm

# torch 2.13 renamed these two.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SLICED_FROM = 2**20  # a tensor of so many values or more is updated in slices, one on each rank
AHEAD = 2  # layers whose weights are gathered while one runs


def connect(device, **options):
    """Start the process group of all ranks. options: of init_process_group."""
    # Its functions take the group of the import as a default: imported later, by dynamo, they would keep it alive.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


def runner():
    """The command that started this process: python, or torchrun with its number of ranks on this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "python" if ranks == "1" else f"torchrun --nproc-per-node={ranks}"


def own_place():
    """[rank, its number on this machine, number of ranks]. ValueError for an environment that no torchrun has made."""
    place, remedy = [], "torchrun sets it: start all ranks with it, or unset WORLD_SIZE for a single process"
    for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):  # a single process has the least values
        text = os.environ.get(name, str(least))
        require(text.isdecimal() and int(text) >= least, name, text, remedy)
        place.append(int(text))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if place[-1] > 1 and name not in os.environ]
    require(not missing, "WORLD_SIZE", place[-1], f"it needs {', '.join(missing)} too; {remedy}")
    return place


def disconnect():
    """End all process groups and their threads. A thread of gloo that outlived the interpreter could still drop the
    last tensor of a collective, for which Python 3.11 aborts the process."""
    if dist.is_initialized():
        error = sys.exception()
        while error:  # the frames of what failed hold CUDA graphs with collectives, for whose end NCCL would wait
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()  # models and optimisers are cycles, and layers know their groups
        dist.destroy_process_group()


def average(tensors, group=None):
    """Replace tensors by their sums over a group (None: all ranks), divided by the number of all ranks, with one
    collective for each dtype."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size()
        parts = zip(flat.split([t.numel() for t in same]), same, strict=True)
        torch._foreach_copy_(same, [part.view_as(t) for part, t in parts])


def layer_of(name, cfg):
    """The number of the first block that needs a weight of model.GPT; n_layers for weights of the output layer."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return 0 if name.startswith("embed.") else cfg.n_layers


class Sharded(Together):
    """The optimiser of one rank. Its state_dict has checkpoint.Pieces where the rank holds a part of a tensor.

    synchronize: whether the backward pass averages gradients over the ranks. The caller sets it: true for the last
    micro-batch of a step only."""

    synchronize = True

    def __init__(self, model, cfg, rank, world):
        self.model, self.rank, self.world = model, rank, world
        self.full = {}  # this rank's slice of a parameter, in the same memory -> the parameter
        self.reduced = {}  # parameter -> (gradient of this rank's slice, the collective that brings it)
        self.gathers = {}  # layer -> collectives that bring its weights
        self.next_layer = cfg.n_layers + 1  # the first layer whose weights have not been asked for in this step
        layers = [moe for moe in model.modules() if isinstance(moe, MoE) and len(moe.w_in) < cfg.n_experts]
        self.groups = layers[0].groups if layers else None
        self.dealt = {p for moe in layers for p in (moe.w_in, moe.w_out)}  # weights of this rank's experts
        super().__init__(*make_optimizer(model, cfg, self._slice).parts)
        sliced = set(self.full.values())
        self.whole = [p for moe in layers for p in (moe.w_in, moe.w_out) if p not in sliced]  # of those, not sliced
        self.exact = {}  # parameter of which this rank has a part -> that part, as the optimiser holds it
        self.places = {}  # such a part -> the other fields of its checkpoint.Piece
        float32_of = {copy: p for p, copy in self.copies.items()}
        for piece, p in [*self.full.items(), *((p, p) for p in self.whole)]:
            self.exact[p] = float32_of.get(piece, piece)
            index, parts = (self.groups.index, self.groups.size) if p in self.dealt else (0, 1)
            _, number, size = self.holders(p)
            place = (index * size + number, parts * size) if p in sliced else (index, parts, number)
            self.places[self.exact[p]] = place
        me = weakref.proxy(self)  # Python cannot free a cycle that goes through a hook
        for p in self.full.values():
            p.register_post_accumulate_grad_hook(lambda p: me._reduce(p))
        if self.full:
            self.pieces = [[] for _ in range(cfg.n_layers + 1)]  # of each layer: (slice, parameter)
            for name, p in model.named_parameters():
                self.pieces[layer_of(name, cfg)] += [(piece, of) for piece, of in self.full.items() if of is p]
            model.before_layer = self._wait

    def holders(self, p):
        """(group of ranks that hold the same values of a parameter, this rank's number there, their number)."""
        groups = self.groups
        return (groups.copies, groups.copy, groups.n_copies) if p in self.dealt else (None, self.rank, self.world)

    def _slice(self, p):
        _, number, size = self.holders(p)
        if size == 1 or p.numel() < SLICED_FROM or p.shape[0] % size:
            return p
        piece = torch.nn.Parameter(p.detach().chunk(size)[number])
        # make_optimizer asks again after it has changed the dtype of a parameter: only the last slice counts.
        self.full = {other: of for other, of in self.full.items() if of is not p} | {piece: p}
        return piece

    def _reduce(self, p):
        if self.synchronize:
            group, _, size = self.holders(p)
            grad = p.grad.contiguous()
            own = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
            self.reduced[p] = own, reduce_scatter(own, grad, group=group, async_op=True)

    def _gradients(self):
        """Three lists of gradients: that only this rank has, of experts that one rank of each group has, and that all
        ranks have."""
        grads = lambda params: [p.grad for p in params if p.grad is not None]
        own, experts = grads(self.full), grads(self.whole)
        if not (self.groups and self.groups.copies):  # no other rank has this rank's experts
            own, experts = own + experts, []
        return own, experts, grads(p for p in self.model.parameters() if p not in self.exact)

    def average_gradients(self):
        """Finish the backward pass's collectives: gradients become means over the tokens of all ranks."""
        for piece, p in self.full.items():
            own, work = self.reduced.pop(p)
            work.wait()
            piece.grad, p.grad = own, None
        own, experts, plain = self._gradients()
        if own:
            torch._foreach_div_(own, self.world)  # so far they were sums over the ranks' tokens
        if experts:
            average(experts, self.groups.copies)
        average(plain)

    def grad_norm(self):
        """Norm of all gradients, a float32 scalar tensor, the same on every rank: each part counts once."""
        own, experts, plain = self._gradients()
        counted = own if not experts or self.groups.copy else own + experts
        return norm_over_ranks(counted, plain) if self.exact else total_norm(plain)

    def begin_step(self):
        """From now on the weights are old: the model asks for those of each layer before the layer runs."""
        self.next_layer = 0

    def _wait(self, layer):
        """Wait for the weights of a layer, and ask for those of the next ones.

        When all were asked for at once, they overlapped with nothing in a CUDA graph (8 ms of 163 on two H200s)."""
        while self.next_layer <= min(layer + AHEAD, len(self.pieces) - 1):
            gathers = self.gathers[self.next_layer] = []
            for piece, p in self.pieces[self.next_layer]:
                own = piece.detach() if piece.is_cuda else piece.detach().clone()  # NCCL gathers in place
                gathers.append(all_gather(p.detach(), own, group=self.holders(p)[0], async_op=True))
            self.next_layer += 1
        for gather in self.gathers.pop(layer, ()):
            gather.wait()

    def gather_weights(self):
        """Bring all weights up to date; between two steps a rank has only its slices of large tensors."""
        self.begin_step()
        for layer in range(len(self.pieces) if self.full else 0):
            self._wait(layer)

    def state_dict(self):
        return self._map(super().state_dict(), Piece)

    def load_state_dict(self, states):
        super().load_state_dict(self._map(states, lambda t, index, parts, *_: t.chunk(parts)[index].clone()))

    def _map(self, states, change):
        """The states, with change(tensor, *place) of each tensor that belongs to a part of a parameter."""
        mapped = []
        for optimizer, state in zip(self.parts, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            changed = {}
            for i, values in state["state"].items():
                place = self.places.get(params[i])
                changed[i] = {name: change(t, *place) if place and t.ndim else t for name, t in values.items()}
            mapped.append(state | {"state": changed})
        return mapped

    def weights(self, model):
        state = super().weights(model)
        for name, p in model.named_parameters(remove_duplicate=False):
            if p in self.exact:
                state[name] = Piece(self.exact[p].detach(), *self.places[self.exact[p]])
        return state


def norm_over_ranks(own, plain):
    """Norm of tensors of which every rank has a part, `own`, and of tensors that all ranks have, `plain`."""
    square = total_norm(own).square() if own else torch.zeros((), device=plain[0].device)
    dist.all_reduce(square)
    return (square + total_norm(plain).square()).sqrt() if plain else square.sqrt()


def weights_norm(state, world):
    """Norm of what `Sharded.weights` returns, of all ranks; a float."""
    own = [t.tensor for t in state.values() if isinstance(t, Piece) and not t.copy]
    plain = [t for t in state.values() if not isinstance(t, Piece)]
    return float(norm_over_ranks(own, plain) if world > 1 else total_norm(plain))
