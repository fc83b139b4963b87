"""These kernels as the experts of Hugging Face models (transformers 5: Mixtral, Qwen3-MoE, OLMoE and others of that form).

    from moe_kernels.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(NAME, dtype="bfloat16", experts_implementation="moe_kernels").cuda()

The model keeps its router; a model already loaded is switched with `model.set_experts_implementation("moe_kernels")`.
"""

from functools import partial

from moe_kernels.experts import moe_experts

NAME = "moe_kernels"


def register(impl=None):
    """Make experts_implementation="moe_kernels" known to transformers. impl: as in `moe_experts`, None to choose by device.

    Raises ImportError where transformers has no interface for experts (before version 5). Models whose experts are no plain SwiGLU
    without biases raise ValueError when they run."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # the library itself needs no transformers

    ALL_EXPERTS_FUNCTIONS.register(NAME, partial(experts_forward, impl=impl))


def experts_forward(module, hidden_states, top_k_index, top_k_weights, impl=None):
    """What transformers calls in place of the experts module's forward.

    hidden_states (T, D); top_k_index (T, K) int64; top_k_weights (T, K); module.gate_up_proj (E, 2F, D), module.down_proj (E, D, F).
    Returns (T, D) in the dtype of hidden_states; computes in that of the weights."""
    _check(module)
    w_in, w_out = module.gate_up_proj, module.down_proj
    return moe_experts(hidden_states.to(w_in.dtype), w_in, w_out, top_k_weights, top_k_index, impl=impl).to(
        hidden_states.dtype
    )


def _check(module):
    flag = lambda name, usual=False: getattr(module, name, usual)  # noqa: E731  # younger flags are missing in older versions
    activation = getattr(module.config, "hidden_act", None)
    problems = {
        "no gate projection": not flag("has_gate", True),
        "biases": flag("has_bias"),
        "transposed weights": flag("is_transposed"),
        "interleaved gate and up rows": not flag("is_concatenated", True),
        "a norm after the experts": flag("has_post_expert_norm"),
        "a gate function of their own": type(module)._apply_gate.__module__ != "transformers.integrations.moe",
        f"the activation {activation!r}": activation not in ("silu", "swish"),
        "expert parallelism": flag("_is_expert_parallel"),
    }
    found = [what for what, present in problems.items() if present]
    if found:
        raise ValueError(
            f"{type(module).__name__} has {', '.join(found)}: experts_implementation={NAME!r} takes plain SwiGLU experts; "
            "use 'grouped_mm'"
        )
