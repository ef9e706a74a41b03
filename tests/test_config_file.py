"""`--config`: options from a TOML file, checked as on the command line, and the file that a run leaves behind."""

import json
import os
import sys

import pytest
import torch

import fastmeta.training
from fastmeta import cli
from fastmeta.cli.config_file import write_settings
from fastmeta.training import CheckpointFolder, run_config
from fastmeta.training.registry import ALGORITHMS


class Stop(Exception):
    """In place of training."""


@pytest.fixture
def settings_of(monkeypatch):
    """The settings that a command line comes to."""

    def settings_of(*arguments):
        found = []

        def stop(**given):
            found.append(run_config(**given))
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(fastmeta.training, "run_config", stop)
            patch.setattr(sys, "argv", ["fastmeta", "train", *map(str, arguments)])
            with pytest.raises(Stop):
                cli.main()
        return found[0]

    return settings_of


@pytest.fixture
def refusal_of(monkeypatch, capsys, tmp_path):
    """The line that a file's text ends in."""

    def refusal_of(text):
        path = tmp_path / "mine.toml"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        monkeypatch.setattr(sys, "argv", ["fastmeta", "train", "--config", str(path)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        stderr = capsys.readouterr().err
        assert leaving.value.code == 2 and stderr.count("\n") == 1
        prefix = f"error: {path}: "
        assert stderr.startswith(prefix), stderr
        return stderr[len(prefix) :].strip()

    return refusal_of


CASES = [(name, data) for name in ALGORITHMS for data in ("sinusoid", "glyphs")]
CASES = [(name, data) for name, data in CASES if data == "glyphs" or "regression" in ALGORITHMS[name].kinds]


def test_what_a_run_leaves_behind_is_read_back(tmp_path, settings_of):
    path = tmp_path / "run.toml"
    for name, data in CASES:
        config = run_config(name, data)
        write_settings(path, config, test_tasks=None)
        assert settings_of("--config", path) == config
    config = run_config("ridge", "glyphs", model="none")
    write_settings(path, config)
    assert settings_of("--config", path) == config
    odd = {
        "data_root": 'a "b"\\ \n\x7f é 😀', "minutes": 1e-7, "iterations": None, "labels": "augment", "outer_lr": 1e16,
        "augmentation": (("rotate", 3),), "settings": (("scale", 2.5), ("full_context", True)), "hidden": (4, 5),
        "model": "mlp", "norm": "batch", "task_chunk": 2, "threads": 1,
    }  # fmt: skip
    config = run_config("matching", "glyphs", **odd)
    write_settings(path, config)
    assert settings_of("--config", path).as_json() | {"settings": None} == config.as_json() | {"settings": None}
    assert dict(settings_of("--config", path).settings) == dict(config.settings)


def test_the_command_line_wins(tmp_path, settings_of):
    path = tmp_path / "mine.toml"
    path.write_text('algorithm = "matching"\ndata = "glyphs"\ntrain-ways = 7\nquery_shots = 3\naugment-support = true\n'
                    'hidden = [9]\nlabels = "augment"\n[set]\nscale = 2.0\nsteps = 3\n')  # fmt: skip
    plain = settings_of("--config", path)
    assert (plain.train_ways, plain.query_shots, plain.hidden, plain.augment_support) == (7, 3, (9,), True)
    assert dict(plain.settings) == {"scale": 2.0, "steps": 3}
    config = settings_of("--train-ways", 4, "--config", path, "--set", "steps=2", "--hidden", "5", "--plain-support")
    assert (config.train_ways, config.query_shots, config.hidden, config.augment_support) == (4, 3, (5,), False)
    assert dict(config.settings) == {"scale": 2.0, "steps": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian_ways = 3", "there is no option trian_ways; did you mean train-ways?"),
        ("inner_learning = 1.0", "there is no option inner_learning; did you mean inner-lr?"),
        ("resume = true", "there is no option resume; "),
        ("q = 1", "there is no option q; the keys are algorithm, augment, "),
        ("[train]\nways = 5", "there is no option train; "),
        ("ways = 3\nquery-shots = 3\nquery_shots = 4", "query-shots stands there twice"),
        ("ways = '5'", 'ways must be a whole number, got "5"'),
        ("ways = 5.0", "ways must be a whole number, got 5.0"),
        ("ways = true", "ways must be a whole number, got true"),
        ("ways = 0", "ways: "),  # what follows are the words of the library that parses commands
        ("inner_lr = '1e-3'", 'inner_lr must be a number, got "1e-3"'),
        ("first-order = 1", "first-order must be true or false, got 1"),
        ("seed = 1979-05-27", 'seed must be a whole number, got "1979-05-27"'),
        ("out = 3", "out must be a string, got 3"),
        ("data = 3", "data must be a string, got 3"),
        ("model = 'conv5'", "model: "),
        ("hidden = [1, 'a']", 'hidden must be a string, got [1, "a"]'),
        ("set = 3", "set must be a table, or a list of strings NAME=VALUE, got 3"),
        ("ways = ", "not a TOML file: "),
        (b"data = '\xff'", "not a TOML file: "),
    ],
)
def test_mistakes_name_the_file_and_the_key(refusal_of, text, said):
    assert refusal_of(text).startswith(said)


def test_a_file_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastmeta", "train", "--config", "nowhere.toml"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: nowhere.toml: cannot be read (No such file or directory)\n"


def test_a_run_again_from_its_own_file(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastmeta", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code

    first, second = tmp_path / "first", tmp_path / "second"
    small = ["--task-batch", 4, "--iterations", 3, "--eval-tasks", 4, "--seed", 7, "--threads", 1, "--no-report"]
    threads = torch.get_num_threads()
    try:
        run("maml", "--data", "sinusoid", *small, "--inner-lr", 0.02, "--hidden", 8, "--out", first)
        run("--config", first / "run.toml", "--out", second)
    finally:
        torch.set_num_threads(threads)
    one, other = (CheckpointFolder(folder).newest()[0] for folder in (first, second))
    assert one.record["config"] == other.record["config"] and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert (first / "run.toml").read_text() == (second / "run.toml").read_text()
    assert not [name for name in os.listdir(first) if name.endswith(".tmp") or name == "report.html"]
    assert json.loads((first / "log.jsonl").read_text().splitlines()[-1])["validation"]["loss"]["episodes"] == 4
