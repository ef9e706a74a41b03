"""The columns of a CSV or Parquet file, before anything is made of them."""

from __future__ import annotations

import csv
import difflib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmeta.tasks.read._warning import DataWarning

MISSING = frozenset({"?", "na", "n/a", "nan", "null", "none"})
_DELIMITERS = ",;\t|"


class Columns:
    """Cells by column, None where one is empty. What else means a missing number, or a missing value of a column of
    text that features are made of, depends on what a column is for: a class may be called `None` or `NA`.

    Attributes: path; cells: by name, in the order of the file; lines: where each row stands in the file.
    """

    def __init__(self, path: Path, cells: dict[str, list[Any]], lines: Sequence[int]):
        self.path, self.cells, self.lines = path, cells, lines

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int, column: str) -> str:
        return f"{self.path}, row {self.lines[row]}, column {column!r}"

    def check(self, *names: str) -> None:
        for name in names:
            if name not in self.cells:
                near = difflib.get_close_matches(name, self.cells, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"{self.path} has no column {name!r}{hint}: it has {', '.join(self.cells)}")

    def names(self, name: str) -> list[str | None]:
        """Of classes or tasks: every text as it is, None where a cell is empty."""
        self.check(name)
        return [None if cell is None else _plain(cell) for cell in self.cells[name]]

    def texts(self, name: str) -> list[str | None]:
        """Values of a feature: None where one is missing."""
        return [None if is_missing(text) else text for text in self.names(name)]

    def numbers(self, name: str) -> list[float]:
        """NaN where a cell is missing. ValueError for one that is no finite number, by row."""
        self.check(name)
        return [self._number(i, name, cell) for i, cell in enumerate(self.cells[name])]

    def _number(self, row: int, name: str, cell: Any) -> float:
        if is_missing(cell):
            return math.nan
        number = _number(cell)
        if number is None:
            raise ValueError(f"{self.where(row, name)}: must be a finite number, or empty if missing; got {cell!r}")
        return number

    def is_numeric(self, name: str) -> bool:
        """Whether at least half of the cells are numbers: the others are then mistakes, else it is a column of text."""
        there = [cell for cell in self.cells[name] if not is_missing(cell)]
        return 2 * sum(_number(cell) is not None for cell in there) >= max(1, len(there))

    def only(self, rows: Sequence[int]) -> Columns:
        cells = {name: [column[i] for i in rows] for name, column in self.cells.items()}
        return Columns(self.path, cells, [self.lines[i] for i in rows])


def read_columns(path: Path, delimiter: str | None = None) -> Columns:
    """The table at `path`; a file that ends in .parquet needs pyarrow, all others are text with a header line.

    Raises:
        ValueError: no such file, one that is no table, a row with another number of cells, two columns of one name.
        ImportError: Parquet without pyarrow.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    columns = _parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _csv(path, delimiter)
    if not len(columns):
        raise ValueError(f"{path} has no rows")
    return columns


def _csv(path: Path, delimiter: str | None) -> Columns:
    rows, lines = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header_line = file.readline()
            delimiter = delimiter or max(_DELIMITERS, key=header_line.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, row {reader.line_num}: {len(row)} cells, and the header has {len(header)} columns"
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}: {error}") from error
    if "" in header and len(header) > 1:
        header, rows = _named(path, header, rows)
    twice = [name for name in header if header.count(name) > 1]
    if twice or not header:
        raise ValueError(f"{path}: " + (f"two columns are called {twice[0]!r}" if twice else "the file is empty"))
    cells = {name: [_stripped(row[i]) for row in rows] for i, name in enumerate(header)}
    return Columns(path, cells, lines)


def _named(path: Path, header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without columns that have no name: most often the numbers of the rows, which tell of the order that they are in,
    or nothing, behind a delimiter at the end."""
    kept = [i for i, name in enumerate(header) if name]
    if any(row[i].strip() for row in rows for i, name in enumerate(header) if not name):
        count = len(header) - len(kept)
        told = "a column without a name is" if count == 1 else f"{count} columns without a name are"
        warnings.warn(f"{path}: {told} left out", DataWarning, stacklevel=4)
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _parquet(path: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs pyarrow: pip install pyarrow, or write the table as CSV") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no Parquet file: {error}") from error
    cells = {
        name: [_stripped(one) for one in column.to_pylist()]
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return Columns(path, cells, range(1, len(table) + 1))


def _stripped(cell: Any) -> Any:
    """None where it is empty, or NaN."""
    if isinstance(cell, str):
        return cell.strip() or None
    return None if cell != cell else cell


def is_missing(cell: Any) -> bool:
    """Whether a cell of a feature or a target says that there is no value."""
    return cell is None or (isinstance(cell, str) and cell.lower() in MISSING)


def _plain(cell: Any) -> str:
    """1.0 as 1: a column of whole numbers in which some are missing comes as floats from Parquet."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _number(cell: Any) -> float | None:
    if isinstance(cell, str) and "_" in cell:  # 12_000 is a number to Python, and a name in a table
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
