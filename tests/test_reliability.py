"""Runs that are killed, run out of disk, meet NaN or lose a rank. CPU, gloo.

Run: python -m pytest tests/test_reliability.py"""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

import train as train_file
from data import shards
from model import GPT
from optimoe import checkpoint, config, guard
from tests.test_train import data_dir  # noqa: F401  a fixture
from tests.trainrun import ROOT, SMALL, differences, launch, rows, run, snapshot
from train import main


def test_sigkill_at_any_moment_changes_no_bit(data_dir, tmp_path):  # noqa: F811
    """Twenty kills, half of them while a checkpoint is being written."""
    flags = [
        *SMALL,
        f"--data={data_dir}",
        "--steps=40",
        "--checkpoint-every=1",
        "--log-every=1",
        "--val-every=10",
        "--keep-checkpoints=2",
        "--optimizer=muon",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.killrun", "20", *flags, f"--out-dir={tmp_path / 'killed'}"],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] >= 20 and seen["in_write"] >= 8 and seen["torn"] >= 8 and len(set(seen["steps"])) >= 5, seen
    main([*flags, f"--out-dir={tmp_path / 'whole'}"])
    assert differences(checkpoint.read(tmp_path / "killed"), checkpoint.read(tmp_path / "whole")) == []
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.parametrize("kind", ["full disk", "size limit"])
def test_full_disk_keeps_the_previous_checkpoint(data_dir, tmp_path, kind):  # noqa: F811
    """/dev/full refuses every write; a limit on file sizes refuses the second part of the file."""
    out = tmp_path / "out"
    run(data_dir, out, "--steps=4")
    before = snapshot(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if kind == "full disk":
            (out / "ckpt.tmp").symlink_to("/dev/full")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        with pytest.raises(OSError) as raised:
            main([f"--resume={out}", "--steps=8"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ((_, path),) = checkpoint.find(out)
    said = str(raised.value)
    assert (
        said.startswith("the checkpoint of step 8 could not be written")
        and f"{path} is whole: free some space, then --resume={out}" in said
    )
    assert not (out / "ckpt.tmp").exists() and snapshot(out)[path.relative_to(out)] == before[path.relative_to(out)]
    main([f"--resume={out}", "--steps=8"])  # the remedy
    main([*SMALL, f"--data={data_dir}", f"--out-dir={tmp_path / 'whole'}", "--steps=8", "--checkpoint-every=0"])
    assert [step for step, _ in checkpoint.find(out)] == [4, 8]


def poisoned(monkeypatch, bad_batches, layer=1):
    """Make the forward pass of these batches (counted from 1, in training mode) not finite from a layer on."""
    forward, seen = GPT.forward, {"batches": 0}

    def poisoned_forward(self, tokens_BL, *args, **kwargs):
        if not self.training:
            return forward(self, tokens_BL, *args, **kwargs)
        key = tokens_BL.sum().item()
        seen["batches"] += 1
        if seen["batches"] in bad_batches:
            seen.setdefault("keys", set()).add(key)
        hit = key in seen.get("keys", ())
        hook = self.blocks[layer].attn_norm.register_forward_hook(lambda m, i, o: o * float("nan")) if hit else None
        try:
            return forward(self, tokens_BL, *args, **kwargs)
        finally:
            if hook:
                hook.remove()

    monkeypatch.setattr(GPT, "forward", poisoned_forward)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flags", [["--optimizer=adamw"], ["--optimizer=muon"], ["--optimizer=adamw", "--weights=bfloat16"]]
)
def test_bad_steps_inside_a_cuda_graph(data_dir, tmp_path, flags):  # noqa: F811
    """Every loss is too high: no step of the graph, recorded or replayed, changes a weight; the first is named."""
    flags = ["--device=cuda", "--val-every=0", "--steps=12", "--log-every=12", *flags]
    for bad_steps in ("stop", "skip"):
        saved = []
        with pytest.MonkeyPatch.context() as patch:

            def dump(path, model, *rest, saved=saved):
                saved.extend(p.detach().cpu() for p in model.parameters())
                return 9.9, "a layer"

            patch.setattr(guard, "dump", dump)
            with pytest.raises(ValueError, match="at step 1: the loss is 9.9, a layer"):
                run(
                    data_dir,
                    tmp_path / bad_steps,
                    *flags,
                    "--max-loss=1e-6",
                    f"--bad-steps={bad_steps}",
                    "--checkpoint-every=0",
                )
        torch.manual_seed(0)
        cfg = config.parse(train_file.TrainConfig, [f"--config={tmp_path / bad_steps}/config.json"])
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(saved, GPT(cfg).parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nan_stops_with_step_batch_and_layer(data_dir, tmp_path, monkeypatch, optimizer):  # noqa: F811
    """Step 5 is bad and the line of step 6 finds it: the weights are those of step 4, the dump repeats that batch."""
    flags = ["--log-every=3", "--checkpoint-every=2", f"--optimizer={optimizer}", "--val-every=0"]
    batches = []
    step = train_file.optimizer_step
    monkeypatch.setattr(
        train_file, "optimizer_step", lambda *a, **k: (batches.append(a[4][0][0].tolist()), step(*a, **k))[1]
    )
    poisoned(monkeypatch, {5})
    with pytest.raises(
        ValueError,
        match="at step 5: the loss is nan, the output of layer 1 is the first .*bad-step-00000005-rank0.json",
    ):
        run(data_dir, tmp_path / "out", *flags)
    dump = json.loads((tmp_path / "out" / "bad-step-00000005-rank0.json").read_text())
    assert dump["step"] == 5 and dump["tokens"] == [batches[4]] and dump["loss"] == ["nan"]
    finite = {(row["what"].split()[0:2][-1], row["name"]): row["finite"] for row in dump["seen"]}
    assert all(ok for (what, _), ok in finite.items() if what == "was")  # the weights
    assert finite["output", "layer 0"] and not finite["output", "layer 1"]
    assert [s for s, _ in checkpoint.find(tmp_path / "out")] == [2, 4]


def test_nan_is_skipped_by_option(data_dir, tmp_path, monkeypatch):  # noqa: F811
    """The skipped step changes neither weights nor optimiser, and the averages leave it out."""
    flags = ["--val-every=0", "--bad-steps=skip", "--router-bias-rate=1e-2"]
    with monkeypatch.context() as patch:
        poisoned(patch, {5})
        run(data_dir, tmp_path / "out", *flags)
    log = [r for r in rows(tmp_path / "out") if "loss" in r]
    assert [r.get("skipped_steps", 0) for r in log] == [0, 1, 0] and "NaN" not in (
        tmp_path / "out" / "metrics.jsonl"
    ).read_text()
    state = checkpoint.read(tmp_path / "out")
    assert float(state["optimizer"][0]["state"][0]["step"]) == 7 and state["step"] == 8
    run(data_dir, tmp_path / "good", *flags)
    assert differences(state, checkpoint.read(tmp_path / "good"))
    with monkeypatch.context() as patch:
        poisoned(patch, set(range(4, 20)))
        with pytest.raises(ValueError, match="at step 4: the loss is nan"):  # skipping everything is not training
            run(data_dir, tmp_path / "all", *flags, "--steps=20")


def test_a_step_skipped_just_before_a_checkpoint_stops_nothing(data_dir, tmp_path, monkeypatch):  # noqa: F811
    """Step 4 is the first after a line, and saved: all steps since were bad, but the next line is not due. Nor does a
    run stop for it that is resumed with --bad-steps=stop."""
    flags = ["--val-every=0", "--bad-steps=skip"]
    with monkeypatch.context() as patch:
        poisoned(patch, {4})
        run(data_dir, tmp_path / "out", *flags)
    assert [r.get("skipped_steps", 0) for r in rows(tmp_path / "out") if "loss" in r] == [0, 1, 0]
    checkpoint.find(tmp_path / "out")[-1][1].unlink()
    window = checkpoint.read(tmp_path / "out")["window"]
    assert window["steps"].tolist() == [1, 1] and window["skipped_in_a_row"] == 1
    main([f"--resume={tmp_path / 'out'}", "--bad-steps=stop"])
    assert [r["step"] for r in rows(tmp_path / "out") if "loss" in r] == [3, 6, 8]


def test_exploded_loss_and_gradient_are_bad(data_dir, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    found = r"at step 1: the loss is 5\.\d+, above the limit max_loss=3 "
    advice = (
        rf"use a higher max_loss or a lower lr: --resume={out} (--max_loss=[78]\.\d) or --lr=0.005 starts again, as "
    )
    with pytest.raises(ValueError, match=f"{found}.*{advice}") as raised:
        run(data_dir, out, "--max-loss=3")
    with pytest.raises(ValueError, match=f"{found}.*: use a higher max_loss: --resume={out} --max_loss=[78]"):
        main([f"--resume={out}", "--lr=0"])
    main([f"--resume={out}", "--lr=1e-3", re.search(advice, str(raised.value))[1]])  # the remedy
    (_, newest) = checkpoint.find(out)[-1]
    assert guard.remedy(out, 1e-3).endswith(f"--resume={out} --lr=0.0005 goes on from {newest.name}")
    assert "--lr=0.01 " in guard.remedy(out, 1e30)  # half of that would be no advice
    assert "--lr=" not in guard.remedy(out, 0.0) + guard.remedy(out, 5e-324) + guard.remedy(out, 0.0, 5.0)
    assert "max_loss" not in guard.remedy(out, 1e-3)
    cfg = train_file.TrainConfig(vocab_size=64)
    for loss, norm, bad in (
        (2.0, 1.0, 0),
        (7.0, 1.0, 0),
        (8.0, 1.0, 1),
        (2.0, float("inf"), 1),
        (2.0, float("nan"), 1),
        (float("nan"), 1.0, 1),
    ):
        window = train_file.new_window(cfg, "cpu")
        assert float(guard.judge(window, torch.tensor(loss), torch.tensor(norm), cfg)) == bad, (loss, norm)
        assert window["steps"].tolist() == [1, bad] and window["skipped_in_a_row"] == bad


def test_killed_before_its_first_checkpoint_a_run_starts_again(data_dir, tmp_path):  # noqa: F811
    flags = ["--steps=4", "--checkpoint-every=0"]
    run(data_dir, tmp_path / "whole", *flags)
    run(data_dir, tmp_path / "out", *flags)
    for _, path in checkpoint.find(tmp_path / "out"):
        path.unlink()
    main([f"--resume={tmp_path / 'out'}"])
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_a_rank_that_dies_ends_the_others(data_dir, tmp_path):  # noqa: F811
    flags = [*SMALL, f"--data={data_dir}", "--steps=100000", "--log-every=20", "--checkpoint-every=0", "--val-every=0"]
    process = launch(*flags, f"--out-dir={tmp_path / 'out'}")
    for line in process.stdout:
        if line.startswith("step"):
            break
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)  # and not the half hour that ranks wait for one another
    assert process.returncode != 0
    assert "lost its connection to another rank" in output and "Signal 9 (SIGKILL)" in output, output[-3000:]
    for pid in children:
        assert not os.path.exists(f"/proc/{pid}")


def test_flipped_bits_in_a_shard(data_dir, tmp_path):  # noqa: F811
    """Anywhere in the file, a few at a time: found before the first step."""
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(data_dir, bad)
    shard = bad / "val-00000.bin"
    content = shard.read_bytes()
    for at in (len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(ValueError, match="val-00000.bin.*corrupt"):
            run(bad, tmp_path / "out")
    shard.write_bytes(content)
    assert shards.open_shards(bad, "val")
