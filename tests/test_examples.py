"""docs/examples: they do what they say. Run: python -m pytest tests/test_examples.py (CPU; needs transformers)"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from data import tokenizer
from model import GPT, ModelConfig
from optimoe import hf

transformers = pytest.importorskip("transformers", minversion="5.7")
pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "docs/examples"


def test_trainer(tmp_path, monkeypatch):
    """A Qwen3-MoE learns by transformers' Trainer, with our experts, and loads again."""
    path = EXAMPLES / "trainer.py"
    assert len(path.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location("trainer_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, seq_len=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, n_experts=4)
    enc = tokenizer.encoding({bytes([b]): b for b in range(256)})
    hf.save_model(GPT(ModelConfig(**sizes, top_k=2, d_expert=32, qk_norm=True)), tmp_path / "model", eos=enc.eot_token)
    hf.save_tokens(enc, tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} eggs, " * 5}) + "\n" for i in range(16)))
    from moe_kernels import transformers as adapter

    calls, forward = [], adapter.experts_forward
    monkeypatch.setattr(adapter, "experts_forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    settings = dict(max_steps=12, learning_rate=1e-2, warmup_steps=2, logging_steps=1, use_cpu=True, save_strategy="no")
    trainer = example.main(
        str(tmp_path / "model"), tmp_path / "texts.jsonl", str(tmp_path / "out"), max_length=48, **settings
    )
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 1 and len(calls) >= 2 * 12  # two layers
    back = hf.load_model(tmp_path / "out")
    assert torch.equal(back.head.weight, trainer.model.lm_head.weight.detach().cpu().float())
