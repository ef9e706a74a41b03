"""Own data in one line of text, as the command line takes it: `folder:photos?image_size=32&split_seed=1`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fastmeta import values
from fastmeta.tasks.read._pictures import BACKGROUNDS
from fastmeta.tasks.read.folder import ON_ERROR
from fastmeta.tasks.read.table import MISSING


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


def _side(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError("a number of at least 1")
    return int(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text

    return read


def _list(text: str) -> tuple[str, ...]:
    """Names with commas between; in a name a comma is %2C."""
    return tuple(map(unquote, text.split(",")))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError("three numbers with commas between, such as 0.6,0.2,0.2") from None


_SPLIT = {"fractions": _numbers, "split_seed": _whole}
_CLASSES = {**_SPLIT, "by_group": _flag, "splits": str, "class": str, "split": str}
_PICTURES = {
    **_CLASSES, "image_size": _side, "grey": _flag, "background": _one_of(*BACKGROUNDS), "on_error": _one_of(*ON_ERROR),
    "cache": _flag,
}  # fmt: skip
_TABLE = {
    **_SPLIT, "label": str, "task": str, "target": _list, "features": _list, "one_hot": _list, "ignore": _list,
    "missing": _one_of(*MISSING), "indicator": _flag, "standardise": _flag, "split": str, "splits": str,
    "class": str, "delimiter": str,
}  # fmt: skip
# forms of data, and how the text of each option is read
FORMS: dict[str, dict[str, Callable[[str], Any]]] = {
    "folder": _PICTURES, "zip": _PICTURES, "npz": _CLASSES, "npy": {**_CLASSES, "labels": str},
    "safetensors": _CLASSES, "csv": _TABLE, "parquet": _TABLE,
}  # fmt: skip


IN_A_PATH = "A ? that is part of the path is written %3F"
_IN_A_PATH = re.compile("%(3F|25)", re.IGNORECASE)


@dataclass(frozen=True)
class Spec:
    """Which data, in words: `form:path?option=value&option=value`."""

    form: str
    path: str
    options: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What its tasks are: "regression" or "classification"."""
        return "regression" if "target" in self.options else "classification"

    @property
    def pictures(self) -> bool:
        return self.form in ("folder", "zip")

    @property
    def name(self) -> str:
        """For the names of folders."""
        return Path(self.path).stem or "data"


def is_form(data: str) -> bool:
    """Whether `data` is a form with a path, and not one of the names that are known here."""
    return ":" in data


def parse(data: str) -> Spec:
    """A line of text as a `Spec`. The path ends at the first `?`; in it %3F is a question mark and %25 a percent sign,
    and all else as it stands. Options may hold any such escape.

    Raises:
        ValueError: an unknown form or option, with the nearest; an option twice, a value that it does not take.
    """
    form, _, rest = values.name("data", data).partition(":")
    if form not in FORMS:
        forms = ", ".join(f"{one}:PATH" for one in FORMS)
        raise ValueError(f"data must be one of {forms}; got {data!r}{_near(form, FORMS)}")
    path, _, query = rest.partition("?")
    if not path:
        raise ValueError(f"data {data!r} names no path: {form}:PATH")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, equals, text = part.partition("=")
        name = unquote(name)
        if name not in FORMS[form]:
            allowed = ", ".join(FORMS[form])
            told = f"{form}: has no option {name!r}{_near(name, FORMS[form])}; it has {allowed}"
            raise ValueError(f"{told}. {IN_A_PATH}")
        if not equals or not text:
            raise ValueError(f"option {name} of {form}: must be {name}=VALUE, got {part!r}")
        if name in options:
            raise ValueError(f"option {name} of {form}: stands there twice in {data!r}")
        read = FORMS[form][name]
        text = text if read is _list else unquote(text)
        try:
            options[name] = read(text)
        except ValueError as error:
            raise ValueError(f"option {name} of {form}: must be {error}, got {text!r}") from error
    return Spec(form, _IN_A_PATH.sub(lambda found: unquote(found[0]), path), options)


def quoted(path: str | PathLike) -> str:
    """A path as it stands in a line of data."""
    return re.sub("%(?=3F|25)|[?]", lambda found: quote(found[0]), str(path), flags=re.IGNORECASE)


def with_options(data: str, **options: Any) -> str:
    """`data` with options added that are not None; one that is there already with another value raises ValueError."""
    spec = parse(data)
    for name, value in options.items():
        if value is None:
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if name not in FORMS[spec.form]:
            raise ValueError(f"{name} is no option of {spec.form}:, which has {', '.join(FORMS[spec.form])}")
        if name in spec.options:
            if spec.options[name] != FORMS[spec.form][name](text):
                raise ValueError(f"{name} is given twice: {text}, and {spec.options[name]} in {data!r}")
            continue
        data += f"{'&' if '?' in data else '?'}{name}={text}"
    parse(data)
    return data


def moved(data: str, to: str) -> str:
    """`to`, with those options of `data` that it does not give itself and that are of its form: the same data at
    another place."""
    form, given = parse(to).form, parse(to).options
    for part in filter(None, data.partition("?")[2].split("&")):
        name = unquote(part.partition("=")[0])
        if name in FORMS[form] and name not in given:
            to += f"{'&' if '?' in to else '?'}{part}"
    return to


def _near(name: str, allowed: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {near[0]}?)" if near else ""
