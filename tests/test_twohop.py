"""Facts and two-hop questions. Run: python -m pytest tests/test_twohop.py (CPU, seconds)"""

import dataclasses

import numpy as np
import pytest

from data import shards, tokenizer, twohop
from data.twohop import HopConfig

HOPS = HopConfig(entities=12, relations=3, names=5, composed=60, tokens=4000, window=64)
KEYS = HopConfig(entities=30, relations=0, names=32, composed=0, tokens=4000, window=64)


def documents(directory, split):
    enc = tokenizer.load(directory)
    text = enc.decode(np.concatenate(shards.open_shards(directory, split)).tolist())
    return [part for part in text.split("<|endoftext|>") if part]


@pytest.mark.parametrize("cfg", [HOPS, KEYS])
def test_every_document_is_whole_and_true(cfg, tmp_path):
    meta = twohop.build(tmp_path / "d", cfg)
    assert 4000 <= meta["splits"]["train"]["tokens"] < 6000 and twohop.read_config(tmp_path / "d") == cfg
    facts = dict(twohop.texts(cfg, "fact", np.arange(cfg.entities * max(1, cfg.relations))))
    found = documents(tmp_path / "d", "train")
    assert len(facts) == cfg.entities * max(1, cfg.relations)
    for text in found:
        parts = text.split(" ")[1:]
        question, answer = "".join(f" {w}" for w in parts[:-2]), "".join(f" {w}" for w in parts[-2:])
        if len(parts) == 6:  # head, two relations, tail
            answer_of = facts["".join(f" {w}" for w in parts[:2]) + f" {parts[2]}"] + f" {parts[3]}"
            assert facts[answer_of] == answer
        else:
            assert facts[question] == answer
    assert {t for t in found if len(t.split(" ")) < 7} >= {q + a for q, a in facts.items()}
    for block in np.concatenate(shards.open_shards(tmp_path / "d", "train")).reshape(-1, 64):
        assert block[0] == meta["eos"]  # no document runs over a border


def test_questions_asked_were_never_trained(tmp_path):
    twohop.build(tmp_path / "d", HOPS)
    order = twohop.asked(HOPS)
    trained = {q + a for q, a in twohop.texts(HOPS, "composed", order[: HOPS.composed])}
    unseen = {q + a for q, a in twohop.texts(HOPS, "composed", order[HOPS.composed :])}
    found = set(documents(tmp_path / "d", "train"))
    assert trained <= found and not unseen & found and len(trained | unseen) == 12 * 9


def test_seeds_differ_and_impossible_sizes_are_refused():
    other = dataclasses.replace(HOPS, seed=1)
    assert (twohop.world(HOPS)[1] != twohop.world(other)[1]).any()
    for fields in (dict(entities=26), dict(composed=100), dict(names=1), dict(relations=27), dict(window=4)):
        with pytest.raises(ValueError, match="need"):
            dataclasses.replace(HOPS, **fields).validate()
