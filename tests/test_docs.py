"""What the README and docs/ say holds: code runs, commands parse, paths exist, figures are those of the results."""

import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer

from benchmarks import memory as memory_command
from benchmarks import modules as modules_command
from benchmarks import report as report_command
from benchmarks import sampler as sampler_command
from benchmarks import sampling as sampling_command
from benchmarks import scaling as scaling_command
from benchmarks.conv import __main__ as conv_command
from fastmeta import tasks
from fastmeta.cli.main import app
from fastmeta.tasks import glyphs

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ids = {"ids": lambda page: page.name}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(number of its first line, text) of every fenced block in `language`."""
    text = page.read_text()
    return [(text[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def spans(page: Path) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


# code -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], **ids)
def test_python_runs(page, monkeypatch):
    """A page's blocks in order, in one namespace, as a reader types them."""
    torch.manual_seed(0)
    monkeypatch.setattr(tasks, "glyphs", lambda split, seed=0: glyphs("val", seed))  # a quarter of the time to draw
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # errors name the page's line


# commands -------------------------------------------------------------------------------------------------------------
def single(function):
    alone = typer.Typer()
    alone.command()(function)
    return alone


MODULES = {
    "fastmeta": app,
    "benchmarks.conv": single(conv_command.main),
    "benchmarks.memory": single(memory_command.main),
    "benchmarks.modules": single(modules_command.main),
    "benchmarks.report": single(report_command.main),
    "benchmarks.sampler": single(sampler_command.main),
    "benchmarks.sampling": single(sampling_command.main),
    "benchmarks.scaling": single(scaling_command.main),
}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:fastmeta|make|python -m (?:fastmeta|benchmarks)\b\S*)(?: .*)?$")


def parse(command: str) -> None:
    """Raises where the command would be refused before it does anything."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS, command
        return
    if words[:3] == ["python", "-m", "benchmarks"]:
        words[:3] = ["fastmeta", "bench"]
    name, arguments = (words[2], words[3:]) if words[:2] == ["python", "-m"] else (words[0], words[1:])
    entry = typer.main.get_command(MODULES[name])
    if hasattr(entry, "commands"):
        assert arguments[0] in entry.commands, f"{name} has no command {arguments[0]}"
        name, entry, arguments = arguments[0], entry.commands[arguments[0]], arguments[1:]
    with mock.patch("fastmeta.cli.config_file._parsed", return_value={}):  # what --config names is the reader's own
        entry.make_context(name, list(arguments))


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_of_blocks_parse(page):
    for _, block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if COMMAND.match(line):
                parse(line)
            else:
                assert re.match(r"(\w+=\S+ )*pip install |$|#", line), f"nothing here knows {line!r}"


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_in_sentences_parse(page):
    for span in spans(page):
        if COMMAND.match(span) and span != "fastmeta" and "NAME" not in span:
            try:
                parse(span)
            except Exception as error:
                # a sentence may leave out what must be given, as `fastmeta evaluate` does
                assert type(error).__name__ == "MissingParameter", f"{span}: {error}"


@pytest.mark.parametrize(
    "command, why",
    [
        ("fastmeta train protonet --shotz 1", "shotz"),
        ("fastmeta train nothing", "nothing"),
        ("fastmeta trane maml", "trane"),
        ("fastmeta evaluate", "checkpoint"),
        ("make dmeo", "dmeo"),
        ("python -m benchmarks --secs 3", "secs"),
    ],
)
def test_wrong_commands_are_seen(command, why):
    with pytest.raises(Exception, match=why):
        parse(command)


# names ----------------------------------------------------------------------------------------------------------------
FOLDERS = ("fastmeta", "csrc", "kernels", "docs", "tests", "benchmarks", ".ci")


@pytest.mark.parametrize("page", PAGES, **ids)
def test_paths_and_tests_exist(page):
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for span in spans(page):
        if re.fullmatch(r"[\w.]+/[\w./*<>-]*", span) and span.split("/")[0] in FOLDERS:
            assert list(ROOT.glob(re.sub(r"<\w+>", "*", span).rstrip("/"))), f"{span} does not exist"
        if re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in sources, f"there is no {span}"


def test_environment_variables():
    """Those in the README's table are those that the package and its build read."""
    told = set(re.findall(r"FASTMETA_[A-Z_]+", "".join(line for line in README.open() if line.startswith("| `"))))
    sources = [*(ROOT / "fastmeta").rglob("*.py"), ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp")]
    calls = r'\w[([]"(FASTMETA_[A-Z_]+)"'  # get("..."), environ["..."], getenv("...")
    read = set(re.findall(calls, "".join(path.read_text() for path in sources)))
    assert told == read


# figures --------------------------------------------------------------------------------------------------------------
def test_tables_are_those_of_the_committed_results():
    """`python -m benchmarks.report` writes them."""
    text, folder = README.read_text(), report_command.IN_README
    assert f"`{folder.relative_to(ROOT).as_posix()}/report.md`" in text
    assert text == report_command.readme(text, folder), "python -m benchmarks.report makes the README's tables"
    case = json.loads((folder / "results.json").read_text())["cases"][0]
    figure = f"| {case['name']} | {case['contenders']['fastmeta']['median_ms']:.3f} |"
    assert figure in text and report_command.readme(text.replace(figure, "| another |"), folder) == text
