"""What train.py and grpo.py share: refused starts, config.json, the log, counts. CPU.

Run: python -m pytest tests/test_run.py"""
# ruff: noqa: F811  three fixtures are imported

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
import train
from data import files, procedural, shards
from data.facts import FactsConfig
from data.procedural import MixtureConfig
from data.reasoning import ReasoningConfig
from eval import report
from optimoe import checkpoint, config, guard, run
from tests.test_grpo import SHORT, start  # noqa: F401
from tests.test_train import data_dir, whole_run  # noqa: F401
from tests.trainrun import SMALL, cut_at, differences, rows, snapshot
from tests.trainrun import run as train_run
from train import TrainConfig, main


def without_crc(path, **changes):
    """Rewrites a config.json as an earlier version, which signed nothing, would have written it."""
    path.write_text(json.dumps(files.read_json(path) | changes))


def resave(out, change, part="config"):
    """Rewrites the newest checkpoint of a run with another state."""
    step, path = checkpoint.find(out)[-1]
    state = torch.load(path, weights_only=True)
    change(state)
    path.unlink()
    return checkpoint.save(out, step, state, keep=9)


# ---- starts that are refused


HUGE = [
    "--d-model=1600000000",
    "--d-expert=1600000000",
    "--n-layers=1000000000",
    "--n-heads=1000000000",
    "--head-dim=1000000000",
    "--n-experts=1024 --d-expert=16000000",
    "--n-shared-experts=1000000000",
    "--vocab-size=100000000000",
    "--batch-size=1000000000000",
    "--dense --d-expert=16000000000",
]


@pytest.mark.parametrize("flags", HUGE)
def test_sizes_that_cannot_be_allocated(data_dir, tmp_path, flags):
    too_much = r"parameters and .* need .* GiB of memory or more, and there are .*: use a small"
    too_much += r"|[a-z_]+=[0-9]+: use 1,073,741,824 or less"
    with pytest.raises(ValueError, match=too_much):
        train_run(data_dir, tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["steps", "log_every", "warmup_steps", "keep_checkpoints", "val_batches"])
def test_numbers_beyond_64_bits(name):
    with pytest.raises(ValueError, match=f"{name}=1000.*: use 9,223,372,.* or less"):
        TrainConfig(**{name: 10**400})
    with pytest.raises(ValueError, match="questions=1000.*: use 9,223,372,.* or less"):
        grpo.GRPOConfig(model="x", questions=10**400)


@pytest.mark.parametrize(
    "flags", ["--questions=1000000000000", "--batch-prompts=1024000000000", "--group-size=1000000000"]
)
def test_answers_that_cannot_be_held(start, tmp_path, flags):
    with pytest.raises(ValueError, match="questions and .* answers a step need .* GiB of memory or more"):
        grpo.main([*SHORT, f"--model={start}", f"--out-dir={tmp_path / 'out'}", flags])
    assert not (tmp_path / "out").exists()


def test_no_memory_is_one_line():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        line = run.explain(error, 0, 1)
        assert line.startswith("error: out of memory (") and "\n" not in line
    assert run.explain(KeyError("x"), 0, 1) is None and run.explain(RuntimeError("shape mismatch"), 0, 1) is None


SMALL_MIXTURE = MixtureConfig(
    FactsConfig(n_people=4), ReasoningConfig(max_steps=2, modulus=7, names=10), exposures=2, n_problems=20, n_mano=20
)


def test_a_refused_start_removes_only_what_it_made(tmp_path, monkeypatch):
    """Whatever refuses it: a checkpoint to start from, a size."""
    build = procedural.build
    monkeypatch.setattr(procedural, "build", lambda directory, seed: build(directory, SMALL_MIXTURE))
    for flags in (["--upcycle-from=/nonexistent"], ["--vocab-size=9"]):
        with pytest.raises((ValueError, FileNotFoundError)):
            main([*SMALL, "--n-layers=1", *flags, f"--out-dir={tmp_path / 'new/run'}"])
        assert not (tmp_path / "new").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("not ours")
    with pytest.raises(ValueError, match="vocab_size"):
        main([*SMALL, "--vocab-size=9", f"--out-dir={mine}"])
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("length, n_samples", [(1, None), (2, 2)])
def test_windows_too_short_for_samples(data_dir, tmp_path, length, n_samples):
    found = train_run(data_dir, tmp_path / "out", f"--seq-len={length}", "--steps=1").get("samples")
    assert (found and len(found)) == n_samples


# ---- config.json


def test_damage_to_config_json_is_found(whole_run, tmp_path):
    """Any digit, letter or name that changes is refused with the name of the file, and nothing is changed."""
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    path = cut / "config.json"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in (*rng.integers(0, len(content), 40).tolist(), content.index(b'"lr"') + 8, content.index(b'"crc"') + 2):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        before = snapshot(cut)
        if json_equal(path.read_bytes(), content):
            continue  # white space
        with pytest.raises(ValueError, match="cut/config.json"):
            main([f"--resume={cut}"])
        assert snapshot(cut) == before


def json_equal(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize(
    "name, value", [("lr", 2e-2), ("beta2", 0.5), ("eps", 1e-7), ("weight_decay", 0.2), ("z_coef", 0.1), ("steps", 9)]
)
def test_a_config_that_is_not_the_checkpoints_is_refused_by_name(whole_run, tmp_path, name, value):
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    without_crc(cut / "config.json", **{name: value})
    true = checkpoint.read(cut)["config"][name]
    with pytest.raises(
        ValueError, match=rf"{name}={value}: this is from .*cut/config.json, but ckpt-.* with {true}.*--{name}="
    ):
        main([f"--resume={cut}"])
    main([f"--resume={cut}", f"--{name.replace('_', '-')}={true}"])  # the remedy
    assert rows(cut) == rows(whole_run[0])


def test_flags_are_judged_with_the_values_of_the_run(data_dir, tmp_path):
    """Four ranks times two micro-batches is no multiple of the default batch, but of this run's."""
    train_run(data_dir, tmp_path / "out", "--batch-size=48", "--steps=1")
    for flags in ([f"--resume={tmp_path / 'out'}"], ["--resume", str(tmp_path / "out")]):
        assert run.parse(TrainConfig, [*flags, "--grad-accum=3"])[0].grad_accum == 3
    with pytest.raises(
        ValueError, match="out/config.json with these flags: batch_size=48: use a multiple of grad_accum=5"
    ):
        run.parse(TrainConfig, [*flags, "--grad-accum=5"])


def test_a_resumed_run_stays_where_it_is(data_dir, tmp_path):
    train_run(data_dir, tmp_path / "out", "--steps=1")
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    for same in ([], [f"--out-dir={moved}/"]):
        cfg, given = run.parse(TrainConfig, [f"--resume={moved}", "--lr=1", *same])
        assert (cfg.lr, cfg.steps, cfg.out_dir, cfg.resume) == (1.0, 1, str(moved), str(moved)) and "lr" in given
    with pytest.raises(ValueError, match="out_dir='new': a resumed run stays"):
        run.parse(TrainConfig, [f"--resume={moved}", "--out-dir=new"])
    for wrong in (moved / "config.json", tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"resume='{wrong}': not a run directory"):
            run.parse(TrainConfig, [f"--resume={wrong}"])


def test_help_of_a_resumed_run_shows_its_values(whole_run, tmp_path, capsys):
    def page(program, *argv):
        with pytest.raises(SystemExit):
            program([*argv, "--help"])
        return capsys.readouterr().out

    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    default = lambda page, name: re.search(rf"^  --{name} \S+ +(\S+)", page, re.MULTILINE)[1]
    for resume in ([f"--resume={cut}"], ["--resume", str(cut)]):
        found = page(main, *resume, "--lr=5")
        assert "Train a mixture" in found
        assert [default(found, name) for name in ("steps", "lr", "out_dir")] == ["8", "0.01", repr(str(cut))]
    assert default(page(main), "steps") == "1700" and default(page(grpo.main), "steps") == "105"
    with pytest.raises(ValueError, match="resume='absent': not a run directory"):
        main(["--resume=absent", "--help"])


def test_flags_of_a_killed_resumption_stay(whole_run, tmp_path, monkeypatch):
    """Resumed with another rate and killed before its next checkpoint, a run goes on with that rate."""
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_at", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        main([f"--resume={cut}", "--lr=1e-3", "--steps=6"])
    assert files.read_json(cut / "config.json")["resumed_with"] == ["lr", "steps"]
    main([f"--resume={cut}"])
    assert checkpoint.read(cut)["config"]["lr"] == 1e-3 and rows(cut)[-1]["step"] == 6
    main([f"--resume={cut}", "--steps=7"])


def test_config_of_a_grpo_run(start, tmp_path):
    out = tmp_path / "out"
    small = ["--batch-prompts=4", "--mini-batch=4", "--eval-every=0"]
    grpo.main([*SHORT, f"--model={start}", f"--out-dir={out}", *small, "--steps=1"])
    without_crc(out / "config.json", lr=0.5)
    with pytest.raises(ValueError, match=r"lr=0.5: this is from .*config.json, but ckpt-.* was trained with 0.001"):
        grpo.main([f"--resume={out}"])
    grpo.main([f"--resume={out}", "--lr=0.001", "--steps=2", "--batch-prompts=8"])  # 8: no multiple of the default
    assert checkpoint.read(out)["read"] == 12  # questions: other batches ask no question twice and leave none out
    resave(out, lambda state: state.pop("read"))
    assert rows(out)[-1]["step"] == 2


# ---- runs of earlier versions

LATER = ["weights", "muon_momentum", "max_loss", "qk_norm_joint", "bad_steps", "deterministic"]


def test_a_run_of_an_earlier_version_goes_on(whole_run, tmp_path, monkeypatch):
    """Fields that did not exist yet are absent, others had another name or were deleted since."""
    monkeypatch.setitem(config.RENAMED, "learning_rate", "lr")
    monkeypatch.setitem(config.RENAMED, "fast", None)
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)

    def age(values):
        values |= {"learning_rate": values.pop("lr"), "fast": True, "compile": True, "upcycle_noise": 0.0}
        for name in LATER:
            values.pop(name)
        return values

    resave(cut, lambda state: (age(state["config"]), [state.pop(name) for name in ("tokens", "logged")]))
    values = files.read_json(cut / "config.json")
    (cut / "config.json").write_text(json.dumps(age(values)))
    main([f"--resume={cut}", "--compile=auto"])
    assert rows(cut) == rows(whole_run[0])
    assert differences(checkpoint.read(cut), checkpoint.read(whole_run[0])) in ([], ["/logged"])
    assert checkpoint.load_model(cut).cfg == checkpoint.load_model(whole_run[0]).cfg


def test_what_was_done_before_a_field_existed():
    old = config.complete(TrainConfig, {"steps": 7, "compile": False, "loss_chunk": 0})
    assert (old["optimizer"], old["steps"], old["compile"], old["loss_chunk"]) == ("adamw", 7, "false", 16384)
    assert TrainConfig(**old).weights == "float32"
    with pytest.raises(ValueError, match="unknown field 'sped': did you mean"):
        config.parse(TrainConfig, [], start={"sped": 1})


# ---- counts and the log


def test_tokens_are_counted_when_the_batch_changes(whole_run, tmp_path):
    for old in (False, True):
        cut = cut_at(whole_run[0], tmp_path / f"cut-{old}", 4)
        if old:  # an earlier version counted nothing
            resave(cut, lambda state: state.pop("tokens"))
        results = main([f"--resume={cut}", "--batch-size=32"])
        assert [row["tokens"] for row in rows(cut)] == [384, 512, 512 + 2 * 512, 512 + 4 * 512, 512 + 4 * 512]
        assert results["tokens"] == 2560 and results["tokens_per_parameter"] == 2560 / results["parameters"]
        assert checkpoint.read(cut)["tokens"] == 2560
        assert results["epochs"] == pytest.approx(whole_run[1]["epochs"] * 2560 / 1024)


@pytest.mark.parametrize("kind", ["lost", "torn", "damaged", "not a row"])
def test_a_gap_in_the_log_is_said(whole_run, tmp_path, capsys, kind):
    cut = cut_at(whole_run[0], tmp_path / "cut", 8)
    log = cut / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)[:-1] + [b""]
    assert [json.loads(line)["step"] for line in lines[:-1]] == [3, 4, 6, 8]
    changed = {"lost": b"", "torn": lines[0][:9] + b"\n", "damaged": b"\xff" + lines[0], "not a row": b"5\n"}[kind]
    log.write_bytes(changed + b"".join(lines[1:]))
    capsys.readouterr()
    main([f"--resume={cut}"])
    assert f"{log} has lost 2 rows, of step 3, 8\n" in capsys.readouterr().out
    assert [row["step"] for row in rows(cut)] == [4, 6, 8]
    again = cut_at(whole_run[0], tmp_path / "again", 4)
    main([f"--resume={again}"])
    assert "has lost" not in capsys.readouterr().out  # what was logged after the checkpoint is logged again


def test_the_log_reaches_the_disk_before_the_checkpoint(data_dir, tmp_path, monkeypatch):
    seen, fsync, save = [], os.fsync, checkpoint.save
    link = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(link(handle)), fsync(handle))[1])
    monkeypatch.setattr(checkpoint, "save", lambda *args: (seen.append("checkpoint"), save(*args))[1])
    train_run(data_dir, tmp_path / "out", "--steps=3")
    assert seen[seen.index("checkpoint") - 1] == "metrics.jsonl"


class Recorder(ModuleType):
    """Stands for the packages wandb and torch.utils.tensorboard."""

    def __init__(self):
        super().__init__("recorder")
        self.seen, self.closed = [], 0

    def init(self, config, **options):
        self.config = config
        return self

    def log(self, values, step):
        self.seen += [(name, value, step) for name, value in values.items()]

    def finish(self):
        self.closed += 1

    def SummaryWriter(self, directory, purge_step):  # noqa: N802
        self.directory, self.purged = directory, purge_step
        return self

    def add_scalar(self, *number):
        self.seen.append(number)

    close = finish


def test_rows_go_to_tensorboard_and_wandb(data_dir, tmp_path, monkeypatch):
    board, wandb = Recorder(), Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    train_run(data_dir, tmp_path / "out", "--steps=4", "--log=tensorboard,wandb")
    assert board.seen == wandb.seen and board.closed == wandb.closed == 1
    assert wandb.config["steps"] == 4 and board.directory == tmp_path / "out" / "tensorboard" and board.purged == 1
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = {(name, step): value for name, value, step in board.seen}
    for row in log:
        for name in row.keys() & {"loss", "val_loss", "lr", "tokens"}:
            assert found[name, row["step"]] == row[name]
        for layer, value in enumerate(row.get("load_max", ())):
            assert found[f"load_max/{layer}", row["step"]] == value
    assert all(isinstance(value, (int, float)) for value in found.values()) and "step" not in dict(found)
    main([f"--resume={tmp_path / 'out'}", "--steps=5"])
    assert board.purged == 5  # what was logged after the checkpoint is logged again


def test_a_missing_logger_is_one_line(data_dir, tmp_path, monkeypatch):
    for kind, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"log='{kind}': the package is not installed: pip install {kind}"):
            train_run(data_dir, tmp_path / "out", f"--log={kind}")
    assert config.parse(TrainConfig, ["--logger=wandb"]).log == "wandb"  # torchrun takes --log for a flag of its own
    with pytest.raises(ValueError, match="log='tensorbord': use tensorboard, wandb, or both with a comma"):
        train_run(data_dir, tmp_path / "out", "--log=tensorbord")
    assert not (tmp_path / "out").exists()


# ---- training without validation, and steps that are skipped


def test_training_without_validation(data_dir, tmp_path, capsys):
    """No validation data, or none wanted: no row, said once, samples of what was trained on."""
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    meta = json.loads((data / shards.META).read_text())
    del meta["splits"]["val"]
    meta.pop(files.CRC, None)
    (data / shards.META).write_text(json.dumps(meta))
    for name, source, flags in (("absent", data, []), ("unwanted", data_dir, ["--val-batches=0"])):
        results = train_run(source, tmp_path / name, *flags)
        out = capsys.readouterr().out
        assert not any("val_loss" in row for row in rows(tmp_path / name)) and "val_loss" not in results
        assert "validation loss                   no validation" in out and "prompt from training: " in out
        assert (f"no validation on {source}: there is no validation data" in out) == (name == "absent")
    results = train_run(f"{data}:1,{data_dir}:1", tmp_path / "mixture")
    assert results["val_loss"] > 0 and f"no validation on {data}" in capsys.readouterr().out


@pytest.mark.parametrize("log_every", [1, 3])
def test_skipping_goes_on_until_ten_in_a_row(data_dir, tmp_path, log_every):
    from tests.test_reliability import poisoned

    flags = ["--val-every=0", "--bad-steps=skip", f"--log-every={log_every}", "--checkpoint-every=0", "--steps=24"]
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, {1, *range(3, 3 + guard.PATIENCE - 1)})
        train_run(data_dir, tmp_path / "on", *flags)
    log = [row for row in rows(tmp_path / "on") if "tokens" in row and "lr" in row]
    assert sum(row.get("skipped_steps", 0) for row in log) == guard.PATIENCE and "NaN" not in json.dumps(log)
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, set(range(3, 3 + guard.PATIENCE)))
        with pytest.raises(ValueError, match="training diverged at step 3: the loss is nan, the output of layer 1"):
            train_run(data_dir, tmp_path / "off", *flags, "--steps=12", "--log-every=1")


def test_a_printed_command_can_be_pasted(data_dir, tmp_path, monkeypatch, capsys):
    """Also where a directory's name has a space."""
    out, said = tmp_path / "my run", []
    monkeypatch.setattr(run.Run, "stopping", lambda self: True)
    train_run(data_dir, out)
    said.append(capsys.readouterr().out)
    with pytest.raises(ValueError) as held:
        train_run(data_dir, out)
    with pytest.raises(OSError) as full, monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_make_room", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        checkpoint.save(out, 9, {}, 1)
    said += [str(held.value), str(full.value), guard.remedy(out, 1.0)]
    assert [text for text in said if f"--resume='{out}'" not in text] == []
    with pytest.raises(ValueError, match="--tokenizer='my model'"):
        TrainConfig(init_from="my model")


def test_hints_repeat_the_settings_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = TrainConfig.preset_fields("tiny") | {"vocab_size": 512, "lr": 1e-3, "curves": False, "n_experts": 16}
    cfg = TrainConfig(**fields, data="books:1,web:2", out_dir="runs/x")
    procedural.build("data", SMALL_MIXTURE)
    data = SimpleNamespace(sources=[("data", 1.0)])
    hints = lambda solution, **changes: report.next_steps(
        "runs/x", dataclasses.replace(cfg, **changes), data, {"reasoning": {1: {"solution": solution}}}
    )
    Path("runs/x").mkdir(parents=True)
    for kept, changes in ((cfg, {"n_experts": 64}), (dataclasses.replace(cfg, dense=True), {"dense": False})):
        files.write_json("runs/x/config.json", dataclasses.asdict(kept))
        flags = re.search(r"python train.py (--config=.*?)  #", hints(0.5, dense=kept.dense))[1].split()
        expected = dataclasses.replace(kept, out_dir="runs/x-experts", **changes)
        assert config.parse(TrainConfig, flags) == expected
    assert "grpo.py --model=runs/x --steps=" in hints(0.5) or torch.cuda.is_available()
    assert "grpo.py" not in hints(0.99) + hints(0.5, seq_len=9) and "--n_experts" not in hints(0.5, n_experts=1024)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "  torchrun --nproc-per-node=4 train.py --resume=runs/x --steps=" in hints(0.5)


def test_a_run_of_the_other_program_is_named(tmp_path):
    for cls, kept, ours, theirs in (
        (grpo.GRPOConfig, {"steps": 3, "vocab_size": 64}, "grpo.py", "train.py"),
        (train.TrainConfig, {"steps": 3, "group_size": 5}, "train.py", "grpo.py"),
    ):
        files.write_json(tmp_path / "config.json", kept)
        with pytest.raises(ValueError, match=f"it is a run of {theirs}, not of {ours}"):
            run.parse(cls, [f"--resume={tmp_path}"])
