"""The study: one run, what it trains on and what is measured. Run: python -m pytest tests/test_study.py (CPU)"""

import dataclasses
import json

import pytest
import torch

from data import facts, reasoning, shards, twohop
from optimoe import checkpoint
from study import execute as run
from study import measure, results
from study.execute import Run, execute, key
from tests.studyrows import TINY


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def row(cache):
    return execute([TINY], cache, "cpu", n=4, keep=[cache / "kept"])[0]


# ---- one run


def test_a_run_is_measured_everywhere_and_learns(row, cache):
    assert [point["step"] for point in row["points"]] == [10, 20] and row["step"] == 40 and not row["diverged"]
    losses = [point["val_loss"] for point in (*row["points"], row)]
    assert (
        losses[-1] < losses[0] - 0.5 and abs(row["train_loss"] - row["val_loss"]) < 0.8
    )  # the data is new; two steps are noisy
    assert row["problems"]["by_steps"].keys() == {"1", "2", "3"} and row == json.loads(json.dumps(row))
    assert (
        row["tpp"] == pytest.approx(TINY.tokens / row["params"]["total"], rel=1e-5)
        and row["flops"] > 0
        and row["revision"]
    )
    assert row["skipped_steps"] == 0 and row["mano"]["chance"] >= 0.2  # modulo 5
    assert row["bits"]["possible"] > 0 and row["facts"]["people"] == 20 and len(json.dumps(row)) < 10_000
    kept = checkpoint.load_model(cache / "kept")
    assert kept.cfg.n_experts == 4 and (cache / "kept" / "config.json").exists()


def test_the_same_run_gives_the_same_numbers_and_another_seed_does_not(row, cache):
    times = ("train_seconds", "seconds", "tokens_per_s", "date")
    (again,) = execute([TINY], cache, "cpu", n=4)
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in row.items() if k not in times}
    assert key(TINY) == row["key"] != key(dataclasses.replace(TINY, seed=1))


def test_runs_trained_side_by_side_are_the_same_runs(row, cache):
    other = dataclasses.replace(TINY, seed=1, lr=5e-3)
    rows = execute([other, TINY], cache, "cpu", n=4)
    measured = ("train_loss", "val_loss", "facts", "problems", "mano", "points")
    assert {name: rows[1][name] for name in measured} == {name: row[name] for name in measured}
    assert rows[0]["key"] == key(other) and rows[0]["train_loss"] != row["train_loss"] and rows[0]["together"] == 2
    assert run.form(other) == run.form(TINY) != run.form(dataclasses.replace(TINY, n_experts=8))


def test_samples_are_the_first_part_of_the_data_once_and_targets_follow_tokens(cache):
    directory = run.prepare_data(TINY, cache)
    samples = run.Samples(TINY, directory, "cpu")
    flat = torch.cat([torch.from_numpy(shard.astype("int64")) for shard in shards.open_shards(directory, "train")])
    assert sorted(samples.starts_SB.flatten().tolist()) == [96 * i for i in range(160)]  # 40 steps of 4 windows
    start = int(samples.starts_SB[7, 2])
    tokens, targets = samples.batch(torch.tensor([7]))
    assert (
        tokens[2].tolist() == flat[start : start + 96].tolist()
        and targets[2].tolist() == flat[start + 1 : start + 97].tolist()
    )
    with pytest.raises(ValueError, match="data_tokens"):
        run.Samples(dataclasses.replace(TINY, tokens=2**14, data_tokens=2**20), directory, "cpu") and run.Samples(
            dataclasses.replace(TINY, tokens=2**20, data_tokens=2**20), directory, "cpu"
        )


def test_the_training_step_is_that_of_train_py(cache):
    """Two steps by hand on the same windows give the same weights."""
    cfg = run.train_config(TINY, 1344)
    trainer = run.Trainer([cfg], [run.Samples(TINY, run.prepare_data(TINY, cache), "cpu")], "cpu")
    model = run.GPT(cfg)
    optimizer = run.make_optimizer(model, cfg)
    for step in range(2):
        optimizer.set_lr(run.lr_at(step, cfg))
        run.optimizer_step(
            model, optimizer, cfg, run.new_window(cfg, "cpu"), [trainer.samples[0].batch(torch.tensor([step]))]
        )
    trainer.advance(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.models[0].parameters(), strict=True))


def test_models_of_one_seed_share_what_they_can():
    """Paired initialisation: attention, embeddings and the first experts do not depend on E or k; another seed
    changes all of them."""

    def weights(**fields):
        cfg = run.train_config(dataclasses.replace(TINY, **fields), 1344)
        return dict(run.GPT(cfg).named_parameters())

    small, large, other = weights(), weights(n_experts=8, top_k=3), weights(seed=1)
    for name, a in small.items():
        b = large[name]
        b = b if a.shape == b.shape else b[: a.shape[0]]  # the first experts, or their rows of the router
        assert torch.equal(a, b), name
        assert a.std() == 0 or not torch.equal(a, other[name]), name


@pytest.mark.parametrize("kind, unique", [("twohop", 60), ("room", 0)])
def test_facts_and_two_hop_questions_are_measured_by_the_same_names(cache, kind, unique):
    tiny = dataclasses.replace(TINY, kind=kind, unique=unique, people=16)
    (found,) = execute([tiny], cache, "cpu", n=4)
    assert (
        found["facts"]["loss"] > 0.1
        and 0 <= found["facts"]["overall"] <= 1
        and ("problems" in found) == (kind == "twohop")
    )
    assert found["bits"]["possible"] == pytest.approx(160 * 4 if kind == "twohop" else 16 * 20)
    assert {name for name in results.TASKS if name in found} == {"facts"} | ({"problems"} if unique else set())
    model = run.GPT(run.train_config(tiny, 1344))  # an untrained model knows nothing
    fresh = measure.hops(model, run.data_dir(tiny, cache), 4, True)
    assert fresh["bits"]["values"] <= found["bits"]["values"] + 1e-9 and fresh["facts"]["loss"] > found["facts"]["loss"]
    assert twohop.read_config(run.data_dir(tiny, cache)).entities == 16


def test_runs_of_the_old_draw_are_not_run_again(cache):
    for old in (dict(paired=False), dict(data="text:1")):
        with pytest.raises(ValueError, match=f"{next(iter(old))}="):
            execute([dataclasses.replace(TINY, **old)], cache, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_steps_are_plain_steps(cache):
    """Twelve steps of two models, nine of them replayed on two branches, follow the same losses as twelve plain
    ones of each: data, rate and position move on inside the graph."""
    cfg, samples = run.train_config(TINY, 1344), run.Samples(TINY, run.prepare_data(TINY, cache), "cuda")
    cfgs = [cfg, dataclasses.replace(cfg, seed=1)]
    trainer = run.Trainer(cfgs, [samples] * 2, "cuda")
    both = [[loss for loss, _ in trainer.advance(step)] for step in range(1, 13)]
    for i in range(2):
        plain = run.Trainer(cfgs[i : i + 1], [samples], "cuda")
        plain.run_step = plain._step
        losses = [plain.advance(step)[0][0] for step in range(1, 13)]
        assert [pair[i] for pair in both] == pytest.approx(losses, rel=3e-2) and losses[-1] < losses[0] - 0.3
        assert int(trainer.positions[i]) == int(plain.positions[0]) == 12


def test_mixture_has_the_tokens_and_the_different_problems_it_is_asked_for(tmp_path):
    asked = dataclasses.replace(TINY, data_tokens=2**18, seq_len=256, batch=1, unique=50)
    meta = shards.read_meta(run.prepare_data(asked, tmp_path))
    assert 1 <= meta["splits"]["train"]["tokens"] / 2**18 < 1.12
    assert meta["procedural"]["n_problems"] == 50 and meta["procedural"]["repeats"] > 10


def test_seeds_differ_in_everything_and_experts_in_nothing_but_the_model():
    at = lambda **fields: run.mixture(Run(**fields))
    other = Run(n_experts=256, top_k=8, lr=1.0, init_std=0.1, d_model=64)
    assert run.data_dir(Run(), "c") == run.data_dir(other, "c") != run.data_dir(Run(seed=1), "c")
    zero, one = at(), at(seed=1)
    assert not {p.name for p in facts.people(zero.facts)[:500]} & {p.name for p in facts.people(one.facts)[:500]}
    assert reasoning.problem(zero.reasoning, 0) != reasoning.problem(one.reasoning, 0) and zero.seed != one.seed
    longer = run.mixture(Run(tokens=2**26, data_tokens=2**26, people=16_000))
    assert facts.people(longer.facts)[:500] == facts.people(zero.facts)[:500]  # those whom recall asks about


def test_no_problem_that_is_asked_has_a_template_that_was_trained():
    cfg = run.mixture(Run()).reasoning
    trained = {reasoning.problem(cfg, i).template for i in range(4000)}
    asked = {reasoning.problem(cfg, i, "test", steps).template for steps in range(1, 13) for i in range(50)}
    assert len(trained) > 1000 and not trained & asked
    trained = {reasoning.mano(cfg, i).question for i in range(4000)}
    assert not trained & {reasoning.mano(cfg, i, "test", length).question for length in (2, 3) for i in range(200)}


def test_recall_asks_about_people_whom_training_met(cache):
    directory = run.prepare_data(TINY, cache)
    samples = run.Samples(TINY, directory, "cpu")
    text = run.tokenizer.load(directory).decode(samples.ids.tolist())
    cfg = run.mixture(TINY)
    assert (
        min(text.count(person.name) for person in facts.people(cfg.facts)) >= cfg.exposures - 3 >= 3
    )  # 15,360 of 17,000 tokens
