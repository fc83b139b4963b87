"""Two and four gloo ranks against one process: both engines and optimisers, uneven routing, idle experts, resuming.
Run: python -m pytest tests/test_parallel.py (CPU)"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from itertools import product

import numpy as np
import pytest
import torch

from data import files, shards, tokenizer
from data.loader import Loader
from model import GPT
from optimoe import checkpoint, parallel
from optimoe.config import parse
from optimoe.parallel import Sharded
from tests.test_train import data_dir  # noqa: F401  a fixture
from tests.trainrun import ROOT, SMALL, cut_at, differences, free_port, gloo_threads, rows, wait_for
from train import TrainConfig, main, train

# Two micro-batches, the balance loss of the global batch, shared experts.
FLAGS = [*SMALL, "--n-shared-experts=1", "--grad-accum=2", "--router-bias-rate=1e-4", "--balance-coef=0.1", "--steps=8"]
CASES = {
    "ddp-2-muon": (2, "ddp", "muon"),
    "ddp-4-adamw": (4, "ddp", "adamw"),
    "ddp-4-muon": (4, "ddp", "muon"),
    "ep-2-adamw": (2, "ep", "adamw"),
    "ep-4-muon": (4, "ep", "muon"),
    "groups-4-muon": (4, "ep --ep-size=2", "muon"),
}
HOW = {"groups-4-muon": {"sliced_from": 4097}}  # of a layer's experts w_in is divided over the groups, w_out is not
ENGINES = ("ddp", "ep")
# Selection biases of the first experts. Five experts on two or four ranks are slices of unequal length. With eight on
# four ranks and two out of reach, a rank gets no token at all.
BIASES = {5: [-100.0, 0.2], 8: [-100.0, -100.0, 0.2]}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):  # noqa: F811
    """Every case, and the run of one process, continues two steps after which experts are out of reach or preferred."""
    base = tmp_path_factory.mktemp("parallel")
    for optimizer, n_experts in product(("adamw", "muon"), BIASES):
        flags = [*FLAGS, f"--data={data_dir}", f"--optimizer={optimizer}", f"--n-experts={n_experts}"]
        start = base / f"start-{optimizer}-{n_experts}"
        main([*flags, "--steps=2", f"--out-dir={start}"])
        state = checkpoint.read(start)
        for layer in (0, 1):
            state["model"][f"blocks.{layer}.mlp.bias_E"][: len(BIASES[n_experts])] = torch.tensor(BIASES[n_experts])
        checkpoint.find(start)[-1][1].unlink()
        checkpoint.save(start, 2, state, keep=1)
        (start / "results.json").unlink()
    copy = lambda name, like: shutil.copytree(base / like.replace("one", "start"), base / name)
    jobs = [
        [
            world,
            [f"--resume={copy(name, reference(name))}", "--steps=8", *f"--parallel={engine}".split()],
            HOW.get(name, {}),
        ]
        for name, (world, engine, _) in CASES.items()
    ]
    bad = [
        [
            2,
            [
                *FLAGS,
                f"--data={data_dir}",
                "--max-loss=1",
                f"--out-dir={base / f'bad-{engine}'}",
                f"--parallel={engine}",
            ],
        ]
        for engine in ENGINES
    ]
    (base / "output").write_text(ranks(jobs + bad, failing=len(bad)))
    for one in {reference(name) for name in CASES}:
        main([f"--resume={copy(one, one)}", "--steps=8"])
    return base


def reference(case):
    _, engine, optimizer = CASES[case]
    return f"one-{optimizer}-{5 if engine == 'ddp' else 8}"


def ranks(jobs, failing=0):
    """Run these jobs, of which so many must fail; returns what they print."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", json.dumps(jobs)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},  # on CPUs, also where there is a GPU
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == failing, done.stdout[-4000:]
    return done.stdout


def same_log(run, reference, rtol):
    ours, theirs = rows(run), rows(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() ^ b.keys() <= {"repeated_steps"}
        for key in a.keys() & b.keys():
            np.testing.assert_allclose(
                a[key], b[key], rtol=rtol, atol=2e-3 if "load" in key else 0, err_msg=f"{key} at step {a['step']}"
            )


def same_state(run, reference, bound):
    """Weights, and optimiser states in the format of one process, whole and in the same order."""
    ours, theirs = checkpoint.read(run), checkpoint.read(reference)
    pairs = [(name, ours["model"][name], weight) for name, weight in theirs["model"].items()]
    for part, (a, b) in enumerate(zip(ours["optimizer"], theirs["optimizer"], strict=True)):
        assert a["state"].keys() == b["state"].keys() and len(a["param_groups"]) == len(b["param_groups"])
        pairs += [
            (f"{name} of {part}, {i}", a["state"][i][name], t)
            for i, values in b["state"].items()
            for name, t in values.items()
        ]
    for name, a, b in pairs:
        assert a.shape == b.shape and (a - b).norm() <= bound * b.norm() + 1e-7, (
            f"{name}: {(a - b).norm() / b.norm():.1e}"
        )
    assert ours["loader"] == theirs["loader"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(runs, case):
    one = reference(case)
    same_log(runs / case, runs / one, rtol=3e-4)
    same_state(runs / case, runs / one, bound=3e-3)
    loads = [row["load"] for row in rows(runs / case) if "load" in row and row["step"] > 3]
    dead = len(BIASES[int(one[-1])]) - 1  # the routing is as bad as promised
    assert loads and all(not any(layer[:dead]) and layer[dead] > 1.2 for load in loads for layer in load), loads
    other = one.replace("muon", "other").replace("adamw", "muon").replace("other", "adamw")  # the check can fail
    with pytest.raises(AssertionError):
        same_log(runs / case, runs / other, rtol=3e-4)


def test_resume_on_other_ranks_with_the_other_engine(runs, tmp_path):
    """Four ranks, then two or one; two, then four; four with ep, then two with ddp; the reverse; two groups, then one
    group; the reverse: as if unbroken. A run of fsdp, an engine that is gone, goes on as ddp, bit for bit."""
    to_two, to_one = (cut_at(runs / "ddp-4-muon", tmp_path / name, 4) for name in ("two", "one"))
    to_four = cut_at(runs / "ddp-2-muon", tmp_path / "four", 4)
    to_ddp, to_ep = (cut_at(runs / name, tmp_path / f"{name}-cut", 4) for name in ("ep-4-muon", "one-muon-8"))
    to_group, to_groups = (cut_at(runs / f"{name}-4-muon", tmp_path / name, 4) for name in ("groups", "ep"))
    old = cut_at(runs / "ddp-2-muon", tmp_path / "old", 4)
    values = json.loads((old / "config.json").read_text()) | {"parallel": "fsdp"}
    files.write_json(old / "config.json", {name: value for name, value in values.items() if name != "crc"})
    ranks(
        [
            [2, [f"--resume={old}"]],
            [4, [f"--resume={to_group}", "--ep-size=0"]],
            [4, [f"--resume={to_groups}", "--ep-size=2"], HOW["groups-4-muon"]],
            [2, [f"--resume={to_two}"]],
            [4, [f"--resume={to_four}"]],
            [2, [f"--resume={to_ddp}", "--parallel=ddp"]],
            [2, [f"--resume={to_ep}", "--parallel=ep"]],
        ]
    )
    main([f"--resume={to_one}"])
    five, eight = (to_two, to_one, to_four), (to_ddp, to_ep, to_group, to_groups)
    for run, one in [(run, "one-muon-5") for run in five] + [(run, "one-muon-8") for run in eight]:
        same_log(run, runs / one, rtol=3e-4)
        same_state(run, runs / one, bound=3e-3)
    same_log(old, runs / "ddp-2-muon", rtol=0)


def test_every_validation_window_counts_once(tmp_path):
    """Whatever the number of micro-batches and ranks, also where these do not divide the windows."""
    enc, jobs = tokenizer.word_tokenizer([]), []
    cases = {"7-20": 7, "3-20": 3, "19-1": 8, "19-3": 19}  # of so many windows, so many batches of 8 use
    for case in cases:
        with shards.ShardWriter(tmp_path / f"data-{case}", enc) as writer:
            for split, n in (("train", 40), ("val", int(case.split("-")[0]))):
                writer.add(split, [*np.random.default_rng(0).integers(0, 256, 16 * n), enc.eot_token])
        flags = [*SMALL, f"--data={tmp_path / f'data-{case}'}", f"--val-batches={case.split('-')[1]}"]
        flags += ["--steps=1", "--lr=0", "--sample-tokens=0"]
        for accum in (1, 2, 4):
            main([*flags, f"--grad-accum={accum}", f"--out-dir={tmp_path / f'{case}-1-{accum}'}"])
            engine = "--parallel=ep" if accum == 2 else "--parallel=ddp"
            jobs.append([2, [*flags, engine, f"--grad-accum={accum}", f"--out-dir={tmp_path / f'{case}-2-{accum}'}"]])
    ranks(jobs)
    for case, used in cases.items():
        model = checkpoint.load_model(tmp_path / f"{case}-1-1")
        loader = Loader([(tmp_path / f"data-{case}", 1.0)], "val", 1, 16)
        with torch.no_grad():
            losses = [model(*loader.next()).loss.item() for _ in range(used + 1)]
        for world, accum in product((1, 2), (1, 2, 4)):
            found = rows(tmp_path / f"{case}-{world}-{accum}")[-1]["val_loss"]
            assert found == pytest.approx(np.mean(losses[:used]), rel=2e-6), (case, world, accum)
        assert np.mean(losses) != pytest.approx(np.mean(losses[:used]), rel=1e-5)  # the check can fail


def test_no_thread_of_a_process_group_is_left(monkeypatch):
    """Whenever the functions are imported whose defaults are the present group."""
    monkeypatch.setattr(
        os, "environ", os.environ | dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    )
    before = len(gloo_threads())
    monkeypatch.delitem(sys.modules, "torch.distributed.nn.functional", raising=False)
    parallel.connect(torch.device("cpu"))
    torch.distributed.all_reduce(torch.ones(1))
    assert len(gloo_threads()) > before
    importlib.import_module("torch.distributed.nn.functional")
    parallel.disconnect()
    assert wait_for(lambda: len(gloo_threads()) == before)


def test_what_failed_does_not_hold_its_graph_while_the_group_ends(monkeypatch):
    """NCCL waits for the end of CUDA graphs with collectives. Here an object stands for the graph."""
    environment = os.environ | dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    monkeypatch.setattr(os, "environ", environment)
    graphs, alive, end = weakref.WeakSet(), [], torch.distributed.destroy_process_group
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: (alive.append(len(graphs)), end()))
    parallel.connect(torch.device("cpu"))

    def step():
        graph = torch.nn.Module()  # anything to which a weak reference can point
        graphs.add(graph)
        try:
            raise KeyError("the first fault")
        except KeyError:
            raise ValueError("the one that is reported") from None

    with pytest.raises(ValueError, match="reported"):
        try:
            step()
        finally:
            parallel.disconnect()
    assert alive == [0]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--parallel=ep --ep_size=3", "ep_size=3: use a divisor of the 4 ranks"),
        ("--parallel=ep --ep_size=1", "ep_size=1: use 0 for all ranks, or 2 or more with --parallel=ep"),
        ("--ep_size=2", "ep_size=2: use 0 for all ranks, or 2 or more with --parallel=ep"),
        ("--parallel=ep --ep_size=-2", "ep_size=-2: use 0 for all ranks, or 2 or more with --parallel=ep"),
        ("--parallel=ep --n_experts=6", "n_experts=6: 4 ranks divide the experts: use a multiple of 4, or --ep_size=2"),
        (
            "--parallel=ep --n_experts=3",
            "n_experts=3: 4 ranks divide the experts: use a multiple of 4, or --parallel=ddp",
        ),
    ],
)
def test_groups_that_do_not_come_out_even(flags, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(parse(TrainConfig, [*flags.split(), f"--out_dir={tmp_path / 'out'}"]), world=4)
    assert not list(tmp_path.iterdir())


HALF = ["--dtype=bfloat16", "--optimizer=adamw", "--grad-accum=1", "--n-experts=8", "--checkpoint-every=2", "--steps=6"]
WEIGHTS = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def halves(data_dir, tmp_path_factory):  # noqa: F811
    """Runs in bfloat16: of one process, whole ones of both engines, these cut and resumed; one with a rank that is
    killed in a checkpoint, before and after it is resumed, and what its ranks said."""
    base, jobs = tmp_path_factory.mktemp("halves"), []
    for weights in WEIGHTS:
        flags = [*SMALL, *HALF, f"--data={data_dir}", f"--weights={weights}"]
        main([*flags, f"--out-dir={base / weights}"])
        jobs += [[2, [*flags, f"--parallel={engine}", f"--out-dir={base / engine}-{weights}"]] for engine in ENGINES]
    killed = [*SMALL, *HALF, f"--data={data_dir}", "--parallel=ep", f"--out-dir={base / 'killed'}"]
    (base / "output").write_text(ranks([*jobs, [2, killed, {"die_at": 27}]], failing=1))
    shutil.copytree(base / "killed", base / "again")
    names = [f"{engine}-{weights}" for engine, weights in product(ENGINES, WEIGHTS)]
    resumed = [cut_at(base / name, base / f"resumed-{name}", 4) for name in names] + [base / "again"]
    ranks([[2, [f"--resume={run}"]] for run in resumed])
    return base


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bfloat16_engines_train_alike_and_resume(halves, weights):
    """As on GPUs: ranks hold bfloat16 copies and slices of float32 weights, or bfloat16 weights. Losses are those of
    one process to bfloat16's roundings; a checkpoint has the dtypes of one process, and going on changes no bit."""
    kinds = lambda run: {name: (t.shape, t.dtype) for name, t in checkpoint.read(run)["model"].items()}
    for engine in ENGINES:
        runs = halves / weights, halves / f"{engine}-{weights}"
        losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in runs]
        np.testing.assert_allclose(*losses, rtol=5e-3)
        assert kinds(runs[0]) == kinds(runs[1])
        resumed = halves / f"resumed-{engine}-{weights}"
        same_log(resumed, runs[1], rtol=0)
        same_state(resumed, runs[1], bound=0)


def test_a_rank_killed_in_a_checkpoint_leaves_the_one_before(halves):
    killed, again, whole = halves / "killed", halves / "again", halves / "ep-float32"
    assert "rank 0 lost its connection to another rank" in (halves / "output").read_text()
    assert [step for step, _ in checkpoint.find(killed)] == [2] and (killed / "ckpt.tmp").exists()
    same_log(again, whole, rtol=0)
    same_state(again, whole, bound=0)
    sizes = {path.stat().st_size for run in (again, whole) for _, path in checkpoint.find(run)}
    assert max(sizes) - min(sizes) < 4096, sizes  # the paths in them differ


NEARBY = "--parallel=ep --grad-accum=2 --n-layers=1 --d-expert=16 --batch-size=8 --seq-len=4 --steps=2 --log-every=1"


def test_kernels_carry_tokens_as_the_exact_exchange_does(data_dir, tmp_path):  # noqa: F811
    """Ranks whose memories are shared files. With little room steps are repeated exactly, and no token is lost, also
    where only one of two groups gets too many."""
    flags = [*SMALL, *NEARBY.split(), f"--data={data_dir}", "--val-batches=0", "--sample-tokens=0"]
    jobs = {"exact": (2, 0, {}), "wide": (2, 0, {"room": 2}), "tight": (2, 0, {"room": 1.02})}
    jobs["groups"] = 4, 2, {"room": 1.2}
    said = ranks(
        [
            [n, [*flags, f"--ep-size={size}", f"--out-dir={tmp_path / name}"], how]
            for name, (n, size, how) in jobs.items()
        ]
    )
    for name in ("wide", "tight", "groups"):
        same_log(tmp_path / name, tmp_path / "exact", rtol=2e-5)
        same_state(tmp_path / name, tmp_path / "exact", bound=1e-4)
    repeated = {name: sum(row.get("repeated_steps", 0) for row in rows(tmp_path / name)) for name in jobs}
    assert repeated["exact"] == repeated["wide"] == 0 and 1 <= repeated["tight"] <= 2 and 1 <= repeated["groups"] <= 2
    assert "| repeated 1 |" in said


def test_a_bad_step_stops_all_ranks_with_a_dump_of_each(runs):
    said = (runs / "output").read_text()
    for engine, rank in product(ENGINES, (0, 1)):
        path = runs / f"bad-{engine}" / f"bad-step-00000001-rank{rank}.json"
        assert f"above the limit max_loss=1 (layers and batch: {path})" in said, said
        dump = json.loads(path.read_text())
        assert len(dump["tokens"]) == 2 and {"layer 1", "blocks.1.mlp.w_out"} <= {row["name"] for row in dump["seen"]}
        assert not checkpoint.find(path.parent)


def test_the_closing_report_is_about_the_last_weights(data_dir, tmp_path):  # noqa: F811
    """Without validation, nothing else asks the other ranks for what the last step has changed."""
    flags = [*SMALL, f"--data={data_dir}", "--val-batches=0", "--steps=3", "--lr=0.3", "--sample-tokens=12"]
    ranks([[2, [*flags, f"--out-dir={tmp_path / 'run'}"]]])
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert main([f"--resume={tmp_path / 'run'}"])["samples"] == written["samples"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_give_the_same_bits_twice(engine, data_dir, tmp_path):  # noqa: F811
    """Started by torchrun, with sequences that are long enough for attention to add in any order."""
    flags = [*SMALL, f"--data={data_dir}", f"--parallel={engine}", "--deterministic", "--seq-len=512", "--head-dim=64"]
    flags += ["--device=cuda", "--dtype=bfloat16", "--val-batches=0"]
    for name in ("a", "b"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        subprocess.run(
            [*command, "train.py", *flags, f"--out-dir={tmp_path / name}"], cwd=ROOT, check=True, timeout=300
        )
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 3
    assert differences(checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "b")) == []


@pytest.mark.parametrize("kind, bound", [("adamw", 0.30), ("muon", 0.36)])
def test_a_rank_holds_its_share_of_the_states(kind, bound, monkeypatch):
    """A quarter of them on one of four ranks, but for Muon's 2-D matrices."""
    monkeypatch.setattr("optimoe.parallel.SLICED_FROM", 4096)
    cfg = TrainConfig(vocab_size=64, n_experts=8, optimizer=kind)
    sizes = []
    for world in (1, 4):
        model = GPT(cfg)
        optimizer = Sharded(model, cfg, world - 1, world)
        for p in [*model.parameters(), *optimizer.full]:
            p.grad = torch.zeros_like(p)
        for part in optimizer.parts:
            part.updated = None  # there is nobody to gather from
            part.step()
        sizes.append(
            sum(t.numel() for part in optimizer.parts for values in part.state.values() for t in values.values())
        )
    assert sizes[1] < bound * sizes[0], sizes
