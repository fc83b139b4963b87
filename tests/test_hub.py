"""Models by name, against a hub on the loopback interface. Run: python -m pytest tests/test_hub.py (CPU, seconds)"""

import errno
import re
import socket
import subprocess
import sys

import pytest

import train
from data import prepare, tokenizer
from model import GPT, ModelConfig
from optimoe import hf, hub, start
from optimoe.load import ModelChoice, load
from tests.loopback import Hub

library = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
NAME = "someone/tiny-moe"


def save(folder):
    """A tiny model and its tokenizer, as a released one lies on the hub; with files that nobody here needs."""
    sizes = dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, n_experts=4, top_k=2, d_expert=32)
    hf.save_model(GPT(ModelConfig(vocab_size=320, seq_len=64, init_std=0.2, **sizes)), folder, max_shard_bytes=60_000)
    hf.save_tokens(tokenizer.encoding({bytes([b]): b for b in range(256)}), folder)
    for unneeded in ("README.md", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / unneeded).write_bytes(b"unneeded")
    return folder


def point_to(server, tmp_path, monkeypatch):
    """Make `server` the hub and an empty folder the cache; work in a directory that holds nothing."""
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.folder.cache_clear()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with one model."""
    server = Hub({NAME: save(tmp_path / "released"), "someone/gated": "GatedRepo"})
    point_to(server, tmp_path, monkeypatch)
    yield server
    server.server.shutdown()
    hub.folder.cache_clear()


def test_a_model_by_name_is_the_folder_s(served, tmp_path):
    loaded, local = (load(ModelChoice(hf=str(name), device="cpu")) for name in (NAME, tmp_path / "released"))
    for (name, ours), theirs in zip(loaded.model.named_parameters(), local.model.parameters(), strict=True):
        assert ours.equal(theirs), name
    assert loaded.tokens.encode("ab") == local.tokens.encode("ab")
    sent = [file for file, _ in served.asked]
    needed = {path.name for path in (tmp_path / "released").iterdir()}
    assert sorted(sent) == sorted(needed - {"README.md", "pytorch_model.bin", "consolidated.safetensors"})
    assert str(loaded.results) == "runs/someone--tiny-moe/eval" and loaded.name.startswith("someone--tiny-moe-")
    assert local.results == tmp_path / "released/eval"
    hub.folder.cache_clear()
    served.server.shutdown(), served.server.server_close()  # now the cache is all there is
    assert load(ModelChoice(hf=NAME, device="cpu")).name == loaded.name and sent == [file for file, _ in served.asked]


def test_help_downloads_no_weights(served, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([f"--init_from={NAME}", "--help"])
    assert not end.value.code and {file for file, _ in served.asked} == {"config.json"}
    assert re.search(r"--n_experts int +4 ", capsys.readouterr().out)


def test_the_tokenizer_alone(served, tmp_path):
    (tmp_path / "here/notes.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "f"}\n')
    prepare.prepare(prepare.Config(("notes.jsonl",), "out", tokenizer=NAME, val_fraction=0.3))
    assert {file for file, _ in served.asked} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert tokenizer.load("out").encode_ordinary("ab") == [97, 98]
    assert len(list(hub.folder(NAME, "hf").glob("*.safetensors"))) > 1  # the rest follows when it is needed


def test_training_starts_from_a_name(served):
    fields = start.training_fields(NAME)
    assert (fields["d_model"], fields["seq_len"], fields["optimizer"]) == (32, 64, "adamw")
    model = start.load_any(NAME, "cpu", dtype="float32", impl="reference")
    assert model.embed.weight.equal(hf.load_model(hub.folder(NAME, "hf")).embed.weight)
    assert model.embed.weight.requires_grad and model.cfg.impl == "reference"


def test_an_interrupted_download_goes_on(served, tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.utils._http").time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what has arrived is written at once
    (big,) = (tmp_path / "released").glob("model-00001*")
    served.cut[big.name] = 1000
    try:
        hub.folder(NAME, "hf")  # the library may try again by itself
    except ValueError as error:
        assert "continue" in str(error)
    assert (hub.folder(NAME, "hf") / big.name).read_bytes() == big.read_bytes()
    assert {(big.name, 0), (big.name, 1000)} <= set(served.asked)


MISTAKES = {
    "no/such": "neither a directory nor a model at http.*no/such; if it is private, log in",
    "someone/gated": "its owner asks for consent: accept the terms at http.*someone/gated, then log in",
    NAME + "@v9": "has no revision 'v9'",
    "./no/such/folder": "no such directory; a model on the Hugging Face hub is ORG/NAME",
    "nothing": "no such directory; a model on the Hugging Face hub is ORG/NAME",
    "../folder": "no such directory; a model on the Hugging Face hub is ORG/NAME",
    "no/name--of-the-hub": "no such directory; a model on the Hugging Face hub is ORG/NAME",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, served):
    with pytest.raises(ValueError, match=MISTAKES[name]) as caught:
        load(ModelChoice(hf=name, device="cpu"))
    assert str(caught.value).startswith(f"hf={name!r}: ") and "\n" not in str(caught.value)


def test_revisions(served):
    assert hub.folder(f"{NAME}@main", "hf") == hub.folder(NAME, "hf")
    assert hub.title(f"{NAME}@main") == "someone--tiny-moe--main"


def test_without_a_network(served, monkeypatch, tmp_path):
    def fails(match, name=NAME):
        hub.folder.cache_clear()
        with pytest.raises(ValueError, match=match) as caught:
            hub.folder(name, "model")
        assert str(caught.value).startswith(f"model={name!r}: ") and "\n" not in str(caught.value)

    served.server.shutdown(), served.server.server_close()
    fails(f"neither a directory nor a complete model in .*cache, and {served.url} cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails("HF_HUB_OFFLINE forbids asking the hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(r"no such directory, and to download a model of this name: pip install -e '.\[hf\]'")
    assert hub.folder(str(tmp_path), "model") == tmp_path  # a folder needs no package
    with pytest.raises(ValueError, match=r"huggingface_hub is not installed: pip install -e '.\[hf\]'"):
        hub.place(NAME)


def test_a_hub_that_never_answers(served, monkeypatch):
    """As behind a firewall that drops what it does not let through."""
    folder = hub.folder(NAME, "hf")
    hub.folder.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert hub.folder(NAME, "hf") == folder  # of the cache
        with pytest.raises(
            ValueError, match="neither a directory nor a complete model in .*, and http.* cannot be reached"
        ):
            hub.folder("runs/typo", "hf")


def test_a_full_disk(served, monkeypatch):
    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not write") from error

    monkeypatch.setattr(library, "snapshot_download", full)
    with pytest.raises(ValueError, match=r"the disk of .*cache is full \(.* GB are free\); free some space or set"):
        hub.folder(NAME, "hf")


def test_the_cache_is_found_in_a_process_that_has_imported_nothing_else():
    code = "from optimoe import hub; print(hub.place('some/model').name)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "models--some--model\n", ran.stderr


def test_a_cache_as_the_library_lays_it_out(served, monkeypatch, tmp_path):
    """A cache that was copied from another machine: snapshots and refs, no network."""
    repository = tmp_path / "cache/models--other--model"
    snapshot = repository / "snapshots/abc123"
    snapshot.mkdir(parents=True)
    save(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc123")
    served.server.shutdown(), served.server.server_close()
    assert hub.folder("other/model", "hf") == snapshot
    assert load(ModelChoice(hf="other/model", device="cpu")).tokens.encode("ab") == [97, 98]
