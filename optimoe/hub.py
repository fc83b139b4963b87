"""A Hugging Face model by its name, ORG/NAME or ORG/NAME@REVISION, wherever a folder may be given.

A directory of that name comes first. The package huggingface_hub (the extra `hf`) downloads models: it continues
interrupted downloads, HF_HUB_CACHE says where they go, HF_HUB_OFFLINE=1 forbids them.
"""

import errno
import functools
import re
import shutil
import sys
from pathlib import Path

from data import files
from optimoe.config import require

NAME = re.compile(r"((?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?)(?:@([\w./-]+))?", re.ASCII)
TOKENIZER = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SECONDS = 10  # limit for an answer of the hub
FILES = (*TOKENIZER, "model*.safetensors", "model.safetensors.index.json")


def check(name, field):
    """Raises ValueError, blaming `field`, unless `name` is a directory or may name a model."""
    remedy = "no such directory; a model on the Hugging Face hub is ORG/NAME or ORG/NAME@REVISION"
    require(Path(name).is_dir() or NAME.fullmatch(str(name)), field, str(name), remedy)


def title(name):
    """What to call files about a folder or a named model."""
    return Path(name).resolve().name if Path(name).is_dir() else re.sub("[/@]", "--", str(name))


class Unavailable(ValueError):
    """The model cannot be loaded now."""


def home(name):
    """Where results of a model go: its own folder, or for a model of the hub one under runs/."""
    return Path(name) if Path(name).is_dir() else Path("runs", title(name))


def origin(run_dir):
    """The folder of the published model that a run started from, for its chat template; or None."""
    path = Path(run_dir) / "config.json"
    values = files.read_json(path) if path.is_file() else {}
    name = values.get("init_from") or values.get("group_size") and values["model"]
    if name and name.endswith(".pt"):  # grpo.py started from a checkpoint
        return origin(Path(name).parent)
    try:
        return folder(name, "init_from", TOKENIZER) if name else None
    except ValueError as error:
        print(f"warning: if {name} has a chat template, it is not used ({error})", file=sys.stderr)
        return None


def library(reason="the package huggingface_hub is not installed"):
    """The package huggingface_hub. Raises Unavailable, with the remedy, if it is not installed."""
    try:
        import huggingface_hub.constants  # not imported by the package itself
    except ImportError:
        raise Unavailable(f"{reason}: pip install -e '.[hf]'") from None
    return huggingface_hub


def place(name):
    """The directory for a named model in the library's cache. It need not exist."""
    return Path(library().constants.HF_HUB_CACHE, f"models--{NAME.fullmatch(name)[1].replace('/', '--')}")


def forget(name):
    """Delete all revisions of a named model from the library's cache."""
    shutil.rmtree(place(name), ignore_errors=True)
    folder.cache_clear()


@functools.cache
def folder(name, field, patterns=FILES):
    """The Path of a local folder, or of a model's files in the cache, downloaded if needed. Raises
    Unavailable or another ValueError, blaming `field`."""
    check(name, field)
    if Path(name).is_dir():
        return Path(name)
    repository, revision = NAME.fullmatch(name).groups()
    lib = library(f"{field}={name!r}: no such directory, and to download a model of this name")
    silent = not answers(lib, repository, revision)
    options = dict(revision=revision, allow_patterns=list(patterns), local_files_only=silent)
    try:
        return Path(lib.snapshot_download(repository, **options))
    except Exception as error:  # from the library, its HTTP client or the disk
        raise Unavailable(f"{field}={name!r}: {explain(error, repository, revision)}") from None


def answers(lib, repository, revision):
    """Whether the hub answers within SECONDS, an error counts too. snapshot_download would wait without end."""
    try:
        lib.HfApi().model_info(repository, revision=revision, timeout=SECONDS)
    except Exception as error:  # its class depends on the library's HTTP client
        return "Timeout" not in type(error).__name__
    return True


def explain(error, repository, revision=None):
    """One line about an error of snapshot_download: what is wrong and what to do."""
    from huggingface_hub import constants, errors

    cache, page = constants.HF_HUB_CACHE, f"{constants.ENDPOINT}/{repository}"
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        place = next(path for path in (Path(cache), *Path(cache).parents) if path.exists())
        free = f"{shutil.disk_usage(place).free / 1e9:,.1f} GB are free"
        return f"the disk of {cache} is full ({free}); free some space or set HF_HUB_CACHE, then the download continues"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks for consent: accept the terms at {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"neither a directory nor a model at {page}; if it is private, log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision!r}; leave it out, or look under its files for the branches and tags"
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE forbids asking the hub"
        why = offline if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"neither a directory nor a complete model in {cache}, and {why}; check the name"
    lines = str(error).strip().splitlines() or [""]
    return f"the download failed ({type(error).__name__}: {lines[0]}); the same command continues it"
