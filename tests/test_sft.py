"""Training on examples, and within documents: python -m pytest tests/test_sft.py (CPU)"""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import sample
import train
from data import files, prepare, tokenizer
from data.loader import Loader
from optimoe import checkpoint, hf, hub, start
from optimoe.load import ModelChoice, load
from tests.checks import check
from tests.test_start import KINDS, ROOT, losses, released  # noqa: F401  a fixture
from tests.trainrun import cut_at, differences, rows

FLAGS = "--device=cpu --dtype=float32 --curves=false --batch-size=8 --seq-len=48 --lr=1e-3 --warmup-steps=2"
FLAGS = f"{FLAGS} --log-every=1 --val-every=2 --val-batches=1 --sample-tokens=4 --balance-coef=0 --z-coef=0".split()


@pytest.fixture(scope="module")
def examples(released):  # noqa: F811
    """{kind: directory} of examples whose answers differ in length, in the tokens of each model."""
    lines = [{"prompt": f"{i}+{i}:", "answer": "yn"[i % 2] * (1 + i * i % 5)} for i in range(600)]
    (released / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = {kind: released / f"examples-{kind}" for kind in KINDS}
    for kind, out in made.items():
        prepare.main([str(released / "examples.jsonl"), f"--out={out}", f"--tokenizer={released / kind}", "--sft",
                      "--val_fraction=0.1"])  # fmt: skip
    return made


def run(released, examples, out, *flags, kind="qwen3_moe"):  # noqa: F811
    source = [f"--init-from={released / kind}", f"--data={examples[kind]}"]
    return train.main([*source, f"--out-dir={out}", *FLAGS, *flags])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_transformers_on_each_example_alone(kind, released, examples, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers", minversion="5")
    batch = Loader([(examples[kind], 1.0)], "train", 8, 48, documents=True).next()
    ours = start.load(released / kind, "init_from", seq_len=48, dtype="float32").train()
    loss = ours(*batch).loss
    loss.backward()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(released / kind, dtype=torch.float32).train()
    n_targets, total, alone = (batch[1] >= 0).sum(), 0, 0
    for tokens, targets, numbers in zip(*batch, strict=True):
        for number in numbers.unique():
            at = (numbers == number)[None]
            ids, labels = tokens[None][at][None], targets[None][at][None]
            if (labels >= 0).any():
                labels = labels.where(labels >= 0, -100)
                form = dict(labels=labels, shift_labels=labels, num_items_in_batch=n_targets)
                part = theirs(ids, **form).loss
                part.backward()
                total, alone = total + part.item(), alone + 1
    assert alone > 16 and loss.item() == pytest.approx(total, rel=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = dict(hf.load_model(tmp_path / "gradients", dtype="float32").named_parameters())
    for name, p in ours.named_parameters():
        check(p.grad, expected[name], 1e-5, name)
    run(released, examples, tmp_path / "run", "--steps=1", "--grad-accum=4", kind=kind)
    _, row, *_ = rows(tmp_path / "run")  # the first one is the validation of the start
    assert (row["loss"], row["grad_norm"]) == pytest.approx((total, norm.item()), rel=1e-5)


def test_the_mean_is_over_all_targets_of_a_step(released, examples, tmp_path):  # noqa: F811
    """One micro-batch, four, or two ranks of two with each engine: the same losses, gradients and validation."""
    small = Loader([(examples["qwen3_moe"], 1.0)], "train", 2, 48, documents=True)
    assert len({int((small.next()[1] >= 0).sum()) for _ in range(4)}) > 1
    run(released, examples, tmp_path / "whole", "--steps=4")
    run(released, examples, tmp_path / "parts", "--steps=4", "--grad-accum=4")
    flags = [f"--init-from={released / 'qwen3_moe'}", f"--data={examples['qwen3_moe']}", *FLAGS, "--steps=4"]
    flags, engines = [*flags, "--grad-accum=2"], ("ddp", "ep")
    jobs = [[2, [*flags, f"--parallel={engine}", f"--out-dir={tmp_path / engine}"]] for engine in engines]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks", json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: rows(tmp_path / name) for name in ("whole", "parts", *engines)}
    keys = ("loss", "grad_norm", "val_loss")
    found = {name: [row[key] for row in log for key in keys if key in row] for name, log in found.items()}
    for name in found:
        assert found[name] == pytest.approx(found["whole"], rel=2e-5), name


def test_it_learns_resumes_and_forgets_no_document(released, examples, tmp_path):  # noqa: F811
    results = run(released, examples, tmp_path / "whole", "--steps=6", "--grad-accum=2", "--checkpoint-every=3")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.1
    assert "val_bits_per_byte" not in results  # of answers alone it would mean nothing
    cut = cut_at(tmp_path / "whole", tmp_path / "cut", 3)
    train.main([f"--resume={cut}"])
    assert rows(cut) == rows(tmp_path / "whole")
    states = [checkpoint.read(out) for out in (cut, tmp_path / "whole")]
    assert differences(*states) == [] and states[0]["config"]["document_mask"]


def test_a_run_on_chats_keeps_the_template(released, tmp_path, capsys, monkeypatch):  # noqa: F811
    """sample.py asks the run by it, and an export has it, for transformers too."""
    pytest.importorskip("jinja2")
    end = "<|endoftext|>"
    source = f"{{% for m in messages %}}:{{{{ m.content }}}}{end}{{% endfor %}}"
    source += "{% if add_generation_prompt %}:{% endif %}"
    model = tmp_path / "model"
    shutil.copytree(released / "qwen3_moe", model)
    (model / "chat_template.jinja").write_text(source)
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"split_special_tokens": False}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yy"}] for i in range(99)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    prepare.main([str(tmp_path / "chats.jsonl"), f"--out={tmp_path / 'data'}", f"--tokenizer={model}", "--sft",
                  "--val_fraction=0.1"])  # fmt: skip
    out = tmp_path / "run"
    train.main([f"--init-from={model}", f"--data={tmp_path / 'data'}", f"--out-dir={out}", *FLAGS, "--steps=1"])
    hf.main([str(out), str(tmp_path / "export")])
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == source
    said = []
    for place in (f"--run={out}", f"--hf={tmp_path / 'export'}", f"--hf={model}"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "generate", lambda model, prompts, *args, **options: said.extend(prompts) or [[5]])
            sample.main([place, "--prompt=1", "--device=cpu", "--max-new-tokens=2"])
    # The end of a message is a special token, not the letters of its name.
    assert said[0] == said[1] == said[2] == [ord(":"), ord("1"), 256, ord(":")]
    enc, (ckpt,) = tokenizer.load(tmp_path / "data"), [path for _, path in checkpoint.find(out)]
    for name in (out, ckpt, str(out)):  # grpo.py asks the same way, and what it made does too
        assert (
            start.prompt_ids(name, tokenizer.tiktoken_tokens(enc), tmp_path / "data")("Question: 1\nAnswer:") == said[0]
        )
    (tmp_path / "grpo").mkdir()
    for name in (str(ckpt), str(model)):
        (tmp_path / "grpo/config.json").write_text(json.dumps({"group_size": 2, "model": name}))
        assert hub.origin(tmp_path / "grpo") == model
    monkeypatch.setattr(sys, "stdin", io.StringIO("0123456789\n" * 9))  # more than the model can read
    said.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda model, prompts, *args, **options: said.extend(prompts) or [[53]])
        sample.main([f"--run={out}", "--device=cpu", "--max-new-tokens=2"])
    lengths = list(map(len, said))
    assert lengths == [13, 28, *[43] * 7] and max(lengths) < 48  # the oldest turns are forgotten
    model.rename(tmp_path / "moved")
    hub.folder.cache_clear()
    hf.main([str(out), str(tmp_path / "without")])  # the model that it started from is gone
    assert "has a chat template, it is not used" in capsys.readouterr().err
    assert not (tmp_path / "without" / "chat_template.jinja").exists()


def test_the_end_of_a_turn_ends_answers_of_the_run_and_of_its_export(released, tmp_path, capsys):  # noqa: F811
    """A template that ends turns with another token than eos_token, as that of many base models."""
    pytest.importorskip("jinja2")
    source = "{% for m in messages %}:{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(released / "qwen3_moe", model)
    (model / "chat_template.jinja").write_text(source)
    made = json.loads((model / "tokenizer.json").read_text())
    made["added_tokens"].append(made["added_tokens"][0] | {"id": 257, "content": "<|im_end|>"})
    (model / "tokenizer.json").write_text(json.dumps(made))
    chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yy"}] for i in range(99)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    prepare.main([str(tmp_path / "chats.jsonl"), f"--out={tmp_path / 'data'}", f"--tokenizer={model}", "--sft",
                  "--val_fraction=0.1"])  # fmt: skip
    data = f"--data={tmp_path / 'data'}"
    train.main([f"--init-from={model}", data, f"--out-dir={out}", *FLAGS, "--steps=60", "--lr=1e-2"])
    hf.main([str(out), str(tmp_path / "export")])
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "export" / name).read_text())["eos_token_id"] == [256, 257]
    assert hf.load_tokens(tmp_path / "export").eos == [256, 257]
    capsys.readouterr()
    for place in (f"--run={out}", f"--hf={tmp_path / 'export'}"):
        sample.main([place, "--prompt=1", "--device=cpu", "--max-new-tokens=20", "--temperature=0"])
        assert capsys.readouterr().out == "yy\n"
    # The run keeps the ends and the SHA-256 of its tokenizer, also when text in the same tokens comes first.
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{i} yy" * 9}) for i in range(99)))
    prepare.main([str(tmp_path / "text.jsonl"), f"--out={tmp_path / 'text'}", f"--tokenizer={model}",
                  "--val_fraction=0.2"])  # fmt: skip
    mix = f"--data={tmp_path / 'text'}:0.5,{tmp_path / 'data'}:0.5"
    train.main([f"--init-from={model}", mix, f"--out-dir={tmp_path / 'mix'}", *FLAGS, "--steps=1"])
    choose = lambda **options: load(ModelChoice(**options, device="cpu")).tokens.eos
    assert choose(run=str(tmp_path / "mix")) == choose(run=str(out), data=str(tmp_path / "text")) == [256, 257]
    (tmp_path / "other").mkdir()
    renamed = files.read_json(tmp_path / "data/tokenizer.json") | {"name": "other"}
    files.write_json(tmp_path / "other/tokenizer.json", renamed)
    with pytest.raises(ValueError, match=f"data='{tmp_path / 'other'}': its tokenizer is not that of the run: name"):
        choose(run=str(tmp_path / "mix"), data=str(tmp_path / "other"))


def test_plain_text_by_option(released, tmp_path):  # noqa: F811
    flags = [f"--init-from={released / 'olmoe'}", f"--data={released / 'data'}", *FLAGS, "--steps=1"]
    for name, option in (("with", "true"), ("without", "false")):
        train.main([*flags, f"--document-mask={option}", f"--out-dir={tmp_path / name}"])
    batch = Loader([(released / "data", 1.0)], "train", 8, 48, documents=True).next()
    expected = start.load(released / "olmoe", "init_from", seq_len=48)(*batch).loss.item()
    assert losses(tmp_path / "with") == [pytest.approx(expected, rel=1e-5)]
    assert abs(losses(tmp_path / "without")[0] - expected) > 1e-3
