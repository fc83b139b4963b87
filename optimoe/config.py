"""Command lines and JSON files from frozen dataclasses.

    @dataclass(frozen=True)
    class Config:
        # Optimiser
        lr: float = 3e-4  # peak learning rate

    cfg = parse(Config)  # python prog.py --lr=1e-3   (or --help, or --config=run/config.json --lr=1e-3)

Types come from annotations (int, float, bool, str, `X | None`, Literal, tuple[X, ...] with commas), help from the
comment behind a field, headings from comment lines, ranges from `__post_init__`. Fields named in the class variable
POSITIONAL take words without a flag; a tuple at their end takes any number. A static method `preset_fields(name)` adds
--preset, `start_fields(flags)` gives other defaults. A --config file with all names in the set RUN may have unknown
ones too: it is that of a run, which has more fields. Each of these overrides the ones before: defaults, start_fields,
--config, --preset (the default preset only without start_fields and --config), other flags.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import select
import sys
import tempfile
import textwrap
import types
import typing
from pathlib import Path

from data import files

ROOM = 2**16  # bytes that must be free on a disk that is written to
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def require(ok, name, value, remedy):
    """Raises ValueError with the field, its value and the remedy, unless ok."""
    if not ok:
        raise ValueError(f"{name}={shown(value)}: {remedy}")


def check_range(cfg, names, least=0, most=2**63 - 1):
    """Raises ValueError unless each field of cfg in the text `names` is in [least, most]."""
    for name in names.split():
        value = getattr(cfg, name)
        require(value >= least, name, value, f"use {least} or more")
        require(value <= most, name, value, f"use {most:,} or less")


def shown(value):
    """repr(value), short enough for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more than 4,300 digits; a list nested too deeply
        return f"({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:150]}...{text[-40:]}"


def make_directory(path, name, value):
    """The directory as a Path, made if missing. Raises ValueError, blaming field `name`, if it is not writable or has
    no room; what was made is then removed."""
    path = Path(path)
    made = [new for new in (path, *path.parents) if not os.path.exists(new)]
    remedy = "its name is not UTF-8, which torch cannot open; name another directory"
    require(str(path) == str(path).encode(errors="replace").decode(), name, value, remedy)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        for new in made:
            with contextlib.suppress(OSError):  # it was not made, or another process uses it
                new.rmdir()
        space = "free some space or " if error.errno == errno.ENOSPC else ""
        remedy = f"nothing can be written to {path} ({error.strerror}); {space}name another directory"
        require(False, name, value, remedy)
    return path


def check_file(path, name, device=True):
    """Raises ValueError, blaming field `name`, if no file can be written to this path. Makes its directory.

    device: whether the path may be a device or a pipe. torch's profiler would replace it by a file."""
    path = Path(path)
    require(device or not path.exists() or path.is_file() or path.is_dir(), name, str(path), "name an ordinary file")
    require(not path.is_dir(), name, str(path), "this is a directory; name a file in it")
    if not path.exists():  # a device is left as it is
        make_directory(path.parent, name, str(path))
    writable = not path.exists() or os.access(path, os.W_OK)
    require(writable, name, str(path), "this file cannot be written to; name another file")


# For files of earlier versions: new names of fields (None: gone), new values, and what was done before a field existed.
# --logger is for torchrun, which takes --log for a flag of its own.
RENAMED: dict = {"upcycle_noise": None, "logger": "log"}
CHANGED = {"compile": {True: "true", False: "false"}, "loss_chunk": {0: 16384}, "parallel": {"fsdp": "ddp"}}
BEFORE = {"optimizer": "adamw"}
# Not settings of a run: a note of optimoe/run.py in config.json, and flags that hold for one call only.
NOT_FIELDS = ("resumed_with", "resume", "trace")


def renamed(values, known=()):
    """An earlier version's configuration, with today's names and values. Names in `known` are kept."""
    found = {}
    for name, value in values.items():
        name = name if name in known else RENAMED.get(name, name)
        if name is not None and name not in NOT_FIELDS and name != files.CRC:
            found[name] = CHANGED.get(name, {}).get(value, value) if isinstance(value, (int, str)) else value
    return found


def complete(cls, values):
    """`values` with all fields of `cls`; missing ones say what was done before they existed."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    defaults |= {name: value for name, value in BEFORE.items() if name in defaults}
    return defaults | renamed(values, defaults)


def parse(cls, argv=None, description="", start=None):
    """A `cls` from command-line words (None: sys.argv[1:]), with the dict `start` as its defaults.

    Flags are --field=value or --field value; a bool is --flag or --flag=false; hyphens are underscores; the last flag
    of a name counts; --help prints the fields and exits. Raises ValueError or OSError for a mistake."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("--help", "-h")]
    if len(words) < len(argv):
        print(help_text(cls, description, words, start))
        sys.exit(0)
    flags = split_flags(cls, argv)
    values = _start(cls, flags, start) | _converted(cls, {name: flags[name] for name in flags if name != "config"})
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        value = values.get(field.name, "" if required else field.default)  # "": a shell variable that is not set
        empty = value == "" and required or value == () != field.default  # a list that chooses nothing
        require(not empty, field.name, "", "it is required; --help lists the fields")
    return cls(**values)


def no_reader():
    """Whether nobody reads the standard output any more, as after `| head`."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def out_of_memory(error):
    """The line that ends a program that is out of memory; None for another error."""
    text, words = str(error), ("allocate memory", "enough memory", "out of memory")
    if not isinstance(error, MemoryError) and not any(part in text for part in words):
        return None
    return f"error: out of memory ({text.splitlines()[0] if text else 'no bytes left'}); use a smaller batch or model"


def command_line(main, stopped=""):
    """main(). A user's mistake ends the process with one line, and Ctrl-C with the line `stopped`."""
    try:
        return main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and no_reader():
            os._exit(1)
        line = out_of_memory(error)
        if not line and not isinstance(error, (ValueError, OSError)):
            raise
        sys.exit(line or f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(stopped)


def split_flags(cls, argv):
    """{field or "config": text}. A positional tuple has the list of its words."""
    hints = typing.get_type_hints(cls)
    flags, words, positional = {}, list(argv), list(getattr(cls, "POSITIONAL", ()))
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            if name != "config":
                name = RENAMED[name] if RENAMED.get(name) in hints else name
                _check_name(cls, name)
            if not equals:
                if hints.get(name) is not bool and not words:
                    raise ValueError(f"--{name} needs a value: write --{name}=VALUE")
                text = "true" if hints.get(name) is bool else words.pop(0)
            flags[name] = text
        elif not positional:
            raise ValueError(f"unexpected argument {word!r}: write --field=value (a bool takes a value only with '=')")
        elif typing.get_origin(hints[positional[0]]) is tuple:
            before = flags.get(positional[0], [])
            flags[positional[0]] = [*(before.split(",") if isinstance(before, str) else before), word]
        else:
            flags[positional.pop(0)] = word
    return flags


def _start(cls, flags, start=None):
    """Values of fields before the other flags: from `start`, --config and --preset."""
    if start is None and hasattr(cls, "start_fields"):
        start = cls.start_fields(flags)
    values, path = _converted(cls, start or {}), flags.get("config")
    if path is not None:
        require(Path(path).is_file(), "config", path, "no such config file")
        known = {field.name for field in dataclasses.fields(cls)}
        found = renamed(files.read_json(path), known)
        if "out_dir" in found:  # of a whole run, perhaps of an earlier version
            found = {name: value for name, value in BEFORE.items() if name in known} | found
        if hasattr(cls, "RUN") and cls.RUN <= found.keys():
            found = {name: found[name] for name in found if name in known}
        values |= _converted(cls, found, f"{path}: ")
    preset = flags.get("preset", "" if values else getattr(cls, "preset", ""))
    if preset and hasattr(cls, "preset_fields"):
        values |= cls.preset_fields(preset) | {"preset": preset}
    return values


def help_text(cls, description="", argv=(), start=None):
    """The --help page: each field with its type, default (by `start`, --config and --preset of argv) and comment."""
    (notes, headings), hints = _comments(cls), typing.get_type_hints(cls)
    values = _start(cls, split_flags(cls, argv), start)
    lines = [description.strip(), ""] if description else []
    lines += ["usage: --field=value; bools --flag or --flag=false; --config=FILE.json loads saved values"]
    if hasattr(cls, "preset_fields"):
        lines += ["--preset=NAME --help shows the values of another preset"]
    for field in dataclasses.fields(cls):
        if field.name in headings:
            lines += ["", headings[field.name] + ":"]
        default = values.get(field.name, field.default)
        default = "required" if default is dataclasses.MISSING else repr(default)
        flag = field.name if field.name in getattr(cls, "POSITIONAL", ()) else "--" + field.name
        flag += " " + _type_name(hints[field.name])
        lines.append(f"  {flag:<34} {default:<11}  {notes.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def _converted(cls, values, where=""):
    """{field: text or JSON value}, converted to the types of the fields. Raises ValueError for an unknown field."""
    hints = typing.get_type_hints(cls)
    for name in values:
        _check_name(cls, name, where)
    return {name: _convert(name, value, hints[name]) for name, value in values.items()}


def _check_name(cls, name, where=""):
    names = [field.name for field in dataclasses.fields(cls)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.65)  # 0.5 would match 'help' and 'eps'
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the fields"
        raise ValueError(f"{where}unknown field {name!r}: {hint}")


def _convert(name, value, hint):
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
                return int(value)  # exact above 2^53; a float is not
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
    """({field: its comment}, {first field under a heading: heading}), from the source of cls and its bases."""
    notes, headings = {}, {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        heading = None
        for line in textwrap.dedent(inspect.getsource(base)).splitlines():
            code, _, comment = line.partition("# ")
            if re.match(r"    (@|def )", line):
                break
            if field := re.match(r"    (\w+): ", line):
                notes[field[1]] = comment
                if heading:
                    headings[field[1]] = heading
            heading = comment if not code.strip() else None
    return notes, headings
