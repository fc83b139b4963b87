"""The differentiable expert layer."""

from moe_kernels import reference
from moe_kernels.tiles import pick_impl


def moe_experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, impl=None):
    impl = pick_impl(impl, x_TD)
    if impl == "grouped_mm":
        return reference.experts_grouped_mm(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK)
    return reference.experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK)
