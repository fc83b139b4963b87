"""These kernels as the experts of Hugging Face models (transformers 5.7 or newer: Mixtral, Qwen3-MoE, OLMoE, LFM2-MoE
and others like them).

    from moe_kernels.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(NAME, dtype="bfloat16", experts_implementation="moe_kernels").cuda()

The model keeps its router. `model.set_experts_implementation("moe_kernels")` switches a model that is already loaded.
"""

import contextlib
from functools import partial

import torch

from moe_kernels.experts import moe_experts
from moe_kernels.tiles import eager

NAME = "moe_kernels"
NEEDED = (5, 7)  # the first version whose modules of experts state their gate, biases and layout
ACTIVATIONS = {  # {function or class that a module applies to its gate rows: our name}
    "silu": "swiglu",
    "SiLU": "swiglu",
    "SiLUActivation": "swiglu",
    "GELUTanh": "geglu",
    "NewGELUActivation": "geglu",
    "ReLUSquaredActivation": "relu2",
}


def register(impl=None):
    """Make experts_implementation="moe_kernels" known to transformers. impl: as in `moe_experts`.

    Raises ImportError if transformers is missing or older than 5.7. A model raises ValueError when it runs, if these
    kernels cannot compute its experts: they have biases, another layout or another activation."""
    try:
        from transformers import __version__ as version
    except ImportError:
        version = "none"
    if version == "none" or tuple(int(n) for n in version.split(".")[:2]) < NEEDED:
        raise ImportError(f"moe_kernels needs transformers 5.7 or newer, found {version}: pip install -U transformers")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, partial(experts_forward, impl=impl))


def experts_forward(module, hidden_states, top_k_index, top_k_weights, impl=None):
    """transformers calls this in place of the forward of a module of experts.

    hidden_states (T, D); top_k_index (T, K) int64; top_k_weights (T, K); module.gate_up_proj (E, 2F, D),
    module.down_proj (E, D, F). Returns (T, D) in the dtype of hidden_states; computes in the dtype of the weights."""
    act_fn = getattr(module, "act_fn", None)
    function = getattr(act_fn, "__name__", type(act_fn).__name__)  # the module and not its config: it is what runs
    activation = ACTIVATIONS.get(function)
    _check(module, activation, function)
    w_in, w_out = module.gate_up_proj, module.down_proj
    # With device_map, each layer runs on the GPU that has its weights, whatever the current device is.
    with torch.cuda.device_of(w_in) if eager(w_in) else contextlib.nullcontext():
        y = moe_experts(hidden_states.to(w_in.dtype), w_in, w_out, top_k_weights, top_k_index, impl, activation)
    return y.to(hidden_states.dtype)


def _check(module, activation, function):
    flag = partial(getattr, module)  # default: the flag's usual value
    problems = {
        "no gate projection": not flag("has_gate", True),
        "biases": flag("has_bias", False),
        "transposed weights": flag("is_transposed", False),
        "interleaved gate and up rows": not flag("is_concatenated", True),
        "a norm after the experts": flag("has_post_expert_norm", False),
        "a gate function of its own": type(module)._apply_gate.__module__ != "transformers.integrations.moe",
        f"the activation {getattr(module.config, 'hidden_act', None)!r} ({function})": activation is None,
        "expert parallelism": flag("_is_expert_parallel", False),
    }
    if found := [what for what, present in problems.items() if present]:
        raise ValueError(
            f"{type(module).__name__} has {', '.join(found)}: experts_implementation={NAME!r} takes plain gated "
            "experts; use 'grouped_mm'"
        )
