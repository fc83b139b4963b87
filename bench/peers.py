"""Other libraries' expert layers with one signature. None is a dependency: each is imported when it is asked for."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch


class Peer(NamedTuple):
    experts: Callable  # (x_TD, w_in, w_out_EDF, gates_TK, experts_TK) -> y_TD; each sorts by expert itself
    prepare: Callable = lambda w_in_EGD: w_in_EGD  # w_in in the library's layout, made once, not timed
    restore: Callable = lambda dw_in: dw_in  # its gradient back as (E, G, D)


def interleave(w_EGD):
    """Rows gate 0..F-1, up 0..F-1 -> gate 0, up 0, gate 1, up 1, ..."""
    return w_EGD.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def deinterleave(w_EGD):
    return w_EGD.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _liger(module):
    apply = module.LigerFusedMoEFunction.apply
    return Peer(lambda x, w_in, w_out, gates, experts: apply(x, w_in, w_out, experts, gates))


def _sonicmoe(module):
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    tokens = {}  # token of each slot: depends on the shape only, so not timed

    def experts(x, w_in, w_out, gates, experts):
        T, K = experts.shape
        if (T, K) not in tokens:
            tokens[T, K] = torch.arange(T, device=x.device, dtype=torch.int32).repeat_interleave(K)
        routing = gates.flatten(), tokens[T, K], experts.flatten()
        weights = w_in.permute(1, 2, 0), None, w_out.permute(1, 2, 0), None
        stream = torch.cuda.current_stream().cuda_stream
        return module.moe_general_routing_inputs(x, *routing, *weights, w_out.shape[0], stream, swiglu, False)[0]

    return Peer(experts, interleave, deinterleave)


TUNING = "its own tuner chooses tiles at the first call of each size, which takes up to minutes"
PEERS = {  # name: module, where it comes from, how it is called
    "sonicmoe": ("sonicmoe", "pip install sonic-moe, https://github.com/Dao-AILab/sonic-moe", _sonicmoe),
    "liger": ("liger_kernel.ops.fused_moe", "https://github.com/linkedin/Liger-Kernel", _liger),
}


def load(name):
    """The Peer `name`. ImportError, with the remedy, for a library that does not import here."""
    module_name, origin, make = PEERS[name]
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a library may fail in any way while it is imported
        reason = f"{module_name} does not import ({type(error).__name__}: {error})"
        raise ImportError(f"peer {name}: {reason}; it comes from {origin}") from error
    return make(module)
