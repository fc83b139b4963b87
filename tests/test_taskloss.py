"""Task loss against a plain one-by-one computation. Run: python -m pytest tests/test_taskloss.py (CPU, seconds)"""

import math

import pytest
import torch

from data import tokenizer
from data.tokenizer import Tokens, tiktoken_tokens
from eval.taskloss import bits, encode_pair, mean_stderr, score, windows
from model import GPT, ModelConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = ModelConfig(
        vocab_size=320,
        seq_len=24,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        head_dim=16,
        n_experts=4,
        top_k=2,
        d_expert=32,
        init_std=0.3,
        dtype="float32",
    )
    return GPT(cfg).eval()


def slow_nll(model, context, answer):
    """-log p(answer | context), one forward pass a token."""
    total, ids = 0.0, list(context)
    for token in answer:
        logits = model(torch.tensor([ids[-model.cfg.seq_len :]])).logits[0, -1].double()
        total -= torch.log_softmax(logits, 0)[token].item()
        ids.append(token)
    return total


def make_pairs():
    rng = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, 320, (n,), generator=rng).tolist()
    return [
        (draw(1), draw(1)),
        (draw(5), draw(3)),
        (draw(20), draw(4)),
        (draw(2), draw(20)),
        (draw(9), draw(9)),
        (draw(12), draw(13)),
    ]


@torch.no_grad()
def test_score_equals_one_token_at_a_time(model):
    pairs = make_pairs()
    truth = [slow_nll(model, *pair) for pair in pairs]
    for max_tokens in (1, 40, None):  # one row, several rows, all rows in a batch
        assert score(model, pairs, max_tokens) == pytest.approx(truth, rel=1e-5)
    shifted = [(context[:-1], context[-1:] + answer) for context, answer in pairs if len(context) > 1]
    assert score(model, shifted) != pytest.approx(
        truth[1:], rel=1e-2
    )  # the check can fail: another boundary, another score
    assert score(model, []) == []


@torch.no_grad()
def test_long_answers_are_scored_once_in_windows(model):
    context, answer = list(range(40)), [(7 * i) % 320 for i in range(70)]
    parts = list(windows(context, answer, 24))
    assert sum(n for _, n in parts) == 70 and all(len(ids) <= 25 for ids, _ in parts)
    assert sum((ids[-n:] for ids, n in parts), []) == answer
    assert all(len(ids) - n >= 12 for ids, n in parts)  # context of the first scored token
    truth = sum(slow_nll(model, ids[: len(ids) - n], ids[-n:]) for ids, n in parts)
    assert score(model, [(context, answer)]) == pytest.approx([truth], rel=1e-5)
    assert list(windows([1, 2], [3], 24)) == [([1, 2, 3], 1)]
    assert list(windows([1], list(range(24)), 24)) == [([1, *range(24)], 24)]  # exactly full


def test_boundary():
    enc = tokenizer.train_bpe(["Question: a\nAnswer: Janet sells eggs. " * 20, "x:Janet " * 50], 300)
    tokens = tiktoken_tokens(enc)
    context, answer, merged = encode_pair(tokens, "Question: a\nAnswer:", " Janet")
    assert not merged and tokens.decode(context[1:]) == "Question: a\nAnswer:" and tokens.decode(answer) == " Janet"
    assert context[0] == enc.eot_token

    prompt = "Question: a\nAnswer:"
    joint = enc.encode_ordinary(prompt + "Janet")
    assert joint[: len(enc.encode_ordinary(prompt))] != enc.encode_ordinary(prompt)  # ":J" merges: the case in question
    context, answer, merged = encode_pair(tokens, prompt, "Janet")
    assert merged and tokens.decode(context[1:]) == prompt and tokens.decode(answer) == "Janet"
    paper_slice = joint[len(enc.encode_ordinary(prompt)) :]
    assert tokens.decode(paper_slice) != "Janet"  # what the paper's rule would have scored
    with pytest.raises(ValueError, match="answer after 'x' is empty"):
        encode_pair(tokens, "x", "")


def test_every_byte_is_scored_once():
    """Any split of any text: context and answer decode to the two sides, whatever merges."""
    text = "Answer:Janet sells 16 - 3 = 13 eggs.\n\n\n#### 13\n  é→"
    enc = tokenizer.train_bpe([text * 30], 400)
    tokens = tiktoken_tokens(enc)
    merges = 0
    for cut in range(1, len(text)):
        context, answer, merged = encode_pair(tokens, text[:cut], text[cut:])
        assert tokens.decode(context[1:]) == text[:cut] and tokens.decode(answer) == text[cut:]
        merges += merged
    assert 0 < merges < len(text) - 1


def test_bits_of_a_uniform_model(model):
    """Hand-computed: a head of zeros gives log2(V) bits a token, whatever the text."""
    head = model.head.weight.data.clone()
    model.head.weight.data.zero_()
    try:
        tokens = Tokens(lambda s: list(s.encode()), lambda ids: bytes(ids).decode(), [300], [300], 256)
        context, answer, _ = encode_pair(tokens, "ab", "é!")
        nats = score(model, [(context, answer)])[0]
        assert bits(nats, len(answer)) == pytest.approx(math.log2(320), rel=1e-6)
        assert bits(nats, len("é!".encode())) == pytest.approx(math.log2(320), rel=1e-6)
    finally:
        model.head.weight.data.copy_(head)


def test_mean_stderr():
    stats = mean_stderr([1.0, 0.0, 0.0, 1.0])
    assert stats["mean"] == 0.5 and stats["stderr"] == pytest.approx(math.sqrt(1 / 3 / 4)) and stats["n"] == 4
    assert mean_stderr([3.0]) == {"mean": 3.0, "stderr": None, "n": 1}
    assert mean_stderr([]) == {"mean": None, "stderr": None, "n": 0}
