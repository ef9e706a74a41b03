"""The site: every page is in it, every public name is in its reference, and it builds without a warning."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = {"functional", "algorithms", "tasks", "training", "nn"}


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_every_public_name_is_in_the_reference(name):
    package = f"fastmeta.{name}"
    module = importlib.import_module(package)
    told = re.findall(rf"^::: {package}\.(\w+)$", (DOCS / "reference" / f"{name}.md").read_text(), re.MULTILINE)
    things = {one for one in module.__all__ if hasattr(getattr(module, one), "__name__")}
    own = {one for one in things if getattr(module, one).__module__.startswith("fastmeta")}
    assert len(told) == len(set(told)) and set(told) == own
    assert {path.stem for path in (DOCS / "reference").glob("*.md")} == REFERENCE


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs")
def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-2000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    text = (tmp_path / "site" / "reference" / "functional" / "index.html").read_text()
    assert 'id="fastmeta.functional.pairwise_distance"' in text and "Raises" in text
    for page in pages:  # nothing is fetched from elsewhere
        assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["']https?:""", page.read_text()), page
