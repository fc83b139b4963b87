"""Examples for fine-tuning: rows with a prompt and an answer, or with the messages of a chat. Only answers are targets.

    {"prompt": "2 + 2 =", "answer": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

The chat template in the tokenizer's folder turns messages into text. Some templates rewrite earlier answers (they drop
the reasoning in them); then the next answer starts a new example. The special token that the template puts at the end
of an answer also ends generation. Until it is encoded, a row is the JSON of its pieces of text:
[is it a chat, [[[piece, is it a target], ...] for each example]].
"""

import json
import re
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch needs jinja2, so it is there

from data import files
from data.fast import AGAIN, inside, spelled
from data.shards import START, TRAINED
from data.tokenizer import context_ids, tiktoken_tokens
from optimoe.config import require

TEMPLATE = "chat_template.jinja"


def template_source(directory):
    """(the chat template of a Hugging Face folder, or None; the contents of its tokenizer_config.json)."""
    path, separate = Path(directory, "tokenizer_config.json"), Path(directory, TEMPLATE)
    settings = files.read_json(path, AGAIN) if path.is_file() else {}
    source = files.read_text(separate, AGAIN) if separate.is_file() else settings.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else None
    return source or None, settings


def chat_template(directory):
    """The function text(messages, does an answer follow) of a Hugging Face folder; None if it has no template."""
    source, settings = template_source(directory)
    if source is None:
        return None
    tokens = {name: spelled(settings, name) for name in settings if name.endswith("_token")}
    tokens = {name: text for name, text in tokens.items() if isinstance(text, str)} | {"tools": None, "documents": None}
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes for HTML

    def text(messages, answer):
        try:
            return template.render(messages=messages, add_generation_prompt=answer, **tokens)
        except Exception as error:  # a template is somebody else's program
            raise ValueError(f"the chat template of {directory} refuses the messages ({error}); change them") from None

    try:
        # The tag {% generation %} marks answers for transformers; jinja2 does not know it.
        source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
        template = environment.from_string(re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source))
    except Exception as error:
        raise ValueError(f"the chat template of {directory} is damaged ({error}): {AGAIN}") from None
    return text


def _refuse(reason):  # templates call it where roles do not alternate
    raise ValueError(reason)


def example(row, where, template):
    """The JSON of a row's examples, as described above. ValueError names `where`, the place of the row."""
    names = row if isinstance(row, dict) else {}
    prompt, answer, messages = map(names.get, ("prompt", "answer", "messages"))
    if isinstance(prompt, str) and isinstance(answer, str):
        return _kept(False, [[[prompt, False], [answer, True]]])
    if not isinstance(messages, list):
        there = ", ".join(names) or type(row).__name__
        remedy = 'an example is {"prompt": TEXT, "answer": TEXT} or {"messages": [...]}'
        raise ValueError(f"{where} is no example (it has: {there}): {remedy}")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        whole = isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)
        require(whole, f"{where}: message {number}", message, 'it needs "role" and "content", both of them texts')
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    require(turns, f"{where}: messages", messages, 'none has the role "assistant", so there is no answer to train')
    if not template:
        raise ValueError(f"{where}: messages need a --tokenizer with a chat template; or use prompt and answer")
    examples, text = [], None
    for i in turns:
        try:
            asked, answered = template(messages[:i], True), template(messages[: i + 1], False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not answered.startswith(asked):
            raise ValueError(f"{where}: the chat template begins answers in another way than it asks for them")
        if text is None or not asked.startswith(text):
            examples, text = [*examples, []], ""
        examples[-1] += [[asked[len(text) :], False], [answered[len(asked) :], True]]
        text = answered
    return _kept(True, examples)


def _kept(chat, examples):
    clean = lambda text: text.encode("utf-8", "replace").decode()  # "\ud800" alone becomes "?"
    return json.dumps([chat, [[[clean(p), target] for p, target in pieces] for pieces in examples]], ensure_ascii=False)


def encode(enc, text):
    """(ids, number of bytes of text, marks as in data/shards.py) of a row's examples, each ended by eos."""
    chat, examples = json.loads(text)
    ids, sizes, marks = zip(*(_encoded(enc, chat, pieces) for pieces in examples), strict=True)
    return np.concatenate(ids), sum(sizes), np.concatenate(marks)


def _end(enc, answer):
    """The special token after which an answer (ids) has only white space; None if there is none."""
    last = next((token for token in reversed(answer) if token in enc.special or enc.decode([token]).strip()), None)
    return last if last in enc.special else None


def _encoded(enc, chat, pieces):
    # No token lies across the end of a prompt, because generation begins there.
    read = enc.encode_control if chat else enc.encode_ordinary
    ids, trained, before = [], [], ""
    for piece, target in pieces:
        whole = read(before + piece)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else inside(read, piece)
        ids, trained, before = ids + new, trained + [target] * len(new), before + piece
        if chat and target and (end := _end(enc, new)) not in (None, enc.eot_token, *enc.ends):
            enc.ends.append(end)  # data.shards keeps it in meta.json
    if not chat:  # as in evaluation and sampling
        prompt = pieces[0][0]
        context = context_ids(tiktoken_tokens(enc), prompt)
        begin = context[: len(context) - len(read(prompt))]
        ids, trained = [*begin, *ids], [False] * len(begin) + trained
    if not chat or ids[-1:] != [enc.eot_token]:
        ids, trained = [*ids, enc.eot_token], [*trained, not chat]
    marks = np.array(trained, np.uint8) * TRAINED
    marks[0] |= START
    return np.array(ids, np.uint32), len(before.encode()), marks
