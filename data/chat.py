"""Examples to imitate: rows with a prompt and an answer, or with the messages of a chat. Only answers are targets.

    {"prompt": "2 + 2 =", "answer": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Messages become text by the chat template of the tokenizer's folder. An example is kept as the JSON of its pieces of
text, [is it a chat, [[piece, is it a target], ...]], until it is encoded.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import files
from data.fast import AGAIN
from data.shards import START, TRAINED

TEMPLATE = "chat_template.jinja"


def template_source(directory: str | Path) -> tuple[str | None, dict]:
    """(the chat template of a Hugging Face folder or None, its tokenizer_config.json)"""
    settings_file, source_file = Path(directory) / "tokenizer_config.json", Path(directory) / TEMPLATE
    settings = files.read_json(settings_file, AGAIN) if settings_file.is_file() else {}
    source = files.read_text(source_file, AGAIN) if source_file.is_file() else settings.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source or None, settings


def chat_template(directory: str | Path) -> Callable[[list, bool], str] | None:
    """template(messages, whether an answer is to follow) of a Hugging Face folder; None where it has none."""
    source, settings = template_source(directory)
    if source is None:
        return None
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"the chat template of {directory} needs jinja2: pip install jinja2") from None
    tokens = {name: settings.get(name) or "" for name in ("bos_token", "eos_token")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse

    def text(messages, answer):
        try:
            return template.render(messages=messages, add_generation_prompt=answer, **tokens)
        except Exception as error:  # the template is a program of others
            raise ValueError(
                f"the chat template of {directory} refuses these messages ({error}); change them"
            ) from None

    try:
        template = environment.from_string(source)
    except Exception as error:
        raise ValueError(f"the chat template of {directory} is damaged ({error}): {AGAIN}") from None
    return text


def _refuse(reason: str):  # what templates call where roles do not alternate
    raise ValueError(reason)


def example(row: object, where: str, template: Callable | None) -> str:
    """The JSON of a row's pieces. ValueError naming `where` for a row that is no example."""
    row = row if isinstance(row, dict) else {}
    prompt, answer, messages = row.get("prompt"), row.get("answer"), row.get("messages")
    if isinstance(prompt, str) and isinstance(answer, str):
        return _kept(False, [[prompt, False], [answer, True]])
    known = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"] if known else []
    if not turns:
        remedy = 'an example is {"prompt": ..., "answer": ...} or {"messages": [...]} with one of an assistant'
        raise ValueError(f"{where} is no example (it has: {', '.join(row)}): {remedy}")
    if not template:
        raise ValueError(f"{where}: messages need a --tokenizer with a chat template; or use prompt and answer")
    pieces, text = [], ""
    for i in turns:
        try:
            asked, answered = template(messages[:i], True), template(messages[: i + 1], False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not asked.startswith(text) or not answered.startswith(asked):
            raise ValueError(f"{where}: the chat template changes earlier messages; split this chat at its answers")
        pieces += [[asked[len(text) :], False], [answered[len(asked) :], True]]
        text = answered
    return _kept(True, pieces)


def _kept(chat: bool, pieces: list) -> str:
    clean = [[piece.encode("utf-8", "replace").decode(), target] for piece, target in pieces]  # no half characters
    return json.dumps([chat, clean], ensure_ascii=False)


def documents(enc, texts: list[str]) -> list[tuple[np.ndarray, int, np.ndarray]]:
    """`encode` for a batch of examples, as data.prepare calls it."""
    return [encode(enc, text) for text in texts]


def encode(enc, text: str) -> tuple[np.ndarray, int, np.ndarray]:
    """(ids, bytes of text, marks) of an example, ended by eos. Its pieces are encoded as they are when a model answers:
    tokens do not merge across the end of a prompt."""
    chat, pieces = json.loads(text)
    read = getattr(enc, "encode_control", enc.encode_ordinary) if chat else enc.encode_ordinary
    ids, trained, before = [], [], ""
    for piece, target in pieces:
        whole = read(before + piece)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else _inside(read, piece)
        ids, trained, before = ids + new, trained + [target] * len(new), before + piece
    begin = [] if chat else list(getattr(enc, "begin", []))
    if not chat or ids[-1:] != [enc.eot_token]:
        ids, trained = [*ids, enc.eot_token], [*trained, not chat]
    marks = np.array([0] * len(begin) + trained, np.uint8) * TRAINED
    marks[0] |= START
    return np.array([*begin, *ids], np.uint32), len(before.encode()), marks


def _inside(read: Callable[[str], list[int]], piece: str) -> list[int]:
    """The ids of a text behind others: SentencePiece puts a space in front of one that stands alone."""
    for letter in "a", "\n":
        head, whole = read(letter), read(letter + piece)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return read(piece)
