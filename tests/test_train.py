"""Training runs: what they compute, log and refuse, signals, traces. CPU, gloo.

Run: python -m pytest tests/test_train.py"""

import fcntl
import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

import train as train_file
from data import procedural, shards, tokenizer
from data.loader import parse_sources
from model import GPT
from optimoe import checkpoint, config
from tests.trainrun import SMALL, cut_at, differences, final_state, launch, rows, run, snapshot
from train import main


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Words in a random but skewed order: something to learn in a few steps."""
    path = tmp_path_factory.mktemp("data") / "words"
    words = [f" {a}{b}" for a in "abcde" for b in "klmnop"]
    enc = tokenizer.word_tokenizer(words)
    rng = np.random.default_rng(0)
    with shards.ShardWriter(path, enc) as writer:
        for split, documents in (("train", 60), ("val", 12)):
            for _ in range(documents):
                text = "".join(words[int(30 * u**3)] for u in rng.random(25))
                writer.add(split, enc.encode_ordinary(text) + [enc.eot_token])
    return path


@pytest.fixture(scope="module")
def whole_run(data_dir, tmp_path_factory):
    """8 steps without a break, with accumulation and loss-free balancing (state outside the parameters)."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    results = run(data_dir, out, "--grad-accum=2", "--router-bias-rate=1e-2")
    return out, results


def test_learns_and_reports(whole_run):
    out, results = whole_run
    log = rows(out)
    train_rows, val_rows = [r for r in log if "loss" in r], [r for r in log if "val_loss" in r]
    assert [r["step"] for r in train_rows] == [3, 6, 8] and [r["step"] for r in val_rows] == [4, 8]
    assert train_rows[-1]["loss"] < train_rows[0]["loss"] - 0.3 and val_rows[1]["val_loss"] < val_rows[0]["val_loss"]
    for r in train_rows:  # 4 experts, k = 2: the load is at most 2
        assert len(r["load_max"]) == 2 and 1 <= max(r["load_max"]) <= 2.0 and 0.9 < r["balance"] < 1.5
    assert train_rows[-1]["tokens"] == 8 * 8 * 16
    splits = shards.read_meta(json.loads((out / "config.json").read_text())["data"])["splits"]
    windows = (splits["train"]["tokens"] - 1) // 16
    assert results["epochs"] == pytest.approx(8 * 8 / windows)
    meta = splits["val"]
    expected = results["val_loss"] / np.log(2) * meta["tokens"] / meta["bytes"]
    assert results["val_bits_per_byte"] == pytest.approx(expected)
    assert json.loads((out / "results.json").read_text())["val_loss"] == results["val_loss"]
    assert len(results["samples"]) == 2
    assert [step for step, _ in checkpoint.find(out)] == [4, 8]


def test_accumulation_equals_a_bigger_batch(data_dir, tmp_path):
    """The same tokens in one, two and four micro-batches; without the balance loss, which is that of a micro-batch."""
    losses = []
    for accum in (1, 2, 4):
        flags = ["--balance-coef=0", "--val-batches=1", "--val-every=0"]
        run(data_dir, tmp_path / str(accum), f"--grad-accum={accum}", *flags)
        losses.append([r["loss"] for r in rows(tmp_path / str(accum)) if "loss" in r])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
    run(data_dir, tmp_path / "half", "--batch-size=4", "--balance-coef=0", "--val-every=0")  # the check can fail
    assert abs(rows(tmp_path / "half")[-2]["loss"] - losses[0][-1]) > 1e-3


@pytest.mark.parametrize("accum", [1, 4])
def test_gradients_have_the_scale_of_the_loss(data_dir, tmp_path, accum):
    """Adam and Muon hide it; the norm that is logged and clipped does not. Of the first step, by hand."""
    flags = ["--steps=1", "--log-every=1", f"--grad-accum={accum}", "--balance-coef=0.3", "--z-coef=0.2"]
    run(data_dir, tmp_path / "out", *flags)
    cfg = config.parse(train_file.TrainConfig, [f"--config={tmp_path}/out/config.json"])
    torch.manual_seed(cfg.seed)
    model, loader = GPT(cfg), train_file.Loader([(data_dir, 1.0)], "train", 8 // accum, 16)
    for _ in range(accum):
        out = model(*loader.next())
        ((out.loss + 0.3 * out.balance + 0.2 * out.z) / accum).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert rows(tmp_path / "out")[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flags", [["--optimizer=adamw"], ["--optimizer=muon"], ["--optimizer=adamw", "--weights=bfloat16"]]
)
def test_on_a_gpu(data_dir, tmp_path, flags):
    """Resume is exact with --deterministic; compiled blocks train as eager ones do."""
    flags = ["--device=cuda", "--deterministic", *flags, "--d-model=64", "--head-dim=32", "--steps=8"]
    try:
        run(data_dir, tmp_path / "whole", *flags)
        cut = cut_at(tmp_path / "whole", tmp_path / "cut", 4)
        main([f"--resume={cut}"])
        assert rows(cut) == rows(tmp_path / "whole")
        assert differences(final_state(cut), final_state(tmp_path / "whole")) == []
        run(data_dir, tmp_path / "eager", *flags, "--compile=false")
        for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "whole"), strict=True):
            np.testing.assert_allclose(a.get("loss", 0), b.get("loss", 0), rtol=2e-2)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("flags", ["--compile=false", "--compile=true", "--impl=grouped_mm", "--document-mask"])
def test_attention_to_many_keys_has_the_same_bits(data_dir, tmp_path, flags, device):
    """The backward passes of attention add the parts of long sequences in any order unless they are told not to."""
    if device == "cpu" and flags in ("--compile=true", "--impl=grouped_mm"):
        pytest.skip("the same as --compile=false on a CPU")
    flags = [flags, f"--device={device}", "--deterministic", "--seq-len=512", "--head-dim=64", "--val-batches=0"]
    try:
        for name in ("a", "b"):
            run(data_dir, tmp_path / name, *flags)
        assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 3
        assert differences(final_state(tmp_path / "a"), final_state(tmp_path / "b")) == []
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_recomputation_trains_alike(data_dir, tmp_path, compiled):
    """Bit for bit in eager blocks; on a GPU also inside the CUDA graph of a step, and in compiled blocks nearly."""
    flags = ["--steps=8", "--dtype=float32", f"--compile={compiled}", "--val-every=0"]
    if torch.cuda.is_available():
        flags += ["--device=cuda", "--deterministic"]
    elif compiled == "true":
        pytest.skip("blocks are compiled on a GPU only")
    try:
        for choice in ("none", "experts", "blocks"):
            run(data_dir, tmp_path / choice, *flags, f"--recompute={choice}")
            for a, b in zip(rows(tmp_path / choice), rows(tmp_path / "none"), strict=True):
                if compiled == "false":
                    assert a == b
                elif "loss" in a:
                    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        main([f"--resume={tmp_path / 'none'}", "--steps=9", "--recompute=blocks"])  # another choice is no other model
    finally:
        torch.use_deterministic_algorithms(False)


def test_dealt_out_experts_are_not_computed_twice():
    for choice in ("experts", "blocks"):
        cfg = train_file.TrainConfig(recompute=choice, parallel="ep")
        train_file.check_start(cfg, 1)
        with pytest.raises(ValueError, match=f"recompute='{choice}': not with parallel=ep; use --par"):
            train_file.check_start(cfg, 2)


def test_sigterm_saves_and_a_resumed_run_equals_an_unbroken_one(data_dir, tmp_path):
    flags = "--steps=1000000 --log-every=1 --checkpoint-every=0 --val-every=0"
    flags += " --schedule=wsd --decay-frac=0"  # a rate that does not depend on the number of steps
    flags = [*SMALL, f"--data={data_dir}", *flags.split()]
    process = launch(*flags, f"--out-dir={tmp_path / 'stopped'}", ranks=1)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait(timeout=300) == 0 and "continue with" in output, output
    ((step, _),) = checkpoint.find(tmp_path / "stopped")
    assert 1 <= step < 1000000
    assert rows(tmp_path / "stopped")[-1]["step"] == step
    main([f"--resume={tmp_path / 'stopped'}", f"--steps={step + 5}"])
    main([*flags, f"--out-dir={tmp_path / 'unbroken'}", f"--steps={step + 5}"])
    stopped, unbroken = rows(tmp_path / "stopped"), rows(tmp_path / "unbroken")
    assert [(r["step"], r.keys()) for r in stopped] == [(r["step"], r.keys()) for r in unbroken]
    for name in ("loss", "val_loss"):  # not the bits: the two processes may have other numbers of threads
        np.testing.assert_allclose([r.get(name, 0) for r in stopped], [r.get(name, 0) for r in unbroken], rtol=1e-4)


def test_validation_is_pure_and_changes_nothing(data_dir, tmp_path):
    run(data_dir, tmp_path / "often", "--val-every=1")
    run(data_dir, tmp_path / "never", "--val-every=0")
    found = differences(final_state(tmp_path / "often"), final_state(tmp_path / "never"))
    assert set(found) <= {"/config/val_every", "/logged"}
    # Cross-entropy of the validation windows by hand, on a checkpoint that was loaded for evaluation.
    model = checkpoint.load_model(tmp_path / "never")
    ids = np.concatenate(shards.open_shards(data_dir, "val")).astype(np.int64)
    loader = train_file.Loader([(data_dir, 1.0)], "val", 8, 16)
    with torch.no_grad():
        expected = np.mean([model(*loader.next()).loss.item() for _ in range(2)])
    assert len(ids) > 2 * 8 * 16
    assert rows(tmp_path / "never")[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_sources(tmp_path):
    (tmp_path / "a:2").mkdir()
    assert parse_sources(f"{tmp_path}/a:2") == [(f"{tmp_path}/a:2", 1.0)]
    assert parse_sources("a/b") == [("a/b", 1.0)] and parse_sources("a:0.7,b:3") == [("a", 0.7), ("b", 3.0)]
    with pytest.raises(ValueError, match="data='a:x': could not convert.*'x'"):
        parse_sources("a:x")
    for weight in ("-1", "0", "nan", "inf"):
        with pytest.raises(ValueError, match=f"data='a:1,b:{weight}': each needs a directory and a finite weight"):
            parse_sources(f"a:1,b:{weight}")


def test_mixture_of_two_directories(data_dir, tmp_path):
    results = run(f"{data_dir}:3,{data_dir}:1", tmp_path / "mix", "--steps=2")
    assert results["val_bits_per_byte"] > 0
    assert final_state(tmp_path / "mix")["loader"]["drawn"] == [12, 4]


MISTAKES = {
    "--data=/nonexistent": "/nonexistent/meta.json does not exist",
    "--vocab-size=100": "vocab_size=100: the tokenizer of .* has 287 tokens",
    "--stpes=3": "did you mean 'steps'",
    "--top-k=5": "top_k=5: use 4 or less",
    "--d-model=40": "d_model=40: use a multiple of 16",
    "--batch-size=9 --grad-accum=2": "batch_size=9: use a multiple of grad_accum=2",
    "--seq-len=100000": "seq_len=100000: a window needs 100001 tokens",
    "--resume=": "resume='': it is empty",
    "--resume=/nonexistent": "resume='/nonexistent': not a run directory",
    "--beta2=1": "beta2=1.0: use a number from 0 to below 1",
    "--muon-momentum=1": "muon_momentum=1.0: use a number from 0 to below 1",
    "--seed=-1": "seed=-1: use 0 or more",
    "--trace=.": "trace='.': this is a directory; name a file in it",
    "--trace=/proc/x/t.json": "trace='/proc/x/t.json': nothing can be written",
    "--trace=t.json --steps=7": "trace='t.json': it shows steps 6 to 8, and this run has 7",
    f"--seed={2**63}": "seed=9223372036854775808: use 9,223,372,036,854,775,807 or less",
    "--out-dir=/proc/x": "out_dir='/proc/x': nothing can be written",
    "--weights=bfloat16": "weights='bfloat16': only AdamW rounds stochastically: add --optimizer=adamw",
    "--weights=bfloat16 --optimizer=adamw --batch-size=128 --grad-accum=128": "grad_accum=128: .* use 64 or less",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_bad_flags(data_dir, tmp_path, flags):
    before = snapshot(data_dir)
    with pytest.raises((ValueError, FileNotFoundError), match=MISTAKES[flags]):
        run(data_dir, tmp_path / "out", *flags.split())
    assert snapshot(data_dir) == before and not list(tmp_path.iterdir())


def test_kernels_that_cannot_run_are_refused_before_any_data_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA GPU.*leave --impl=auto"):
        main([*SMALL, "--impl=triton", f"--out-dir={tmp_path / 'out'}"])
    assert snapshot(tmp_path) == {}


def test_the_largest_seed_trains_to_the_end(data_dir, tmp_path):
    assert run(data_dir, tmp_path / "out", f"--seed={2**63 - 1}", "--steps=1")["samples"]


def test_a_run_that_ends_within_its_warm_up_says_so(data_dir, tmp_path, capsys):
    for steps, said in ((2, True), (3, False)):
        run(data_dir, tmp_path / str(steps), f"--steps={steps}")
        line = f"steps={steps} ends within the warm-up, before lr=0.01 is reached; lower warmup_steps=3"
        assert (line in capsys.readouterr().out) == said
    run(data_dir, tmp_path / "1", "--steps=1")
    out = capsys.readouterr().out
    assert "1 step of 128 tokens" in out and "each step reads" not in out
    run(data_dir, tmp_path / "wide", "--batch-size=400", "--steps=1")
    assert re.search(r"batch_size=400: each step reads the data [34]\.\d times", capsys.readouterr().out)


def test_an_interrupt_before_the_first_step_ends_with_a_message(data_dir, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    flags = [*SMALL, f"--out-dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    monkeypatch.delenv("DEBUG", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(procedural, "build", interrupted)
        with pytest.raises(SystemExit, match="stopped; .* the same command starts again"):
            main()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--data={data_dir}", "--steps=1"])
    main()  # the remedy


def test_damaged_data_is_never_trained_on(data_dir, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(data_dir, bad)
    shard = bad / "train-00000.bin"
    whole = shard.read_bytes()
    for content, message in ((whole[:-2], "bytes instead of"), (whole[:50] + b"\x07" + whole[51:], "corrupt")):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=f"train-00000.bin.*{message}"):
            run(bad, tmp_path / "out")
        assert shard.read_bytes() == content
    shard.unlink()
    with pytest.raises(ValueError, match="train-00000.bin is missing"):
        run(bad, tmp_path / "out")


def test_one_run_per_directory(whole_run, data_dir, tmp_path):
    out = whole_run[0]
    before = snapshot(out)
    with pytest.raises(ValueError, match="it already holds a run; continue it with --resume"):
        run(data_dir, out)
    with open(out / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is training there"):
            main([f"--resume={out}"])
    assert snapshot(out) == before


def test_command_line_reports_mistakes_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data=/nonexistent", f"--out-dir={tmp_path / 'x'}"])
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit, match="error: /nonexistent/meta.json does not exist"):
        main()


def test_a_trace_shows_three_steps_and_changes_nothing(whole_run, data_dir, tmp_path):
    """Nor does a run that goes on write one again, which config.json does not ask for."""
    path = tmp_path / "new" / "trace.json"
    run(data_dir, tmp_path / "out", "--grad-accum=2", "--router-bias-rate=1e-2", f"--trace={path}")
    assert rows(tmp_path / "out") == rows(whole_run[0])
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert {name for name in names if name.startswith("ProfilerStep")} == {f"ProfilerStep#{i}" for i in (5, 6, 7)}
    path.unlink()
    main([f"--resume={tmp_path / 'out'}", "--steps=16"])
    assert not path.exists() and rows(tmp_path / "out")[-1]["step"] == 16
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "trace" not in kept and "resume" not in kept
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            train_file, "lr_at", lambda step, cfg: 1e-2 if step < 6 else (_ for _ in ()).throw(KeyboardInterrupt)
        )
        run(data_dir, tmp_path / "ended", f"--trace={path}")
    assert path.exists()  # the profiler was stopped: else the process would end with a segmentation fault
    path.unlink()
    old = tmp_path / "old"  # a run of a version that kept it
    shutil.copytree(tmp_path / "out", old)
    (old / "config.json").write_text(json.dumps({k: v for k, v in kept.items() if k != "crc"} | {"trace": str(path)}))
    main([f"--resume={old}", "--steps=24"])
    assert not path.exists()
