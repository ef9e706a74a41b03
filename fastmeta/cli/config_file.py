"""`--config FILE`: a command's options from a TOML file, by their names; and the file that a run leaves behind."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..training import RunConfig

_NOT_IN_A_FILE = ("config", "debug", "resume", "fall-back", "help")
_OPTION_OF = {"augmentation": "augment", "settings": "set"}  # where a run's setting has another name than its option


def options_of(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """What `path` says of the options of the command in `ctx`, by the names of the command's parameters.

    A key is an option's name, with dashes or underscores, or the argument's. Values are numbers, true and false, and
    strings; of `hidden` a list of numbers too, and of `set` and `augment`, which may be given often, a table.

    Raises:
        ValueError: what is no TOML, a key that is no option (with the nearest that is one) or stands there twice, a
            value of another type than the option's or outside what it allows. OSError: a file that cannot be read.
            ImportError: Python 3.10 without tomli.
    """
    given = _parsed(path)
    kinds = _kinds(ctx)
    parameters = {_name(parameter): parameter for parameter in ctx.command.params}
    allowed = [name for name in parameters if name not in _NOT_IN_A_FILE]
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("_", "-")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(allowed))}"
            raise ValueError(f"{path}: there is no option {key}; {hint}")
        parameter = parameters[name]
        if parameter.name in found:
            raise ValueError(f"{path}: {name} stands there twice, with a dash and with an underscore")
        found[parameter.name] = _typed(f"{path}: {key}", name, value, kinds[parameter.name])
        try:
            parameter.process_value(ctx, found[parameter.name])
        except typer.BadParameter as error:
            raise ValueError(f"{path}: {key}: {error.message}") from error
    return found


def write_settings(path: Path, config: RunConfig, **more: Any) -> None:
    """Write all settings of a run, and `more` options, as a file that `--config` reads, whole or not at all. What is
    None or empty is left out: it is the default."""
    from ..training.checkpoint import write_whole

    settings = {_OPTION_OF.get(name, name).replace("_", "-"): value for name, value in config.as_json().items()}
    settings |= {name.replace("_", "-"): value for name, value in more.items()}
    tables = {name: dict(settings.pop(name)) for name in _OPTION_OF.values()}
    lines = ["# fastmeta train --config FILE reads this; what the command line gives is taken before it"]
    lines += _lines(settings)
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *_lines(table)]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def _parsed(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ImportError("--config needs Python 3.11, or: pip install tomli") from error
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error


def _name(parameter: Any) -> str:
    """As it is typed, without its dashes."""
    return max(parameter.opts, key=len).lstrip("-").replace("_", "-")


def _kinds(ctx: typer.Context) -> dict[str, type]:
    """The type of each parameter, of `X | None` the X."""
    kinds = {}
    for name, hint in typing.get_type_hints(ctx.command.callback).items():
        others = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        kinds[name] = others[0] if type(None) in typing.get_args(hint) else hint
    return kinds


def _typed(where: str, name: str, value: Any, kind: type) -> Any:
    """`value` as the command line would have it."""
    if name in _OPTION_OF.values():
        if isinstance(value, dict):
            return [f"{key}={json.dumps(one)}" for key, one in value.items()]
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
        raise ValueError(f"{where} must be a table, or a list of strings NAME=VALUE, got {_shown(value)}")
    if name == "hidden" and isinstance(value, list) and all(type(one) is int for one in value):
        return ",".join(map(str, value))
    if name == "task-chunk" and type(value) is int:
        return str(value)
    if kind is bool:
        fits, what = type(value) is bool, "true or false"
    elif kind is int:
        fits, what = type(value) is int, "a whole number"
    elif kind is float:
        fits, what = type(value) in (int, float), "a number"
    elif typing.get_origin(kind) is list:
        fits, what = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of strings"
    else:
        fits, what = isinstance(value, str), "a string"
    if not fits:
        raise ValueError(f"{where} must be {what}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _lines(settings: Mapping[str, Any]) -> Iterable[str]:
    return [f"{name} = {_literal(value)}" for name, value in settings.items() if value not in (None, (), [])]


def _literal(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):  # what JSON escapes, TOML reads alike, but it wants one more character escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
