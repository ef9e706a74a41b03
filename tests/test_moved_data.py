"""A run whose own data have moved, or have changed where they were: judged, gone on with, or refused in one line."""

import json
import shutil

import pytest
import torch

from fastmeta.training.run import find_checkpoint, load_for_evaluation

QUICK = ["--iterations", 2, "--eval-every", 0, "--threads", 1, "--device", "cpu", "--hidden", 4, "--no-report"]
JUDGED = ["--episodes", 8, "--threads", 1, "--device", "cpu"]


def patients(path, factor=1, count=15):
    lines = [f"{p},{r},{p * r},{factor * ((p - 7) * r + p)}" for p in range(count) for r in range(12)]
    path.write_text("patient,time,noise,score\n" + "\n".join(lines) + "\n")


@pytest.fixture
def moved(tmp_path, run, monkeypatch):
    """A run in `run` on a table that now lies in another folder."""
    monkeypatch.chdir(tmp_path)
    patients(tmp_path / "p.csv")
    line = "csv:p.csv?task=patient&target=score&ignore=noise&split_seed=2"
    run("train", "ridge", "--data", line, "--shots", 3, "--query-shots", 4, *QUICK, "--out", "run")
    before = json.loads(run("evaluate", "run", *JUDGED, "--json")[0])
    (tmp_path / "new").mkdir()
    shutil.move("p.csv", "new/p.csv")
    return before


def test_what_has_moved_is_judged_where_it_is(run, moved, tmp_path):
    _, stderr = run("evaluate", "run", *JUDGED, code=2)
    assert "the data of run, csv:p.csv?task=patient" in stderr and "no p.csv in /" in stderr
    assert "--data csv:PATH (in Python data=) says where they are" in stderr and stderr.count("\n") == 1
    told = run("evaluate", "run", *JUDGED, "--data", "csv:new/p.csv", "--json")
    now = json.loads(told[0])
    assert now["data"] == "csv:new/p.csv?task=patient&target=score&ignore=noise&split_seed=2"
    assert now["loss"] == moved["loss"] and not told[1]
    for given, there in (((), False), (("--data", "csv:new/p.csv"), True)):
        run("report", "run", "--tasks", 4, "--threads", 1, *given)
        assert ("Not here: the data of run" not in (tmp_path / "run" / "report.html").read_text()) == there


def test_a_run_goes_on_with_what_has_moved(run, moved, tmp_path):
    go_on = ["train", "ridge", "--out", "run", "--resume", "--iterations", 3, "--no-report"]
    _, stderr = run(*go_on, code=2)
    assert "csv:p.csv?task=patient" in stderr and "--data csv:PATH" in stderr
    _, stderr = run(*go_on, "--data", "csv:new/p.csv?split_seed=3", code=2)
    assert "--resume cannot change data" in stderr
    _, stderr = run(*go_on, "--image-size", 20, code=2)
    assert "--image-size says how --data is read, and there is no --data" in stderr
    patients(tmp_path / "other.csv", count=16)
    _, stderr = run(*go_on, "--data", "csv:other.csv", code=2)
    assert "other.csv" in stderr and "that would be another run" in stderr
    stdout, _ = run(*go_on, "--data", "csv:new/p.csv")
    assert "finished at step 3" in stdout
    assert find_checkpoint("run", newest=True).record["config"]["data"].startswith("csv:new/p.csv?task=patient")


def test_a_table_is_standardised_as_in_the_run(run, moved, tmp_path):
    """Targets ten times as large are, in the run's scale, ten times as large."""
    patients(tmp_path / "large.csv", factor=10)
    found = find_checkpoint("run")
    batches = {}
    for name in ("new/p.csv", "large.csv"):
        _, _, tasks = load_for_evaluation(found, "test", device="cpu", data=f"csv:{name}")
        batches[name] = tasks.sample(4, generator=torch.Generator().manual_seed(0))
    now, large = batches.values()
    mean, scale = (found.record["inputs"]["table"]["targets"][key][0] for key in ("mean", "scale"))
    torch.testing.assert_close(now.support_x, large.support_x)
    scores = {name: batch.support_y * scale + mean for name, batch in batches.items()}
    torch.testing.assert_close(scores["large.csv"], 10 * scores["new/p.csv"], rtol=1e-5, atol=1e-4)


def test_other_data_than_the_runs(run, moved, tmp_path):
    """Other tasks are told; other columns and other targets are refused."""
    patients(tmp_path / "more.csv", count=20)
    stdout, stderr = run("evaluate", "run", *JUDGED, "--data", "csv:more.csv")
    assert "csv:more.csv" in stdout and "has other classes or tasks, or other numbers of rows" in stderr
    (tmp_path / "short.csv").write_text("patient,noise,score\n" + "1,2,3\n" * 30)
    _, stderr = run("evaluate", "run", *JUDGED, "--data", "csv:short.csv", code=2)
    assert "short.csv has no column 'time'" in stderr
    _, stderr = run("evaluate", "run", *JUDGED, "--data", "csv:new/p.csv?target=noise&ignore=score", code=2)
    assert "target must be score as in the run, got noise" in stderr
    _, stderr = run("evaluate", "run", *JUDGED, "--data", "omniglot", code=2)
    assert "data says where a run's own data are now" in stderr
