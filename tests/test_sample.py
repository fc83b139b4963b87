"""sample.py: what it prints is what generation gives. Run: python -m pytest tests/test_sample.py (CPU, seconds)"""

import io
import json
import sys

import pytest

import sample
from data.chat import chat_template
from eval.generate import generate
from optimoe.load import ModelChoice, load

pytest_plugins = ("tests.evalrun",)  # its fixture tiny_run


def texts(tiny_run, capsys, *flags):
    sample.main([f"--run={tiny_run}", "--device=cpu", "--max-new-tokens=12", *flags])
    return capsys.readouterr().out


def expected(tiny_run, prompt, **options):
    loaded = load(ModelChoice(run=str(tiny_run), device="cpu"))
    ids = loaded.tokens.bos + loaded.tokens.encode(prompt)
    options = dict(temperature=0.8, top_p=0.95, n_vocab=loaded.tokens.n_vocab) | options
    (new,) = generate(loaded.model, [ids], 12, loaded.tokens.eos, **options)
    return loaded.tokens.decode(new)


def test_prints_what_generation_gives(tiny_run, capsys):
    found = texts(tiny_run, capsys, "--prompt=ab", "--seed=3")
    assert found == expected(tiny_run, "ab", seed=3) + "\n" == texts(tiny_run, capsys, "--prompt=ab", "--seed=3")
    assert found != texts(tiny_run, capsys, "--prompt=ab", "--seed=4")
    greedy = expected(tiny_run, "ab", temperature=0.0)
    assert texts(tiny_run, capsys, "--prompt=ab", "--temperature=0") == greedy + "\n"
    assert texts(tiny_run, capsys, "--prompt=ab", "--temperature=3", "--top_k=1") == greedy + "\n"
    two = texts(tiny_run, capsys, "--prompt=ab", "--seed=3", "--number=2")
    assert two == found + expected(tiny_run, "ab", seed=3, streams=[1]) + "\n"


def test_stop_strings(tiny_run, capsys):
    whole = texts(tiny_run, capsys, "--prompt=ab", "--temperature=0")
    stop = whole[3:5]
    assert (
        texts(tiny_run, capsys, "--prompt=ab", "--temperature=0", f"--stop={stop}|never") == whole.split(stop)[0] + "\n"
    )


def test_lines_of_the_input(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\udcff\n\n  \ncd"))  # \udcff: a byte that is no text
    found = texts(tiny_run, capsys, "--temperature=0")
    assert found == "".join(expected(tiny_run, prompt, temperature=0.0) + "\n" for prompt in ("ab\ufffd", "cd"))


def test_a_line_that_is_too_long_does_not_end_the_conversation(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 64 + "\ncd"))
    assert texts(tiny_run, capsys, "--temperature=0") == expected(tiny_run, "cd", temperature=0.0) + "\n"


class Bytes:
    decode = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))


def test_without_a_standard_input(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # `<&-`
    with pytest.raises(ValueError, match="prompt='': there is no standard input"):
        texts(tiny_run, capsys)


def test_a_stop_string_without_text(tiny_run, capsys):
    with pytest.raises(ValueError, match=r"stop='\|': it holds no text"):
        texts(tiny_run, capsys, "--prompt=ab", "--stop=|")


def test_streams_whole_characters_and_no_stop_string(capsys):
    text, shown = "aé→b###c", []
    stream = sample.Stream(Bytes, ("##!", "###"))
    for n in range(1, len(text.encode()) + 1):
        stream(0, list(text.encode()[:n]))
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == "aé→b"[: len("".join(shown))] and len([part for part in shown if part]) > 2
    assert stream(0, list(text.encode()), last=True) == "aé→b"
    assert "".join(shown) + capsys.readouterr().out == "aé→b\n"


def test_chat_template(tmp_path):
    assert chat_template(tmp_path) is None
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    messages = [{"role": "user", "content": "hi"}]
    settings = {"bos_token": {"content": "<s>"}, "chat_template": source}
    for form in (settings, settings | {"chat_template": [{"name": "default", "template": source}]}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(form))
        assert chat_template(tmp_path)(messages, True) == "<s>[user]hi[assistant]"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert chat_template(tmp_path)(messages, True) == "hi!"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=" + "x" * 64], "prompt='65 tokens': the model reads 64 at most"),
        (["--top_p=0", "--prompt=a"], "top_p=0"),
        (["--top_k=-1", "--prompt=a"], "top_k=-1"),
        (["--checkpoint=x"], "give one of --run"),
    ],
)
def test_mistakes(tiny_run, capsys, flags, message):
    with pytest.raises(ValueError, match=message):
        texts(tiny_run, capsys, *flags)
