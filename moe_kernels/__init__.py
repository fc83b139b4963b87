"""Mixture-of-Experts layers on hand-written Triton kernels: routing, dispatch and grouped GEMMs, forward and backward.

    r = route(x_TD @ w_router_ED.T, top_k=2)
    y_TD = moe_experts(x_TD, w_in_EGD, w_out_EDF, r.gates_TK, r.experts_TK, activation="swiglu")
    loss = y_TD.square().mean() + 1e-2 * balance_loss(r.counts_E, r.probs_E) + 1e-3 * r.z

Shapes: T tokens, D model width, E experts, F expert width, G = 2F (gate rows, then up rows), K experts per token.
"""

from moe_kernels.activation import ACTIVATIONS, gated_activation
from moe_kernels.adamw import adamw_step
from moe_kernels.cross_entropy import linear_cross_entropy
from moe_kernels.experts import moe_experts
from moe_kernels.reference import gates_of
from moe_kernels.rms_norm import add_rms_norm
from moe_kernels.rotary import rope
from moe_kernels.routing import Routing, balance_loss, route

__all__ = [
    "ACTIVATIONS",
    "Routing",
    "adamw_step",
    "add_rms_norm",
    "balance_loss",
    "gated_activation",
    "gates_of",
    "linear_cross_entropy",
    "moe_experts",
    "rope",
    "route",
]
