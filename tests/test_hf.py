"""Hugging Face checkpoints and the kernels inside transformers (tokenizers: tests/test_hf_tokens.py).

Run: python -m pytest tests/test_hf.py (CPU; comparisons with transformers 5 are skipped where it is not installed)"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402

from eval.__main__ import main as evaluate  # noqa: E402
from eval.generate import generate  # noqa: E402
from model import GPT, ModelConfig  # noqa: E402
from optimoe import checkpoint, hf  # noqa: E402
from tests.checks import check  # noqa: E402
from tests.evalrun import tiny_run  # noqa: E402, F401

CFG = dict(vocab_size=96, seq_len=48, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=4)
CFG |= dict(top_k=2, d_expert=48, init_std=0.3, dtype="float32")
KINDS = {
    "mixtral": {},
    "qwen3_moe": dict(qk_norm=True, router_normalize=False),
    "olmoe": dict(qk_norm=True, qk_norm_joint=True),
    "tied": dict(tie_embeddings=True),
}
TOKENS = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))


def make(**overrides):
    model = GPT(ModelConfig(**{**CFG, **overrides})).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    return model


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = make(**KINDS[kind])
    hf.save_model(model, tmp_path / "one")
    hf.save_model(model, tmp_path / "many", max_shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2 and not list(tmp_path.glob("*/*.tmp"))
    assert max(path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")) < 120_000
    assert len({path.stat().st_mode for path in (tmp_path / "one").iterdir()}) == 1
    for folder in ("one", "many"):
        back = hf.load_model(tmp_path / folder)
        assert dataclasses.replace(back.cfg, dtype="float32", init_std=0.3) == model.cfg
        assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)
        assert generate(back, [[5, 6]], 10) == generate(model, [[5, 6]], 10)
    half = hf.load_model(tmp_path / "one", dtype="bfloat16", impl="reference")
    assert torch.equal(half.blocks[1].mlp.w_in, model.blocks[1].mlp.w_in.bfloat16())
    assert half(TOKENS).logits.dtype == torch.bfloat16


def test_names_and_layout_of_a_released_mixtral(tmp_path):
    model = make()
    hf.save_model(model, tmp_path, torch.bfloat16)
    tensors, moe, F = load_file(tmp_path / hf.SINGLE), model.blocks[1].mlp, 48
    assert len(tensors) == 3 + 2 * (2 + 4 + 1 + 3 * 4) and all(t.dtype == torch.bfloat16 for t in tensors.values())
    for name, expected in (
        ("block_sparse_moe.experts.3.w1", moe.w_in[3, :F]),
        ("block_sparse_moe.experts.3.w3", moe.w_in[3, F:]),
        ("block_sparse_moe.experts.0.w2", moe.w_out[0]),
        ("block_sparse_moe.gate", moe.router.weight),
        ("self_attn.q_proj", model.blocks[1].attn.qkv.weight[:64]),
        ("self_attn.v_proj", model.blocks[1].attn.qkv.weight[96:]),
    ):
        assert torch.equal(tensors[f"model.layers.1.{name}.weight"], expected.bfloat16()), name


def test_bad_folders_name_what_is_wrong(tmp_path):
    hf.save_model(make(), tmp_path, max_shard_bytes=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    whole = {path: path.read_bytes() for path in (*files, tmp_path / hf.INDEX, tmp_path / hf.CONFIG)}
    at = json.loads(whole[tmp_path / hf.INDEX])["weight_map"][name]

    def broken(error, match):
        with pytest.raises(error, match=match):
            hf.load_model(tmp_path)
        for path, data in whole.items():
            path.write_bytes(data)
        hf.load_model(tmp_path)

    edit(tmp_path / hf.INDEX, lambda index: index["weight_map"].pop(name))
    broken(ValueError, f"index.json and the files that it names differ: only one of them has {name}")
    tensors = load_file(tmp_path / at)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.inf)}, tmp_path / at)
    broken(ValueError, f"{name} is not finite: download it again")
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / at)
    broken(ValueError, f"index.json and the files that it names differ: only one of them has {name}")
    save_file(tensors | {name: torch.zeros(48, 32)}, tmp_path / at)
    broken(ValueError, rf"{name}=\(48, 32\): .*\(48, 64\)")
    (tmp_path / hf.INDEX).write_text("{}")
    broken(ValueError, "index.json is damaged")
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit(tmp_path / hf.INDEX, lambda index: index["weight_map"].update({bias: at}))
    broken(ValueError, f"differ: only one of them has {bias}")
    edit(tmp_path / hf.INDEX, lambda index: index["weight_map"].update({bias: at}))
    save_file(tensors | {bias: torch.zeros(64)}, tmp_path / at)
    broken(ValueError, f"tensors that config.json does not describe, such as {bias}")
    whole_without = {k: v for k, v in tensors.items() if k != name}
    edit(tmp_path / hf.INDEX, lambda index: index["weight_map"].pop(name))
    save_file(whole_without, tmp_path / at)
    broken(ValueError, f"the tensor {name} is missing")
    (tmp_path / at).unlink()
    broken(FileNotFoundError, f"{at} is missing: download it again")
    (tmp_path / at).write_bytes(whole[tmp_path / at][:1000])
    broken(ValueError, f"{at} is damaged")
    (tmp_path / hf.CONFIG).write_text("{")
    broken(ValueError, "config.json is damaged")
    for change, match in (
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_type='linear'"),
        (dict(hidden_size=None), "hidden_size=None: config.json needs int"),
    ):
        edit(tmp_path / hf.CONFIG, lambda config, change=change: config.update(change))
        broken(ValueError, match)
    (tmp_path / hf.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        hf.load_model(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_fields_that_change_the_computation_are_refused_by_name(kind, tmp_path):
    hf.save_model(make(**KINDS[kind]), tmp_path)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # rope_scaling comes before it
    whole = json.dumps(json.loads((tmp_path / hf.CONFIG).read_text()) | rope)
    for name, value in (
        ("model_type", [kind]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("clip_qkv", 8.0),
        ("mlp_only_layers", [1]),
        ("decoder_sparse_step", 2),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
        ("compression_config", {"format": "int-quantized"}),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("rope_parameters", {"partial_rotary_factor": 0.25}),
        ("rope_parameters", {"rope_theta": "a"}),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", "4"),
        ("num_attention_heads", -4),
        ("hidden_size", 10**30),
        ("vocab_size", 10**9),
        ("max_position_embeddings", 10**12),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", [[]]),
        ("num_experts_per_tok", 9),
        ("tie_word_embeddings", "yes"),
    ):
        (tmp_path / hf.CONFIG).write_text(json.dumps(json.loads(whole) | {name: value}))
        names = f"{name}|rope_type|partial_rotary_factor|rope_theta|num_key_value_heads|embed_tokens"
        with pytest.raises(ValueError, match=names) as caught:
            hf.load_model(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    for text in (
        "[" * 100_000,
        '{"a": ' * 100_000,
        "[]",
        '{"model_type": "mixtral", "hidden_size": ' + "9" * 5000 + "}",
    ):
        (tmp_path / hf.CONFIG).write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            hf.load_model(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_every_field_of_transformers_is_read_refused_or_harmless(kind):
    """A field that a later transformers adds shows here, before a checkpoint that uses it is misread."""
    transformers = pytest.importorskip("transformers", minversion="5")
    harmless = """architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
        initializer_range is_encoder_decoder label2id model_type output_attentions output_hidden_states
        output_router_logits pad_token_id problem_type return_dict router_aux_loss_coef router_jitter_noise
        transformers_version use_cache _name_or_path max_window_layers""".split()  # training, output and generation
    names = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe"}
    fields = getattr(transformers, names[kind] + "Config")().to_dict()
    if kind == "qwen3_moe":
        harmless.append("intermediate_size")  # of dense layers, which are refused

    class Recorded(dict):
        read = set()

        def get(self, name, default=None):
            self.read.add(name)
            return super().get(name, default)

        def __getitem__(self, name):
            self.read.add(name)
            return super().__getitem__(name)

    hf.model_config(Recorded(fields))
    if kind == "qwen3_moe":  # whose window counts only where it is used
        hf.model_config(Recorded(fields | {"use_sliding_window": True, "sliding_window": 64}))
    assert fields.keys() - Recorded.read - set(harmless) == set()


def test_a_window_limits_the_length():
    transformers = pytest.importorskip("transformers", minversion="5")
    model = theirs("mixtral", sliding_window=8)
    with torch.no_grad():
        expected = model(TOKENS).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = hf.load_model(folder)
    assert transformers and ours.cfg.seq_len == 8
    check(ours(TOKENS[:, :8]).logits, expected[:, :8], 1e-5)
    with pytest.raises(ValueError, match="seq_len is 8"):
        ours(TOKENS[:, :9])


def test_a_tied_configuration_with_a_head_of_its_own(tmp_path):
    """Like transformers: a head that differs from the embedding is kept; one that equals it, or is absent, is tied."""
    transformers = pytest.importorskip("transformers", minversion="5")
    for case in ("other", "equal", "absent"):
        untied = make(**KINDS["mixtral"])
        if case == "equal":
            untied.head.weight.copy_(untied.embed.weight)
        hf.save_model(untied, tmp_path / case)
        edit(tmp_path / case / hf.CONFIG, lambda config: config.update(tie_word_embeddings=True))
        if case == "absent":
            tensors = load_file(tmp_path / case / hf.SINGLE)
            del tensors["lm_head.weight"]
            save_file(tensors, tmp_path / case / hf.SINGLE, metadata={"format": "pt"})
        ours = hf.load_model(tmp_path / case)
        assert ours.cfg.tie_embeddings == (case != "other")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case, dtype=torch.float32)
        with torch.no_grad():
            check(ours(TOKENS).logits, model(TOKENS).logits, 1e-5, case)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_quantised_tensors_are_never_read_as_numbers(dtype, tmp_path):
    hf.save_model(make(), tmp_path)
    whole = load_file(tmp_path / hf.SINGLE)
    for name in ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight", "lm_head.weight"):
        save_file(whole | {name: whole[name].to(dtype)}, tmp_path / hf.SINGLE)
        with pytest.raises(ValueError, match=f"{name}=.*: it is quantised"):
            hf.load_model(tmp_path)


def test_what_no_format_expresses_is_refused_by_a_rule(tmp_path, monkeypatch):
    """Every field that is not FREE, a new one too, is compared with what the format gives back."""

    @dataclasses.dataclass(frozen=True)
    class Variant(ModelConfig):
        router_temperature: float = 1.0

    monkeypatch.setattr(hf, "ModelConfig", Variant)
    hf.save_model(GPT(Variant(**CFG)), tmp_path / "default")
    with pytest.raises(ValueError, match="router_temperature=0.5: the format of mixtral has 1.0 only"):
        hf.save_model(GPT(Variant(**CFG, router_temperature=0.5)), tmp_path / "hot")
    assert not (tmp_path / "hot").exists()
    free = dict(init_std=0.1, embed_init_std=0.2, loss_chunk=7, dtype="bfloat16", impl="reference", recompute="blocks")
    assert set(free) == set(hf.FREE)
    hf.save_model(GPT(Variant(**CFG | free)), tmp_path / "free")


def test_a_router_without_gradient_is_named(tmp_path, capsys):
    hf.save_model(make(top_k=1), tmp_path)
    hf.load_model(tmp_path)
    assert "top_k=1: " in (said := capsys.readouterr().err) and "no gradient for the router" in said


def test_what_cannot_be_saved(tmp_path):
    for options in (
        dict(dense=True),
        dict(n_shared_experts=1),
        dict(router_score="sigmoid"),
        dict(router_normalize=False),
        dict(qk_norm=True, qk_norm_joint=True, head_dim=8),
    ):
        with pytest.raises(ValueError, match=next(iter(reversed(options)))):
            hf.save_model(make(**options), tmp_path)
    hf.save_model(make(), tmp_path)
    with pytest.raises(ValueError, match="already holds safetensors"):
        hf.save_model(make(), tmp_path)


def test_evaluating_an_export_equals_evaluating_the_run(tiny_run):  # noqa: F811
    hf.save_model(checkpoint.load_model(tiny_run), tiny_run / "export")
    options = ["--device=cpu", f"--evaldata={tiny_run}", "--tasks=hellaswag,gsm8k", "--shots=0"]
    expected = evaluate([f"--run={tiny_run}", *options])["tasks"]
    assert evaluate([f"--hf={tiny_run}/export", f"--data={tiny_run}/data", *options])["tasks"] == expected
    assert (tiny_run / "export/eval/gsm8k.jsonl").is_file()
    with pytest.raises(ValueError, match="there is no tokenizer.json"):
        evaluate([f"--hf={tiny_run}/export", *options])
    pytest.importorskip("tokenizers")
    hf.main([str(tiny_run), str(tiny_run / "whole")])
    assert evaluate([f"--hf={tiny_run}/whole", *options])["tasks"] == expected
    edit(tiny_run / "whole/config.json", lambda config: config.update(rope_theta=500.0))
    with pytest.raises(ValueError, match="hellaswag.jsonl was made with checkpoint='whole-"):
        evaluate([f"--hf={tiny_run}/whole", *options])
    results = evaluate([f"--hf={tiny_run}/whole", *options[:2], "--tasks=gsm8k", "--shots=0", "--overwrite"])
    assert list(results["tasks"]) == ["gsm8k"]  # not HellaSwag's of what the folder held before


def test_a_failed_export_leaves_nothing_and_can_be_repeated(tiny_run, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("tokenizers")
    export = [str(tiny_run), str(tmp_path / "out")]
    failing = lambda *args: (_ for _ in ()).throw(ValueError("too late"))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the package tokenizers is not installed"):
        patch.setitem(sys.modules, "tokenizers", None)
        patch.setattr(checkpoint, "load_model", failing)  # before any work
        hf.main(export)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="too late"):
        patch.setattr(hf, "save_tokens", failing)
        hf.main(export)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "out").mkdir()
    hf.main(export)
    assert len(list((tmp_path / "out").iterdir())) == 4 and not list(tmp_path.glob(".*"))
    for out, message in ((export[1], "it exists already"), ("/proc/x/out", "nothing can be written")):
        with pytest.raises(ValueError, match=f"out='{out}': {message}"):
            hf.main([export[0], out])


def test_results_belong_to_all_that_made_them(tmp_path):
    """Other weights of the same sizes, or another tokenizer, in the same folder."""
    names = set()
    router = "model.layers.1.block_sparse_moe.gate.weight"

    def change_the_router():
        changed = {k: v + (k == router) for k, v in load_file(tmp_path / hf.SINGLE).items()}
        save_file(changed, tmp_path / hf.SINGLE, metadata={"format": "pt"})

    tokenizer_file = tmp_path / "tokenizer.json"
    for change in (
        lambda: hf.save_model(make(), tmp_path),
        lambda: tokenizer_file.write_text("{}"),
        change_the_router,
    ):
        change()
        names.add(hf.fingerprint(tmp_path))
        (tmp_path / "results.json").write_text(str(names))
        assert hf.fingerprint(tmp_path) in names
    assert len(names) == 3 and hf.fingerprint(tmp_path, Path(__file__)) not in names


# ---- against transformers


SPECIFIC = {
    "mixtral": ("Mixtral", dict(intermediate_size=48, num_local_experts=4)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(intermediate_size=80, moe_intermediate_size=48, num_experts=4, head_dim=32, norm_topk_prob=True),
    ),
    "olmoe": ("Olmoe", dict(intermediate_size=48, num_experts=4)),
}


def theirs(kind, **overrides):
    transformers = pytest.importorskip("transformers", minversion="5")
    (name, specific), shape = SPECIFIC[kind], dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    common = dict(vocab_size=96, num_hidden_layers=2, num_experts_per_tok=2, max_position_embeddings=48)
    common |= dict(initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**shape | common | specific | overrides)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_equals_transformers_both_ways(kind, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    model = theirs(kind)
    model.save_pretrained(tmp_path / "released", max_shard_size="100KB")
    with torch.no_grad():
        expected = model(TOKENS).logits
    options = dict(attention_mask=torch.ones(3, 8), do_sample=False, max_new_tokens=24)
    greedy = model.generate(TOKENS[:, :8], **options)[:, 8:].tolist()
    assert len({tuple(row) for row in greedy}) == 3
    ours = hf.load_model(tmp_path / "released")
    check(ours(TOKENS).logits, expected, 1e-5)
    assert generate(ours, TOKENS[:, :8].tolist(), 24) == greedy
    hf.save_model(ours, tmp_path / "back", max_shard_bytes=100_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        check(back(TOKENS).logits, expected, 1e-5, "back")


@pytest.mark.parametrize("kind, impl", [*((kind, None) for kind in SPECIFIC), ("mixtral", "triton")])
def test_the_kernels_inside_transformers(kind, impl, device):
    """Loss, logits and every gradient are those of the eager loop over experts."""
    small = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32) if impl else {}  # the interpreter is slow
    model, tokens = theirs(kind, **small).to(device), (TOKENS[:1, :4] if impl else TOKENS).to(device)
    from moe_kernels import transformers as adapter

    def run(experts):
        model.set_experts_implementation(experts)
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        return {"logits": out.logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    adapter.register(impl)
    expected, results = run("eager"), run(adapter.NAME)
    for name, truth in expected.items():
        check(results[name], truth, 1e-5, name)
    # It was another implementation.
    assert any(not torch.equal(results[name], truth) for name, truth in expected.items())


def test_other_experts_are_refused():
    model = theirs("mixtral", hidden_act="gelu")
    from moe_kernels import transformers as adapter

    adapter.register()
    model.set_experts_implementation(adapter.NAME)
    with pytest.raises(ValueError, match="MixtralExperts has the activation 'gelu'.*grouped_mm"):
        model(TOKENS)
