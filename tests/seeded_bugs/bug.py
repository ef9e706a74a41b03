"""What a seeded bug is: one change of one file, and the tests that must notice it."""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str  # from the root of the repository
    old: str  # occurs there exactly once
    new: str
    tests: tuple[str, ...]  # arguments of pytest; with the bug they must fail


def at(*cases: str, dtype: str = "float32") -> tuple[str, ...]:
    """The tests of `tests/test_boundaries.py` that must fail."""
    return tuple(f"tests/test_boundaries.py::test_values_and_gradients[{case}-{dtype}]" for case in cases)
