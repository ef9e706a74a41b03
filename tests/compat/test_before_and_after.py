"""The pairs of examples run: `before`, a library's own loop with its import changed; `after`, the vectorised form."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
FILES = sorted([*EXAMPLES.glob("*_before.py"), *EXAMPLES.glob("*_after.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example(path, few_glyphs, monkeypatch, capsys):
    assert len(path.read_text().splitlines()) < 100
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "2"])
    runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().out
    assert re.search(r"\d", told) and not re.search(r"\b(nan|inf)\b", told)


def test_examples_come_in_pairs():
    names = {path.stem.rsplit("_", 1)[0] for path in FILES}
    pairs = {f"{name}_{form}" for name in names for form in ("before", "after")}
    assert names and {path.stem for path in FILES} == pairs
