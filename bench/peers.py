"""Other libraries' expert layers behind one signature. None is a dependency: each is imported when it is asked for.

scattermoe   https://github.com/shawntan/scattermoe        Triton
sonicmoe     https://github.com/Dao-AILab/sonic-moe        CuTe, Hopper and newer; pip install sonic-moe
liger        https://github.com/linkedin/Liger-Kernel      Triton; pip install liger-kernel (autotunes for minutes on its first calls)
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F_
from torch import Tensor

MODULES = {"scattermoe": "scattermoe.parallel_experts", "sonicmoe": "sonicmoe", "liger": "liger_kernel.ops.fused_moe"}


class Peer(NamedTuple):
    experts: Callable  # (x_TD, w_in, w_out_EDF, gates_TK, experts_TK) -> y_TD; sorts by expert itself, as all others do
    prepare: Callable = lambda w_in_EGD: w_in_EGD  # w_in in the library's layout, made once before anything is timed
    restore: Callable = lambda dw_in: dw_in  # its gradient back as (E, G, D)


def load(name):
    """The Peer `name`. Raises ValueError for an unknown name and ImportError, with the remedy, for a library that does not import here."""
    if name not in MODULES:
        raise ValueError(f"peer {name!r}: known are {', '.join(MODULES)}")
    try:
        module = importlib.import_module(MODULES[name])
    except Exception as error:  # noqa: BLE001  a library may fail in any way while it is imported
        reason = f"{MODULES[name]} does not import ({type(error).__name__}: {error})"
        raise ImportError(f"peer {name}: {reason}; bench/peers.py says where it comes from") from error
    return {"scattermoe": _scattermoe, "sonicmoe": _sonicmoe, "liger": _liger}[name](module)


def _scattermoe(module):
    def experts(x, w_in, w_out, gates, experts):
        order = module.flatten_sort_count(experts, w_in.shape[0])
        gate, up = module.parallel_linear(x, w_in.transpose(1, 2), experts.shape[1], *order, grouped_out=True).chunk(
            2, dim=1
        )
        return module.parallel_linear(
            F_.silu(gate) * up, w_out.transpose(1, 2), 1, *order, grouped_in=True, gates=gates.to(x.dtype)
        )

    return Peer(experts)


def _liger(module):
    return Peer(
        lambda x, w_in, w_out, gates, experts: module.LigerFusedMoEFunction.apply(x, w_in, w_out, experts, gates)
    )


def _sonicmoe(module):
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    tokens = {}  # token of each slot: depends on the shape only, so not timed

    def experts(x, w_in, w_out, gates, experts):
        T, K = experts.shape
        if (T, K) not in tokens:
            tokens[T, K] = torch.arange(T, device=x.device, dtype=torch.int32).repeat_interleave(K)
        stream = torch.cuda.current_stream().cuda_stream
        w_in, w_out = w_in.permute(1, 2, 0), w_out.permute(1, 2, 0)
        return module.moe_general_routing_inputs(
            x,
            gates.flatten(),
            tokens[T, K],
            experts.flatten(),
            w_in,
            None,
            w_out,
            None,
            w_out.shape[2],
            stream,
            swiglu,
            False,
        )[0]

    return Peer(experts, interleave, deinterleave)


def interleave(w_EGD: Tensor):
    """Rows gate 0..F-1, up 0..F-1 -> gate 0, up 0, gate 1, up 1, ..."""
    E, G, D = w_EGD.shape
    return w_EGD.view(E, 2, G // 2, D).transpose(1, 2).reshape(E, G, D).contiguous()


def deinterleave(w_EGD: Tensor):
    E, G, D = w_EGD.shape
    return w_EGD.reshape(E, G // 2, 2, D).transpose(1, 2).reshape(E, G, D)
