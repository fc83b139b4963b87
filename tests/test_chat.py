"""Examples for fine-tuning: python -m pytest tests/test_chat.py (needs the package tokenizers)"""

import importlib.util
import json

import numpy as np
import pytest
import torch

from data import chat, files, shards, tokenizer
from data.loader import Loader, packed
from data.prepare import main
from data.shards import START, TRAINED
from eval.taskloss import context_ids
from tests.test_fast import byte_level, folder, metaspace, unigram

tokenizers = pytest.importorskip("tokenizers")
ROWS = [{"prompt": f"the goose {i} in", "answer": f" the river {i * 7}" * (1 + i % 3)} for i in range(60)]


def pieces(directory, split="train"):
    """(ids, trained) of each example."""
    ids, marks = (np.concatenate(shards.open_shards(directory, split, kind)) for kind in (False, True))
    starts = np.flatnonzero(marks & START)
    return [(a, b & TRAINED) for a, b in zip(np.split(ids, starts[1:]), np.split(marks, starts[1:]), strict=True)]


def prepared(path, rows, tok, *flags):
    (path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([str(path / "x.jsonl"), f"--out={path / 'd'}", f"--tokenizer={tok}", "--sft", "--val_fraction=0", *flags])
    return path / "d"


@pytest.mark.parametrize("kind", [byte_level, metaspace, unigram])
def test_only_answers_and_their_end_are_trained(tmp_path, kind):
    made, eos, begin = folder(tmp_path / "hf", kind)
    data = prepared(tmp_path, ROWS, tmp_path / "hf")
    enc, meta = tokenizer.load(data), shards.read_meta(data)
    split, found = meta["splits"]["train"], pieces(data)
    assert (meta["version"], split["documents"], len(found)) == (2, 60, 60)
    assert split["bytes"] == sum(len(row["prompt"] + row["answer"]) for row in ROWS)
    for row, (ids, trained) in zip(ROWS, found, strict=True):
        prompt = [*begin, *enc.encode_ordinary(row["prompt"])]  # as eval and grpo.py ask a model
        assert ids[: len(prompt)].tolist() == prompt and not trained[: len(prompt)].any()
        assert trained[len(prompt) :].all() and ids[-1] == eos
        assert kind is unigram or enc.decode(ids[len(prompt) : -1].tolist()) == row["answer"]


@pytest.mark.parametrize("own", [True, False])
def test_examples_begin_with_what_prompts_begin_with(tmp_path, own):
    """A tokenizer of our own puts the end of text there, and one without bos does so before an empty prompt."""
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"the goose {i} in {i}"}) for i in range(60)))
    if own:
        main([str(tmp_path / "text.jsonl"), f"--out={tmp_path / 'own'}", "--vocab_size=280", "--val_fraction=0"])
    else:
        folder(tmp_path / "own", byte_level)
    rows = [*ROWS, {"prompt": "", "answer": "the river"}]
    data = prepared(tmp_path, rows, tmp_path / "own")
    enc = tokenizer.load(data)
    tokens, found = tokenizer.tiktoken_tokens(enc), pieces(data)
    assert len(found) == len(rows)
    for row, (ids, trained) in zip(rows, found, strict=True):
        prompt = context_ids(tokens, row["prompt"])
        assert (prompt[:1] == [enc.eot_token]) == (own or not row["prompt"])
        assert ids[: len(prompt)].tolist() == prompt and not trained[: len(prompt)].any()
        assert enc.decode(ids[len(prompt) : -1].tolist()) == row["answer"]
        assert ids[-1] == enc.eot_token and trained[len(prompt) :].all()


def test_a_token_that_would_join_prompt_and_answer_is_split(tmp_path):
    made, _, _ = folder(tmp_path / "hf", byte_level)
    (joined,) = made.encode(" goose").ids
    data = prepared(tmp_path, [{"prompt": "the go", "answer": "ose"}, {"prompt": "a", "answer": "b"}], tmp_path / "hf")
    ids, trained = pieces(data)[0]
    enc = tokenizer.load(data)
    assert joined not in ids and ids[trained == 0].tolist() == enc.encode_ordinary("the go")
    assert enc.decode(ids[trained == 1][:-1].tolist()) == "ose"


def test_an_answer_behind_a_prompt_gets_no_space_of_its_own(tmp_path):
    """SentencePiece puts one in front of a text that stands alone."""
    made, eos, begin = folder(tmp_path / "hf", metaspace)
    assert made.encode("the", add_special_tokens=False).tokens == ["▁the"]
    data = prepared(tmp_path, [{"prompt": "t", "answer": "he"}, ROWS[0]], tmp_path / "hf")
    ids = pieces(data)[0][0].tolist()
    assert [made.id_to_token(token) for token in ids] == ["<s>", "▁t", "he", "</s>"]


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chats(path, template=TEMPLATE):
    made, settings, _ = byte_level()
    made.add_special_tokens(["<|im_start|>"])
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    files.write_json(path / "tokenizer_config.json", settings | {"chat_template": template}, signed=False)
    return made


def say(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_messages_become_text_by_the_chat_template(tmp_path):
    made = chats(tmp_path / "hf")
    rows = [{"messages": say("the goose", "in the river", "1987", "yes", "no more")}, {"messages": say("a", "b")}]
    data = prepared(tmp_path, rows, tmp_path / "hf")
    (ids, trained), _ = pieces(data)
    text = "<|im_start|>user\nthe goose<|endoftext|>\n<|im_start|>assistant\nin the river<|endoftext|>\n"
    text += "<|im_start|>user\n1987<|endoftext|>\n<|im_start|>assistant\nyes<|endoftext|>\n"
    assert ids[:-1].tolist() == made.encode(text).ids and ids[-1] == tokenizer.load(data).eot_token
    runs = np.split(ids, np.flatnonzero(np.diff(trained)) + 1)[1::2]
    assert [made.decode(run.tolist(), skip_special_tokens=False) for run in runs] == [
        "in the river<|endoftext|>\n",
        "yes<|endoftext|>\n",
    ]
    assert shards.read_meta(data)["splits"]["train"]["documents"] == 2, "ends inside a chat are no ends of documents"


def test_the_token_that_ends_turns_is_kept_as_an_end_of_answers(tmp_path):
    ending = TEMPLATE.replace("<|endoftext|>", "{{ '<|im_end|>' if m.role == 'assistant' else '<|im_start|>' }}")
    made = chats(tmp_path / "hf", ending)
    made.add_special_tokens(["<|im_end|>"])
    made.save(str(tmp_path / "hf/tokenizer.json"))
    rows = [{"messages": say("the goose", f"<|im_start|> river {i}", "1987", "yes")} for i in range(20)]
    data = prepared(tmp_path, rows, tmp_path / "hf")
    eot, (start, end) = made.token_to_id("<|endoftext|>"), map(made.token_to_id, ("<|im_start|>", "<|im_end|>"))
    assert shards.read_meta(data)["ends"] == [end]
    assert tokenizer.tiktoken_tokens(tokenizer.load(data)).eos == [eot, end]
    ids, trained = pieces(data)[0]
    assert list(ids[trained > 0]).count(end) == 2 and start in ids[trained > 0]


@pytest.mark.parametrize("ending", ["<|endoftext|>", " ###", ""])
def test_no_other_token_ends_answers(tmp_path, ending):
    """Where turns end with the end of text, or with text: not even a special token within an answer."""
    chats(tmp_path / "hf", TEMPLATE.replace("<|endoftext|>", ending))
    data = prepared(tmp_path, [{"messages": say("a", f"<|im_start|> {i}")} for i in range(9)], tmp_path / "hf")
    assert "ends" not in shards.read_meta(data)


def test_answers_after_a_changed_past_are_examples_of_their_own(tmp_path):
    """As in chats with models that think: only the newest answer shows its thought. The row stays on one side."""
    content = "{{ m.content }}"
    thinking = "{% if loop.last and m.role == 'assistant' %}yes {% endif %}" + content
    made = chats(tmp_path / "hf", TEMPLATE.replace(content, thinking))
    rows = [{"messages": say("the goose", f"river {i}", "1987", "no more", "a", "b")} for i in range(20)]
    data = prepared(tmp_path, rows, tmp_path / "hf", "--val_fraction=0.3")
    found = {split: pieces(data, split) for split in ("train", "val")}
    assert sum(map(len, found.values())) == 60 and all(found.values())
    for each in found.values():
        for first, second, third in zip(each[::3], each[1::3], each[2::3], strict=True):
            said = [
                made.decode(ids[trained == 1].tolist(), skip_special_tokens=False) for ids, trained in (first, second)
            ]
            assert said[0].startswith("yes river") and said[1].startswith("yes no more")
            asked = made.decode(third[0][third[1] == 0].tolist(), skip_special_tokens=False)
            assert "yes" not in asked and said[0][4:-1] in asked and "no more" in asked


def test_templates_are_those_of_transformers(tmp_path):
    """What its environment adds to jinja2: its own tojson, the date, loop controls, and a tag that marks answers."""
    source = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }} {% endfor %}"
    source += "{{ strftime_now('%Y')[:2] }}{%- generation -%} endgeneration {{ messages | length }} {% endgeneration %}"
    source += "{{ tools is none }}"
    chats(tmp_path / "hf", source)
    text = chat.chat_template(tmp_path / "hf")(say("<é'>", "b", "c"), False)
    assert (
        text == """{"role": "user", "content": "<é'>"} {"role": "assistant", "content": "b"} 20endgeneration 3 True"""
    )
    if importlib.util.find_spec("transformers"):
        theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert text == theirs.apply_chat_template(say("<é'>", "b", "c"), tokenize=False)
    for form in ([{"nam": "default"}], [5], [{"name": "tool_use", "template": source}]):
        files.write_json(tmp_path / "hf/tokenizer_config.json", {"chat_template": form}, signed=False)
        assert chat.chat_template(tmp_path / "hf") is None


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "text": "b"}, "x.jsonl:2 is no example .it has: prompt, text.: an example is"),
        ({"prompt": "a", "answer": None}, "x.jsonl:2 is no example .it has: prompt, answer.: an example is"),
        ({"messages": say("a")}, "x.jsonl:2: messages=.*: none has the role .assistant."),
        ({"messages": [{"role": "assistant"}]}, "x.jsonl:2: message 1={'role': 'assistant'}: it needs .role. and"),
        (
            {"messages": [*say("a"), {"role": "assistant", "content": None}]},
            "x.jsonl:2: message 2=.*both of them texts",
        ),
        (["a"], "x.jsonl:2 is no example .it has: list."),
        ({"messages": say("a", "b")}, "x.jsonl:2: messages need a --tokenizer with a chat template"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    folder(tmp_path / "hf", byte_level)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        prepared(tmp_path, [ROWS[0], row], tmp_path / "hf")
    assert not (tmp_path / "d").exists()


FAILING = {
    "{{ raise_exception('no users') }}": "refuses the messages .no users.; change them",
    "{{ messages + 1 }}": "refuses the messages",
    "{{ unknown() }}": "refuses the messages .'unknown' is undefined",
    "{% for %}": "is damaged",
}


def test_what_cannot_be_examples_is_refused(tmp_path):
    chats(tmp_path / "hf", "{{ messages | length }}" + TEMPLATE)
    with pytest.raises(SystemExit, match="x.jsonl:1: the chat template begins answers in another way"):
        prepared(tmp_path, [{"messages": say("a", "b", "c", "d")}], tmp_path / "hf")
    for number, (template, message) in enumerate(FAILING.items()):
        chats(tmp_path / f"hf{number}", template)
        with pytest.raises(SystemExit, match=f"^error: .*the chat template of .*hf{number} {message}"):
            prepared(tmp_path, [{"messages": say("a", "b")}], tmp_path / f"hf{number}")
    (tmp_path / f"hf{number}/chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SystemExit, match="^error: .*chat_template.jinja is damaged"):
        prepared(tmp_path, [{"messages": say("a", "b")}], tmp_path / f"hf{number}")
    (tmp_path / "x.txt").write_text("text")
    flags = [str(tmp_path / "x.txt"), f"--out={tmp_path / 'd'}", "--sft"]
    with pytest.raises(SystemExit, match="x.txt: examples are rows of"):
        main([*flags, f"--tokenizer={tmp_path / 'hf'}"])
    with pytest.raises(SystemExit, match="sft=True: name the model's --tokenizer"):
        main(flags)


def test_damaged_marks_are_found(tmp_path):
    folder(tmp_path / "hf", byte_level)
    data = prepared(tmp_path, ROWS, tmp_path / "hf")
    path = data / "train-00000.marks"
    content = path.read_bytes()
    for damaged, message in ((content[:-1], "bytes instead of"), (bytes([content[0] ^ 1]) + content[1:], "is corrupt")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"train-00000.marks .*{message}"):
            Loader([(data, 1.0)], "train", 2, 32)
    path.unlink()
    with pytest.raises(ValueError, match="train-00000.marks is missing"):
        Loader([(data, 1.0)], "train", 2, 32)


@pytest.mark.parametrize("shard_tokens", [50, 2**26])
def test_every_example_is_whole_in_one_row_and_only_answers_are_targets(tmp_path, shard_tokens):
    folder(tmp_path / "hf", byte_level)
    data = prepared(tmp_path, ROWS, tmp_path / "hf")
    found, enc = pieces(data), tokenizer.load(data)
    with shards.ShardWriter(tmp_path / "e", enc, shard_tokens=shard_tokens) as writer:
        for ids, trained in found:
            marks = trained.copy()
            marks[0] |= START
            writer.add("train", ids, 1, marks)
    seq_len = 2 * max(len(ids) for ids, _ in found) - 1
    loader = Loader([(tmp_path / "e", 1.0)], "train", 1, seq_len, documents=True)
    seen = []
    for _ in range(loader.n_windows[0]):
        tokens, targets, documents = (t[0] for t in loader.next())
        assert documents.dtype == torch.int32 and documents[0] == 0 and (documents.diff() >= 0).all()
        for number in documents.unique():
            at = documents == number
            ids, aims = tokens[at].tolist(), targets[at].tolist()
            if set(aims) == {-1}:
                assert set(ids) == {enc.eot_token}  # what fills a row up
                continue
            match = [i for i, (whole, _) in enumerate(found) if whole.tolist()[: len(ids)] == ids]
            (example,) = [i for i in match if len(found[i][0]) - len(ids) in (0, 1)]
            whole, trained = found[example]
            expected = np.where(trained[1:], whole[1:].astype(np.int64), -1).tolist()
            assert aims == (expected + [-1])[: len(ids)] and len(ids) >= len(expected)
            seen.append(example)
    assert sorted(seen) == list(range(60)) and loader.n_windows[0] < 45
    plain = Loader([(tmp_path / "e", 1.0)], "train", 1, seq_len)
    again = Loader([(tmp_path / "e", 1.0)], "train", 1, seq_len, documents=True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(plain.next(), again.next(), strict=False))


def test_a_directory_of_examples_may_have_a_text_beside_them(tmp_path, capsys):
    folder(tmp_path / "hf", byte_level)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/README.md").write_text("what these rows are")
    (tmp_path / "rows/x.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    flags = [f"--out={tmp_path / 'd'}", f"--tokenizer={tmp_path / 'hf'}", "--sft", "--val_fraction=0"]
    main([str(tmp_path / "rows"), *flags])
    assert len(pieces(tmp_path / "d")) == 1 and "rows: 1 left out for their endings (.md)" in capsys.readouterr().err


def test_long_examples_lose_their_end(tmp_path):
    folder(tmp_path / "hf", byte_level)
    data = prepared(tmp_path, ROWS, tmp_path / "hf")
    starts = sorted(ids[:9].tolist() for ids, trained in pieces(data) if trained[:10].any())
    tokens, targets, documents = Loader([(data, 1.0)], "train", len(starts), 9, documents=True).next()
    assert sorted(tokens.tolist()) == starts and (documents == 0).all()


def test_examples_cut_off_before_their_answer_are_left_out(tmp_path):
    folder(tmp_path / "hf", byte_level)
    data = prepared(tmp_path, [{"prompt": "q" * 40, "answer": "a"}, {"prompt": "b", "answer": "c"}], tmp_path / "hf")
    loader = Loader([(data, 1.0)], "train", 1, 16)
    assert loader.n_windows == [1] and (loader.next()[1] >= 0).any()
    with pytest.raises(ValueError, match="seq_len=1: no answer in split 'train' of .*use a larger seq_len"):
        data = prepared(tmp_path / "hf", [{"prompt": "q" * 40, "answer": "a"}], tmp_path / "hf")
        Loader([(data, 1.0)], "train", 1, 1)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(5, 200, 5000).tolist()
    rows = packed(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(5000))
    assert all(sum(lengths[i] for i in row) <= 512 for row in rows)
    assert sum(lengths) / (512 * len(rows)) > 0.97


def test_documents_of_plain_text(tmp_path):
    """Windows, tokens and targets as ever, and the numbers of documents, which begin with an eos. Where prompts begin
    without it, documents end with it, and the next document is no target."""
    folder(tmp_path / "hf", byte_level)
    fast = tokenizer.from_folder(tmp_path / "hf")
    for name, enc in (("eos", tokenizer.word_tokenizer([])), ("other", fast)):
        rng, eos_first = np.random.default_rng(0), name == "eos"
        assert (tokenizer.tiktoken_tokens(enc).bos == [enc.eot_token]) == eos_first
        with shards.ShardWriter(tmp_path / name, enc) as writer:
            for _ in range(50):
                writer.add("train", [*rng.integers(1, 256, rng.integers(1, 30)), enc.eot_token], 1)
        plain, loader = (Loader([(tmp_path / name, 1.0)], "train", 3, 40, documents=d) for d in (False, True))
        for _ in range(5):
            (tokens, targets), (same, aims, documents) = plain.next(), loader.next()
            ends = tokens == enc.eot_token
            assert torch.equal(tokens, same) and torch.equal(aims, targets if eos_first else targets.where(~ends, -1))
            begins = ends[:, 1:] if eos_first else ends[:, :-1]
            assert torch.equal(documents[:, 1:], begins.cumsum(1).int()) and not documents[:, 0].any()
        assert loader.state_dict() == plain.state_dict()
    assert chat.chat_template(tmp_path) is None
