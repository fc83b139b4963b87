"""Other libraries' expert layers behind one signature. None is a dependency: each is imported when it is asked for."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F_


class Source(NamedTuple):
    module: str
    origin: str
    tuning: str  # how its tiles are chosen


TUNER = "by its own tuner at the first call of each size, which takes up to minutes"
FIXED = "nothing is tuned: grouped_mm experts as transformers has them"
PEERS = {
    "sonicmoe": Source("sonicmoe", "pip install sonic-moe, https://github.com/Dao-AILab/sonic-moe", TUNER),
    "liger": Source("liger_kernel.ops.fused_moe", "https://github.com/linkedin/Liger-Kernel", TUNER),
    "transformers": Source("transformers.integrations.moe", "pip install 'transformers>=5'", FIXED),
}


class Peer(NamedTuple):
    experts: Callable  # (x_TD, w_in, w_out_EDF, gates_TK, experts_TK) -> y_TD; each sorts by expert itself
    prepare: Callable = lambda w_in_EGD: w_in_EGD  # w_in in the library's layout, made once before anything is timed
    restore: Callable = lambda dw_in: dw_in  # its gradient back as (E, G, D)


def load(name):
    """The Peer `name`. ImportError, with the remedy, for a library that does not import here."""
    source = PEERS[name]
    try:
        module = importlib.import_module(source.module)
    except Exception as error:  # a library may fail in any way while it is imported
        reason = f"{source.module} does not import ({type(error).__name__}: {error})"
        raise ImportError(f"peer {name}: {reason}; it comes from {source.origin}") from error
    known = {"sonicmoe": _sonicmoe, "liger": _liger, "transformers": _transformers}
    return known[name](module)


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


def _transformers(module):
    flags = dict(has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False)
    flags |= dict(_is_expert_parallel=False, _apply_gate=lambda h: F_.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1])

    def experts(x, w_in, w_out, gates, experts):
        layer = SimpleNamespace(**flags, gate_up_proj=w_in, down_proj=w_out, num_experts=len(w_in))
        return module.grouped_mm_experts_forward(layer, x, experts.long(), gates.to(x.dtype))

    return Peer(experts)


def interleave(w_EGD):
    """Rows gate 0..F-1, up 0..F-1 -> gate 0, up 0, gate 1, up 1, ..."""
    return w_EGD.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def deinterleave(w_EGD):
    return w_EGD.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
