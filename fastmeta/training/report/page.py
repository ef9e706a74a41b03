"""The page: sections of HTML about a run. All text that comes from outside is escaped."""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..metrics import Estimate
from .charts import Line, line_chart, scatter_chart

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..config import RunConfig
    from .predictions import Predictions, Query, Task

_SUPPORT_SHOWN, _QUERIES_SHOWN, _ROWS_SHOWN, _PAIRS_SHOWN, _MATRIX = 25, 40, 12, 20, 20
_LARGEST_IMAGE = 96

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p>$subtitle</p></header>
<main>
$sections
</main>
<footer><p>Written by fastmeta $version.</p></footer>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --quiet: #565b62; --rule: #d6d9de; --card: #f5f6f8;
  --s0: #0b62a4; --s1: #a84a00; --right: #19692f; --wrong: #a8201a; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e9eaec; --quiet: #a9aeb6; --rule: #3b3f45; --card: #202327;
    --s0: #6cb6ff; --s1: #ffa657; --right: #6bd07f; --wrong: #ff8f86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; }
header p, footer, .note, .legend { color: var(--quiet); } .note, .legend { font-size: .9rem; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
dl div { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem 1rem; }
dt { color: var(--quiet); font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; } .charts figure { max-width: 44rem; } .tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.charts figcaption { font-weight: 600; margin-bottom: .3rem; }
.chart { width: 100%; height: auto; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
svg text { fill: var(--quiet); font-size: 13px; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; } .band { opacity: .22; stroke: none; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .line.s1 { stroke-dasharray: 6 3; }
.band.s0, .dot.s0, .point.s0 { fill: var(--s0); } .band.s1, .dot.s1 { fill: var(--s1); }
.point { opacity: .55; stroke: none; } .key { width: 24px; height: 8px; } .legend span { margin-right: 1rem; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; margin: .4rem 0 1rem; padding: 0; list-style: none; }
.images li { border: 2px solid var(--rule); border-radius: .4rem; padding: .3rem; text-align: center;
  font-size: .78rem; line-height: 1.3; max-width: 12rem; overflow-wrap: anywhere; }
.images img { display: block; margin: 0 auto .2rem; width: 56px; height: 56px; object-fit: contain;
  image-rendering: pixelated; background: #888; }
.images .wrong { border: 2px dashed var(--wrong); } .images .right { border-color: var(--right); }
.trio { display: flex; gap: .3rem; justify-content: center; }
.verdict { font-weight: 600; } .right .verdict { color: var(--right); } .wrong .verdict { color: var(--wrong); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
tbody th { font-weight: 400; }
td { font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
@media print { body { max-width: none; } }
"""


def page(
    folder: Path,
    config: RunConfig,
    best: Checkpoint,
    newest: Checkpoint,
    log: Sequence[dict[str, Any]],
    found: Predictions | str,
    parameters: int,
) -> str:
    """The whole of `report.html`. `best`, `newest`: the run's checkpoints; `log`: its lines; `found`: what the best
    one says of test tasks, or why that is not known."""
    size = f"{config.shots} shots" if config.regression else f"{config.ways}-way {config.shots}-shot"
    sections = [
        _section("Results", _key_figures(best, newest, log, found, parameters)),
        _section("Curves", _curves(config, newest, log)),
        *([_section("Predictions", f'<p class="note">Not here: {escape(found)}</p>')] if isinstance(found, str)
          else _predictions(found)),
        _section("Throughput", _throughput(log)),
        _section("Settings", _table(("setting", "value"), _settings(config), "All settings of the run.")),
        _section("Versions and machine", _table(("what", "value"), _environment(best, log), "What the run ran on.")),
    ]  # fmt: skip
    return _PAGE.substitute(
        title=escape(f"{config.algorithm} on {config.data_name}"),
        subtitle=escape(f"{size}, {folder.resolve().name}, {newest.step:,} steps"),
        style=_STYLE, sections="\n".join(sections), version=escape(best.record["versions"]["fastmeta"]),
    )  # fmt: skip


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{inside}\n</section>"


def _key_figures(
    best: Checkpoint, newest: Checkpoint, log: Sequence[dict[str, Any]], found: Predictions | str, parameters: int
) -> str:
    figures: list[tuple[str, str]] = []
    tested = [line["test"] for line in log if "test" in line and line["step"] == best.step][-1:]
    if not isinstance(found, str):
        both = {"loss": found.loss, "accuracy": found.accuracy}
        tested.append({name: estimate.as_json() for name, estimate in both.items() if estimate is not None})
    for test in sorted(tested, key=lambda test: test["loss"]["episodes"])[-1:]:
        name, value = _from_json(test)
        figures.append((f"{name}, {test['loss']['episodes']:,} test tasks", value))
    if not isinstance(found, str) and found.own_error is not None:
        figures.append(("its root, in the targets' own unit", f"{found.own_error:.4g}"))
    for entry in newest.record["history"]:
        if entry["step"] == best.step:
            name, value = _from_json(entry)
            figures.append((f"{name}, validation, best checkpoint", value))
    rates = [line["tasks_per_second"] for line in log if "tasks_per_second" in line]
    minutes = newest.record["seconds"] / 60
    figures += [("best checkpoint", f"step {best.step:,}"), ("training", f"{minutes:.1f} minutes")]
    if rates:
        figures.append(("throughput, median", f"{statistics.median(rates):,.0f} tasks/s"))
    figures.append(("parameters", f"{parameters:,}"))
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    return f'<dl>{shown}</dl><p class="note">± is the 95% confidence interval over tasks.</p>'


def _of(accuracy: Estimate | None, loss: Estimate) -> tuple[str, str]:
    return ("squared error", loss.plain()) if accuracy is None else ("accuracy", accuracy.percent())


def _from_json(entry: dict[str, Any]) -> tuple[str, str]:
    """A validation's figure from its JSON."""

    def estimate(name: str) -> Estimate | None:
        if name not in entry:
            return None
        return Estimate(*(float("nan") if value is None else value for value in entry[name].values()))

    return _of(estimate("accuracy"), estimate("loss"))


def _curves(config: RunConfig, newest: Checkpoint, log: Sequence[dict[str, Any]]) -> str:
    history, charts = newest.record["history"], []
    for what, show in (("loss", "{:.3g}".format), ("accuracy", "{:.0%}".format)):
        trained = [(line["step"], line[what]) for line in log if what in line]
        validated = [
            (entry["step"], entry[what]["mean"], entry[what]["ci95"] or 0.0)
            for entry in history
            if what in entry and entry[what]["mean"] is not None
        ]
        lines = [Line("training", trained), Line("validation, with its 95% interval", validated, marked=True)]
        if trained or validated:
            charts.append(line_chart(what.capitalize(), lines, "step", what, show))
    table = ""
    if charts and (config.train_ways, config.train_shots) != (config.ways, config.shots):
        table = (
            f'<p class="note">Training tasks are {config.train_ways}-way {config.train_shots}-shot, those of '
            f"validation {config.ways}-way {config.shots}-shot: they are not of equal difficulty.</p>"
        )
    if history:
        rows = [(f"{entry['step']:,}", f"{entry['seconds']:.0f}", _from_json(entry)[1]) for entry in history]
        name = _from_json(history[0])[0]
        numbers = _table(("step", "seconds", name), rows, "Validations, with their 95% intervals.")
        table += f"<details><summary>Validations in numbers</summary>{numbers}</details>"
    if not charts:
        return '<p class="note">Nothing was reported: the run has no log and was not validated.</p>'
    return f'<div class="charts">{"".join(charts)}</div>{table}'


def _throughput(log: Sequence[dict[str, Any]]) -> str:
    rates = [(line["step"], line["tasks_per_second"]) for line in log if "tasks_per_second" in line]
    if not rates:
        return '<p class="note">Not recorded: the run has no log.</p>'
    show = "{:,.3g}".format if max(rate for _, rate in rates) < 10 else "{:,.0f}".format
    chart = line_chart("Training tasks per second", [Line("training", rates)], "step", "tasks/s", show)
    return f'<div class="charts">{chart}</div>'


def _predictions(found: Predictions) -> list[str]:
    sections = []
    if found.points is not None:
        chart = scatter_chart("Test tasks: predicted against true", found.points.tolist(), "true", "predicted")
        sections.append(_section("Predicted against true", f'<div class="charts">{chart}</div>'))
    images = bool(found.tasks) and _is_image(found.tasks[0].support[0][0])
    shown = "".join(
        f"<div><h3>Task {number}</h3>{_task_of_images(task) if images else _task_of_rows(task)}</div>"
        for number, task in enumerate(found.tasks, 1)
    )
    shown = shown if images else f'<div class="tables">{shown}</div>'
    sections.append(_section("Queries and predictions", shown))
    if found.accuracy is not None:
        sections.append(_section("Most confident mistakes", _mistakes(found.mistakes, images)))
        sections.append(_section("Confusion", _confusion(found)))
    return sections


def _task_of_images(task: Task) -> str:
    support = "".join(
        f"<li>{_image(x, f'support example of {label}')}{escape(label)}</li>"
        for x, label in _some(task.support, _SUPPORT_SHOWN)
    )
    queries = "".join(_query(query) for query in _some(task.queries, _QUERIES_SHOWN))
    some = _of_all(task.queries, _QUERIES_SHOWN)
    return (
        f'<p class="note">Support set{_of_all(task.support, _SUPPORT_SHOWN)}</p><ul class="images">{support}</ul>'
        f'<p class="note">Queries{some}, with the predicted class and its probability</p>'
        f'<ul class="images">{queries}</ul>'
    )


def _query(query: Query) -> str:
    right = query.true == query.predicted
    told = f"query of {query.true}, predicted {query.predicted}"
    verdict = f"{'✓' if right else '✗'} {query.predicted} ({query.probability:.0%})"
    correction = "" if right else f"<br>is {escape(query.true)}"
    return (
        f'<li class="{"right" if right else "wrong"}">{_image(query.x, told)}'
        f'<span class="verdict">{escape(verdict)}</span>{correction}</li>'
    )


def _mistakes(mistakes: Sequence[Query], images: bool) -> str:
    if not mistakes:
        return '<p class="note">There are none.</p>'
    if not images:
        rows = [(_numbers(q.x), q.true, q.predicted, f"{q.probability:.0%}") for q in mistakes]
        return _table(("query", "is", "predicted", "probability"), rows, "Of all test tasks.")
    shown = "".join(
        f'<li class="wrong"><span class="trio">{_image(query.x, f"query of {query.true}")}'
        f"{_image(query.of_true, f'support example of {query.true}, which it is')}"
        f"{_image(query.of_predicted, f'support example of {query.predicted}, which was predicted')}</span>"
        f'<span class="verdict">{escape(f"✗ {query.predicted} ({query.probability:.0%})")}</span>'
        f"<br>is {escape(query.true)}</li>"
        for query in mistakes
    )
    note = "Of all test tasks: the query, a support example of its class, and one of the class that was predicted."
    return f'<p class="note">{note}</p><ul class="images">{shown}</ul>'


def _confusion(found: Predictions) -> str:
    if found.confusion is None:
        return (
            '<p class="note">Left out: the classes of this data have no names, and a class\'s number within one task '
            "says nothing about the next.</p>"
        )
    counts = found.confusion
    totals: dict[str, int] = {}
    for (true, _), count in counts.items():
        totals[true] = totals.get(true, 0) + count
    names = sorted({name for pair in counts for name in pair})
    if len(names) <= _MATRIX:
        rows = [
            [true, *(f"{counts[true, other] / totals[true]:.0%}" if counts[true, other] else "" for other in names)]
            for true in names
            if true in totals
        ]
        return _table(("is", *names), rows, "Of a class's queries (a row), the share that was predicted as each.")
    wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]][:_PAIRS_SHOWN]
    rows = [(true, other, f"{count:,}", f"{count / totals[true]:.0%}") for (true, other), count in wrong]
    if not rows:
        return '<p class="note">No class was taken for another.</p>'
    return _table(("is", "predicted", "queries", "of its queries"), rows, "Classes most often taken for another.")


def _task_of_rows(task: Task) -> str:
    regression = isinstance(task.queries[0].true, Tensor)
    rows = [
        (_numbers(q.x), _numbers(q.true), _numbers(q.predicted))
        if regression
        else (_numbers(q.x), q.true, f"{'✓' if q.true == q.predicted else '✗'} {q.predicted}", f"{q.probability:.0%}")
        for q in _some(task.queries, _ROWS_SHOWN)
    ]
    head = ("query", "true", "predicted") if regression else ("query", "is", "predicted", "probability")
    caption = f"{len(task.support)} support rows; queries{_of_all(task.queries, _ROWS_SHOWN)}"
    return _table(head, rows, caption)


def _settings(config: RunConfig) -> Iterable[tuple[str, str]]:
    for name, value in config.as_json().items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
            value = ", ".join(f"{key}={json.dumps(one)}" for key, one in value)
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        yield name, "" if value is None else str(value)


def _environment(best: Checkpoint, log: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = [(name, str(value)) for name, value in best.record["versions"].items()]
    starts = [line for line in log if "started" in line]
    if not starts:
        return [*rows, ("machine", "not recorded: the run has no log")]
    rows += [(name, str(value)) for name, value in starts[-1]["machine"].items()]
    return [*rows, *((f"started at step {line['step']:,}", line["started"]) for line in starts)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        # wide ones scroll, by keys too
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _some(rows: Sequence[Any], most: int) -> Sequence[Any]:
    """`most` of them from end to end, or all."""
    return rows if len(rows) <= most else [rows[i * len(rows) // most] for i in range(most)]


def _of_all(rows: Sequence[Any], most: int) -> str:
    return f", {most} of {len(rows)}" if len(rows) > most else ""


def _numbers(x: Tensor) -> str:
    flat = x.flatten().tolist()
    shown = ", ".join(f"{value:.4g}" for value in flat[:6])
    return shown + (f", … ({len(flat)} numbers)" if len(flat) > 6 else "")


def _is_image(x: Tensor) -> bool:
    return x.dim() == 3 and x.shape[0] in (1, 3) and min(x.shape[1:]) > 1


def _image(x: Tensor, alt: str) -> str:
    """An image `[C, H, W]` in the page itself."""
    from PIL import Image

    x = x.float()
    if x.min() < 0 or x.max() > 1:  # of another range, such as standardised ones
        x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)
    pixels = (255 * x).round().to(torch.uint8).permute(1, 2, 0)
    image = Image.fromarray(pixels.squeeze(2).numpy() if len(x) == 1 else pixels.numpy())
    image.thumbnail((_LARGEST_IMAGE, _LARGEST_IMAGE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{escape(alt)}">'
