"""Own data by one line of text: what it may say, and from the command line to a judged run and back."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.tasks import Data, EpisodeSampler, Examples, RegressionTasks, TaskRows, make_tasks, open_data
from fastmeta.tasks.read import FORMS, DataWarning, moved, parse, quoted, with_options
from fastmeta.training import run_config


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def pictures(root, classes=15, each=6, size=20, groups=1):
    """Each class a colour of its own, a little different every time."""
    generator = np.random.default_rng(0)
    for c in range(classes):
        colour = generator.integers(0, 200, 3)
        folder = root / f"g{c % groups}" / f"c{c:02d}" if groups > 1 else root / f"c{c:02d}"
        folder.mkdir(parents=True)
        for i in range(each):
            shade = (colour + generator.integers(0, 50, 3)).astype(np.uint8)
            Image.fromarray(np.broadcast_to(shade, (size, size, 3)).copy()).save(folder / f"{i}.png")
    return root


def patients(path, count=15, each=12):
    """Of each patient a line with a slope of its own, and more or fewer rows."""
    lines = [f"{p},{r},{p * r},{(p - 7) * r}" for p in range(count) for r in range(each - p % 3)]
    path.write_text("patient,time,noise,score\n" + "\n".join(lines) + "\n")
    return path


def test_a_line_is_read():
    spec = parse("csv:a/b.csv?label=my%20label&one_hot=a,b&split_seed=-1&missing=drop&indicator=TRUE")
    assert (spec.form, spec.path, spec.kind, spec.name) == ("csv", "a/b.csv", "classification", "b")
    assert spec.options == {
        "label": "my label", "one_hot": ("a", "b"), "split_seed": -1, "missing": "drop", "indicator": True
    }  # fmt: skip
    assert parse("csv:x?ignore=a%2Cb,c%26d").options["ignore"] == ("a,b", "c&d")
    assert parse("csv:x?task=t&target=a,b").kind == "regression"
    assert parse("folder:C:/photos").path == "C:/photos"
    assert parse("folder:a%3fb%253F%20c&d=e?grey=true").path == "a?b%3F%20c&d=e"
    assert quoted("a?b%3F%20c&d=e") == "a%3Fb%253F%20c&d=e"
    assert moved("folder:a?grey=true&image_size=8&split_seed=1", "zip:b?image_size=9").endswith(
        "b?image_size=9&grey=true&split_seed=1"
    )
    assert moved("folder:a?grey=true&split_seed=1", "npz:b") == "npz:b?split_seed=1"
    assert with_options("folder:x", image_size=32, grey=True, on_error=None) == "folder:x?image_size=32&grey=true"
    assert with_options("folder:x?grey=true", grey=True) == "folder:x?grey=true"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("foler:x", r"got 'foler:x' \(did you mean folder\?\)"),
        ("folder:", "names no path"),
        ("folder:x?image_sise=3", r"has no option 'image_sise' \(did you mean image_size\?\); it has fractions"),
        ("folder:x?label=y", "folder: has no option 'label'"),
        ("folder:what?/x", "has no option '/x'.* A [?] that is part of the path is written %3F"),
        ("folder:x?image_size=big", "option image_size of folder: must be a number of at least 1, got 'big'"),
        ("folder:x?grey", "option grey of folder: must be grey=VALUE"),
        ("npz:x?split_seed=1&split_seed=2", "option split_seed of npz: stands there twice in 'npz:x"),
        ("folder:x?grey=maybe", "must be true or false, got 'maybe'"),
        ("csv:x?missing=zero", "must be one of mean, drop, refuse, got 'zero'"),
        ("csv:x?fractions=a", "must be three numbers with commas between"),
    ],
)
def test_lines_that_are_refused(data, text):
    with pytest.raises(ValueError, match=text):
        parse(data)


def test_options_given_twice():
    with pytest.raises(ValueError, match="grey is given twice: false, and True"):
        with_options("folder:x?grey=true", grey=False)
    with pytest.raises(ValueError, match="grey is no option of csv:"):
        with_options("csv:x", grey=True)


def test_folders_and_their_splits(tmp_path):
    root = pictures(tmp_path / "photos", groups=5)
    data = open_data(f"folder:{root}?image_size=8&by_group=true&split_seed=3&fractions=0.6,0.2,0.2")
    assert isinstance(data, Data) and [len(part) for part in (data.train, data.val, data.test)] == [9, 3, 3]
    assert not {*data.train.groups} & {*data.test.groups} and data.train.rows is data.test.rows
    for split, name in (("train", "c01"), ("val", "g2/c02"), ("test", "c03\nc04")):
        (root / f"{split}.txt").write_text(name)
    assert open_data(f"folder:{root}?image_size=8").test.names == ("g3/c03", "g4/c04")  # files beside the data
    (tmp_path / "classes.csv").write_text("name,part\nc01,train\nc02,val\nc03,test\nc04,test\n")
    data = open_data(f"folder:{root}?image_size=8&splits=../classes.csv&class=name&split=part")
    assert data.test.names == ("g3/c03", "g4/c04")
    with pytest.raises(ValueError, match="option split names a column of the file that splits=FILE names"):
        open_data(f"folder:{pictures(tmp_path / 'other')}?split=part")
    with pytest.raises(ValueError, match="splits=.. says which classes are in which split: leave seed out"):
        open_data(f"folder:{root}?splits=..&split_seed=1")


def test_folders_that_are_splits_already(tmp_path):
    for split, classes in (("train", 10), ("test", 3)):
        pictures(tmp_path / "photos" / split, classes, each=2)
    with pytest.warns(DataWarning, match="train and test have 3 classes of the same name, such as 'c00'; .* no acc"):
        data = open_data("folder:photos?image_size=8")
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 2, 3]
    assert not {*data.train.names} & {*data.val.names} and data.test.names == ("c00", "c01", "c02")
    pictures(tmp_path / "photos" / "val", 4, each=2)
    with pytest.warns(DataWarning) as told:
        data = open_data("folder:photos?image_size=8")
    assert ["val have 4" in str(told[0].message), "test have 3" in str(told[1].message)] == [True, True]
    assert [len(part) for part in (data.train, data.val, data.test)] == [10, 4, 3]
    with pytest.raises(ValueError, match="has nothing in its test split"):
        Data("folder:x", data.train, data.val, None).part("test")


def test_arrays_and_tables(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 10
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    np.save(tmp_path / "y.npy", y)
    for line in ("npz:a.npz", "npy:x.npy?labels=y.npy"):
        data = open_data(line)
        assert data.train.rows.dtype == torch.float32 and [len(data.train), len(data.val), len(data.test)] == [6, 2, 2]
    patients(tmp_path / "p.csv")
    data = open_data("csv:p.csv?task=patient&target=score&ignore=noise")
    assert data.kind == "regression" and isinstance(data.train, TaskRows) and data.features.names == ("time",)
    (tmp_path / "who.csv").write_text("id,split\n3,test\n4,train\n5,val\n6,train\n")
    listed = open_data("csv:p.csv?task=patient&target=score&splits=who.csv&class=id")
    assert [part.names for part in (listed.train, listed.val, listed.test)] == [("4", "6"), ("5",), ("3",)]
    tasks = make_tasks(data, "test", shots=2, query_shots=3)
    assert isinstance(tasks, RegressionTasks) and tasks.inputs.table["targets"]["scale"][0] > 1
    assert set(FORMS) == {"folder", "zip", "npz", "npy", "safetensors", "csv", "parquet"}


def test_defaults_by_what_the_data_is(tmp_path):
    pictures(tmp_path / "photos")
    images = run_config("protonet", "folder:photos?image_size=16")
    assert (images.model, images.train_ways, images.rotations) == ("conv4", 10, False)
    assert (images.ways, images.query_shots, images.train_query_shots) == (2, 5, 5)  # of 2 classes of 6 in "val"
    asked = run_config("protonet", "folder:photos?image_size=16", ways=4, shots=2, query_shots=7, train_ways=3)
    assert (asked.ways, asked.query_shots, asked.train_ways, asked.train_query_shots) == (4, 7, 3, 4)
    small = run_config("maml", "folder:photos?image_size=8")
    assert (small.model, small.train_ways, small.data_name) == ("mlp", 2, "photos")
    with pytest.raises(ValueError, match=r"conv4 needs images of at least 16 x 16, and .* has \[3, 8, 8\]: use mlp"):
        run_config("maml", "folder:photos?image_size=8", model="conv4")
    patients(tmp_path / "p.csv")
    line = "csv:p.csv?task=patient&target=score"
    numbers = run_config("maml", line)
    assert (numbers.model, numbers.ways, numbers.hidden, numbers.regression) == ("mlp", 1, (40, 40), True)
    with pytest.raises(ValueError, match="protonet classifies, and csv:p.csv.* is regression"):
        run_config("protonet", line)
    np.savez(tmp_path / "ids.npz", x=np.zeros((40, 5), np.int64), y=np.arange(40) % 10)
    with pytest.raises(ValueError, match="rows of int64 are token ids, which need a model of your own"):
        run_config("protonet", "npz:ids.npz")


def test_classes_that_are_too_small_are_left_out_and_said():
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 8)
    part = Examples(torch.zeros(19, 4), labels, name="x/train")
    data = Data("npz:x", part, None, None)
    with pytest.warns(DataWarning, match="1 of the 3 classes of x/train have fewer than 1 .* rows, and are left out"):
        tasks = make_tasks(data, ways=2, shots=1, query_shots=4)
    assert isinstance(tasks, EpisodeSampler) and tasks.examples.names == ("0", "2")
    with pytest.raises(ValueError, match="and 3 ways need 3 that have: ask for fewer shots or query_shots"):
        make_tasks(data, ways=3, shots=1, query_shots=4)
    patients = Data("csv:x?target=y", TaskRows(torch.zeros(19, 4), torch.zeros(19), labels, name="x/train"), None, None)
    with pytest.warns(DataWarning, match="1 of the 3 tasks of x/train have no more than 2 rows, and are left out"):
        make_tasks(patients, shots=2, query_shots=4)


def test_paths_that_the_form_does_not_take(tmp_path):
    pictures(tmp_path / "what?", classes=5, each=2)
    assert len(open_data("folder:what%3F?image_size=8").train) == 3
    with pytest.raises(ValueError, match=r"what: no such file or folder. A [?] that is part of the path is written"):
        open_data("folder:what?")
    patients(tmp_path / "p.csv")
    for form in ("csv", "parquet", "npz", "npy", "safetensors"):
        with pytest.raises(ValueError, match=rf"what\? is a folder, and {form}: takes a file; folder:PATH is for"):
            open_data(f"{form}:what%3F")
    with pytest.raises(ValueError, match="p.csv is a file, and folder: takes a folder or a .zip .* have npz:, .*csv:"):
        open_data("folder:p.csv")


QUICK = ["--iterations", 4, "--eval-every", 2, "--eval-tasks", 8, "--threads", 1]


def test_from_a_folder_to_a_judged_run_and_back(tmp_path, run):  # noqa: F811
    pictures(tmp_path / "photos")
    (tmp_path / "photos" / "c00" / "bad.png").write_bytes(b"")
    train = ["train", "protonet", "--data", "folder:photos", "--image-size", 16, "--hidden", 8]
    _, stderr = run(*train, *QUICK, code=2)
    assert re.match(r"error: photos: 1 of 91 pictures cannot be read: c00/bad.png \(.*on_error 'skip' takes", stderr)
    stdout, stderr = run(*train, *QUICK, "--on-error", "skip", "--out", "run", "--test-tasks", 20)
    assert "warning: photos: 1 of 91 pictures" in stderr and stderr.count("\n") == 1
    assert "finished at step 4" in stdout and "2-way 1-shot, 20 episodes" in stdout
    stdout, _ = run("evaluate", "run", "--episodes", 40, "--threads", 1, "--json")
    record = json.loads(stdout)
    assert record["data"] == "folder:photos?image_size=16&on_error=skip" and record["accuracy"]["mean"] > 0.6
    stdout, _ = run("train", "protonet", "--out", "run", "--resume", "--iterations", 5)
    assert "finished at step 5" in stdout
    _, stderr = run("train", "protonet", "--data", "omniglot", "--image-size", 16, code=2)
    assert "--image-size: of --data folder:PATH and zip:PATH, and it is omniglot" in stderr


def test_from_a_table_to_a_judged_run(tmp_path, run):  # noqa: F811
    patients(tmp_path / "p.csv")
    data = ["--data", "csv:p.csv?task=patient&target=score", "--shots", 4, "--query-shots", 7]
    stdout, _ = run("train", "ridge", *data, *QUICK, "--task-batch", 4, "--test-tasks", 20, "--out", "run")
    assert "validation MSE" in stdout and "in their own unit the root of the MSE is" in stdout
    config = json.loads((tmp_path / "run" / "step-00000004.json").read_text())
    assert config["inputs"]["table"]["targets"]["numeric"] == ["score"]
    stdout, _ = run("evaluate", "run", "--episodes", 20, "--threads", 1)
    assert "4 shots, 20 episodes" in stdout
    _, stderr = run("train", "protonet", *data, *QUICK, code=2)
    assert stderr.startswith("error: protonet classifies, and csv:p.csv") and "Traceback" not in stderr


def test_names_of_data_in_the_options_are_those_of_the_tasks():
    from fastmeta import tasks
    from fastmeta.cli import options

    assert options.DATA_NAMES == tasks.NAMES
