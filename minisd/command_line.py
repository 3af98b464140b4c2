"""The scripts' command line: options, defaults from a file (--config), and mistakes said in one line.

Imports nothing slow, so that `--help` and a refusal come before torch is loaded.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import inspect
import io
import json
import os
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

import tyro

from minisd.config import TrainConfig
from minisd.errors import UsageError, one_line
from minisd.picture_record import read_record
from minisd.sample_config import SampleConfig

Config = TypeVar("Config", TrainConfig, SampleConfig)


@dataclass(frozen=True)
class _CommandLine(Generic[Config]):
    options: Annotated[Config, tyro.conf.arg(name="")]
    config: Path | None = None
    """Defaults from a TOML file of options, or from the config.json of an earlier run; options given here win."""


def parse_args(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Read the command line into a config; a mistake ends the process with one line on stderr and exit code 2.

    Args:
        config_class: TrainConfig or SampleConfig.
        arguments: the words after the script's name; those of the process if not given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    path = _path_after("--config", words)
    picture = _path_after("--from-png", words) if config_class is SampleConfig else None
    try:
        # tyro would add to the defaults of an option that may be given several times; what is said here replaces them.
        given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
        values = {} if path is None else read_config_file(path, config_class)
        if "from_png" in values:
            raise UsageError(f"--config {path}: from_png is not for a file. Give --from-png on the command line.")
        if picture is not None:
            values |= _options_of_picture(picture, given)
        described = _with_whole_texts(config_class)
        defaults = _defaults(described, {name: value for name, value in values.items() if name not in given})
        with tyros_refusal():
            # mypy takes the subscripted class for a plain value.
            command_line: Any = _CommandLine[described]  # type: ignore[valid-type]
            options = tyro.cli(
                command_line,
                args=words,
                default=_CommandLine(options=defaults),
                description=config_class.__doc__,
            ).options
            return config_class(**vars(options))
    except UsageError as error:
        message = str(error)
    for file in (path, picture):
        if file is not None and str(file) not in message:
            message += f" (With the defaults of {file}.)"
    refuse(message)


def _with_whole_texts(config_class: type[Config]) -> type[Config]:
    """The same options with the texts of their help in one piece: tyro breaks a line where the source does."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {
        ast.unparse(option.target): " ".join(ast.literal_eval(text.value).split())
        for option, text in pairwise(definition.body)
        if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    hints = typing.get_type_hints(config_class, include_extras=True)
    options = [
        (option.name, Annotated[hints[option.name], tyro.conf.arg(help=texts[option.name])], copy.copy(option))
        for option in fields(config_class)
    ]
    return make_dataclass(config_class.__name__, options, bases=(config_class,), frozen=True, kw_only=True)


@contextlib.contextmanager
def tyros_refusal() -> Iterator[None]:
    """Turn tyro's explanation of a mistake, which it prints in a frame, into a UsageError; let --help pass."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except BrokenPipeError:  # `--help | head`: who has left does not need the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_out_of_the_frame(said.getvalue())) from None


def _out_of_the_frame(text: str) -> str:
    """What tyro says between the rules of its frames, without their titles, and the options that it suggests."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        if re.search(
            r"\u2500{3}|^ *-{3,} *$", line
        ):  # drawn in box characters, or in ASCII where those cannot be shown
            sections.append([])
        else:
            sections[-1].append(line.strip("\u2502 "))
    said = []
    for section in sections[1:]:
        words = " ".join(section).strip().rstrip(".")
        if words.startswith("Perhaps you meant:"):
            said.append(f"Perhaps you meant {' or '.join(re.findall(r' (--[a-z-]+)', words)[:2])}?")
        elif words and not words.startswith(("Argument helptext:", "For full helptext")):
            said.append(words)
    message = ". ".join(said)
    for python, ours in {
        "invalid literal for int() with base 10:": "expected a whole number, got",
        "could not convert string to float:": "expected a number, got",
    }.items():
        message = message.replace(python, ours)
    if re.match("Unrecognized options: (?!-)", message):
        message += ". A value stands behind its option, as in --output NAME"
    return f"{message}{'' if message.endswith('?') else '.'} See --help."


def refuse(message: str) -> NoReturn:
    """End the process with one line on stderr and exit code 2."""
    print(f"minisd: error {UsageError.name}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(UsageError.exit_code)


def as_json(config: TrainConfig | SampleConfig) -> str:
    """The whole resolved config as JSON, one option a line. `--config` reads it back."""
    return json.dumps(asdict(config), indent=2, default=str) + "\n"


def read_config_file(path: Path, config_class: type[Config]) -> dict[str, Any]:
    """Read the options in a file: TOML, or the JSON that a run saved. Paths in it stay as they are written.

    Args:
        path: ends in .toml or .json.
        config_class: what the options are checked against: their names (dashes or underscores) and their types.

    Returns:
        The options that the file names, as the config's fields have them.

    Raises:
        UsageError: the file cannot be read, or has an unknown option or a value of the wrong type.
    """
    read = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"--config {path}: expected a .toml file, or the config.json of an earlier run.")
    try:
        content = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path}: not valid {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected options by name.")
    return _checked(content, config_class, f"--config {path}")


def _options_of_picture(path: Path, given: Collection[str]) -> dict[str, Any]:
    """The options that a picture was drawn with, to be the defaults of the others. Raises UsageError."""
    options = dict(read_record(path).options)
    if "prompts_file" in given:  # its prompts take the place of the picture's
        options.pop("prompt", None)
    if "model" in given:  # these are about the picture's
        options = {name: options[name] for name in options.keys() - {"revision", "variant", "prediction_type"}}
    if "scheduler" in given:  # and these about the way of its sampler: another may have none of them
        options = {name: options[name] for name in options.keys() - {"karras", "timestep_spacing", "eta"}}
    # A null stands for "not given" in every option that has it.
    options = {name: value for name, value in options.items() if value is not None}
    return _checked(options | {"num_images": 1}, SampleConfig, f"--from-png {path}")


def _checked(content: Mapping[str, Any], config_class: type[Any], where: str) -> dict[str, Any]:
    """The options in a file under their fields' names, with values of their types. Raises UsageError."""
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            help_ = f"Did you mean {near[0]!r}?" if near else "See --help for the options."
            raise UsageError(f"{where}: unknown option {key!r}. {help_}")
        if name in values:
            raise UsageError(f"{where}: {key!r} is given twice, with dashes and with underscores.")
        values[name] = _converted(value, hints[name])
        if values[name] is MISSING:
            raise UsageError(f"{where}: {key} = {value!r}: expected {_wanted(hints[name])}.")
    return values


def _path_after(option: str, words: list[str]) -> Path | None:
    """The value of an option, wherever it stands. tyro needs the values of its file before it reads the words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    spellings = {option, "--" + option[2:].replace("-", "_")}
    parser.add_argument(*spellings, dest="path", nargs="?", type=Path)  # "?": a missing value is for tyro to say
    path: Path | None = parser.parse_known_args(words)[0].path
    return path


def _defaults(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """A config with holes (tyro.MISSING), made without __init__: it is checked when the command line has filled it."""
    config = object.__new__(config_class)
    for field in fields(config_class):
        default = tyro.MISSING if field.default is MISSING else field.default
        object.__setattr__(config, field.name, values.get(field.name, default))
    return config


def _converted(value: Any, hint: Any) -> Any:
    """A value of the file as the type of its option; MISSING if it is of another type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((found for arg in args if (found := _converted(value, arg)) is not MISSING), MISSING)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else MISSING
    if origin is tuple:  # tuple[str, ...] or tuple[float, float]
        right = isinstance(value, list) and (args[-1] is ... or len(value) == len(args))
        found = tuple(_converted(item, args[0]) for item in value) if right else (MISSING,)
        return MISSING if MISSING in found else found
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else MISSING  # type(), because True is an int


def _wanted(hint: Any) -> str:
    """A type in a user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(arg) for arg in args if arg is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        size = "" if args[-1] is ... else f" of {len(args)}"
        return f"a list{size}, each {_wanted(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path as text"}[hint]
