"""Facts, reasoning problems, and the data directory made of them: python -m pytest tests/test_procedural.py."""

import dataclasses
import json
import math
import random
import re
import sys
from collections import Counter

import pytest
import torch

from data import facts, procedural, reasoning, tokenizer
from data.facts import FactsConfig
from data.reasoning import ReasoningConfig
from data.shards import open_shards, read_meta
from eval.generate import generate
from eval.probes import graded, loss_of, mano_accuracy, report, solutions_written
from eval.taskloss import score
from model import GPT
from optimoe.sizes import preset

SMALL = procedural.MixtureConfig(
    FactsConfig(12, 10, 10, 10, 10, 10, 10, 10, years=20),
    ReasoningConfig(max_steps=3, modulus=7, names=12),
    exposures=3,
    n_problems=60,
    window=0,
)
SIGNS = {"adds": lambda x, y: x + y, "takes": lambda x, y: x - y, "has": lambda x, y: x * y}


def solve(text, modulus):
    """The asked value, by repeated substitution, written without a line of the generator's code."""
    body, asked = re.fullmatch(r"Given:(.*) What is (\w+)\? Solution:", text).groups()
    rules, known = [s.split() for s in re.findall(r"[^.]+", body) if s.strip()], {}
    value = lambda word: int(word) if word.isdigit() else known[word]
    while asked not in known:
        before = len(known)
        for name, verb, y, *rest in rules:
            operands = [y] + rest[1:]
            if name not in known and all(w.isdigit() or w in known for w in operands):
                y = value(y)
                known[name] = y if verb == "is" else SIGNS[verb](value(rest[1]), y) % modulus
        assert len(known) > before, f"cannot be solved: {text}"
    return known[asked]


@pytest.mark.parametrize("cfg", [ReasoningConfig(), ReasoningConfig(max_steps=4, modulus=7, names=24)])
def test_problems_are_right_and_solutions_pass(cfg):
    for split in ("train", "test"):
        for i in range(150):
            p = reasoning.problem(cfg, i, split)
            assert p == reasoning.problem(cfg, i, split)
            assert solve(p.question, cfg.modulus) == p.answer
            assert reasoning.check(p.question, p.solution, cfg.modulus) == (True, True)
            assert (p.template % reasoning.TEST_SHARE == 0) == (split == "test")


def test_wrong_solutions_fail():
    cfg = ReasoningConfig(modulus=7, names=24, max_steps=4)
    for i in range(60):
        p = reasoning.problem(cfg, i, steps=2 + i % 3)
        wrong = f" Answer: {(p.answer + 1) % 7}."
        assert reasoning.check(p.question, re.sub(r" Answer: \d\.", wrong, p.solution), 7) == (False, False)
        assert reasoning.check(p.question, f" Answer: {p.answer}.", 7) == (
            True,
            False,
        )  # right by luck, without the work
        assert reasoning.check(p.question, "", 7) == (False, False)
        other = re.sub(r"is (\d)\. Answer", lambda m: f"is {(int(m[1]) + 1) % 7}. Answer", p.solution)
        assert not reasoning.check(p.question, other, 7)[1]


def test_templates_of_train_and_test_are_disjoint_and_problems_vary():
    cfg = ReasoningConfig(max_steps=4, names=24)
    train, test = ({reasoning.problem(cfg, i, split).template for i in range(800)} for split in ("train", "test"))
    assert not train & test and len(train) > 100
    assert len({reasoning.problem(cfg, i).question for i in range(500)}) > 495
    answers = Counter(reasoning.problem(cfg, i).answer for i in range(1500))
    assert max(answers.values()) < 0.2 * 1500  # no constant answer is worth much


def test_people_are_distinct_and_probes_answer_from_the_biography():
    cfg = SMALL.facts
    people = facts.people(cfg)
    assert len({p.name for p in people}) == 12 and people == facts.people(cfg)
    assert people[:5] == facts.people(dataclasses.replace(cfg, n_people=5))
    for person in people:
        text = "".join(facts.segments(cfg, person, 3))
        assert text.startswith(person.name) and all(value in text for value in person.values)
        assert text != "".join(facts.segments(cfg, person, 4))
    assert cfg.value_choices == 2 * 12 * 28 * 20 * 10**4
    assert math.isclose(math.log2(FactsConfig().value_choices), 47.59, abs_tol=0.01)  # the published bioS figure


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="n_people=900"):
        facts.people(FactsConfig(n_people=900, first_names=10, middle_names=10, last_names=10))
    with pytest.raises(ValueError, match="names=5"):
        ReasoningConfig(names=5).validate()
    with pytest.raises(ValueError, match="modulus=2"):
        ReasoningConfig(modulus=2).validate()


def test_build_round_trip_and_report(tmp_path):
    meta = procedural.build(tmp_path / "d", SMALL, seed=3)
    enc = tokenizer.load(tmp_path / "d")
    text = {
        split: enc.decode([int(t) for shard in open_shards(tmp_path / "d", split) for t in shard])
        for split in ("train", "val")
    }
    cfg = procedural.read_config(tmp_path / "d")
    assert cfg.reasoning.seed == cfg.facts.seed == 3 and read_meta(tmp_path / "d") == meta
    for person in facts.people(cfg.facts):
        assert text["train"].count(person.name) == 3
    assert text["train"].count("Answer:") == 60
    held_out = {reasoning.problem(cfg.reasoning, i, "test").question for i in range(40)}
    assert not any(question in text["train"] for question in held_out) and any(
        question in text["val"] for question in held_out
    )
    assert all(len(enc.encode_ordinary(piece)) == 1 for piece in (" Answer", " 5", "Given"))  # words are tokens
    model = GPT(preset("tiny", vocab_size=enc.n_vocab, n_layers=1))
    printed, scores = report(model, tmp_path / "d", n_people=4, n_problems=4)
    assert "recall" in printed and scores["facts"]["overall"] < 0.3  # an untrained model remembers nothing
    assert scores["bits"]["per_parameter"] < 0.01


@pytest.mark.parametrize("parts", [{}, {"exposures": 0}, {"n_problems": 0}, {"exposures": 0, "n_problems": 0}])
def test_the_closing_report_fits_any_window(tmp_path, parts):
    """What is longer than the model's window is scored in parts, so that no finished run fails at its end."""
    mixture = dataclasses.replace(SMALL, n_mano=20, **parts)
    procedural.build(tmp_path, mixture)
    for seq_len in (1, 2, 24):
        model = GPT(preset("tiny", vocab_size=tokenizer.load(tmp_path).n_vocab, n_layers=1, seq_len=seq_len))
        _, scores = report(model, tmp_path, n_people=2, n_problems=2)
        expected = {"facts": mixture.exposures, "bits": mixture.exposures, "reasoning": mixture.n_problems, "mano": 20}
        assert set(scores) == {name for name, number in expected.items() if number} | {"samples"}
        assert len(scores["samples"]) == (bool(mixture.exposures) + bool(mixture.n_problems)) * (seq_len > 1)


def test_window_packing_starts_every_window_with_a_document(tmp_path):
    procedural.build(tmp_path / "d", dataclasses.replace(SMALL, window=144))
    enc = tokenizer.load(tmp_path / "d")
    ids = [int(t) for shard in open_shards(tmp_path / "d", "train") for t in shard]
    assert len(ids) % 144 == 0 and all(ids[i] == enc.eot_token for i in range(0, len(ids), 144))


def test_many_processes_write_the_same_bytes(tmp_path):
    cfg = dataclasses.replace(SMALL, n_mano=40, window=144)
    alone, together = procedural.build(tmp_path / "a", cfg), procedural.build(tmp_path / "b", cfg, workers=2)
    assert alone == together and alone["procedural"]["n_mano"] == 40
    (tmp_path / "cfg.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    procedural.main([f"--out={tmp_path / 'c'}", f"--mixture={tmp_path / 'cfg.json'}"])
    assert read_meta(tmp_path / "c") == alone


def test_a_bad_mixture_is_named(tmp_path):
    path, whole = tmp_path / "cfg.json", dataclasses.asdict(SMALL)
    for change, message in (
        ({"n_mona": 1}, "unknown field 'n_mona': did you mean 'n_mano'"),
        ({"facts": whole["facts"] | {"people": 1}}, "unknown field 'people'"),
        ({"facts": 3}, "'int' object has no attribute"),
        ({"facts": whole["facts"] | {"seed": [1]}}, "unhashable"),
        ({"exposures": "many"}, "exposures='many': a whole number"),
        ({"exposures": [3]}, "exposures=.3.: a whole number"),
        ({"reasoning": whole["reasoning"] | {"ordered": 1}}, "unknown field 'ordered'"),
        ({"reasoning": whole["reasoning"] | {"branch": 0.5}}, "unknown field 'branch'"),
        ({"facts": whole["facts"] | {"plan": True}}, "unknown field 'plan'"),
        ({"reasoning": whole["reasoning"] | {"mano_length": 10**6}}, "mano_length=1000000: need 1 to 200"),
        ({"n_problems": 10**15}, "n_problems=1000000000000000: need 0 to 1,000,000,000"),
        ({"window": 10**12}, "window=1000000000000: need 0 to 1,048,576"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            procedural.main([f"--out={tmp_path / 'd'}", f"--mixture={path}"])
    for content in ("{", "[" * 10**5, "[]"):
        path.write_text(content)
        with pytest.raises(SystemExit, match=f"^error: {path}"):
            procedural.main([f"--out={tmp_path / 'd'}", f"--mixture={path}"])
    with pytest.raises(SystemExit, match="^error: workers=1000000000: must be from 1 to 1024"):
        procedural.main([f"--out={tmp_path / 'd'}", "--workers=1e9"])
    with pytest.raises(SystemExit, match="out='a,b': --data of train.py has a comma between directories"):
        procedural.main(["--out=a,b"])
    with pytest.raises(SystemExit, match="^error: .*missing.json"):
        procedural.main([f"--out={tmp_path / 'd'}", f"--mixture={tmp_path / 'missing.json'}"])
    assert [p.name for p in tmp_path.iterdir()] == ["cfg.json"]
    del whole["reasoning"]["mano_length"], whole["repeats"]  # written before these existed
    for kind, retired in procedural.RETIRED.items():  # and while these did
        whole[kind] |= retired
    assert procedural.from_dict(whole) == SMALL


def test_the_default_data_needs_no_tokenizers_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert procedural.build(tmp_path / "d", SMALL)["splits"]["train"]["tokens"] > 1000


def test_the_first_part_of_the_data_has_its_share_of_everything(tmp_path):
    cfg = dataclasses.replace(SMALL, exposures=30, n_problems=20, repeats=18, n_mano=360)
    kinds = [kind for kind, _ in procedural._kinds(cfg, "train", random.Random(0))]
    first = Counter(kinds[: len(kinds) // 2])
    assert len(kinds) == 3 * 360 and all(140 <= first[kind] <= 220 for kind in ("facts", "problem", "mano"))


def test_graded_agrees_with_greedy_generation_and_task_loss():
    enc = procedural.encoder(SMALL)
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=enc.n_vocab, n_layers=1))
    pairs = [("Given: lamp is 3. Solution:", " lamp is 3. Answer: 3."), ("Mano: + 1 2 =", " 3."), ("Given:", " kite")]
    rows = [procedural.prompt(enc, question + answer) for question, answer in pairs]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):  # until it knows the first two by heart
        sum(model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])).loss for ids in rows[:2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs.append((pairs[0][0], " lamp is 3. Answer: 4."))
    answers = [enc.encode_ordinary(answer) for _, answer in pairs]
    prompts = [procedural.prompt(enc, question) for question, _ in pairs]
    written = generate(model, prompts, max(map(len, answers)), n_vocab=enc.n_vocab)
    grades = graded(model, enc, pairs, max_tokens=20)  # several batches
    assert (
        [right for *_, right in grades]
        == [new[: len(ids)] == ids for new, ids in zip(written, answers, strict=True)]
        == [True, True, False, False]
    )
    nats = score(model.eval(), list(zip(prompts, answers, strict=True)))
    assert [g[0] for g in grades] == pytest.approx(nats, rel=1e-4)
    assert loss_of(grades) == pytest.approx(sum(nats) / sum(map(len, answers)), rel=1e-4)


def test_solutions_written_are_those_of_generation():
    """A model that knows half of the problems by heart gets the same shares from one forward pass as from writing."""
    enc, cfg = procedural.encoder(SMALL), SMALL.reasoning
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=enc.n_vocab, n_layers=1))
    problems = [reasoning.problem(cfg, i, "test", s) for s in (1, 3) for i in (0, 2)]
    rows = [procedural.prompt(enc, p.question + p.solution) + [enc.eot_token] for p in problems]
    ids = torch.tensor([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids[:, :-1].clamp(min=0), ids[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = solutions_written(model, enc, cfg, (1, 3), 4)
    for s, share in found["accuracy"].items():
        asked = [reasoning.problem(cfg, i, "test", s).question for i in range(4)]
        prompts = [procedural.prompt(enc, question) for question in asked]
        written = generate(model, prompts, 50, [enc.eot_token], n_vocab=enc.n_vocab)
        right = [reasoning.check(q, enc.decode(new), cfg.modulus)[1] for q, new in zip(asked, written, strict=True)]
        assert share == sum(right) / 4
    assert 0 < found["accuracy"][3] < 1
    assert found["loss"] > 0.1
    narrow = GPT(preset("tiny", vocab_size=enc.n_vocab, n_layers=1, seq_len=96))
    assert (
        3 <= max(solutions_written(narrow, enc, cfg, range(1, 9), 2)["accuracy"]) < 8
    )  # what is not trained and does not fit is left out


def test_mental_arithmetic_is_tested_on_unseen_expressions_beyond_the_trained_lengths():
    enc = procedural.encoder(SMALL)
    torch.manual_seed(0)
    found = mano_accuracy(GPT(preset("tiny", vocab_size=enc.n_vocab, n_layers=1)), enc, SMALL.reasoning, n=8)
    assert list(found["accuracy"]) == [2, 3, 4, 5, 6] and 1 / 7 < found["chance"] < 0.5 and found["loss"] > 1
    train = {reasoning.mano(SMALL.reasoning, i).question for i in range(2000)}
    assert not train & {reasoning.mano(SMALL.reasoning, i, "test", 3).question for i in range(100)}
