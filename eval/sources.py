"""Where evaluation items come from: a local folder, or else the Hugging Face hub (through `datasets`).

source = Source("evaldata")  # --evaldata; default: $OPTIMOE_EVALDATA, else ./evaldata
rows = source.rows(gsm8k.TEST)  # list of dicts
source.used  # {"gsm8k/test": "evaldata/gsm8k/test.jsonl"}
"""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from data import files, procedural, shards


class Set(NamedTuple):
    """One set of evaluation items and where it may be found."""

    name: str  # "gsm8k/test", as results name it
    file: str  # in the local folder: JSON lines or one JSON list, plain or gzipped
    hub: tuple[str, str | None, str] | None = None  # (dataset, configuration, split)
    origin: str = ""  # where a person gets the file


class Source:
    """folder: the local one; ValueError if it was named and does not exist. training_data: the data directory of the
    evaluated run, for tasks on procedural data."""

    def __init__(self, folder: str | Path | None = None, training_data: str | Path | None = None):
        asked = folder or os.environ.get("OPTIMOE_EVALDATA")
        self.folder, self.training_data = Path(asked or "evaldata"), training_data
        if asked and not self.folder.is_dir():
            raise ValueError(f"evaldata={str(asked)!r}: no such folder; name the one with gsm8k/, hellaswag/, ...")
        self.used = {}  # name of a set -> where it was read
        self._cache = {}

    def rows(self, *sets: Set) -> list[dict]:
        """The items, in their published order, of the first of these sets that exists. ValueError says how to get the
        first set, or names a damaged file."""
        for wanted in sets:
            found = self._cache.get(wanted) or self._local(wanted) or self._hub(wanted)
            if found:
                rows, where = found
                if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
                    raise ValueError(f"{where} must hold a JSON object for each item; get it again")
                self._cache[wanted], self.used[wanted.name] = found, where
                return rows
        raise ValueError(f"{sets[0].name} was not found: {self._ways(sets[0])}")

    def procedural(self, part: str) -> procedural.MixtureConfig:
        """The settings of the run's procedural training data; ValueError where it has no such part."""
        where = f"{self.training_data}/{shards.META}"
        settings = shards.read_meta(self.training_data).get("procedural", {}) if self.training_data else {}
        if part not in settings:
            why = f"{where} has none" if self.training_data else "if it was, name its data directory with --data"
            what = f"this model was not trained on procedural {part} ({why})"
            raise ValueError(f"{part}: {what}; choose another task, for instance gsm8k")
        return procedural.from_dict(settings, where)

    def _ways(self, wanted):
        origin = f" (it is in {wanted.origin})" if wanted.origin else ""
        way = f"put {wanted.file} (or {wanted.file}.gz){origin} into the folder {self.folder}"
        hub = f"; or pip install datasets, for the hub's {' '.join(filter(None, wanted.hub))}" if wanted.hub else ""
        return f"{way}, or name another one with --evaldata or OPTIMOE_EVALDATA{hub}"

    def _local(self, wanted):
        for path in (self.folder / wanted.file, self.folder / f"{wanted.file}.gz"):
            if path.is_file():
                return _read(path), str(path)

    def _hub(self, wanted):
        try:
            from datasets import load_dataset
        except ImportError:  # also where datasets/ is a folder of prepared data
            return None
        if wanted.hub is None:
            return None
        dataset, configuration, split = wanted.hub
        try:
            rows = load_dataset(dataset, configuration, split=split)
        except (OSError, ValueError) as error:  # no network, or the dataset has moved
            why = f"reading {dataset} from the hub failed ({error})"
            raise ValueError(f"{wanted.name}: {why}: {self._ways(wanted)}") from error
        # TriviaQA's nested answer becomes flat, as in the local file.
        flat = [row | row["answer"] if isinstance(row.get("answer"), dict) else row for row in rows]
        return flat, f"hub: {' '.join(filter(None, wanted.hub))}"


def _read(path):
    """JSON lines, or one JSON list; gzipped or not."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from None
    if ".jsonl" in path.name:
        rows = [row for _, row in files.json_lines(text.split("\n"), path, "get the file again")]
    else:
        rows = files.parse(text, str(path), "get it again")
    if "\\ud" in text.lower():  # tokenizers refuse "\ud800" alone; it becomes "?"
        return json.loads(json.dumps(rows, ensure_ascii=False).encode(errors="replace"))
    return rows
