"""Generation: the cache against recomputation, batches against single prompts: pytest tests/test_generate.py (CPU)"""

import pytest
import torch

from eval.generate import Decoder, generate, sample
from eval.kv_cache import KVCache
from model import GPT, ModelConfig

CFG = dict(
    vocab_size=50,
    seq_len=40,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    n_experts=4,
    top_k=2,
    d_expert=32,
    init_std=0.3,
    dtype="float32",
)


def make(**overrides):
    torch.manual_seed(0)
    return GPT(ModelConfig(**{**CFG, **overrides})).eval()


def make_prompts(lengths, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=rng).tolist() for n in lengths]


def greedy_without_cache(model, prompt, n, stop_ids=()):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + n:
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token in stop_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "options", [{}, dict(dense=True), dict(qk_norm=True, n_kv_heads=4, router_score="sigmoid", n_shared_experts=1)]
)
def test_cache_equals_recompute(options):
    model = make(**options)
    prompt = make_prompts([24])[0]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
        cache, rows = KVCache(model.cfg, 1, 24), []
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 15), (15, 24)):  # prefill, single tokens, chunks
            rows.append((end - 1, model(torch.tensor([prompt[start:end]]), cache=cache).logits[0, 0]))
    for position, logits in rows:
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)
        neighbour = expected[position - 1]
        assert (logits - neighbour).abs().max() > 0.1  # the check can fail


def test_rows_of_a_batch_are_independent():
    """Unequal prompts, padded on the right and continued: the logits of each row are those of the row alone."""
    model = make()
    prompts = make_prompts([3, 11, 7])
    with torch.no_grad():
        cache = KVCache(model.cfg, 3, 20)
        cache.new_B = torch.tensor([3, 11, 7])
        padded = torch.tensor([p + [49] * (11 - len(p)) for p in prompts])
        first = model(padded, cache=cache).logits[:, 0]
        second = model(torch.tensor([[5], [6], [7]]), cache=cache).logits[:, 0]
        assert cache.lengths_B.tolist() == [4, 12, 8]
        for i, prompt in enumerate(prompts):
            torch.testing.assert_close(first[i], model(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                second[i], model(torch.tensor([prompt + [5 + i]])).logits[0, -1], rtol=1e-4, atol=1e-4
            )


def test_training_mode_uses_the_cache_too():
    model = make().train()
    prompt = make_prompts([10])[0]
    with torch.no_grad():
        cache = KVCache(model.cfg, 1, 10)
        model(torch.tensor([prompt[:6]]), cache=cache)
        logits = model(torch.tensor([prompt[6:]]), cache=cache).logits[0, 0]
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_batched_equals_single_equals_uncached():
    model = make()
    prompts = make_prompts([5, 1, 17, 9, 12, 3, 3])
    expected = [greedy_without_cache(model, p, 20) for p in prompts]
    assert len({tuple(e) for e in expected}) > 1
    for batch_size in (1, 3, 64):
        assert generate(model, prompts, 20, batch_size=batch_size) == expected
    stops = (expected[0][4], expected[2][7])  # rows end at different steps and leave the batch
    expected = [greedy_without_cache(model, p, 20, stops) for p in prompts]
    assert len({len(e) for e in expected}) > 1
    for batch_size in (1, 3, 64):
        assert generate(model, prompts, 20, stop_ids=stops, batch_size=batch_size) == expected


def test_sampling_is_reproducible_and_independent_of_the_batch():
    model = make()
    prompts = make_prompts([5, 1, 17, 9])
    first = generate(model, prompts, 15, temperature=1.0, top_p=0.9, seed=3)
    assert generate(model, prompts, 15, temperature=1.0, top_p=0.9, seed=3, batch_size=2) == first
    assert generate(model, prompts, 15, temperature=1.0, top_p=0.9, seed=4) != first
    same = generate(model, [prompts[0]] * 4, 15, temperature=1.0)
    assert len({tuple(ids) for ids in same}) == 4  # equal prompts draw different samples
    assert generate(model, prompts, 15, temperature=1e-4) == generate(model, prompts, 15)  # cold is greedy
    assert generate(model, prompts, 15, temperature=5.0, top_p=1e-6) == generate(
        model, prompts, 15
    )  # a nucleus of one token


def test_sample_follows_the_distribution_and_the_nucleus():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    logits = probs.log().expand(10_000, 4)
    for top_p, expected in (
        (1.0, probs),
        (0.74, torch.tensor([0, 2 / 3, 0, 1 / 3])),
        (0.4, torch.tensor([0, 1.0, 0, 0])),
        ((1.0, 2), torch.tensor([0, 2 / 3, 0, 1 / 3])),
        ((1.0, 9), probs),
        ((0.66, 2), torch.tensor([0, 1.0, 0, 0])),  # 0.5 is two thirds of the two
    ):
        top_p, top_k = top_p if isinstance(top_p, tuple) else (top_p, 0)
        shares = torch.bincount(sample(logits, top_p, uniform, top_k), minlength=4) / 10_000
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-3)
    for top_p in (1.0, 0.999):  # never a token of probability 0
        assert sample(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), top_p, torch.tensor([1 - 2**-24])).item() == 1
        assert sample(torch.tensor([[-torch.inf, 0.0, -torch.inf]]), top_p, torch.tensor([0.0])).item() == 1


def test_stop_strings_and_vocabulary_limit():
    model = make()
    prompts = make_prompts([4, 8])
    decode = lambda ids: "".join(f"<{i}>" for i in ids)
    free = generate(model, prompts, 12)
    stop = decode(free[0][3:5])  # spans two tokens
    stopped = generate(model, prompts, 12, stop_strings=[stop], decode=decode)
    end = next(n for n in range(1, 13) if stop in decode(free[0][:n]))
    assert stopped[0] == free[0][:end] and end < 12
    most = max(free[0])
    limited = generate(model, prompts, 12, n_vocab=most)
    assert all(token < most for ids in limited for token in ids) and limited[0] != free[0]


@pytest.mark.parametrize("coarse", [False, True])
def test_records_the_experts_of_every_token_read(coarse, monkeypatch):
    """What the cached steps chose is what one pass over the whole text chooses; rows end in three ways."""
    monkeypatch.setattr("eval.generate.coarse", lambda device: coarse)
    model = make()
    prompts = make_prompts([5, 1, 17, 9, 12, 3])
    decode = lambda ids: "".join(f"<{i}>" for i in ids)
    free = generate(model, prompts, 15)
    for options, read in (
        (dict(stop_ids=(free[0][4], free[2][7])), lambda ids: ids),
        (dict(stop_strings=[decode([free[4][6]])], decode=decode), lambda ids: ids[:-1]),
    ):
        experts = []
        found = generate(model, prompts, 15, batch_size=4, experts=experts, **options)
        assert len({len(ids) for ids in found}) > 1
        for prompt, ids, chosen in zip(prompts, found, experts, strict=True):
            ids = prompt + (ids[:-1] if len(ids) == 15 else read(ids))
            expected = torch.stack(model(torch.tensor([ids])).experts)
            assert chosen.dtype == torch.int16 and torch.equal(chosen.int(), expected)
            assert len(ids) < 4 or not torch.equal(chosen[:, 1:].int(), expected[:, :-1])  # the check can fail


def test_leaves_the_model_as_it_was():
    model = make().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, make_prompts([4]), 5)
    assert model.training and all((model.state_dict()[name] == value).all() for name, value in state.items())
    assert generate(model, [], 5) == []


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "a prompt is empty"),
        ([[1] * 36], {}, "36 tokens.*seq_len=40"),
        ([[1]], dict(temperature=-1), "temperature=-1"),
        ([[1]], dict(temperature=1e-300), "temperature=1e-300: use 0 .greedy., or 1e-6 or more"),
        ([[1]], dict(top_p=0), "top_p=0"),
        ([[1]], dict(batch_size=0), "batch_size=0"),
        ([[1]], dict(stop_strings=["x"]), "needs decode"),
    ],
)
def test_bad_arguments(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), prompts, 5, **options)


def test_few_shapes_give_the_same(monkeypatch):
    """What a GPU does (padded batches, steps nobody needs, rows leaving late), without its graphs."""
    model = make()
    prompts = make_prompts([5, 1, 17, 9, 12, 3, 3, 8, 2])
    free = generate(model, prompts, 20)
    decode = lambda ids: "".join(f"<{i}>" for i in ids)
    cases = [
        {},
        dict(stop_ids=(free[0][4], free[2][7])),
        dict(temperature=1.0, top_p=0.9, seed=3),
        dict(stop_strings=[decode(free[1][8:10])], decode=decode),
    ]
    expected = [generate(model, prompts, 20, **case) for case in cases]
    shapes = set()
    monkeypatch.setattr("eval.generate.coarse", lambda device: True)
    decode_step = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, *shape: (shapes.add(shape), decode_step(self, *shape)))
    for batch_size in (1, 4, 64):
        shapes.clear()
        assert [generate(model, prompts, 20, batch_size=batch_size, **case) for case in cases] == expected
        assert shapes <= {(rows, 40) for rows in (1, 2, 4, 16)}  # 40: the whole cache, 17 + 20 - 1 rounded up
    assert (16, 40) in shapes and min(shapes)[0] < 16  # rows did leave


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, dict(dense=True), dict(dtype="bfloat16", impl="triton"), dict(dtype="bfloat16", impl="grouped_mm")]
)
def test_graphs_give_what_single_steps_give(options, monkeypatch):
    model, captures, capture = make(seq_len=300, **options).cuda(), [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: captures.append(args) or capture(*args, **kwargs))
    prompts = make_prompts([5, 1, 150, 9, 100, 3])
    first = generate(model, prompts, 140)  # crosses a span of 128 and one of 256 keys
    assert generate(model, prompts, 140) == first and len({tuple(ids) for ids in first}) > 1
    sampled = generate(model, prompts, 140, temperature=1.0, top_p=0.9)
    assert options.get("impl") == "grouped_mm" or captures  # grouped_mm waits for the device: no graphs
    monkeypatch.setattr(Decoder, "run", Decoder.decode)
    assert generate(model, prompts, 140) == first
    assert generate(model, prompts, 140, temperature=1.0, top_p=0.9) == sampled


def test_weights_are_cast_once_in_a_copy():
    model = make(dtype="bfloat16", impl="reference", tie_embeddings=True).train()
    copy = Decoder(model, 2, 3, 4, 0.0, 1.0, None).model
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {
        torch.float32
    }
    assert copy.head.weight is copy.embed.weight and copy.cos is model.cos and model.training and not copy.training
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(copy(tokens).logits, model(tokens).logits)
    model = make()
    assert Decoder(model, 2, 3, 4, 0.0, 1.0, None).model.head.weight.data_ptr() == model.head.weight.data_ptr()
