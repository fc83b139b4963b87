"""Command lines and JSON files from frozen dataclasses.

    @dataclass(frozen=True)
    class Config:
        # Optimiser
        lr: float = 3e-4  # peak learning rate
        steps: int = 1000  # optimiser steps

    cfg = parse(Config)  # python prog.py --lr=1e-3 --steps 2e3   (or --help, or --config=run/config.json --steps=4000)

The dataclass is the only place where a field is written down. Types come from its annotations: int, float, bool, str,
`X | None`, Literal, and tuple[X, ...] for values with commas. Help comes from the comment behind each field, its
headings from comment lines between fields, ranges from `__post_init__`. Fields named in the class variable POSITIONAL
are words without a flag; if the last of them is a tuple, it takes any number of words. A class with a static method
`preset_fields(name) -> dict` understands --preset=NAME. From weakest to strongest: defaults, --config, --preset
(without --config also its default), the other flags.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import json
import math
import sys
import tempfile
import textwrap
import tokenize
import types
import typing
import zlib
from pathlib import Path

BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def require(ok, name, value, remedy):
    """ValueError naming the field, its value and the remedy, unless ok."""
    if not ok:
        raise ValueError(f"{name}={shown(value)}: {remedy}")


def shown(value):
    """repr(value), short enough for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; a list nested too deeply
        return f"({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def make_directory(path, name, value):
    """The directory as a Path, made if missing. ValueError blames the field `name` where nothing can be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        require(False, name, value, f"nothing can be written to {path} ({error.strerror}); name another directory")
    return path


# Names and values in files of earlier versions. A field that is renamed or goes gets a row here (its new name or None);
# BEFORE says how a program behaved before a field existed, where that is not the default of today.
RENAMED: dict = {}
CHANGED = {"compile": {True: "true", False: "false"}, "loss_chunk": {0: 16384}, "parallel": {"fsdp": "ddp"}}
BEFORE = {"optimizer": "adamw"}
NOTES = ("crc", "resumed_with")  # members of a config.json that are no fields: its checksum, and see optimoe/run.py


def renamed(values, known=()):
    """The members of a configuration of any earlier version under the names and with the values of today."""
    found = {}
    for name, value in values.items():
        name = name if name in known else RENAMED.get(name, name)
        if name is not None and name not in NOTES:
            found[name] = CHANGED.get(name, {}).get(value, value) if isinstance(value, (int, str)) else value
    return found


def complete(cls, values):
    """The same with all fields of today's `cls`; one that did not exist yet says what was done then."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    defaults |= {name: value for name, value in BEFORE.items() if name in defaults}
    found = defaults | renamed(values, defaults)
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


def parse(cls, argv=None, description="", start=None):
    """Build a `cls` from command-line words, and from the values `start` (a dict) where they say nothing.

    argv: list of str, or None for sys.argv[1:]. Flags are --field=value or --field value; a bool is --flag or
    --flag=false; hyphens and underscores are the same; a repeated flag keeps its last value. --help prints the fields
    and exits. With argv=None a mistake ends the program with its message; with a list it raises ValueError or OSError.
    """
    if argv is None:
        try:
            return parse(cls, sys.argv[1:], description, start)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    words = [word for word in argv if word not in ("--help", "-h")]
    if len(words) < len(argv):
        print(help_text(cls, description, words))
        sys.exit(0)
    flags = split_flags(cls, argv)
    values, _ = _start(cls, flags, start)
    values |= _converted(cls, {name: text for name, text in flags.items() if name != "config"})
    for field in dataclasses.fields(cls):
        missing = field.name not in values and field.default is field.default_factory is dataclasses.MISSING
        require(not missing, field.name, "", "it is required; --help lists the fields")
    return cls(**values)


def command_line(main, stopped=""):
    """Call main(): a mistake ends the process with one line, Ctrl-C with the line `stopped`."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(stopped)


def split_flags(cls, argv):
    """{field, or "config": text on the command line}; of a positional tuple, the list of its words."""
    hints = typing.get_type_hints(cls)
    flags, words, positional = {}, list(argv), list(getattr(cls, "POSITIONAL", ()))
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            if name != "config":
                _check_name(cls, name)
            if not equals:
                if hints.get(name) is not bool and not words:
                    raise ValueError(f"--{name} needs a value: write --{name}=VALUE")
                text = "true" if hints.get(name) is bool else words.pop(0)
            flags[name] = text
        elif not positional:
            remedy = "write --field=value (a bool takes its value only with '=')"
            raise ValueError(f"unexpected argument {word!r}: {remedy}")
        elif typing.get_origin(hints[positional[0]]) is tuple:
            before = flags.get(positional[0], [])
            flags[positional[0]] = [*(before.split(",") if isinstance(before, str) else before), word]
        else:
            flags[positional.pop(0)] = word
    return flags


def _start(cls, flags, start=None):
    """(values of fields before the other flags, name of the preset among their sources)"""
    values = _converted(cls, start or {})
    if "config" in flags:
        values |= _read(cls, flags["config"])
    preset = flags.get("preset", "" if values else getattr(cls, "preset", ""))
    if preset and hasattr(cls, "preset_fields"):
        values |= cls.preset_fields(preset) | {"preset": preset}
    return values, preset


def load(cls, path):
    """A `cls` from a JSON file. FileNotFoundError, or ValueError for damage, unknown fields and bad values."""
    return cls(**_read(cls, path))


def help_text(cls, description="", argv=()):
    """The --help page: every field with its type, the value with which the program runs after argv, its comment."""
    notes, headings = _comments(cls)
    hints = typing.get_type_hints(cls)
    values, preset = _start(cls, split_flags(cls, argv))
    marked = cls.preset_fields(preset) if preset and hasattr(cls, "preset_fields") else {}
    bools = "bools --flag or --flag=false"
    lines = [description.strip(), ""] if description else []
    lines += [f"usage: --field=value or --field value; {bools}; --config=FILE.json loads saved values"]
    if marked:
        lines += [f"* value of --preset={preset}; --preset=NAME --help shows those of another preset"]
    for field in dataclasses.fields(cls):
        if field.name in headings:
            lines += ["", headings[field.name] + ":"]
        default = values.get(field.name, field.default)
        default = "required" if default is dataclasses.MISSING else repr(default) + " *" * (field.name in marked)
        flag = field.name if field.name in getattr(cls, "POSITIONAL", ()) else "--" + field.name
        flag += " " + _type_name(hints[field.name])
        lines.append(f"  {flag:<34} {default:<11}  {notes.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def _read(cls, path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; check the path")
    try:
        values = json.loads(path.read_text())
        damaged = isinstance(values, dict) and "crc" in values and values.pop("crc") != _crc(values)
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8; nested too deeply
        raise ValueError(f"{path}: not valid JSON ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; a JSON object of field: value is needed")
    if damaged:
        raise ValueError(f"{path} is damaged: its checksum differs; restore it from a copy, or delete the member crc")
    return _converted(cls, {name: value for name, value in values.items() if name not in NOTES}, f"{path}: ")


def _crc(values):
    """The checksum that data/files.py writes. It is repeated here because this module imports nothing of ours."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _converted(cls, values, where=""):
    """Texts or JSON values as the types of the fields of `cls`; ValueError for one that is no field."""
    hints = typing.get_type_hints(cls)
    for name in values:
        _check_name(cls, name, where)
    return {name: _convert(name, value, hints[name]) for name, value in values.items()}


def _check_name(cls, name, where=""):
    names = [field.name for field in dataclasses.fields(cls)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.65)  # at 0.5 'help' is near 'eps'
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the fields"
        raise ValueError(f"{where}unknown field {name!r}: {hint}")


def _convert(name, value, hint):
    """A string from the command line, or a JSON value, as the annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or str(value).lower() == "none":
            return None
        return _convert(name, value, next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        require(isinstance(items, (list, tuple)), name, value, "use values with commas between them")
        return tuple(_convert(name, item, args[0]) for item in items if item != "")
    if origin is typing.Literal:
        options = {str(option): option for option in args}
        require(str(value) in options, name, value, "use one of " + ", ".join(options))
        return options[str(value)]
    if hint is bool:
        require(str(value).lower() in BOOLS, name, value, "use true or false")
        return BOOLS[str(value).lower()]
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            if hint is int and isinstance(value, (int, str)) and str(value).lstrip("+-").replace("_", "").isdigit():
                return int(value)  # exact beyond 2^53, where a float is not
            number = float(value)
            if math.isfinite(number) if hint is float else number == int(number):
                return hint(number)
        except (TypeError, ValueError, OverflowError):  # not a number, or int(inf), int(nan)
            pass
    kind = {int: "a whole number (1e6 is one)", float: "a finite number", str: "text"}[hint]
    raise ValueError(f"{name}={shown(value)}: {kind} is needed")


def _type_name(hint):
    if typing.get_origin(hint) is tuple:
        return _type_name(typing.get_args(hint)[0]) + ",..."
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(option) for option in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace(" | None", "?")


def _comments(cls):
    """({field: trailing comment}, {first field under it: heading}) read from the source of cls and of its bases."""
    notes, headings = {}, {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        comments = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)  # in parentheses, the comment is not on the last line
                notes[node.target.id] = " ".join(comments[line][0] for line in lines if line in comments)
                heading, own_line = comments.get(node.lineno - 1, ("", False))
                if own_line:
                    headings[node.target.id] = heading
    return notes, headings
