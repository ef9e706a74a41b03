"""A folder of pictures, or a zip archive of one: a folder inside is a class."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.read._archive import open_archive
from fastmeta.tasks.read._cache import Made, cache_folder, cached
from fastmeta.tasks.read._pictures import BACKGROUNDS, faint, formats, open_picture, square, suffixes
from fastmeta.tasks.read._warning import DataWarning

ON_ERROR = ("refuse", "skip")
_FORMAT = "2"  # of the cached tensors
_SHOWN = 5  # files that a message names
_AT_A_TIME = 64  # files of one piece of work for a thread
_IN_MEMORY = 1 << 30  # bytes; what is more than that stays in a file


class File(NamedTuple):
    """A picture that is there: its place in the folder, and what changes when it does."""

    name: str
    stamp: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return PurePosixPath(self.name).parts


class _How(NamedTuple):
    """How pictures are read: arguments of `folder`."""

    image_size: int
    grey: bool
    background: str
    on_error: str
    progress: bool

    def checked(self) -> _How:
        values.count("image_size", self.image_size)
        values.flag("grey", self.grey)
        values.choice("background", self.background, tuple(BACKGROUNDS))
        values.choice("on_error", self.on_error, ON_ERROR)
        values.flag("progress", self.progress)
        return self


def folder(
    path: str | os.PathLike,
    *,
    image_size: int = 84,
    grey: bool = False,
    background: str = "white",
    on_error: str = "refuse",
    cache: bool = True,
    progress: bool = False,
    under: str | None = None,
) -> Examples:
    """The pictures of a folder, or of a zip archive of one, which is read member by member and never unpacked.

    A picture lies at `class/instance.png` or at `super/class/instance.png`, all at the same depth; then a class is
    called `super/class`, and `groups` are the super-classes. Files whose names do not end as pictures' do are passed
    over, and so is all that begins with a dot. Each is turned upright as its EXIF data say, laid over `background`
    where it is transparent, its middle cut to a square, and that resized by Pillow's bicubic filter, which averages
    when it makes smaller. The first frame of a film counts. Of 16 bits 65535 is white; pictures that use only the
    lowest 12 of them come out dark, which a warning tells.

    Decoded once, by all cores, and kept as uint8 in a cache folder (the one FASTMETA_CACHE names, else the user's own),
    under the names, sizes and times of the files: where one changes, all are decoded anew.

    Args:
        path: the folder, or a file that ends in .zip.
        image_size: side of the pictures, 84 by default.
        grey: one channel in place of red, green and blue.
        background: "white" (default) or "black".
        on_error: of files that cannot be decoded: "refuse" (default) all, naming them; or "skip" them, with a warning.
        cache: whether to keep what was decoded, and to take what was kept.
        progress: draw a bar on the error stream.
        under: only what lies in this folder inside.

    Returns:
        Examples of rows uint8 `[R, 3 or 1, image_size, image_size]`, of more than 1 GiB mapped from the cache.

    Raises:
        ValueError: no such folder, no picture in it, pictures at different depths or in no class; files that are
            damaged or have more pixels than Pillow allows, by name; an archive that is damaged, encrypted, or would
            unpack to more than it may.
    """
    how = _How(image_size, grey, background, on_error, progress).checked()
    values.path("path", path)
    values.flag("cache", cache)
    path = Path(path)
    with opened(path) as (files, read):
        if under is not None:
            files = [File("/".join(file.parts[1:]), file.stamp) for file in files if file.parts[0] == under]
            prefix, path = f"{under}/", path / under
        else:
            prefix = ""
        names, groups, classes = _classes(path, files)

        def make() -> Made:
            rows, kept, told = _decoded(path, files, lambda name: read(prefix + name), how)
            return {"rows": rows, "labels": torch.tensor([classes[i] for i in kept])}, told

        if cache:
            choices = [str(path.resolve()), image_size, grey, background, *files]
            key = hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]
            tensors, texts = cached(f"folder-{image_size}-{key}", _FORMAT, make)
        else:
            tensors, texts = make()
    _say(texts, on_error)
    there = tensors["labels"].unique().tolist()  # a class may have lost all its files
    rows = tensors["rows"]
    small = rows.nbytes <= _IN_MEMORY
    found = Examples(
        rows.clone() if small and cache else rows,
        tensors["labels"],
        names=[names[c] for c in there],
        groups=None if groups is None else [groups[c] for c in there],
        name=path.stem,
    )
    found.mapped = not small
    return found


def pictures(
    path: str | os.PathLike,
    *,
    image_size: int = 84,
    grey: bool = False,
    background: str = "white",
    on_error: str = "refuse",
    progress: bool = False,
) -> tuple[Tensor, list[str]]:
    """Pictures that are of no class yet: all that lie in a folder or archive, in folders inside too, or one file.

    Arguments and errors as of `folder`, which treats each picture alike; nothing is kept.

    Returns:
        Rows uint8 `[R, 3 or 1, image_size, image_size]`, and the name of each within the folder, in their order.
    """
    how = _How(image_size, grey, background, on_error, progress).checked()
    path = Path(values.path("path", path))
    if path.is_file() and path.suffix.lower() in suffixes():
        files, folder = [File(path.name, ())], path.parent
        rows, kept, told = _decoded(folder, files, lambda name: open(folder / name, "rb"), how)
    else:
        with opened(path) as (files, read):
            if not files:
                raise ValueError(f"{path} holds no picture that Pillow can read")
            rows, kept, told = _decoded(path, files, read, how)
    _say(told, on_error)
    return rows, [files[i].name for i in kept]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[list[File], Callable[[str], IO[bytes]]]]:
    """The pictures of a folder or archive, in the order of their names, and what opens one."""
    allowed = suffixes()

    def wanted(name: str) -> bool:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        return not hidden and PurePosixPath(name).suffix.lower() in allowed

    if path.suffix.lower() == ".zip":
        with open_archive(path) as archive:
            stamps = {name: (info.file_size, info.CRC) for name, info in archive.members.items() if wanted(name)}
            tops = {PurePosixPath(name).parts[0] for name in stamps}
            # an archive often holds the folder itself
            prefix = f"{tops.pop()}/" if len(tops) == 1 and all(name.count("/") > 1 for name in stamps) else ""
            files = [File(name[len(prefix) :], stamps[name]) for name in sorted(stamps)]
            yield files, lambda name: io.BytesIO(archive.read(prefix + name))
    elif path.is_dir():
        found = [entry for entry in _walk(path, "") if wanted(entry[0])]
        files = [File(name, (stat.st_size, stat.st_mtime_ns)) for name, stat in sorted(found, key=lambda one: one[0])]
        yield files, lambda name: open(path / name, "rb")
    else:
        raise ValueError(f"{path} is no folder, and no .zip archive of one")


def _walk(path: Path, prefix: str, depth: int = 0) -> Iterator[tuple[str, os.stat_result]]:
    """Files down to a depth at which pictures are refused: links to folders may lead in a circle."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                if depth < 3:
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", depth + 1)
            elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is a file that cannot be read
                yield prefix + entry.name, entry.stat(follow_symlinks=entry.is_file())


def _classes(path: Path, files: Sequence[File]) -> tuple[list[str], list[str] | None, list[int]]:
    """Names and groups of the classes, and the class of each file."""
    layout = "pictures must lie at class/instance.png or super/class/instance.png"
    if not files:
        raise ValueError(f"{path} holds no picture that Pillow can read: {layout}")
    depth = len(files[0].parts)
    for file in files:
        if len(file.parts) not in (2, 3):
            where = "in no class" if len(file.parts) < 2 else "too deep"
            raise ValueError(f"{path}: {file.name!r} lies {where}: {layout}")
        if len(file.parts) != depth:
            other = files[0].name
            raise ValueError(f"{path}: {other!r} and {file.name!r} lie at different depths: {layout}, all alike")
    of = ["/".join(file.parts[:-1]) for file in files]
    names = sorted(set(of))
    number = {name: i for i, name in enumerate(names)}
    return names, [name.split("/")[0] for name in names] if depth == 3 else None, [number[name] for name in of]


def _decoded(
    path: Path, files: Sequence[File], read: Callable[[str], IO[bytes]], how: _How
) -> tuple[Tensor, list[int], dict[str, str]]:
    """Rows, the files that they are of, and what is to be said: of those that could not be read ("damaged") and of
    those that came out dark ("faint")."""
    allowed = formats()
    dark: list[str] = []

    def decode(file: File) -> np.ndarray:
        with read(file.name) as data, open_picture(data, allowed) as image:
            if faint(image):
                dark.append(file.name)
            return square(image, how.image_size, how.grey, how.background)

    shape = (len(files), 1 if how.grey else 3, how.image_size, how.image_size)
    rows, failed = _decode(files, decode, shape, how.progress)
    told = {"damaged": _told(path, files, failed) if failed else "", "faint": _told_of_faint(path, sorted(dark))}
    if len(failed) == len(files):
        raise ValueError(told["damaged"])
    kept = [i for i in range(len(files)) if i not in failed]
    return _squeezed(rows, kept), kept, told


def _told_of_faint(path: Path, dark: list[str]) -> str:
    if not dark:
        return ""
    return (
        f"{path}: {len(dark):,} pictures of 16 bits, such as {dark[0]}, use only the lowest 12 and come out dark: "
        "65535 is white; multiply such pixels by 16 (or what fills the range), the same for all, and write them anew"
    )


def _say(told: Mapping[str, str], on_error: str) -> None:
    """What is wrong with some files, as an error or a warning."""
    damaged = told["damaged"]
    if damaged and on_error == "refuse":
        raise ValueError(f"{damaged}; on_error 'skip' takes the others")
    if damaged:
        warnings.warn(f"{damaged}; skipped", DataWarning, stacklevel=3)
    if told["faint"]:
        warnings.warn(told["faint"], DataWarning, stacklevel=3)


def _decode(
    files: Sequence[File], decode: Callable[[File], np.ndarray], shape: tuple[int, ...], progress: bool
) -> tuple[Tensor, dict[int, str]]:
    """All rows, and why those that are missing are, by their number."""
    from PIL import Image

    rows = _room(shape)
    failed: dict[int, str] = {}

    def piece(start: int) -> int:
        end = min(start + _AT_A_TIME, len(files))
        for i in range(start, end):
            try:
                rows[i] = decode(files[i])
            except Exception as error:  # a damaged file may raise anything in one of Pillow's forty readers
                failed[i] = " ".join(str(error).split()) or type(error).__name__
        return end - start

    bar = _bar(len(files), progress)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as threads, bar as advance:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused with a sentence of our own
        for count in threads.map(piece, range(0, len(files), _AT_A_TIME)):
            advance(count)
    return torch.from_numpy(rows), dict(sorted(failed.items()))


def _room(shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64))
    if size > _IN_MEMORY:
        place = cache_folder()
        if shutil.disk_usage(place).free > 2 * size + _IN_MEMORY:  # itself, and its copy in the cache
            with tempfile.TemporaryFile(dir=place) as file:  # stays while it is mapped
                return np.memmap(file, np.uint8, "w+", shape=shape)
    return np.empty(shape, np.uint8)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("decoding pictures", total=total)
        yield lambda count: progress.update(task, advance=count)


def _told(path: Path, files: Sequence[File], failed: dict[int, str]) -> str:
    shown = ", ".join(f"{files[i].name} ({why})" for i, why in list(failed.items())[:_SHOWN])
    more = f" and {len(failed) - _SHOWN:,} more" if len(failed) > _SHOWN else ""
    return f"{path}: {len(failed):,} of {len(files):,} pictures cannot be read: {shown}{more}"


def _squeezed(rows: Tensor, kept: Sequence[int]) -> Tensor:
    """`rows[kept]` in the place of `rows`, which may be larger than the memory."""
    if len(kept) == len(rows):
        return rows
    for start in range(0, len(kept), _AT_A_TIME):
        end = min(start + _AT_A_TIME, len(kept))
        rows[start:end] = rows[list(kept[start:end])]
    return rows[: len(kept)]
