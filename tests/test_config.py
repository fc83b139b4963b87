"""Command lines and config files. Run: python -m pytest tests/test_config.py   (CPU, no torch)"""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from data import files
from optimoe import config


@dataclass(frozen=True)
class Base:
    # Model
    width: int = 64  # residual stream
    act: Literal["relu", "silu"] = "silu"  # the '#' inside a comment # stays

    def __post_init__(self):
        config.require(self.width % 16 == 0, "width", self.width, "use a multiple of 16")

    @staticmethod
    def preset_fields(name):
        return {"small": {"width": 32}, "large": {"width": 1024}}[name]


@dataclass(frozen=True)
class Config(Base):
    # Optimiser
    lr: float = 3e-4  # peak learning rate
    steps: int = 1000  # optimiser steps
    compile: bool = False  # use torch.compile
    data: str = ""  # a directory
    warmup_steps: int = 0  # linear
    eps: float = 1e-8  # AdamW
    out: str = ""  # another
    limit: int | None = None  # at most this many
    preset: str = ""  # start from a named size


def parse(*argv):
    return config.parse(Config, list(argv))


def test_no_arguments_give_defaults():
    assert parse() == Config()


def test_types():
    cfg = parse("--lr=1", "--steps", "1e6", "--compile", "--data=/a=b", "--limit=1_000", "--act=relu", "--width=+128")
    assert cfg == Config(lr=1.0, steps=1_000_000, compile=True, data="/a=b", limit=1000, act="relu", width=128)
    assert type(cfg.lr) is float and type(cfg.steps) is int
    assert parse("--compile=false").compile is False and parse("--limit=none").limit is None
    assert parse(f"--steps={2**60 + 1}").steps == 2**60 + 1
    assert parse("--lr=-1e-3").lr == -1e-3 and parse("--lr", "-2").lr == -2.0
    assert parse("--lr=1", "--lr=2").lr == 2.0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stpes=3"], "unknown field 'stpes': did you mean 'steps'"),
        (["--zzzzzz=3"], "--help lists"),
        (["--steps=1.5"], r"steps='1.5': a whole number"),
        (["--steps=inf"], "whole number"),
        (["--steps=nan"], "whole number"),
        (["--steps=many"], "whole number"),
        (["--lr=fast"], "lr='fast': a finite number"),
        (["--lr=inf"], "lr='inf': a finite number"),
        (["--lr=nan"], "lr='nan': a finite number"),
        (["--bogus=3"], "unknown field 'bogus': --help lists"),  # not 'out'
        (["--help=1"], "unknown field 'help': --help lists"),
        (["--warmup=1"], "did you mean 'warmup_steps'"),
        (["--act=gelu"], "act='gelu': use one of relu, silu"),
        (["--compile=maybe"], "true or false"),
        (["--compile", "false"], "only with '='"),
        (["--width=100"], "width=100: use a multiple of 16"),
        (["--lr"], "needs a value"),
        (["lr=3"], "unexpected argument"),
        (["--config=/nonexistent.json"], "no such config file"),
        (["--steps=" + "9" * 5000], r"^steps='9{149}\.\.\.9+': a whole number .{1,40}$"),
        (["--steps=1e400"], "steps='1e400': a whole number"),
        (["--width=" + "9" * 4000], r"^width=9{150}\.\.\.9+: use a multiple of 16$"),
    ],
)
def test_mistakes_name_field_value_and_remedy(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config.parse(Config, argv)


def test_a_reader_that_has_enough_is_no_mistake():
    code = "from optimoe.config import command_line; command_line(lambda: [print(i) for i in range(10**5)])"
    ran = subprocess.run(f"{sys.executable} -c '{code}' | head -1", shell=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")


def test_mistake_on_the_real_command_line_exits_with_the_message(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prog", "--stpes=3"])
    with pytest.raises(SystemExit, match="did you mean 'steps'"):
        config.command_line(lambda: config.parse(Config))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0


def test_file_round_trip_and_precedence(tmp_path):
    cfg = Config(lr=0.1 + 0.2, steps=7, limit=3, compile=True, width=48)
    path = tmp_path / "config.json"
    files.write_json(path, dataclasses.asdict(cfg))
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert parse(f"--config={path}") == cfg
    assert parse("--steps=9", f"--config={path}") == dataclasses.replace(cfg, steps=9)  # flags win wherever they stand
    assert parse(f"--config={path}", "--preset=large") == dataclasses.replace(cfg, width=1024, preset="large")
    assert parse("--width=96", "--preset=large").width == 96


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"lr": 1', "config.json is damaged"),
        (b'{"lr": \xff', "config.json is damaged"),
        ("[1]", "JSON object"),
        ('{"learning_rate": 1}', "unknown field 'learning_rate'"),
        ('{"lr": "fast"}', "lr='fast'"),
        ('{"steps": true}', "steps=True"),
        ('{"data": 3}', "data=3: text"),
        ('{"lr": Infinity}', "lr=inf: a finite number"),
        ("[" * 100_000, "config.json is damaged"),  # deeper than the parser goes
        ('{"data": ' + "[" * 900 + "]" * 900 + "}", r"data=\[+\.\.\.\]+: text"),
        ('{"steps": ' + "9" * 5000 + "}", "config.json is damaged"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "config.json"
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        parse(f"--config={path}")
    assert path.read_bytes() == text


def test_help_comes_from_the_source(capsys):
    with pytest.raises(SystemExit) as exit_info:
        config.parse(Config, ["--help"], description="Trains something.")
    assert exit_info.value.code == 0
    page = capsys.readouterr().out
    for part in (
        "Trains something.",
        "Model:",
        "Optimiser:",
        "--lr float",
        "0.0003",
        "peak learning rate",
        "relu|silu",
        "the '#' inside a comment # stays",
        "--limit int?",
        "residual stream",
    ):
        assert part in page, part


def shown(page):
    """{field: (value, comment)} of a help page."""
    lines = re.findall(r"^  (?:--)?(\w+) \S+ +(.+?)(?:  +(.*))?$", page, re.MULTILINE)
    return {name: (value, comment) for name, value, comment in lines}


def programs():
    """The configurations of all programs. Not imported above: only this needs torch."""
    import grpo
    import train
    from eval import __main__ as evaluate
    from eval import votes
    from optimoe import hf, sizes

    classes = [vars(module) for module in (train, grpo, evaluate, votes, sizes, hf)]
    return {
        value
        for names in classes
        for name, value in names.items()
        if name.endswith("Config") and dataclasses.is_dataclass(value) and hasattr(value, "__module__")
    }


def test_help_shows_what_runs():
    """In every program and some presets, a field has the value that `parse` gives, and every field is explained."""
    classes = programs()
    assert {cls.__name__ for cls in classes} >= {"TrainConfig", "SizeConfig", "GRPOConfig", "ExportConfig"}
    seen = 0
    for cls in classes:
        presets = ["tiny", "paper-d512-e8-k2"] if hasattr(cls, "preset_fields") else [None]
        for argv in ([f"--preset={name}"] if name else [] for name in presets):
            words = ["word"] * len(getattr(cls, "POSITIONAL", ()))
            page, fields = shown(config.help_text(cls, "", argv)), dataclasses.fields(cls)
            assert list(page) == [field.name for field in fields]
            try:
                runs = config.parse(cls, [*argv, *words])
            except ValueError:  # a program that needs a choice to run: at least the defaults of its class
                runs = None
            for field in fields:
                value, comment = page[field.name]
                if value != "required":
                    assert value == repr(getattr(runs, field.name) if runs else field.default), (cls, field.name)
                    seen += 1
                assert comment or field.name == "temperature", (cls, field.name)
    assert seen > 150


def test_help_follows_preset_and_file(tmp_path, capsys):
    def page(*argv):
        with pytest.raises(SystemExit):
            parse("--help", *argv)
        return capsys.readouterr().out

    assert shown(page())["width"][0] == "64" and shown(page("--preset=large"))["width"][0] == "1024"
    (tmp_path / "c.json").write_text('{"lr": 0.5}')
    assert shown(page(f"--config={tmp_path}/c.json"))["lr"][0] == "0.5"


def test_signed_and_old_files_are_read(tmp_path):
    path = tmp_path / "config.json"
    for signed in (True, False):
        files.write_json(path, dataclasses.asdict(Config(lr=0.25)), signed)
        assert ("crc" in path.read_text()) == signed and parse(f"--config={path}") == Config(lr=0.25)


@pytest.mark.parametrize("old, new", [("0.25", "0.75"), ('"limit": null', '"limit": 3'), ('"crc": "', '"crc": "0')])
def test_a_damaged_signed_file_is_refused(tmp_path, old, new):
    path = tmp_path / "config.json"
    files.write_json(path, dataclasses.asdict(Config(lr=0.25)) | {"resumed_with": ["lr"]})
    assert parse(f"--config={path}") == Config(lr=0.25)
    text = path.read_text()
    path.write_text(text.replace(old, new))
    assert path.read_text() != text
    with pytest.raises(ValueError, match=f"{path} is damaged: its checksum differs"):
        parse(f"--config={path}")


def test_files_of_earlier_versions_are_read(tmp_path):
    """With --config as with --resume; a field that did not exist yet counts only in the file of a whole run."""
    from train import TrainConfig

    path, old = tmp_path / "config.json", {"compile": True, "parallel": "fsdp", "loss_chunk": 0, "upcycle_noise": 0.0}
    files.write_json(path, old | {"resume": "x", "trace": "y"})
    cfg = config.parse(TrainConfig, [f"--config={path}"])
    expected = TrainConfig(compile="true", parallel="ddp", loss_chunk=16384)
    assert cfg == dataclasses.replace(expected, optimizer=cfg.optimizer) and cfg.optimizer == TrainConfig.optimizer
    files.write_json(path, old | {"out_dir": "runs/x"})
    assert config.parse(TrainConfig, [f"--config={path}"]).optimizer == "adamw"
    assert config.parse(TrainConfig, [f"--config={path}", "--optimizer=muon"]).optimizer == "muon"


def test_a_directory_that_cannot_be_written_is_named_by_its_field(tmp_path):
    assert config.make_directory(tmp_path / "a/b", "out", "a/b").is_dir() and not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").write_text("")
    for path in ("/proc", "/proc/x", tmp_path / "file"):
        with pytest.raises(
            ValueError, match=f"out='given': nothing can be written to {path} .*; name another directory"
        ):
            config.make_directory(path, "out", "given")
    with pytest.raises(ValueError, match=r"out='o\\udcff': its name is not UTF-8"):
        config.make_directory(tmp_path / "o\udcff", "out", "o\udcff")
    assert not (tmp_path / "o\udcff").exists()


def test_a_file_that_cannot_be_written_is_named_by_its_field(tmp_path):
    config.check_file(tmp_path / "new/x.csv", "csv")
    config.check_file("/dev/null", "csv")
    with pytest.raises(ValueError, match="trace='/dev/null': name an ordinary file"):
        config.check_file("/dev/null", "trace", device=False)
    assert not list((tmp_path / "new").iterdir())
    for path, message in ((tmp_path, "this is a directory"), ("/proc/x/y", "nothing can be written to /proc/x")):
        with pytest.raises(ValueError, match=f"csv='{path}': {message}"):
            config.check_file(path, "csv")


def test_no_memory_ends_every_program_with_one_line():
    def ended(error):
        with pytest.raises(SystemExit) as stop:
            config.command_line(lambda: (_ for _ in ()).throw(error))
        return str(stop.value)

    for error in (MemoryError(), RuntimeError("[fail at x.cpp:1] can't allocate memory: 9 bytes\nmore")):
        assert ended(error).startswith("error: out of memory (") and "\n" not in ended(error)
    assert ended(ValueError("a mistake")) == "error: a mistake"
    with pytest.raises(RuntimeError, match="a fault"):
        config.command_line(lambda: (_ for _ in ()).throw(RuntimeError("a fault")))


@dataclass(frozen=True)
class Words:
    POSITIONAL: ClassVar = ("run", "files")
    run: str  # a run
    files: tuple[str, ...] = ()  # any number
    batch: tuple[int, ...] = (1, 16)  # sizes


def test_positional_words_and_lists(capsys):
    assert config.parse(Words, ["a"]) == Words("a")
    assert config.parse(Words, ["a", "b", "--batch=2,3", "c"]) == Words("a", ("b", "c"), (2, 3))
    with pytest.raises(ValueError, match="batch='x'"):
        config.parse(Words, ["a", "--batch=2,x"])
    for words in ([], [""]):
        with pytest.raises(ValueError, match="run='': it is required"):
            config.parse(Words, words)
    assert config.parse(Words, ["a", "--files="]) == Words("a")  # whose default is empty too
    with pytest.raises(ValueError, match="batch='': it is required"):
        config.parse(Words, ["a", "--batch="])
    assert "--batch int,..." in config.help_text(Words) and "  run str" in config.help_text(Words)
