"""The adapter to lm-eval, and our multiple choice against its own: python -m pytest tests/test_lm_eval.py (CPU)"""

import hashlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval import __main__ as ours
from eval import lm_eval as adapter
from eval import tasks
from eval.sources import Source
from optimoe.load import ModelChoice, load
from tests.evalrun import tiny_run, write  # noqa: F401

LIBRARY = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
ARC = [
    {
        "question": f"What is {i}?",
        "choices": {"text": ["red", "a dog", "12", "no one"][i % 2 :], "label": ["A", "B", "C", "D"][: 4 - i % 2]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(5)
]
PIQA = [{"goal": f"Open {i}.", "sol1": "twist", "sol2": "sing it a song", "label": i % 2} for i in range(5)]
BLANK = [
    {"sentence": f"Ann told Bo that _ was {i} late .", "option1": "Ann", "option2": "Bo", "answer": str(1 + i % 2)}
    for i in range(5)
]
MMLU = [
    {"question": f" {i}+2?", "subject": "abstract_algebra", "choices": ["1", "2", "4", "3"], "answer": i % 4}
    for i in range(5)
]
HELLASWAG = [
    {
        "activity_label": "Cook [x]",
        "ctx_a": f"b{i} [title] so",
        "ctx_b": "she",
        "label": str(i % 4),
        "endings": ["d", "ef.", "ghi  [y]", "jklm"],
    }
    for i in range(4)
]
TASKS = {  # ours: (file of lm-eval, its name for the split, our file, rows, examples)
    "arc_easy": ("arc/arc_easy.yaml", "test", "arc/ARC-Easy-Test.jsonl", ARC, 0),
    "piqa": ("piqa/piqa.yaml", "validation", "piqa/validation.jsonl", PIQA, 0),
    "winogrande": ("winogrande/default.yaml", "validation", "winogrande/validation.jsonl", BLANK, 0),
    "mmlu": ("mmlu/default/mmlu_abstract_algebra.yaml", "test", "mmlu/test.jsonl", MMLU, 2),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "hellaswag/val.jsonl", HELLASWAG, 0),
}


# What lm-eval 0.4.13 compares for these items: a digest of the (prompt, continuation) pairs, see `digest`.
RECORDED = {"arc_easy": "2cd4988598c0bcf2", "piqa": "26b766f754277f55", "winogrande": "f44231eb94138b97"}
RECORDED |= {"mmlu": "5e36973337326fdb", "hellaswag": "993484a28f28f01d"}


def digest(items):
    """Of a list with the (prompt, continuation) pairs of each item."""
    return hashlib.sha256(json.dumps([[list(pair) for pair in pairs] for pairs in items]).encode()).hexdigest()[:16]


def write_ours(folder):
    for _, _, own, rows, _ in TASKS.values():
        write(folder / own, rows)
    write(folder / "mmlu/dev.jsonl", MMLU[::-1])
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_those_of_lm_eval(name, tmp_path):
    """Without the library; where it is installed, the next tests compare these digests with its own."""
    items = tasks.load(name).items(Source(write_ours(tmp_path)), TASKS[name][4])
    assert digest([item.compared() for item in items]) == RECORDED[name]
    assert digest([item.compared()[::-1] for item in items]) != RECORDED[name]  # the check can fail


def local_task(folder, name, file, split, rows, examples):
    """lm-eval's own definition of a task, on local rows."""
    import lm_eval.tasks

    folder.mkdir(exist_ok=True)
    theirs = Path(lm_eval.tasks.__file__).parent / file
    write(folder / f"{name}.jsonl", rows)
    write(folder / f"{name}_dev.jsonl", rows[::-1])
    files = {split: str(folder / f"{name}.jsonl"), "train": str(folder / f"{name}.jsonl")}
    files |= {"dev": str(folder / f"{name}_dev.jsonl")} if examples else {}
    task = {"include": str(theirs), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
    task |= {"dataset_kwargs": {"data_files": files}, "num_fewshot": examples, "tag": []}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def test_a_missing_library_is_one_line(tiny_run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(adapter, "TemplateLM", object)
    with pytest.raises(ValueError, match=r"tasks=\('arc_easy',\): .* pip install -e"):
        adapter.main([f"--run={tiny_run}", "--tasks=arc_easy"])


@LIBRARY
def test_multiple_choice_equals_lm_eval_item_by_item(tiny_run, tmp_path, monkeypatch):  # noqa: F811
    """Every choice of every item has the log-likelihood that lm-eval's own prompt and splitting give it."""
    for name, (file, split, _, rows, examples) in TASKS.items():
        local_task(tmp_path / "tasks", name, file, split, rows, examples)
    write_ours(tmp_path / "ours")
    evaluate = adapter.simple_evaluate
    monkeypatch.setattr(adapter, "simple_evaluate", lambda *args, **more: evaluate(*args, log_samples=True, **more))
    found = adapter.main(
        [f"--run={tiny_run}", f"--tasks={','.join(f'{tmp_path}/tasks/{name}.yaml' for name in TASKS)}"]
    )
    for name, (_, _, _, rows, examples) in TASKS.items():
        flags = [f"--tasks={name}", f"--shots={examples}", f"--evaldata={tmp_path / 'ours'}"]
        metrics = ours.main([f"--run={tiny_run}", *flags])["tasks"][name]["metrics"]
        records = [json.loads(line) for line in open(tiny_run / f"eval-00000003/{name}.jsonl")][1:]
        records = {record["id"]: record for record in records}
        samples = found["samples"][f"local_{name}"]
        assert len(samples) == len(records) == len(rows)
        pairs = [sample["arguments"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        assert digest(pairs) == RECORDED[name], name
        for sample in samples:
            theirs = [float(answer[0][0]) for answer in sample["resps"]]
            record = records[str(sample["doc_id"])]
            assert [-nats for nats in record["choices"]] == pytest.approx(theirs, rel=1e-5), name
            assert record["metrics"]["acc"] == sample["acc"]
            assert record["metrics"]["acc_norm"] == sample.get("acc_norm", sample["acc"])
        assert metrics["acc"]["mean"] == found["results"][f"local_{name}"]["acc,none"]
    assert json.loads((tiny_run / "eval-00000003/lm_eval.json").read_text())["local_piqa"]


@LIBRARY
def test_unknown_tasks_are_one_line(tiny_run):  # noqa: F811
    with pytest.raises(ValueError, match="tasks=.'arc_eazy'.: unknown to lm-eval"):
        adapter.main([f"--run={tiny_run}", "--tasks=arc_eazy"])


def request(*args):
    return SimpleNamespace(args=args)


@LIBRARY
def test_likelihoods_and_texts(tiny_run):  # noqa: F811
    """Against one plain forward pass a token; a text longer than the window is scored in disjoint parts."""
    model = adapter.Model()
    loaded = model.loaded = load(ModelChoice(run=str(tiny_run), device="cpu"))
    bos = loaded.tokens.bos

    @torch.no_grad()
    def nats(context, answer):
        logits = loaded.model(torch.tensor([context + answer])[:, :-1]).logits[0, len(context) - 1 :].float()
        logs = logits.log_softmax(1)[torch.arange(len(answer)), torch.tensor(answer)]
        return float(logs.sum()), logits.argmax(1).tolist() == answer

    encode = loaded.tokens.encode
    pairs = [("a b ", "c"), ("", "xy"), ("Q: 1\nA:", " two")]
    expected = [
        nats(bos + encode("a b"), encode(" c")),
        nats(bos, encode("xy")),
        nats(bos + encode(pairs[2][0]), encode(" two")),
    ]
    for (value, best), (found, greedy) in zip(expected, model.loglikelihood([request(*p) for p in pairs]), strict=True):
        assert found == pytest.approx(value, rel=1e-4) and greedy == best
    (text, _) = model.generate_until([request("a b", {"until": "never", "max_gen_toks": 3}), request("a", {})])
    ids = encode(text)
    if len(ids) == 3:
        assert model.loglikelihood([request("a b", text)])[0][1]  # what greedy decoding wrote
    long = "".join(chr(97 + i % 26) for i in range(100))
    ids = encode(long)
    whole = nats(bos, ids[:64])[0] + nats(ids[35:64], ids[64:])[0]  # the window of this model has 64 tokens
    found = model.loglikelihood_rolling([request(long), request("abc")])
    assert found == pytest.approx([whole, nats(bos, encode("abc"))[0]], rel=1e-4)
