"""Text from a model, printed as it is generated.

    python sample.py --run=runs/NAME --prompt="Alice was"
    python sample.py --hf=ORG/NAME  # asks for prompts

Without --prompt every line of the standard input is a prompt; Ctrl-D or Ctrl-C ends. If the model, or the one from
which the run was fine-tuned, has a chat template, this is a chat. The same flags give the same text.
"""

import sys
from dataclasses import dataclass

from eval.generate import generate
from eval.harness import cut_at
from eval.taskloss import context_ids
from optimoe.config import command_line, parse, require
from optimoe.load import ModelChoice, load
from optimoe.start import chat_encoder


@dataclass(frozen=True)
class SampleConfig(ModelChoice):
    # Text
    prompt: str = ""  # empty: each line of the standard input
    number: int = 1  # texts per prompt
    max_new_tokens: int = 256
    temperature: float = 0.8  # 0: greedy
    top_p: float = 0.95  # sample from the smallest set of tokens with this probability
    top_k: int = 0  # sample from this many of the likeliest tokens at most; 0: all
    seed: int = 0
    stop: str = ""  # end before this text; several with | between them, \n is a line end
    chat: bool = True  # use the chat template of a published model if it has one, and remember the conversation

    def stops(self):
        stops = tuple(stop.replace("\\n", "\n") for stop in self.stop.split("|") if stop)
        require(stops or not self.stop, "stop", self.stop, "it holds no text")
        return stops


class Stream:
    """Prints the text of growing ids, but holds back an unfinished character and the possible start of a stop
    string."""

    def __init__(self, tokens, stops):
        self.tokens, self.stops, self.shown = tokens, stops, 0
        self.held = max(map(len, stops), default=1) - 1

    def __call__(self, _, ids, last=False):
        text = cut_at(self.tokens.decode(ids), self.stops)
        end = len(text) if last else max(self.shown, len(text.rstrip("\ufffd")) - self.held)
        print(text[self.shown : end], end="\n" if last else "", flush=True)
        self.shown = end
        return text


def write(loaded, ids, cfg, number):
    """Generate text number `number` after ids, print it as it grows, and return it."""
    (model, tokens, *_), stops = loaded, cfg.stops()
    room, stream = model.cfg.seq_len - len(ids), Stream(tokens, stops)
    require(room > 0, "prompt", f"{len(ids)} tokens", f"the model reads {model.cfg.seq_len} at most; shorten it")
    options = {name: getattr(cfg, name) for name in ("temperature", "top_p", "top_k", "seed")}
    options |= dict(n_vocab=tokens.n_vocab, stop_strings=stops, decode=tokens.decode, streams=[number], watch=stream)
    (new,) = generate(model, [ids], min(cfg.max_new_tokens, room), tokens.eos, **options)
    return stream(0, new, last=True)


def lines():
    """The lines of the standard input; on a terminal with a prompt sign."""
    require(sys.stdin, "prompt", "", "there is no standard input to read it from; give one")
    sign = "> " if sys.stdin.isatty() else ""
    print(sign, end="", flush=True)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")
        print(sign, end="", flush=True)


def main(argv=None):
    cfg = parse(SampleConfig, argv, __doc__)
    require(cfg.number >= 1, "number", cfg.number, "use 1 or more")
    cfg.stops()
    loaded, messages = load(cfg), []
    name = cfg.hf or cfg.run or cfg.checkpoint
    encode_chat = chat_encoder(name, loaded.tokens, cfg.data_directory()) if cfg.chat else None
    for prompt in [cfg.prompt] if cfg.prompt else lines():
        prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are not UTF-8
        messages.append({"role": "user", "content": prompt})
        ids = encode_chat(messages) if encode_chat else context_ids(loaded.tokens, prompt)
        while encode_chat and len(ids) >= loaded.model.cfg.seq_len and len(messages) > 1:
            del messages[:2]  # the oldest question and its answer
            ids = encode_chat(messages)
        try:
            answers = [write(loaded, ids, cfg, number) for number in range(cfg.number)]
        except ValueError as error:  # the prompt is too long, but the next line need not be
            if cfg.prompt:
                raise
            print(f"error: {error}", file=sys.stderr)
            del messages[-1]
            continue
        messages.append({"role": "assistant", "content": answers[0]})


if __name__ == "__main__":
    command_line(main)
