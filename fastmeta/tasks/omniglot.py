"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters of 50 alphabets, each drawn by 20 people.

The archives are read once, and kept as one checked tensor in a cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.read._archive import open_archive
from fastmeta.tasks.read._cache import Made, cache_folder, cached
from fastmeta.tasks.read._pictures import open_picture

CHARACTERS, DRAWINGS, SIZE = 1623, 20, 28
PARTITIONS = ("vinyals", "1200")
ARCHIVES = ("images_background.zip", "images_evaluation.zip")
_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
_PUBLISHED_MD5 = ("68d2efa1b9178cc56df9314c21c6e718", "6b91aef0f799c5bb55b94e3f2daec811")
_FORMAT = "1"  # of the cached tensor


def omniglot(split: str = "train", partition: str = "vinyals", data_root: str | os.PathLike | None = None) -> Tensor:
    """The characters of a split, uint8 `[classes, 20, 1, 28, 28]`, ink 255 on 0, without rotations.

    Images of 105 x 105 are averaged down to 28 x 28 (Pillow's box filter on the inverted image).

    Args:
        split: "train", "val" or "test".
        partition: "vinyals" (default), 1028 / 172 / 423 characters, that of Vinyals et al. 2016 as Prototypical
            Networks used it; or "1200", where 1,200 characters in a fixed random order train and the other 423 test
            ("val" takes the last 100 of the 1,200, which "train" then leaves out).
        data_root: folder that holds `images_background.zip` and `images_evaluation.zip`, itself or in `omniglot/`.
            Without it the folder that FASTMETA_DATA names, and without that a download of 14 MB, checked against the
            published sums.

    Raises:
        ValueError: an archive that is missing from the given folder, damaged, or not complete, by name.
    """
    values.choice("split", split, ("train", "val", "test"))
    values.choice("partition", partition, PARTITIONS)
    values.path("data_root", data_root, or_none=True)
    images, names = _load(find_archives(data_root))
    index = {name: i for i, name in enumerate(names)}
    if partition == "vinyals":
        wanted = resources.files("fastmeta.tasks").joinpath(f"splits/vinyals_{split}.txt").read_text().split()
        chosen = [index[name] for name in wanted]
    else:
        order = torch.randperm(CHARACTERS, generator=torch.Generator().manual_seed(0)).tolist()
        chosen = {"train": order[:1100], "val": order[1100:1200], "test": order[1200:]}[split]
    return images[chosen].unsqueeze(2)


def characters(data_root: str | os.PathLike | None = None) -> tuple[Tensor, list[str]]:
    """All characters, uint8 `[1623, 20, 28, 28]`, ink 255 on 0, and the names they are known by in the archives, such
    as `images_background/Korean/character01`. Argument and errors are those of `omniglot`."""
    archives = find_archives(data_root)
    images, names = _load(archives)
    folder = {}
    for path in archives:
        with open_archive(path) as archive:
            folder |= {n.split("/")[-3]: n.split("/")[0] for n in archive.members if n.endswith(".png")}
    return images, [f"{folder[name.split('/')[0]]}/{name}" for name in names]


def is_local(data_root: str | os.PathLike | None = None) -> bool:
    """Whether Omniglot can be had without a download."""
    try:
        root = data_root or os.environ.get("FASTMETA_DATA")
        return root is not None and all(path.is_file() for path in _archives_in(Path(root)))
    except ValueError:
        return False


def _archives_in(root: Path) -> tuple[Path, ...]:
    for folder in (root, root / "omniglot"):
        paths = tuple(folder / name for name in ARCHIVES)
        if any(path.is_file() for path in paths):
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"{path} is missing: Omniglot is {' and '.join(ARCHIVES)} together")
            return paths
    raise ValueError(f"no Omniglot in {root}: {' and '.join(ARCHIVES)} must lie there or in {root / 'omniglot'}")


def find_archives(data_root: str | os.PathLike | None = None) -> tuple[Path, ...]:
    """The two archives, downloaded if they are nowhere; `data_root` and errors as of `omniglot`."""
    root = data_root or os.environ.get("FASTMETA_DATA")
    if root is not None:
        if not Path(root).is_dir():
            raise ValueError(f"data_root {str(root)!r} is not a folder")
        return _archives_in(Path(root))
    try:
        import pooch
    except ImportError as error:
        raise ValueError(
            "downloading Omniglot needs pooch: pip install pooch, or name a folder by data_root"
        ) from error
    try:
        return tuple(
            Path(pooch.retrieve(_URL + name, f"md5:{md5}", fname=name, path=cache_folder(), progressbar=False))
            for name, md5 in zip(ARCHIVES, _PUBLISHED_MD5, strict=True)
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Omniglot could not be downloaded ({error}); put {' and '.join(ARCHIVES)} into a folder and name it by "
            "data_root or FASTMETA_DATA, or use glyphs, which need no data"
        ) from error


@lru_cache(maxsize=1)
def _load(archives: tuple[Path, ...]) -> tuple[Tensor, list[str]]:
    """All characters, uint8 `[1623, 20, 28, 28]`, and their names, from the cache if it is whole."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in archives)).hexdigest()
    tensors, texts = cached(f"omniglot-{SIZE}-{digest[:16]}", _FORMAT, lambda: _decode(archives))
    return tensors["images"], texts["names"].split("\n")


def _decode(archives: tuple[Path, ...]) -> Made:
    import numpy as np
    from PIL import Image, ImageOps

    drawings: dict[str, list[Tensor]] = {}
    with contextlib.ExitStack() as stack:
        # all are opened before the first is read, which takes a while
        opened = [(path, stack.enter_context(open_archive(path))) for path in archives]
        for path, archive in opened:
            for name in sorted(n for n in archive.members if n.endswith(".png")):
                data = archive.read(name)
                try:
                    image = open_picture(io.BytesIO(data), ("PNG",)).convert("L")
                except (OSError, SyntaxError, ValueError) as error:
                    raise ValueError(f"{path} is damaged: {name}: {error}") from error
                small = ImageOps.invert(image).resize((SIZE, SIZE), Image.Resampling.BOX)
                character = "/".join(name.split("/")[-3:-1])
                drawings.setdefault(character, []).append(torch.from_numpy(np.array(small)))
    short = [name for name, images in drawings.items() if len(images) != DRAWINGS]
    if len(drawings) != CHARACTERS or short:
        raise ValueError(
            f"{' and '.join(map(str, archives))} are not complete: {len(drawings)} characters, should be {CHARACTERS}"
            + (f"; {short[0]} has {len(drawings[short[0]])} drawings, should be {DRAWINGS}" if short else "")
        )
    names = sorted(drawings)
    images = torch.stack([torch.stack(drawings[name]) for name in names])
    return {"images": images}, {"names": "\n".join(names)}
