"""A run directory with a tiny random model over bytes and folders of made-up items inside it, and its evaluation."""

import dataclasses
import json

import pytest
import torch

from data import files, tokenizer
from eval import __main__ as command
from model import GPT, ModelConfig
from optimoe import checkpoint

SIZES = dict(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, n_experts=4, top_k=2, d_expert=32)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ending(i):
    return {
        "activity_label": "A",
        "ctx_a": f"b{i}",
        "ctx_b": "c",
        "label": str(i % 4),
        "endings": ["d", "ef", "ghi", "jklm"],
    }


def function(i):
    row = {"task_id": f"HumanEval/{i}", "prompt": f"def f():\n    '{i}'\n", "canonical_solution": f"    return {i}\n"}
    return row | {"test": f"def check(c):\n    assert c() == {i}\n", "entry_point": "f"}


def question(i):
    return {"question_id": f"q{i}", "question": f"Who {i}", "value": f"X{i}", "aliases": [f"X{i}"]}


@pytest.fixture
def tiny_run(tmp_path):
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    tokenizer.save(tokenizer.encoding({bytes([b]): b for b in range(256)}), run / "data")
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=320, seq_len=64, init_std=0.2, **SIZES)
    checkpoint.save(run, 3, {"step": 3, "config": dataclasses.asdict(cfg), "model": GPT(cfg).state_dict()}, keep=1)
    write(run / "gsm8k/test.jsonl", [{"question": f"{i} eggs?", "answer": f"So {i}.\n#### {i}"} for i in range(4)])
    write(run / "hellaswag/val.jsonl", map(ending, range(6)))
    write(run / "triviaqa/rc_wikipedia_nocontext_val.jsonl", map(question, range(3)))
    write(run / "humaneval/HumanEval.jsonl", map(function, range(2)))
    return run


def run(tiny_run, *flags):
    return command.main([f"--run={tiny_run}", f"--evaldata={tiny_run}", "--device=cpu", *flags])


def records(tiny_run, task):
    (_, *rows), _ = files.read_rows(tiny_run / f"eval-00000003/{task}.jsonl")
    return {record["id"]: record for record in rows}
