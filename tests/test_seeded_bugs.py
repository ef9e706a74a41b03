"""The seeded bugs of `tests/seeded_bugs` still stand where they say. That the tests notice them takes half a minute a
bug: `python tests/seeded_bugs`."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "seeded_bugs"
GROUPS = [group for group in ("cpu", "cuda", "triton") if (FOLDER / f"{group}.py").exists()]


@pytest.mark.parametrize("group", GROUPS)
def test_each_is_one_change_of_what_is_there(group):
    bugs = importlib.import_module(f"seeded_bugs.{group}").BUGS
    assert bugs and len({bug.name for bug in bugs}) == len(bugs)
    for bug in bugs:
        assert (ROOT / bug.file).read_text().count(bug.old) == 1, bug.name
        assert bug.new != bug.old and bug.tests, bug.name
        files = [test.split("::")[0] for test in bug.tests if test.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files), bug.name
