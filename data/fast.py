"""Tokenizers of other models, run by the library `tokenizers`, with the members of tiktoken.Encoding used here.

enc = from_folder("Mixtral-8x7B-v0.1")        # its tokenizer.json and tokenizer_config.json
enc.encode_ordinary("48/2"), enc.begin, enc.eot_token
"""

import importlib
import re
from pathlib import Path

from data import files

AGAIN = "download it again"


def package(name="tokenizers"):
    """An imported package of the extra `hf`; ValueError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"the package {name.partition('.')[0]} is not installed: pip install -e '.[hf]'") from None


def _open(definition, where="its tokenizer.json"):
    Tokenizer = package().Tokenizer
    try:
        tokenizer = Tokenizer.from_str(definition)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{where} is damaged ({error}): {AGAIN}") from None
    tokenizer.no_truncation()  # some were saved with a limit
    tokenizer.no_padding()
    return tokenizer


def spelled(settings, name):
    """The text of a special token in a tokenizer_config.json, where it is a string or an object."""
    token = settings.get(name)
    return token.get("content") if isinstance(token, dict) else token


def inside(read, text):
    """The ids of a text that follows another. In front of a text alone SentencePiece puts a space."""
    for before in "a\n.":
        head, whole = read(before), read(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return read(text)


class Fast:
    """A tokenizer of the library. The name of a special token in a text is just text, except in encode_control.

    definition: the text of its tokenizer.json. begin: ids in front of every document and prompt. eot_token: the id that
    ends a document. ends: further ids that end an answer. Raises ValueError for a definition that the library cannot
    use, or ids that it does not have."""

    def __init__(self, definition, begin, eot_token, name, ends=()):
        self.definition, self.begin, self.eot_token, self.name = definition, list(begin), eot_token, name
        self.ends = [token for token in ends if token != eot_token]
        self._fast, self._control = _open(definition), None
        self._fast.encode_special_tokens = True
        self.n_vocab = 1 + max(self._fast.get_vocab().values(), default=-1)
        ends = [eot_token, *self.ends]
        if any(self._fast.id_to_token(token) is None for token in [*self.begin, *ends]):
            ends = " and ".join(map(str, ends))
            raise ValueError(f"{name}: no tokens have the ids {self.begin} and {ends} of begin and end of text")
        special = {str(token): i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        self.special = set(special.values())
        self._inside = re.compile("|".join(f"(?<={re.escape(s[:1])})(?={re.escape(s[1:])})" for s in special) or "(?!)")
        self._a = self.encode_ordinary("a")
        self._decoded_a = self._fast.decode(self._a)

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        """The ids of each text. The library chooses the number of threads (RAYON_NUM_THREADS)."""
        found = [encoded.ids for encoded in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        for i, ids in enumerate(found):
            if not self.special.isdisjoint(ids):  # unigram models find them all the same: cut their names in two
                parts = self._fast.encode_batch_fast(self._inside.split(texts[i]), add_special_tokens=False)
                found[i] = [token for part in parts for token in part.ids if token not in (*self.begin, self.eot_token)]
        return found

    def encode_control(self, text):
        """The ids of a chat's text, in which the names of special tokens become these tokens."""
        self._control = self._control or _open(self.definition)
        return self._control.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of a continuation. SentencePiece drops the first space of a text, so "a" goes before it."""
        return self._fast.decode([*self._a, *ids])[len(self._decoded_a) :]


def from_folder(directory):
    """The tokenizer of a Hugging Face folder; ValueError where it is missing, damaged or names no end of text.

    begin is what the tokenizer puts in front of a text (usually <s>, or nothing) unless add_bos_token says otherwise.
    All tokens of eos_token_id end an answer, those of generation_config.json if it has some."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    definition = files.read_text(path, AGAIN)
    optional = [directory / name for name in ("tokenizer_config.json", "generation_config.json", "config.json")]
    settings, *configs = (files.read_json(path, AGAIN) if path.exists() else {} for path in optional)
    fast = _open(definition, str(path))
    texts = (spelled(settings, name) for name in ("bos_token", "eos_token"))
    bos, end_of_text = (fast.token_to_id(text) if isinstance(text, str) else None for text in texts)
    plain, dressed = (fast.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = dressed[: dressed.index(plain[0])] if plain and plain[0] in dressed else []
    if "add_bos_token" in settings:
        begin = [bos] if settings["add_bos_token"] and bos is not None else []
    lists = [named if isinstance(named, list) else [named] for named in (c.get("eos_token_id") for c in configs)]
    lists = [[end for end in ends if type(end) is int] for ends in lists]
    eos = next((end for end in (end_of_text, *(ends[0] for ends in lists if ends)) if end is not None), None)
    if eos is None:
        raise ValueError(f"{directory}: neither eos_token in tokenizer_config.json nor eos_token_id in config.json")
    ends = [end for end in next(filter(None, lists), []) if end >= 0 and fast.id_to_token(end) is not None]
    return Fast(definition, begin, eos, directory.name, ends)
