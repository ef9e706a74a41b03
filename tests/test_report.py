"""What a run leaves behind to look at: the log and the page."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.algorithms import NearestNeighbour
from fastmeta.tasks import EpisodeSampler, Examples
from fastmeta.training import CheckpointFolder, Estimate, run_config
from fastmeta.training.evaluate import judged
from fastmeta.training.log import LogReporter, read_log
from fastmeta.training.report.charts import Line, line_chart
from fastmeta.training.report.page import page
from fastmeta.training.report.predictions import Predictions, Query, Task, predict_tasks
from fastmeta.training.run import build_algorithm, build_tasks, build_trainer

SINUSOID = ["maml", "--data", "sinusoid", "--task-batch", 4, "--eval-tasks", 8, "--hidden", "8", "--threads", 1]
GLYPHS = [
    "protonet", "--data", "glyphs", "--ways", 3, "--train-ways", 3, "--query-shots", 2, "--hidden", 8, "--model", "mlp",
    "--eval-tasks", 8, "--threads", 1,
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("few_glyphs")

VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture
def run(run):
    """Both streams as one text."""
    return lambda *arguments, **options: "".join(run(*arguments, **options))


class Page(HTMLParser):
    """Reads a page and complains of tags that are not closed, scripts, and whatever refers to something outside."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "base", "b")
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "style"):
            value = attributes.get(name, "data:")
            assert value.startswith("data:"), f"<{tag} {name}={value!r}>"
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.text.append(data)


# ----- the log


def test_log_of_a_run_and_where_it_goes_on(tmp_path, run):
    run("train", *SINUSOID, "--iterations", 6, "--eval-every", 2, "--out", tmp_path, "--no-report", "--test-tasks", 4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == read_log(tmp_path)
    assert lines[0].keys() == {"step", "seconds", "started", "machine", "versions"}
    reports = [line for line in lines if "tasks_per_second" in line]
    assert [line["step"] for line in reports][-3:] == [2, 4, 6] and reports[-1]["outer_lr"] == 1e-3
    assert all(line["loss"] > 0 and line["seconds"] > 0 and "accuracy" not in line for line in reports)
    record = CheckpointFolder(tmp_path).newest()[0].record
    validations = [line for line in lines if "validation" in line]
    assert [(line["step"], line["validation"]["loss"]) for line in validations] == [
        (entry["step"], entry["loss"]) for entry in record["history"]
    ]
    assert lines[-1]["test"]["loss"]["episodes"] == 4

    # a crash at step 9, half a line written: what is beyond the checkpoint of step 6 is written anew
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "seconds": 3.0, "loss": 1.0}\n{"step": 9, "sec')
    run("train", "--resume", "--out", tmp_path, "--iterations", 8, "--no-report")
    later = read_log(tmp_path)
    assert later[: len(lines)] == lines and "started" in later[len(lines)]
    steps = [line["step"] for line in later]
    assert steps == sorted(steps) and steps[-1] == 8 and 9 not in steps


def test_a_new_run_begins_a_new_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "seconds": 0}\n{"step": 3, "seconds": 1}\n')
    LogReporter(tmp_path, device=torch.device("cpu"))
    assert [line["step"] for line in read_log(tmp_path)] == [0]


# ----- the page


def test_report_of_images(tmp_path, run):
    said = run("train", *GLYPHS, "--iterations", 4, "--eval-every", 2, "--out", tmp_path)
    path = tmp_path / "report.html"
    assert f"report in {path}" in " ".join(said.split())
    found = Page(path.read_text())
    record = CheckpointFolder(tmp_path).newest()[0].record
    last = Estimate(*record["history"][-1]["accuracy"].values())
    assert last.percent() in found.text
    evaluated = json.loads(run("evaluate", tmp_path, "--episodes", 8, "--threads", 1, "--json"))["accuracy"]
    assert f"accuracy, 8 test tasks {Estimate(*evaluated.values()).percent()}" in found.text
    for text in ("protonet on glyphs", "train_ways 3", "sqeuclidean", "throughput, median", torch.__version__,
                 "classes of this data have no names", "best checkpoint step ", "tasks/s"):  # fmt: skip
        assert text in found.text, text
    queries = [image["alt"] for image in found.images if image["alt"].startswith("query of")]
    assert len(queries) >= 3 * 6 and len([image for image in found.images if "support" in image["alt"]]) >= 3 * 3
    wrong = sum(re.fullmatch(r"query of (.*), predicted (?!\1$).*", alt) is not None for alt in queries)
    mistakes = sum(image["alt"].endswith("which was predicted") for image in found.images)
    assert found.text.count("✗") == wrong + mistakes and mistakes >= wrong > 0
    run("report", tmp_path, "--tasks", 3, "--threads", 1)
    assert "accuracy, 3 test tasks" in Page(path.read_text()).text


def test_report_of_regression(tmp_path, run):
    run("train", *SINUSOID, "--iterations", 2, "--out", tmp_path)
    found = Page((tmp_path / "report.html").read_text())
    assert "Predicted against true" in found.text and "80 points" in found.text and not found.images
    assert "squared error, 8 test tasks" in found.text and "Confusion" not in found.text


def test_report_without_the_data_or_the_log(tmp_path, run, monkeypatch):
    run("train", *GLYPHS, "--iterations", 2, "--out", tmp_path, "--no-report")
    (tmp_path / "log.jsonl").unlink()
    monkeypatch.setattr("fastmeta.training.run.make_tasks", lambda *_, **__: (_ for _ in ()).throw(OSError("<gone>")))
    run("report", tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Not here: &lt;gone&gt;" in text and "<gone>" not in text
    found = Page(text)
    assert "Not recorded: the run has no log." in found.text and "train_ways 3" in found.text
    assert "no such file or folder" in run("report", tmp_path / "elsewhere", code=2)


NAMED = [Query(torch.rand(1, 5, 5), "<b>bold</b>", '"&\'', 0.9, torch.rand(1, 5, 5), torch.rand(1, 5, 5))]


SMALL = {"model": "mlp", "hidden": (8,), "query_shots": 2, "eval_every": 0}


def page_of(tmp_path, predictions):
    config = run_config("protonet", "glyphs", iterations=1, train_ways=3, ways=3, **SMALL)
    build_trainer(config, tmp_path).run()
    checkpoint = CheckpointFolder(tmp_path).newest()[0]
    return page(tmp_path, config, checkpoint, checkpoint, [], predictions, 3)


def test_names_are_escaped(tmp_path):
    support = [(torch.rand(1, 5, 5), "<b>bold</b>")]
    predictions = Predictions(
        Estimate(1.0, 0.1, 3), Estimate(0.5, 0.1, 3), [Task(support, NAMED)], NAMED,
        Counter({("<b>bold</b>", "<i>"): 3, ("<i>", "<i>"): 1}),
    )  # fmt: skip
    text = page_of(tmp_path, predictions)
    found = Page(text)
    assert "<b>" not in text and "<i>" not in text and "<b>bold</b>" in found.text
    assert "is <b>bold</b> <i> <b>bold</b> 100% <i> 100%" in found.text


def test_predictions_of_tasks_are_the_algorithms(tmp_path):
    config = run_config("protonet", "glyphs", ways=3, train_ways=3, shots=2, **SMALL)
    tasks = build_tasks(config, "test", torch.device("cpu"))
    algorithm = build_algorithm(config, tasks, torch.device("cpu"))
    found = predict_tasks(algorithm, tasks, episodes=6)
    batch = tasks.sample(6, generator=torch.Generator().manual_seed(0x6D657461))
    with torch.no_grad():
        output = algorithm.eval()(batch)
    torch.testing.assert_close(found.accuracy.mean, float(output.accuracy.double().mean()))
    assert len(found.tasks) == 3
    for task, shown in enumerate(found.tasks):
        assert [label for _, label in shown.support] == [f"class {int(y)}" for y in batch.support_y[task]]
        probability, predicted = output.logits[task].softmax(-1).max(-1)
        for row, query in enumerate(shown.queries):
            assert torch.equal(query.x, batch.query_x[task, row])
            assert query.true == f"class {int(batch.query_y[task, row])}"
            assert query.predicted == f"class {int(predicted[row])}"
            assert query.probability == pytest.approx(float(probability[row]))
    wrong = output.logits.argmax(-1) != batch.query_y
    assert len(found.mistakes) == min(24, int(wrong.sum()))
    best = output.logits.softmax(-1).amax(-1)[wrong].sort(descending=True).values
    assert [q.probability for q in found.mistakes] == pytest.approx(best[: len(found.mistakes)].tolist())
    first = found.mistakes[0]
    assert any(torch.equal(first.of_true, x) for x in batch.support_x.flatten(0, 1))


@pytest.mark.parametrize("sizes", [{"ways": 3, "shots": 1}, {"ways": (2, 4), "shots": (1, 3)}], ids=str)
def test_names_are_those_of_the_rows(sizes):
    names = ["<b>", "two", "same", "same", "five"]
    counts = torch.tensor([5, 6, 4, 5, 7])
    labels = torch.arange(5).repeat_interleave(counts)[torch.randperm(27, generator=torch.Generator().manual_seed(0))]
    rows = labels[:, None] + 0.4 * torch.rand(27, 2, generator=torch.Generator().manual_seed(1))
    examples = Examples(rows, labels, names=names, groups=["a", "a", "b", "c", "c"])
    tasks = EpisodeSampler(examples, **sizes, query_shots=1)
    named = ("a/<b>", "a/two", "b/same", "c/same", "c/five")
    found = predict_tasks(NearestNeighbour(torch.nn.Identity()), tasks, episodes=40, named=True)
    assert found.accuracy.mean == 1 and not found.mistakes
    assert set(found.confusion) == {(name, name) for name in named}
    for task in found.tasks:
        assert all(label == named[int(x[0])] for x, label in task.support)
        assert all(query.true == query.predicted == named[int(query.x[0])] for query in task.queries)
    # classes 0 and 1 fall together, and so do 2 and 3
    judge = NearestNeighbour(Halved())
    found = predict_tasks(judge, tasks, episodes=40, named=True)
    wrong = {pair for pair in found.confusion if pair[0] != pair[1]}
    assert wrong and wrong <= {named[:2], named[1::-1], named[2:4], named[3:1:-1]}
    assert found.mistakes and {(query.true, query.predicted) for query in found.mistakes} <= wrong
    queries = [batch.query_y.numel() if batch.query_mask is None else int(batch.query_mask.sum())
               for batch, _ in judged(judge, tasks, episodes=40)]  # fmt: skip
    assert found.confusion.total() == sum(queries)


class Halved(torch.nn.Module):
    def forward(self, x):
        return (x[:, :1] / 2).floor()


def test_charts_hold_one_point_and_many():
    for points in ([(0, 0.0)], [(0, -1e-9, 2e-9)], [(i, 1e6 + i, 5.0) for i in range(5000)]):
        text = line_chart("<x>", [Line("a&b", points), Line("none", [])], "step", "y", "{:.3g}".format)
        assert "nan" not in text and "<x>" not in text and text.count(",") < 5000
        Page(text)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(tmp_path, run, dark):
    run("train", *GLYPHS, "--iterations", 2, "--out", tmp_path / "run")
    picture = tmp_path / "page.png"
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1000,1400", f"--screenshot={picture}",
        *(["--blink-settings=preferredColorScheme=0"] * dark),
    ]  # fmt: skip
    subprocess.run(["chromium", *options, (tmp_path / "run" / "report.html").as_uri()], check=True, timeout=120,
                   capture_output=True)  # fmt: skip
    shown = torch.from_numpy(np.array(Image.open(picture).convert("L"))).int()
    background = shown[5, 5]
    assert (background < 60) == dark
    assert ((shown - background).abs() > 60).float().mean() > 0.02  # text and charts
    assert (shown[200:].float().std(1) > 5).float().mean() > 0.5  # all the way down
