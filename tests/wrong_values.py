"""What an argument of a kind must not be: values to be refused by name, and others that may be served instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

N = 3  # classes
NO_TENSORS = {"None": None, "text": "text", "number": 3.5, "list": [1.0, 2.0], "numpy": np.ones((2, 3, 4))}
NAN, INF = float("nan"), float("inf")


class Argument(NamedTuple):
    """The right value, anew for each call; values that must be refused; values that may be served instead."""

    make: Callable[[], Any]
    wrong: dict[str, Any]
    odd: dict[str, Any]


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in what no kernel here reads."""
    found = {"COO": t.to_sparse(), "complex": t.to(torch.complex64), "meta": t.to("meta")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are in beta, or on their way out
        if t.dim() > 1:
            found["CSR"] = t.to_sparse_csr()
            found["nested"] = torch.nested.nested_tensor(list(t.unbind()))
            found["jagged"] = torch.nested.nested_tensor(list(t.unbind()), layout=torch.jagged)
        if t.dtype == torch.float32:
            found["mkldnn"] = t.to_mkldnn()
            found["quantized"] = torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
    return found


def shapes(t: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"one dimension more": t.unsqueeze(0), "no dimension": t.flatten()[:1].view(())}
    if t.dim():
        found["one dimension less"] = t[0]
    for axis in range(t.dim()):
        found[f"size {axis} more by one"] = torch.cat([t, t.narrow(axis, 0, 1)], axis)
        found[f"size {axis} of 0"] = t.narrow(axis, 0, 0)
    return found


def floats(*shape, alone: bool = False, or_none: bool = False, any_type: bool = False) -> Argument:
    """`alone`: no other tensor says which dtype this is. `any_type`: a module or loss says what it takes."""
    right = torch.rand(shape)
    wrong = dict(NO_TENSORS) | layouts(right)
    odd = shapes(right) | {"float16": right.half(), "float64": right.double(), "meta": wrong.pop("meta")}
    if not alone:
        wrong |= {"float16": odd.pop("float16"), "float64": odd.pop("float64")}
    integers = {"int64": right.long(), "bool": right > 0.5, "uint8": right.byte()}
    odd, wrong = (odd | integers, wrong) if any_type else (odd, wrong | integers)
    if or_none:
        del wrong["None"]
    return Argument(lambda: right.clone(), wrong, odd)


def labels(*shape, any_label: bool = False) -> Argument:
    right = (torch.arange(shape[-1]) % N).expand(shape).clone()
    wrong = dict(NO_TENSORS) | layouts(right) | {"float32": right.float(), "int32": right.int(), "bool": right > 0}
    wrong["float16"] = right.half()
    odd = shapes(right) | {"meta": wrong.pop("meta")}
    (odd if any_label else wrong).update({"negative": right - 1, "too large": right + 7})
    return Argument(lambda: right.clone(), wrong, odd)


def mask(*shape) -> Argument:
    right = torch.ones(shape, dtype=torch.bool)
    wrong = dict(NO_TENSORS) | layouts(right) | {"float32": right.float(), "int64": right.long()}
    del wrong["None"]
    return Argument(lambda: right.clone(), wrong, shapes(right) | {"meta": wrong.pop("meta")})


def rates(argument: Argument) -> Argument:
    """Rates may be plain numbers too, and have any of the floating dtypes."""
    fine = ("number", "list", "float16", "float64")
    return may(argument, {label for label in argument.wrong if label.removeprefix("[0] ") in fine})


def may(argument: Argument, served: set[str]) -> Argument:
    """The same, but that some of what is wrong elsewhere may be served here."""
    wrong = {label: value for label, value in argument.wrong.items() if label not in served}
    return Argument(argument.make, wrong, argument.odd | {k: v for k, v in argument.wrong.items() if k in served})


def widened(argument: Argument) -> Argument:
    """Where torch takes the wider of two dtypes."""
    return may(argument, {"float16", "float64"})


def unread(argument: Argument) -> Argument:
    """Where only the shape is looked at."""
    values = {"float16", "float32", "float64", "int32", "bool", "complex", "negative", "too large"}
    return may(argument, values)


def layers(*parameters: tuple[int, ...], or_none: bool = False) -> Argument:
    right = [torch.rand(shape) for shape in parameters]
    wrong: dict[str, Any] = {k: v for k, v in NO_TENSORS.items() if not (or_none and v is None)}
    first = floats(*parameters[0])
    wrong |= {f"[0] {label}": [value, *right[1:]] for label, value in first.wrong.items()}
    wrong["a tensor"] = right[0]
    odd = {f"[0] {label}": [value, *right[1:]] for label, value in first.odd.items()}
    odd |= {"none": [], "half of them": right[:1], "one more": [*right, right[0]]}
    return Argument(lambda: [t.clone() for t in right], wrong, odd)


def count(right: int, least: int = 1, or_none: bool = False) -> Argument:
    wrong = {"None": None, "text": "3", "number": 3.5, "whole number": 3.0, "bool": True, "list": [3]}
    wrong |= {"too small": least - 1, "NaN": NAN, "numpy": np.ones(2), "tensor": torch.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(lambda: right, wrong, {"the least": least})


def number(
    right: float, least: float = -INF, *, open: bool = False, or_none: bool = False, below: float | None = None
) -> Argument:
    wrong = {"None": None, "text": "0.1", "bool": True, "list": [0.1], "NaN": NAN, "inf": INF, "-inf": -INF}
    wrong |= {"numpy": np.ones(2), "complex": 1j, "meta": torch.ones((), device="meta")}
    if least > -INF:
        wrong["too small"] = least - 0.5
        if open:
            wrong["the bound"] = least
    if below is not None:
        wrong["too large"] = below
    if or_none:
        del wrong["None"]
    return Argument(lambda: right, wrong, {"whole": 1 if below is None else 0})


def flag(right: bool = False) -> Argument:
    wrong = {"None": None, "text": "no", "int": 1, "number": 0.0, "list": [], "tensor": torch.ones(())}
    return Argument(lambda: right, wrong, {"the other": not right})


def choice(right: str, *others: str, or_none: bool = False, tensor: bool = False) -> Argument:
    wrong = {"None": None, "text": "text", "number": 3.5, "bool": True, "list": [right], "set": {right}}
    wrong |= {"capitals": right.upper(), "tensor": torch.ones(2), "numpy": np.ones(2)}
    if or_none:
        del wrong["None"]
    if tensor:
        del wrong["tensor"]
    return Argument(lambda: right, wrong, {other: other for other in others})


def module(make: Callable[[], nn.Module], or_none: bool = False) -> Argument:
    wrong = dict(NO_TENSORS) | {"class": nn.Linear, "function": torch.relu, "tensor": torch.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(make, wrong, {})


def function(make: Callable[[], Any], or_none: bool = True) -> Argument:
    wrong = dict(NO_TENSORS) | {"bool": True, "tensor": torch.ones(2)}
    if or_none:
        del wrong["None"]
    return Argument(make, wrong, {})


def sizes(*right: int, or_none: bool = False) -> Argument:
    wrong = {"None": None, "text": "text", "number": 3.5, "int": 3, "tensor": torch.ones(2), "numpy": np.ones((2, 2))}
    wrong |= {"floats": [float(r) for r in right], "texts": ["3"] * len(right), "zeros": [0] * len(right)}
    wrong |= {"bools": [True] * len(right), "negative": [-1] * len(right), "None in it": [None] * len(right)}
    return Argument(lambda: list(right), wrong, {"tuple": right})


def pair() -> Argument:
    """A range of rates."""
    wrong = {"None": None, "text": "text", "number": 0.1, "one": (0.1,), "three": (0.1, 0.2, 0.3), "NaN": (0.1, NAN)}
    wrong |= {"texts": ("0.1", "0.2"), "inf": (0.1, INF), "reversed": (0.2, 0.1), "tensor": torch.ones(2)}
    return Argument(lambda: (0.1, 0.2), wrong | {"bools": (False, True)}, {"list": [0.1, 0.2], "negative": (-0.1, 0.1)})


def generator() -> Argument:
    wrong = {"text": "text", "number": 3.5, "int": 3, "list": [1], "numpy": np.random.default_rng(0)}
    return Argument(lambda: None, wrong, {"given": torch.Generator()})


def device() -> Argument:
    wrong = {"text": "text", "number": 3.5, "None": None, "list": ["cpu"], "bool": True, "no GPU": "mps"}
    return Argument(lambda: "cpu", wrong, {"device": torch.device("cpu"), "meta": "meta"})


def one_of(right: Callable[[], Any], *odd: Any) -> Argument:
    """An object of a kind of its own."""
    return Argument(right, dict(NO_TENSORS) | {"bool": True}, {repr(value): value for value in odd})


def seed() -> Argument:
    wrong = {"None": None, "text": "3", "number": 3.5, "bool": True, "list": [3], "NaN": NAN, "tensor": torch.ones(2)}
    return Argument(lambda: 0, wrong, {"large": 2**40, "negative": -1})


def images(*shape) -> Argument:
    right = torch.rand(shape)
    wrong = dict(NO_TENSORS) | layouts(right) | {"int64": right.long(), "bool": right > 0.5}
    return Argument(lambda: right.clone(), wrong, shapes(right) | {"uint8": right.byte(), "float64": right.double()})


def partitions() -> Argument:
    right = torch.arange(24).fmod(4)
    wrong = dict(NO_TENSORS) | layouts(right) | {"float32": right.float(), "bool": right > 0}
    return Argument(lambda: right.clone(), wrong, shapes(right))


def path() -> Argument:
    wrong = {label: value for label, value in NO_TENSORS.items() if label != "text"} | {"bool": True}
    return Argument(lambda: "nowhere", wrong, {})


def optional(argument: Argument) -> Argument:
    """None counts as not given."""
    return Argument(argument.make, {k: v for k, v in argument.wrong.items() if v is not None}, argument.odd)
