"""Zip archives from anywhere: read member by member, never unpacked, and refused where they could do harm."""

from __future__ import annotations

import contextlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

LARGEST = 256 << 20  # bytes of one member
_PLENTY, _RATIO = 1 << 30, 100  # of all members: bytes, and how many times the archive's own size
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


class Archive:
    """An open archive whose members have all been found harmless by what the archive says of them.

    Attributes: path; members: the files in it, by name.
    """

    def __init__(self, path: Path, file: zipfile.ZipFile, largest: int | None):
        self.path, self._file, self._largest = path, file, largest
        self.members = {info.filename: info for info in file.infolist() if not info.is_dir()}
        for info in file.infolist():
            self._check(info)
        total, plenty = sum(info.file_size for info in file.infolist()), max(_PLENTY, _RATIO * path.stat().st_size)
        if largest is not None and total > plenty:
            raise ValueError(f"{path} would be {total:,} bytes unpacked, more than the {plenty:,} that are allowed")

    def _check(self, info: zipfile.ZipInfo) -> None:
        name, where = info.filename, f"{self.path}: member {info.filename!r}"
        if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            raise ValueError(f"{where} leads out of the archive's folder; names must lie within it")
        if info.flag_bits & 1:
            raise ValueError(f"{where} is encrypted: unpack it, or pack it without a password")
        if info.compress_type not in _METHODS:
            allowed = " and ".join(_METHODS.values())
            raise ValueError(f"{where} is compressed by method {info.compress_type}; allowed are {allowed}")
        if self._largest is not None and info.file_size > self._largest:
            raise ValueError(f"{where} would be {info.file_size:,} bytes, more than the {self._largest:,} allowed")

    def read(self, name: str) -> bytes:
        """A member's bytes; never more than the archive says of it. ValueError if it is damaged."""
        try:
            return self._file.read(self.members[name])
        except _ERRORS as error:
            raise ValueError(f"{self.path} is damaged: {name}: {error}") from error


@contextlib.contextmanager
def open_archive(path: Path, largest: int | None = LARGEST) -> Iterator[Archive]:
    """The archive at `path`.

    Raises:
        ValueError: no zip, or a damaged one; a member with an absolute name or `..` in it, encrypted, or compressed by
            another method than deflate, or larger than `largest` bytes (None: any size); all together more than a
            hundred times the archive and 1 GiB.
    """
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except _ERRORS as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    with file:
        yield Archive(path, file, largest)
