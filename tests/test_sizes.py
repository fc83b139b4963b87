"""Presets, counts, FLOPs and memory by arithmetic.

Run: python -m pytest tests/test_sizes.py"""

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from data import files
from model import GPT, ModelConfig
from optimoe import sizes
from optimoe.sizes import PRESETS, count_params, flops_per_token, peak_flops, preset, preset_fields, training_memory
from tests.test_model import SMALL, make, tokens


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("paper-d512-e8-k2", 320_160_256, 169_165_312),
        ("paper-d512-e16-k2", 521_552_384, 169_230_848),
        ("paper-d2048-e128-k16", None, None),
    ],
)
def test_paper_counts(name, total, active):
    cfg = preset(name)
    counted = count_params(cfg)
    with torch.device("meta"):
        model = GPT(cfg)
    assert counted.total == sum(p.numel() for p in model.parameters())
    # research formula: active = 2 V d + L (4 d^2 + 6 d^2 k + d E + 2 d) + d
    d, e, k = cfg.d_model, cfg.n_experts, cfg.top_k
    assert counted.active == 2 * 99_584 * d + 16 * (4 * d**2 + 6 * d**2 * k + d * e + 2 * d) + d
    assert counted.embedding == 2 * 99_584 * d
    if total:
        assert (counted.total, counted.active) == (total, active)
    twin = count_params(dataclasses.replace(cfg, dense=True))
    assert twin.total == counted.active - 16 * d * e  # a dense twin has no router


def test_presets():
    assert len(PRESETS) == 66 and len(set(PRESETS)) == 66
    for name in PRESETS:
        cfg = preset(name, vocab_size=512)
        assert cfg.n_heads * cfg.head_dim == cfg.d_model and cfg.top_k <= cfg.n_experts
    tiny, paper = preset("tiny"), preset("paper-d512-e8-k2")
    assert tiny.n_experts >= 8 and tiny.top_k == 2
    # What the tiny recipe changes must not leak into the paper's models.
    assert (paper.qk_norm, paper.rope_theta, paper.init_std) == (False, 1e4, 0.02)
    with pytest.raises(ValueError, match="preset='paper-d512-e7-k2'"):
        preset("paper-d512-e7-k2")


def test_flops():
    cfg = ModelConfig(**SMALL)
    d, layers, K, F, V, L = 32, 2, 2, 48, 61, 24
    by_hand = 6 * (V * d + layers * (4 * d * d + d * 4 + K * 3 * d * F)) + 6 * layers * L * d
    assert flops_per_token(cfg) == by_hand
    assert flops_per_token(dataclasses.replace(cfg, seq_len=12)) == by_hand - 6 * layers * 12 * d
    assert flops_per_token(dataclasses.replace(cfg, tie_embeddings=True)) == by_hand  # the head multiplies all the same
    assert flops_per_token(dataclasses.replace(cfg, dense=True)) == by_hand - 6 * layers * d * 4
    more = dataclasses.replace(cfg, n_experts=64)
    assert flops_per_token(more) == by_hand + 6 * layers * d * 60  # more experts cost only router
    model = make(dense=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens(2, 24), tokens(2, 24)).loss.backward()
    matmuls = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert matmuls == (flops_per_token(model.cfg) - 6 * layers * L * d) * 2 * 24


def test_memory_table():
    cfg = preset("paper-d512-e8-k2")
    parts = training_memory(cfg, 1024)
    assert training_memory(cfg, 2048)["activations (estimate)"] == 2 * parts["activations (estimate)"]
    chunked = training_memory(dataclasses.replace(cfg, loss_chunk=128), 1024)
    assert chunked["activations (estimate)"] < parts["activations (estimate)"]


def test_peak_flops():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    for unknown in ("NVIDIA GeForce GTX 1080", "NVIDIA RTX A4000", "Tesla T4", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(unknown) is None, unknown


def test_sizes_of_a_run(tmp_path, capsys):
    run = train.TrainConfig(**preset_fields("tiny") | {"n_experts": 32, "vocab_size": 640}, out_dir="runs/x")
    path = tmp_path / "config.json"
    files.write_json(path, dataclasses.asdict(run))
    sizes.main([f"--config={path}"])
    assert f"{count_params(run).total:,}" in capsys.readouterr().out
    for kept, flag, wrong in (
        (dataclasses.asdict(run), "--n_exprts=8", "unknown field 'n_exprts': did you mean 'n_experts'"),
        (dataclasses.asdict(run), "--data=x", "unknown field 'data'"),  # a flag of this program it is not
        ({"n_exprts": 8}, "--n_experts=8", "config.json: unknown field 'n_exprts'"),
        ({"out_dir": "runs/x", "group_size": 4}, "--n_experts=8", "config.json: unknown field"),  # a run of grpo.py
    ):
        files.write_json(path, kept)
        with pytest.raises(ValueError, match=wrong):
            sizes.main([f"--config={path}", flag])


def test_command_line(capsys):
    sizes.main(["--preset=paper-d512-e8-k2", "--tokens=125e9"])
    page = capsys.readouterr().out
    for part in ("320,160,256", "169,165,312", "101,974,016", "390.4", "9.103e+08", "training memory"):
        assert part in page, part
    for field, value in (("tokens", -5.0), ("tokens", 1e300), ("micro_batch", 0), ("micro_batch", 10**12)):
        with pytest.raises(ValueError, match=re.escape(f"{field}={value}: use")):
            sizes.SizeConfig(**{field: value})
