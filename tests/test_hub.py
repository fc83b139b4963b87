import gzip
import json
import sys
import types

import pytest

from data import hub

ITEMS = [{"text": f"document {i} é", "url": str(i)} for i in range(20)]  # 13 or 14 bytes each


class Stream(list):
    def shuffle(self, seed, buffer_size):
        return Stream(self[::-1])


@pytest.fixture
def datasets(monkeypatch):
    """Stands in for the package: the tests have no network. Records how it was called."""
    fake, calls = types.ModuleType("datasets"), []

    def load_dataset(path, name=None, *, split, streaming):
        calls.append((path, name, split, streaming))
        if path == "missing/dataset":
            raise FileNotFoundError("not on the hub")
        return Stream(ITEMS)

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_download_stops_at_the_size(datasets, tmp_path):
    out = tmp_path / "new" / "x.jsonl.gz"
    assert hub.download(hub.Config("owner/name", str(out), subset="small", max_bytes=50))[0] == 4
    assert [json.loads(line)["text"] for line in gzip.open(out, "rt")] == [item["text"] for item in ITEMS[:4]]
    assert datasets == [("owner/name", "small", "train", True)]
    assert [p.name for p in out.parent.iterdir()] == ["x.jsonl.gz"]
    with pytest.raises(ValueError, match="exists"):
        hub.download(hub.Config("owner/name", str(out)))
    assert next(hub.documents(hub.Config("owner/name", "x.jsonl.gz", shuffle_buffer=100))) == ITEMS[-1]["text"]


def test_errors(datasets, tmp_path, monkeypatch):
    out = f"--out={tmp_path / 'x.jsonl.gz'}"
    for flags, message in (
        (["--dataset=missing/dataset", out], "--dataset missing/dataset.*not on the hub"),
        (["--dataset=owner/name", "--text_field=body", out], "--text_field body: not a text.*text, url"),
        (["--dataset=owner/name", "--out=x.txt"], "must end in"),
        (["--dataset=owner/name"], "out='': it is required"),
        (["--dataset=owner/name", out, "--max_bytes=0"], "max_bytes=0.0: must be above 0"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            hub.main(flags)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"pip install -e '.\[hub\]'"):
        hub.main(["--dataset", "owner/name", out])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_download_left_is_removed(datasets, tmp_path):
    (tmp_path / ".x.jsonl.gz.4711.partial").touch()  # the name of an earlier version
    (tmp_path / ".x.jsonl.gz.0123abcd.tmp").touch()
    hub.main(["--dataset=owner/name", f"--out={tmp_path / 'x.jsonl.gz'}"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl.gz"]
