"""What a seeded bug is: one change of one file, and the tests that must notice it."""

from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str  # from the root of the repository
    old: str  # occurs there exactly once
    new: str
    tests: tuple[str, ...]  # arguments of pytest; with the bug they must fail
