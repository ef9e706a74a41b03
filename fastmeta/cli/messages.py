"""What the command line says to a person: lines on stdout, warnings and errors on stderr, each in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from . import options

if TYPE_CHECKING:
    from ..training.distributed import Ranks

out, err = Console(), Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """A line on stdout."""
    _print(out, text, style)


def warn(text: str) -> None:
    """A line on stderr."""
    _print(err, text, "yellow")


def one_speaks(ranks: Ranks) -> None:
    """Of processes that work together, rank 0 says what is to be said, but for errors."""
    out.quiet = err.quiet = not ranks.first


def _print(console: Console, text: str, style: str | None) -> None:
    try:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)  # a path may look like markup
    except OSError as error:
        if error.errno != errno.EIO:  # a terminal that was closed, on which a run goes on
            raise


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Inside, a user's mistake ends in one line on stderr and code 2, and what the machine or the mathematics cannot do
    in code 1; warnings about data are one line each."""
    with warnings.catch_warnings():
        otherwise = warnings.showwarning

        def show(message, category, *where, **more):
            if category.__name__ == "DataWarning":  # of fastmeta.tasks, which takes too long to import for --help
                warn(f"warning: {message}")
            else:
                otherwise(message, category, *where, **more)

        warnings.showwarning = show
        with _one_line():
            yield


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error, 2)
    except (MemoryError, OverflowError) as error:
        _fail(RuntimeError(f"too large for this machine: {str(error) or 'out of memory'}"), 1)
    except RuntimeError as error:
        # Any other RuntimeError is a bug, whose traceback is wanted.
        from torch import OutOfMemoryError

        from ..training import NonFiniteError
        from ..training.distributed import PeerError

        if isinstance(error, OutOfMemoryError):
            _fail(RuntimeError(f"{str(error).splitlines()[0]} --task-chunk bounds the memory of a step"), 1)
        of_memory = ("can't allocate memory", "bad_alloc", "overflow")
        if any(text in str(error).lower() for text in of_memory):  # of a CPU, which has no class
            said = str(error).splitlines()[0]
            _fail(RuntimeError(f"too large for this machine: {said}; --task-chunk bounds the memory of a step"), 1)
        if isinstance(error, (NonFiniteError, PeerError)):
            _fail(error, 1)
        raise


def _fail(error: Exception, code: int) -> None:
    """End with `code` after one line, or with the traceback where `--debug` asks for it."""
    if options.debugging():
        raise error
    err.quiet = False
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":  # torchrun's processes
        err.print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: ", end="", highlight=False)
    err.print("[bold red]error:[/bold red] ", end="")
    err.print(" ".join(str(error).split()) or type(error).__name__, markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
