"""Everything in a folder of real data, in one form: to learn from some of it and be judged on the rest.

Two kinds of domains. Pictures are grey, 28x28 and bright on black. Everything, pictures too, is also a vector of 64
numbers: its features, standardised, times one fixed random matrix for a width (Johnson and Lindenstrauss 1984 on what
such products keep), so that text, tables and pictures can meet in one net.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.clinc import clinc
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.omniglot import is_local, omniglot
from fastmeta.tasks.read import DataWarning, folder
from fastmeta.tasks.read._pictures import suffixes
from fastmeta.tasks.read.splits import names_in_table, split_examples
from fastmeta.tasks.rows import as_inputs, examples_of
from fastmeta.tasks.wisdm import ACTIVITIES, wisdm

SIDE, WIDTH = 28, 64
_FEWEST = 5  # classes of a domain
KINDS = ("pictures", "vectors")
_KNOWN = ("omniglot", "emoji", "fonts", "clinc150", "wisdm", "parkinsons_telemonitoring")
_EMOJI = ("twemoji", "noto", "openmoji")


class Domains(NamedTuple):
    """By name: what is trained on, what belongs to the same sets but other classes, and what was never seen."""

    train: dict[str, Examples]
    near: dict[str, Examples]
    far: dict[str, Examples]


def domains(kind: str, data_root: str | os.PathLike, *, least: int = 11) -> Domains:
    """The domains of a kind, "pictures" or "vectors", in a folder.

    Pictures: trained on Omniglot and on one artist's emoji (classes are sub-categories); near are their test classes;
    far are the other artists' emoji of the test sub-categories, and printed characters, a domain a script. Vectors:
    trained on the intents of CLINC150 and on Omniglot's pixels; near are their test classes; far are the activities of
    WISDM, emoji and printed characters. Any other folder of pictures in there, `class/picture` or
    `super/class/picture`, is a far domain of both kinds. Regression (Parkinson's) has no classes and is left out.

    Args:
        least: rows that a class must have; smaller ones are left out, and with a warning domains that have fewer than
            five others.

    Raises:
        ValueError: an unknown kind, a folder in which there is nothing to train on.
    """
    values.choice("kind", kind, KINDS)
    values.count("least", least)
    root = Path(data_root)
    if not root.is_dir():
        raise ValueError(f"data_root {str(root)!r} is not a folder")
    found = Domains({}, {}, {})
    if is_local(root):
        found.train["omniglot"] = examples_of(omniglot("train", data_root=root), "omniglot")
        found.near["omniglot"] = examples_of(omniglot("test", data_root=root), "omniglot")
    for artist in _EMOJI:
        archive = root / "emoji" / f"{artist}.zip"
        if archive.is_file():
            names = names_in_table(root / "emoji" / "classes.csv", classes="subcategory")
            train, _, test = split_examples(_bright(folder(archive, image_size=SIDE, grey=True)), names=names)
            if artist == _EMOJI[0] and kind == "pictures":
                found.train[artist], found.near[artist] = train, test
            else:
                found.far[artist] = test
    archive = root / "fonts" / "glyphs.zip"
    if archive.is_file():
        glyphs = _bright(folder(archive, image_size=SIDE, grey=True))
        for script in sorted(set(glyphs.groups)):
            found.far[script] = glyphs.only([i for i, one in enumerate(glyphs.groups) if one == script], name=script)
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name not in _KNOWN and _has_pictures(path):
            found.far[path.name] = _bright(folder(path, image_size=SIDE, grey=True, on_error="skip"))
    if kind == "vectors":
        if (root / "clinc150").is_dir():
            found.train["clinc150"], found.near["clinc150"] = (clinc(one, root) for one in ("train", "test"))
        if (root / "wisdm").is_dir():
            windows = wisdm(data_root=root)
            found.far["wisdm"] = Examples(windows.x.flatten(1), windows.activity, names=ACTIVITIES, name="wisdm")
    if not found.train:
        raise ValueError(f"nothing to train on in {root}: it must hold omniglot{', or clinc150' * (kind == 'vectors')}")
    parts = ({name: _large(part, least) for name, part in part.items()} for part in found)
    found = Domains(*({name: part for name, part in part.items() if part is not None} for part in parts))
    return Domains(*(_projected(part) for part in found)) if kind == "vectors" else found


def _has_pictures(path: Path) -> bool:
    return any(file.suffix.lower() in suffixes() for file in path.rglob("*"))


def _large(examples: Examples, least: int) -> Examples | None:
    kept = (examples.counts >= least).nonzero().flatten().tolist()
    if len(kept) >= _FEWEST:
        return examples.only(kept)
    told = f"{examples.name} is left out: {len(kept)} of its classes have {least} rows, {_FEWEST} would be needed"
    warnings.warn(told, DataWarning, stacklevel=4)
    return None


def _bright(examples: Examples) -> Examples:
    """Bright on black: what is brighter at the edges than half is turned over."""
    rows = examples.rows
    edges = torch.cat([rows[..., 0, :], rows[..., -1, :], rows[..., 0], rows[..., -1]], -1).float().mean((1, 2))
    turned = torch.where((edges > 127).view(-1, 1, 1, 1), 255 - rows, rows)
    return examples.over(turned[examples.order], name=examples.name)


def _projected(parts: dict[str, Examples]) -> dict[str, Examples]:
    return {name: _as_vectors(part) for name, part in parts.items()}


def _as_vectors(examples: Examples) -> Examples:
    rows = as_inputs(examples.rows[examples.order]).flatten(1).float()
    rows = (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-3)
    return examples.over(_scaled(rows @ _matrix(rows.shape[1])), name=examples.name)


def _scaled(rows: Tensor) -> Tensor:
    return rows / rows.square().mean().sqrt().clamp(min=1e-12)


def _matrix(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, WIDTH, generator=generator) / WIDTH**0.5
