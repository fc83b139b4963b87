"""A run directory with a tiny random model over bytes, and folders of made-up evaluation items inside it."""

import dataclasses
import json

import pytest
import torch

from data import tokenizer
from model import GPT, ModelConfig
from optimoe import checkpoint


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tiny_run(tmp_path):
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    tokenizer.save(tokenizer.encoding({bytes([b]): b for b in range(256)}), run / "data")
    torch.manual_seed(0)
    cfg = ModelConfig(
        vocab_size=320,
        seq_len=64,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        head_dim=16,
        n_experts=4,
        top_k=2,
        d_expert=32,
        init_std=0.2,
    )
    checkpoint.save(run, 3, {"step": 3, "config": dataclasses.asdict(cfg), "model": GPT(cfg).state_dict()}, keep=1)
    write(run / "gsm8k/test.jsonl", [{"question": f"{i} eggs?", "answer": f"So {i}.\n#### {i}"} for i in range(4)])
    write(
        run / "hellaswag/val.jsonl",
        [
            {
                "activity_label": "A",
                "ctx_a": f"b{i}",
                "ctx_b": "c",
                "label": str(i % 4),
                "endings": ["d", "ef", "ghi", "jklm"],
            }
            for i in range(6)
        ],
    )
    write(
        run / "triviaqa/rc_wikipedia_nocontext_val.jsonl",
        [{"question_id": f"q{i}", "question": f"Who {i}", "value": f"X{i}", "aliases": [f"X{i}"]} for i in range(3)],
    )
    write(
        run / "humaneval/HumanEval.jsonl",
        [
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f"def f():\n    '{i}'\n",
                "canonical_solution": f"    return {i}\n",
                "test": f"def check(c):\n    assert c() == {i}\n",
                "entry_point": "f",
            }
            for i in range(2)
        ],
    )
    return run
