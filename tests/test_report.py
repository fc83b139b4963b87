"""The closing report: what it samples from text and from examples. Run: python -m pytest tests/test_report.py (CPU)"""

from types import SimpleNamespace

import pytest
import torch

from eval import report
from grpo import GRPOConfig
from model import GPT, ModelConfig
from tests.evalrun import SIZES
from train import TrainConfig


def test_the_time_that_is_left_has_no_limit():
    """The most steps, and the slowest, that each program accepts."""
    train_cfg = TrainConfig(steps=2**63 // (8 * 256) - 1, seq_len=256)
    row = {"step": 1, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "mfu": None, "tokens_per_s": 1e-3}
    assert report.log_line(row, train_cfg).endswith("eta 999999999 days, 23:59:59")
    row = dict.fromkeys("reward answer_tokens kl clipped router_changed grad_norm rollout_tokens_per_s".split(), 1.0)
    row |= {"step": 1, "seconds_rollout": 9.0, "seconds_reward": 0.0, "seconds_update": 1.4}
    assert report.grpo_line(row, GRPOConfig(model="x", steps=2**63 - 1)).endswith("eta 999999999 days, 23:59:59")
    assert report.grpo_line(row, GRPOConfig(model="x", steps=11)).endswith("eta 0:01:44")


TEXT = [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1], [9, 9, 9, 9, 9, 9, 9, 9]]


@pytest.mark.parametrize(
    "rows, first_targets, expected",
    [
        (TEXT, [0, 0, 0], [[1, 2, 3, 4], [8, 7, 6, 5]]),
        (TEXT, [1, 4, 2], [[1, 2], [8, 7, 6, 5, 4]]),  # examples: up to the answer of the first one in the row
        ([TEXT[0], TEXT[0]], [2, 2], [[1, 2, 3]]),  # the same row twice is one prompt
        (TEXT[:1], [7], None),  # there is no room for an answer
    ],
)
def test_prompts_of_samples(monkeypatch, capsys, rows, first_targets, expected):
    monkeypatch.setattr(report.shards, "read_meta", lambda _: {})
    ids = torch.tensor(rows)
    targets = torch.where(torch.arange(8) >= torch.tensor(first_targets)[:, None], ids, -1)
    enc = SimpleNamespace(n_vocab=10, eot_token=0, decode=lambda ids: " ".join(map(str, ids)))
    data = SimpleNamespace(sources=[("data", 1.0)], loader=None, enc=enc)
    data.val_loader = SimpleNamespace(next=lambda: (ids, targets))
    model = GPT(ModelConfig(vocab_size=10, seq_len=8, **SIZES))
    cfg = SimpleNamespace(seq_len=8, sample_tokens=3, seed=0)
    samples = report.final_report(model, cfg, data, {}).get("samples")
    assert expected == (samples and [[int(token) for token in sample["prompt"].split()] for sample in samples])
    assert capsys.readouterr().out.count("prompt from validation: ") == len(expected or [])
