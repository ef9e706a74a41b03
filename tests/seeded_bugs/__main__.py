"""Seeds one bug at a time in a copy of the tree, and shows whether the tests that should notice it do.

    python tests/seeded_bugs [cpu|cuda|triton] [name...]

Tests that pass may be tests that cannot fail: each list of bugs here (`cpu.py`, `cuda.py`, `triton.py`) is a list of
changes that must turn the named tests red. Half a minute a bug; exits with 1 if one survives.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# without this folder, whose triton.py is not Triton
sys.path[:] = [str(HERE.parent), str(ROOT), *(path for path in sys.path if Path(path).resolve() != HERE)]
GROUPS = ("cpu", "cuda", "triton")
# no compiled Python: a file that changes twice in a second would count as unchanged
ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1", "FASTMETA_DATA": str(ROOT.parent / "shared" / "data"), **os.environ}


def copy_tree(to: Path) -> None:
    unwanted = (".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", ".*cache", ".hypothesis", "runs")
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*unwanted))
    # an installed package knows its kernels' folder by name, and would find that of the installed tree
    (to / "fastmeta" / "kernels").symlink_to(to / "kernels" / "triton")


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return -1, "no end within 15 minutes"
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


def verdict(code: int, output: str) -> str:
    if code == 1:
        return "killed"
    return "SURVIVED" if code == 0 else f"pytest ended with {code}: {output}"


def seed(group: str, bugs: list, tree: Path, objects: Path) -> bool:
    """Whether all `bugs` were killed; one line is printed for each."""
    build = None
    if group == "cpu":  # the others' tests compile what they run, or run what is not compiled
        from seeded_bugs.native import Build

        build = Build(tree, objects)
    # in one run all that are no options
    alone = {bug.tests for bug in bugs if any(test.startswith("-") for test in bug.tests)}
    together = sorted({test for bug in bugs if bug.tests not in alone for test in bug.tests})
    for tests in (together, *alone) if together else alone:
        code, output = run_tests(tree, list(tests))
        if code != 0:
            print(f"{group}: without a bug the tests do not pass\n{output}")
            return False
    all_killed = True
    for bug in bugs:
        start, file = time.monotonic(), tree / bug.file
        text = file.read_text()
        file.write_text(text.replace(bug.old, bug.new, 1))
        try:
            if build:
                build.with_changed(bug.file)
            found = verdict(*run_tests(tree, list(bug.tests)))
        except RuntimeError as error:  # a bug that does not compile is none
            found = f"does not build: {error}"
        finally:
            file.write_text(text)
        all_killed = all_killed and found == "killed"
        print(f"{group:7}{bug.name:44}{time.monotonic() - start:6.0f} s  {found}", flush=True)
    return all_killed


def main() -> int:
    groups = [a for a in sys.argv[1:] if a in GROUPS] or [g for g in GROUPS if (HERE / f"{g}.py").exists()]
    names = [a for a in sys.argv[1:] if a not in GROUPS]
    bugs = {group: importlib.import_module(f"seeded_bugs.{group}").BUGS for group in groups}
    unknown = set(names) - {bug.name for group in groups for bug in bugs[group]}
    if unknown:
        raise SystemExit(f"no such bug: {', '.join(sorted(unknown))}")
    if names:
        bugs = {group: found for group in groups if (found := [b for b in bugs[group] if b.name in names])}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        killed = [seed(group, found, tree, Path(folder) / "objects") for group, found in bugs.items()]
    return 0 if all(killed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
