"""Training that starts from a published model, against transformers. Run: python -m pytest tests/test_start.py (CPU)"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
import train
from data import shards, tokenizer
from data.loader import Loader, parse_sources
from model import GPT, ModelConfig
from optimoe import checkpoint, hf, hub, start
from optimoe.load import ModelChoice, load
from optimoe.optim import lr_at
from tests.checks import check

for package in ("safetensors", "tokenizers", "huggingface_hub"):
    pytest.importorskip(package)
ROOT = Path(train.__file__).parent
SIZES = dict(vocab_size=320, seq_len=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=4)
KINDS = {
    "mixtral": {},
    "qwen3_moe": dict(qk_norm=True, router_normalize=False, tie_embeddings=True),
    "olmoe": dict(qk_norm=True, qk_norm_joint=True),
}
FLAGS = "--device=cpu --curves=false --steps=10 --batch-size=4 --seq-len=32 --log-every=1 --val-every=0 --lr=1e-3"
FLAGS = f"{FLAGS} --sample-tokens=4 --warmup-steps=3 --weight-decay=0.1".split()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """{kind: folder of a tiny model}; and "data": text in the tokens of their tokenizer."""
    base = tmp_path_factory.mktemp("released")
    enc = tokenizer.encoding({bytes([b]): b for b in range(256)})
    for kind, fields in KINDS.items():
        torch.manual_seed(0)
        model = GPT(ModelConfig(**SIZES, top_k=2, d_expert=48, init_std=0.1, **fields))
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.uniform_(0.5, 1.5)
        hf.save_model(model, base / kind, eos=enc.eot_token)
        hf.save_tokens(enc, base / kind)
    fast, text = tokenizer.load(base / "mixtral"), Path(__file__).read_text()
    with shards.ShardWriter(base / "data", fast) as writer:
        for i in range(0, 4000, 100):
            (document,) = tokenizer.documents(fast, [text[i : i + 100]])
            writer.add("val" if i % 1000 == 0 else "train", *document)
    return base


def run(released, kind, out, *flags):
    return train.main(
        [f"--init-from={released / kind}", f"--data={released / 'data'}", f"--out-dir={out}", *FLAGS, *flags]
    )


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def transformers_losses(released, model, cfg):
    """Losses of the run's steps, and the trained model, by transformers and torch.optim.AdamW."""
    loader = Loader(parse_sources(str(released / "data")), "train", cfg.batch_size, cfg.seq_len, cfg.seed)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, cfg.weight_decay), (False, 0.0))
    ]
    adamw, found = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps), []
    for step in range(cfg.steps):
        for group in adamw.param_groups:
            group["lr"] = lr_at(step, cfg)
        tokens, targets = loader.next()
        loss = model(tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        adamw.step()
        adamw.zero_grad()
        found.append(loss.item())
    return found, model


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_those_of_transformers(kind, released, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    run(released, kind, tmp_path / "run", "--balance-coef=0", "--z-coef=0", "--dtype=float32")
    cfg = train.TrainConfig(**checkpoint.read(tmp_path / "run")["config"])
    ours, before = losses(tmp_path / "run"), transformers.AutoModelForCausalLM.from_pretrained(released / kind)
    expected, model = transformers_losses(released, before.float().train(), cfg)
    assert ours[0] == pytest.approx(expected[0], rel=1e-5) and ours == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.1  # it learned something
    hf.main([str(tmp_path / "run"), str(tmp_path / "out"), "--seq-len=64"])
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 64
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    start_state = transformers.AutoModelForCausalLM.from_pretrained(released / kind).state_dict()
    for name, weight in model.state_dict().items():
        moved = weight - start_state[name]
        check(back.state_dict()[name] - start_state[name], moved, 2e-3, name)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("ab", add_special_tokens=False) == [
        97,
        98,
    ]


def test_every_engine(released, tmp_path):
    """Two ranks lose what one process loses, whatever is sharded."""
    flags = [f"--init-from={released / 'qwen3_moe'}", f"--data={released / 'data'}", *FLAGS, "--steps=4"]
    engines = ("ddp", "ep")
    jobs = [[2, [*flags, f"--parallel={engine}", f"--out-dir={tmp_path / engine}"]] for engine in engines]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [sys.executable, "-m", "tests.ranks", json.dumps(jobs)]
    done = subprocess.run(ranks, capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    run(released, "qwen3_moe", tmp_path / "one", "--steps=4")
    for engine in engines:
        assert losses(tmp_path / engine) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), engine
        hf.main([str(tmp_path / engine), str(tmp_path / f"{engine}-out")])


def test_what_flags_do_not_say(released, tmp_path):
    train.main([f"--init-from={released / 'olmoe'}", f"--data={released / 'data'}", f"--out-dir={tmp_path / 'run'}",
                "--steps=2", "--batch-size=2", "--device=cpu", "--curves=false"])  # fmt: skip
    cfg = json.loads((tmp_path / "run/config.json").read_text())
    assert {name: cfg[name] for name in ("optimizer", "lr", "warmup_steps")} == dict(
        optimizer="adamw", lr=1e-5, warmup_steps=20
    )
    assert (cfg["d_model"], cfg["qk_norm_joint"], cfg["vocab_size"], cfg["seq_len"]) == (64, True, 320, 64)
    train.main([f"--resume={tmp_path / 'run'}", "--steps=3"])
    assert len(checkpoint.find(tmp_path / "run")) == 2
    for flag in ("init_from", "upcycle_from"):
        other = f"--{flag}={released / 'mixtral'}"
        with pytest.raises(ValueError, match=f"{flag}='.*mixtral': the checkpoint has .*; resume without|one place"):
            train.main([f"--resume={tmp_path / 'run'}", "--steps=4", other])


def test_help_shows_the_defaults_of_fine_tuning(released, capsys):
    with pytest.raises(SystemExit):
        train.main([f"--init-from={released / 'olmoe'}", "--help"])
    printed = capsys.readouterr().out
    assert re.search(r"--lr float +1e-05", printed) and re.search(r"--d_model int +64", printed)


MISTAKES = {
    "n_experts=8: .*olmoe has 4": ["--n-experts=8"],
    "seq_len=65: .*olmoe reads 64 tokens at most": ["--seq-len=65"],
    "data='': name text in its tokens: python -m data.prepare": ["--data="],
    "init_from='nowhere': no such directory": ["--init-from=nowhere"],
    "init_from='.': this is no published model; python -m": ["--init-from=."],
    "the weights come from one place": ["--upcycle-from=x"],
    "preset='tiny': the sizes are those of init_from": ["--preset=tiny"],
}


@pytest.mark.parametrize("match", MISTAKES)
def test_mistakes(match, released, tmp_path):
    with pytest.raises(ValueError, match=match):
        run(released, "olmoe", tmp_path / "run", *MISTAKES[match])
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(released, tmp_path):
    backwards = {bytes([255 - b]): b for b in range(256)}
    larger = tokenizer.encoding(backwards | {b"ab" + bytes([b]): 256 + b for b in range(99)})
    for name, other in (
        ("data", tokenizer.encoding(backwards)),
        ("larger", larger),
    ):  # the second has more tokens than the model
        with shards.ShardWriter(tmp_path / name, other) as writer:
            writer.add("train", [*range(200)] * 9 + [other.eot_token])
        with pytest.raises(
            ValueError, match="its tokenizer is not that of .*mixtral: prepare the text with `data.prep"
        ):
            run(released, "mixtral", tmp_path / "run", f"--data={tmp_path / name}")


def test_evaluating_with_data_of_another_tokenizer_is_refused(released, tmp_path):
    """With data in the model's own tokens, all of its ends count, and its chat template's special tokens are tokens."""
    model = tmp_path / "model"
    shutil.copytree(released / "mixtral", model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [65, 256]}))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    tokens = load(ModelChoice(hf=str(model), data=str(released / "data"), device="cpu")).tokens
    assert tokens.eos == hf.load_tokens(model).eos == [256, 65]
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"split_special_tokens": False}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    for data in (None, released / "data"):
        tokens = load(ModelChoice(hf=str(model), data=str(data or ""), device="cpu")).tokens
        assert start.chat_encoder(str(model), tokens, data)([{"role": "user", "content": "a"}]) == [97, 256]
    with shards.ShardWriter(tmp_path / "data", tokenizer.encoding({bytes([255 - b]): b for b in range(256)})) as writer:
        writer.add("train", [*range(256)] * 9 + [256])
    message = f"data='{tmp_path / 'data'}': its tokenizer is not that of {model}: prepare the text"
    with pytest.raises(ValueError, match=message):
        load(ModelChoice(hf=str(model), data=str(tmp_path / "data"), device="cpu"))


# ---- GRPO


GRPO = "--task=gsm8k --questions=4 --eval-questions=2 --batch-prompts=4 --mini-batch=4 --group-size=2 --steps=2"
GRPO = f"{GRPO} --answer-tokens=6 --micro-tokens=64 --eval-every=0 --device=cpu --lr=1e-3".split()
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "eval/gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{i} eggs?", "answer": f"So {i}.\n#### {i}"} for i in range(4)]
        (tmp_path / f"eval/gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--evaldata={tmp_path / 'eval'}"


def test_grpo_starts_from_a_published_model(released, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grpo.main([f"--model={released / 'mixtral'}", questions, *GRPO])
    out = Path(f"{released / 'mixtral'}-grpo")
    cfg, trained = json.loads((out / "config.json").read_text()), checkpoint.load_model(out)
    assert cfg["model"] == cfg["data"] == str(released / "mixtral")
    before = hf.load_model(released / "mixtral")
    assert not torch.equal(trained.head.weight, before.head.weight)
    assert tokenizer.load(checkpoint.training_data(out)).encode_ordinary("ab") == [97, 98]  # eval --run finds it
    with pytest.raises(ValueError, match="model='.*olmoe': its sizes are not those of this run"):
        grpo.main([f"--resume={out}", "--steps=3", f"--model={released / 'olmoe'}"])
    grpo.main([f"--resume={out}", "--steps=3"])
    assert checkpoint.find(out)[-1][0] == 3


def test_the_chat_template_asks(released):
    tokens, plain = hf.load_tokens(released / "olmoe"), "Question: 2 eggs?\nAnswer:"
    decode = lambda ids: tokens.decode(ids)
    assert start.prompt_ids(released / "olmoe", tokens)(plain) == tokens.bos + tokens.encode(plain)
    path = released / "olmoe/chat_template.jinja"
    path.write_text(TEMPLATE)
    try:
        assert decode(start.prompt_ids(str(released / "olmoe"), tokens)(plain)) == "<2 eggs?>="
    finally:
        path.unlink()


def test_what_is_a_published_model(released, tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    assert start.released(released / "olmoe") and start.released("org/name") and not start.released(tmp_path)
    assert not start.released(tmp_path / "config.json") and not start.released(tmp_path / "missing")
    assert hub.home(released / "olmoe") == released / "olmoe" and str(hub.home("org/name@v1")) == "runs/org--name--v1"
