"""The kernels as experts of Hugging Face models: versions, activations and what is refused. tests/test_hf.py compares
whole models."""

import sys
import types

import pytest
import torch

from model import ModelConfig
from moe_kernels import transformers as adapter
from tests.checks import check


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    if tuple(int(n) for n in module.__version__.split(".")[:2]) < adapter.NEEDED:
        pytest.skip("transformers is older than 5.7")
    return module


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.6.2", None])
def test_an_old_or_missing_transformers_is_named(version, monkeypatch):
    stand_in = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    with pytest.raises(ImportError, match=f"5.7 or newer, found {version or 'none'}: pip install"):
        adapter.register()


def outputs(transformers, model, tokens):
    """Logits by the eager loop over experts, then by ours."""
    model = model.eval()
    adapter.register()
    for name in ("eager", adapter.NAME):
        model.set_experts_implementation(name)
        with torch.no_grad():
            yield model(tokens).logits


def mixtral(transformers, activation):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, hidden_act=activation
        )
    )


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu_pytorch_tanh", "gelu_new", "relu2"])
def test_activations_are_those_of_the_module(activation, transformers):
    expected, got = outputs(transformers, mixtral(transformers, activation), torch.arange(20)[None])
    check(got, expected, 1e-5, activation)


def test_layers_run_on_the_device_of_their_weights(transformers, monkeypatch):
    """A model that device_map spreads over GPUs has layers on others than the current one."""
    model, guarded = mixtral(transformers, "silu"), []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: guarded.append(tensor) or device_of(tensor))
    list(outputs(transformers, model, torch.arange(20)[None]))
    assert guarded[0] is model.model.layers[0].mlp.experts.gate_up_proj


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_fast"])
def test_other_activations_are_refused(activation, transformers):
    with pytest.raises(ValueError, match=f"MixtralExperts has the activation '{activation}'.*use 'grouped_mm'"):
        list(outputs(transformers, mixtral(transformers, activation), torch.arange(20)[None]))


def test_the_module_decides_and_not_the_config(transformers):
    """A config that says silu over a module that applies something else must not be believed."""
    model = mixtral(transformers, "silu")
    model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"MixtralExperts has the activation .*\(GELU\)"):
        list(outputs(transformers, model, torch.arange(20)[None]))


def test_a_config_without_hidden_act(transformers):
    """LFM2-MoE has the function on its experts module only."""
    torch.manual_seed(0)
    config = transformers.Lfm2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, num_dense_layers=0,
        layer_types=["full_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert getattr(config, "hidden_act", None) is None
    model = transformers.Lfm2MoeForCausalLM(config)
    expected, got = outputs(transformers, model, torch.arange(20)[None])
    check(got, expected, 1e-5)


@pytest.mark.parametrize("activation", ["geglu", "relu2"])
def test_export_refuses_activations_that_no_family_has(activation):
    from optimoe.hf import hf_config

    with pytest.raises(ValueError, match=f"activation={activation!r}"):
        hf_config(ModelConfig(vocab_size=64, activation=activation))
