"""`fastmeta predict` and `fastmeta embed`: own data in, predictions and features out, by whole commands."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastmeta
from fastmeta.estimators import Adapted
from fastmeta.nn import conv4
from fastmeta.tasks import Examples
from fastmeta.tasks.read import folder
from fastmeta.training.encoder import encoder_of

TRAIN = ["train", "protonet", "--iterations", 2, "--eval-every", 0, "--threads", 1, "--device", "cpu"]
SIZES = ["--ways", 2, "--train-ways", 3, "--shots", 1, "--query-shots", 1, "--train-query-shots", 1, "--task-batch", 2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))


def pictures(root, classes, each, seed=0, size=20):
    """A folder of grey pictures by class: a bright bar whose place is the class's, and a transparent column."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(0, 60, (size, size)).astype(np.uint8)
            pixels[number % size] = 250
            opaque = np.full_like(pixels, 255)
            opaque[:, 7] = 0
            Image.fromarray(np.stack([pixels, opaque], 2), "LA").save(root / name / f"{i}.png")
    return root


def lines(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def photos(tmp_path, run):
    """A run on pictures, and pictures of three other classes."""
    data = f"folder:{pictures(tmp_path / 'data', [f'c{i}' for i in range(6)], 3)}?fractions=0.5,0.3,0.2"
    how = "grey=true&image_size=16&background=black"
    options = ["--hidden", 4, "--model", "conv4", "--data", f"{data}&{how}"]
    run(*TRAIN, *SIZES, *options, "--out", tmp_path / "run")
    support = pictures(tmp_path / "support", ["über", "b", "a"], 2, seed=1)
    return tmp_path / "run", support, pictures(tmp_path / "query", ["über", "b", "a"], 2, seed=2)


def test_pictures(tmp_path, run, photos):
    folder_of_run, support, query = photos
    out = tmp_path / "new" / "predictions.csv"
    ask = ["predict", folder_of_run, "--support", support, "--query", query, "--out", out, "--device", "cpu"]
    stdout, _ = run(*ask, "--calibrate")
    assert "6 predictions from 6 support rows of 3 classes" in stdout and "temperature" in stdout
    header, *found = lines(out)
    assert header == ["file", "prediction", "a", "b", "über"]
    assert [line[0] for line in found] == [f"{name}/{i}.png" for name in ("a", "b", "über") for i in (0, 1)]

    learner = fastmeta.load(folder_of_run, device="cpu")
    how = {"image_size": 16, "grey": True, "background": "black", "cache": False}
    known, asked = folder(support, **how), folder(query, **how)
    expected = Adapted(learner, known.rows, known.labels, calibrate=True).probabilities(asked.rows)
    np.testing.assert_allclose(np.array([line[2:] for line in found], float), expected, atol=1e-5)
    assert [line[1] for line in found] == [known.names[i] for i in expected.argmax(1).tolist()]

    _, stderr = run(*ask, code=2)
    assert f"{out} is there already: --force" in stderr.replace("\n", " ")
    before = out.read_bytes()
    stdout, stderr = run(*ask, "--force", "--json")
    told = json.loads(stdout)
    assert out.read_bytes() != before and not stderr  # without --calibrate
    assert told["classes"] == ["a", "b", "über"] and told["temperature"] == 1 and told["support_rows"] == 6
    right = [line["file"].split("/")[0] == line["prediction"] for line in told["predictions"]]
    assert told["accuracy"] == pytest.approx(np.mean(right))
    assert [line[1] for line in lines(out)[1:]] == [line["prediction"] for line in told["predictions"]]
    assert sum(told["predictions"][0]["probabilities"].values()) == pytest.approx(1)


def test_a_flat_folder_one_picture_and_damaged_ones(tmp_path, run, photos):
    folder_of_run, support, query = photos
    flat = tmp_path / "flat"
    flat.mkdir()
    (query / "a" / "0.png").rename(flat / "x.png")
    (query / "b" / "0.png").rename(flat / "w.png")
    ask = ["predict", folder_of_run, "--support", support, "--json", "--device", "cpu", "--query"]
    told = json.loads(run(*ask, flat)[0])
    assert [line["file"] for line in told["predictions"]] == ["w.png", "x.png"] and "accuracy" not in told
    one = json.loads(run(*ask, flat / "x.png")[0])
    (alone,), (_, beside) = one["predictions"], told["predictions"]
    assert (alone["file"], alone["prediction"], one["out"]) == ("x.png", beside["prediction"], None)
    assert alone["probabilities"] == pytest.approx(beside["probabilities"], abs=1e-6)  # convolutions of one row or two
    (flat / "v.png").write_bytes(b"no picture")
    _, stderr = run(*ask, flat, code=2)
    assert "v.png" in stderr and "on_error 'skip'" in stderr.replace("\n", " ")
    stdout, stderr = run(*ask, flat, "--on-error", "skip")
    assert "v.png" in stderr and "skipped" in stderr and json.loads(stdout)["predictions"] == told["predictions"]


def test_classes_that_are_called_as_columns_are(tmp_path, run):
    names = ["row", "prediction", "class row", "a"]
    text = "kind,x\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names))
    (tmp_path / "s.csv").write_text(text)
    ask = ["--support", tmp_path / "s.csv", "--query", tmp_path / "s.csv", "--label", "kind"]
    stdout, _ = run("predict", "nearest-mean", *ask, "--out", tmp_path / "p.csv", "--json")
    header, *found = lines(tmp_path / "p.csv")
    assert header == ["row", "prediction", "a", "class row", "class prediction", "class class row"]
    assert [line[1] for line in found] == names
    assert set(json.loads(stdout)["predictions"][0]["probabilities"]) == set(names)  # nothing stands beside them there


def test_a_class_that_is_called_none(tmp_path, run):
    (tmp_path / "s.csv").write_text("kind,x\nNone,1\nsome,9\nNone,2\nsome,8\n")
    (tmp_path / "q.csv").write_text("kind,x\nsome,7\nNone,3\n")
    ask = ["--support", tmp_path / "s.csv", "--query", tmp_path / "q.csv", "--label", "kind"]
    stdout, _ = run("predict", "nearest-mean", *ask, "--out", tmp_path / "p.csv")
    assert [line[1] for line in lines(tmp_path / "p.csv")] == ["prediction", "some", "None"] and "100.0%" in stdout


def table(path, seed=0, subjects=6, rows=8):
    """Rows of subjects: two features, one of them with a gap, a class, and a number that lies far from 0."""
    random = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "x", "z", "kind", "score"])
        for subject in range(subjects):
            slope = random.normal()
            for row in range(rows):
                x, z = random.normal(3, 2), random.normal(-50, 10)
                gap = "" if row == 3 else f"{z:.4f}"
                writer.writerow([f"s{subject}", f"{x:.4f}", gap, f"k{subject}", f"{100 + 20 * slope * x:.4f}"])
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")  # of cells that are missing
def test_a_table_of_classes_and_one_of_numbers(tmp_path, run):
    data, support, query = (table(tmp_path / f"{n}.csv", i) for i, n in enumerate(("data", "support", "query")))
    by_class = f"csv:{data}?label=kind&features=x,z&fractions=0.5,0.3,0.2"
    run(*TRAIN, *SIZES, "--data", by_class, "--hidden", 5, "--out", tmp_path / "classes")
    ask = ["predict", tmp_path / "classes", "--support", support, "--query", query, "--device", "cpu"]
    run(*ask, "--out", tmp_path / "classes.csv")
    header, *found = lines(tmp_path / "classes.csv")
    assert header == ["row", "prediction", *(f"k{i}" for i in range(6))] and len(found) == 48
    assert [line[0] for line in found[:2]] == ["2", "3"]  # where they stand in the file
    learner = fastmeta.load(tmp_path / "classes", device="cpu")
    numbers, asked = ([line[1:3] for line in lines(path)[1:]] for path in (support, query))
    mean, scale = (learner.inputs.table["features"][key] for key in ("mean", "scale"))
    raw, raw_asked = (
        torch.tensor([[float(x), float(z or mean[1])] for x, z in rows], dtype=torch.float64)
        for rows in (numbers, asked)
    )
    labels = torch.arange(6).repeat_interleave(8)
    expected = Adapted(learner, raw, labels).probabilities(raw_asked)
    np.testing.assert_allclose(np.array([line[2:] for line in found], float), expected, atol=2e-5)

    # an encoder is given the numbers that it was trained on, whatever the rows beside them are
    features = tmp_path / "features.safetensors"
    embed = ["embed", tmp_path / "classes", "--data", f"csv:{support}?label=kind", "--out", features, "--device", "cpu"]
    run(*embed)
    with torch.no_grad():
        embedded = encoder_of(learner)(learner.inputs.prepare(raw).float()).view(6, 8, -1)
    written = Examples.load(features)
    for number, name in enumerate(written.names):
        torch.testing.assert_close(written.of_class(number), embedded[int(name[1:])])

    by_subject = f"csv:{data}?task=subject&target=score&features=x,z&fractions=0.5,0.3,0.2"
    options = ["--shots", 4, "--query-shots", 4, "--hidden", "5,5", "--data", by_subject, "--task-batch", 2]
    run("train", "ridge", *TRAIN[2:], *options, "--out", tmp_path / "numbers")
    ask = ["predict", tmp_path / "numbers", "--support", support, "--query", query, "--json", "--device", "cpu"]
    told = json.loads(run(*ask)[0])
    learner = fastmeta.load(tmp_path / "numbers", device="cpu")
    scores = torch.tensor([[float(line[4])] for line in lines(support)[1:]], dtype=torch.float64)
    expected = Adapted(learner, raw, scores).predict(raw_asked)[:, 0]
    np.testing.assert_allclose([line["prediction"] for line in told["predictions"]], expected, rtol=1e-4)
    assert abs(expected.mean() - 100) < 60  # in the table's own unit, not in the run's


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rules_without_training(tmp_path, run, photos):
    _, support, query = photos
    ask = ["predict", "nearest-mean", "--support", support, "--query", query, "--json", "--image-size", 20, "--grey"]
    assert json.loads(run(*ask)[0])["accuracy"] == 1
    data, asked = table(tmp_path / "support.csv"), table(tmp_path / "query.csv", 1)
    asked = asked.rename(tmp_path / "query.data")
    told = json.loads(run("predict", "ridge", "--support", data, "--query", asked, "--label", "kind", "--json")[0])
    assert told["classes"] == [f"k{i}" for i in range(6)] and len(told["predictions"]) == 48
    told = json.loads(run("predict", "ridge", "--support", data, "--query", asked, "--target", "score", "--json")[0])
    assert all(np.isfinite(line["prediction"]) for line in told["predictions"]) and "classes" not in told


def test_cells_of_a_table_that_are_missing_or_too_large_are_told_of(tmp_path, run):
    (tmp_path / "s.csv").write_text("a,b,y\n1,,12345678\n2,5,12345679\n3,9,12345680\n")
    (tmp_path / "q.csv").write_text("a,b\n2,5\n2,\n")
    out = tmp_path / "p.csv"
    ask = ["predict", "ridge", "--support", tmp_path / "s.csv", "--query", tmp_path / "q.csv", "--target", "y"]
    _, stderr = run(*ask, "--out", out)
    for name, column in (("s", "b"), ("q", "b")):
        assert f"{name}.csv: 1 cells are missing, 1 in '{column}'; filled with the column's mean" in stderr
    assert lines(out)[1:] == [["2", "12345678.9"], ["3", "12345679"]]  # by hand 1 / 10.5 less, and the mean
    (tmp_path / "known.csv").write_text("y,a,b\nx,2,5\nz,9,9\nz,2,5\nz,8,9\n")
    ask = ["predict", "nearest-mean", "--support", tmp_path / "known.csv", "--label", "y", "--query"]
    assert json.loads(run(*ask, tmp_path / "known.csv", "--json")[0])["accuracy"] == 0.75  # a z among the x
    assert "accuracy" not in json.loads(run(*ask, tmp_path / "q.csv", "--json")[0])
    (tmp_path / "q.csv").write_text("a,b\n2,1e300\n")
    _, stderr = run(*ask, tmp_path / "q.csv", "--out", out, "--force", code=2)
    assert "q.csv, row 2, column 'b': too large for a float32" in " ".join(stderr.split())


def test_a_picture_whose_name_is_no_text(tmp_path, run, photos):
    _, support, query = photos
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    try:
        next((query / "a").iterdir()).rename(query / "a" / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    run("predict", "nearest-mean", "--support", support, "--query", query, "--out", tmp_path / "p.csv")
    assert b"\na/\xff.png,a," in (tmp_path / "p.csv").read_bytes()


def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, run, photos):
    folder_of_run, support, query = photos
    data = table(tmp_path / "t.csv")
    out = tmp_path / "p.csv"
    known, tables = ["--support", support, "--query", query], ["--support", data, "--query", data]
    wrong = {
        "--out is needed": [folder_of_run, *known],
        "nowhere: no such file or folder, and no rule": ["nowhere", *known],
        "both be pictures or both be tables": [folder_of_run, "--support", data, "--query", query],
        "has its own, from training: leave --grey out": [folder_of_run, *known, "--grey"],
        "--label or --target is needed": ["ridge", *tables],
        "--calibrate is of probabilities": ["ridge", *tables, "--target", "score", "--calibrate"],
        "has no column 'species'": ["ridge", *tables, "--label", "species"],
        "no-folder: no such file or folder": [folder_of_run, "--support", tmp_path / "no-folder", "--query", query],
        "reads pictures, of shape [1, 16, 16]": [folder_of_run, *tables],
    }
    for text, arguments in wrong.items():
        given = arguments if text == "--out is needed" else [*arguments, "--out", out]
        _, stderr = run("predict", *given, code=2)
        assert text in " ".join(stderr.split()) and "Traceback" not in stderr
    assert not out.exists()


def test_features_are_written_once_and_trained_on(tmp_path, run, photos):
    folder_of_run, _, _ = photos
    data = f"folder:{tmp_path / 'data'}?fractions=0.5,0.3,0.2"
    out = tmp_path / "features.safetensors"
    stdout, _ = run("embed", folder_of_run, "--data", data, "--out", out, "--device", "cpu")
    form = f"safetensors:{out}?splits=features.csv"
    assert form in stdout.replace("\n", "")
    header, *splits = lines(tmp_path / "features.csv")
    assert header == ["class", "split"] and sorted(line[0] for line in splits) == [f"c{i}" for i in range(6)]
    assert [line[1] for line in splits] == ["train"] * 3 + ["val"] * 2 + ["test"]
    rows = folder(tmp_path / "data", image_size=16, grey=True, background="black")
    encoder = encoder_of(fastmeta.load(folder_of_run, device="cpu"))
    with torch.no_grad():
        expected = {name: encoder(rows.of_class(i).float() / 255) for i, name in enumerate(rows.names)}
    written = Examples.load(out)
    assert written.names == tuple(name for name, _ in splits)
    for number, name in enumerate(written.names):
        torch.testing.assert_close(written.of_class(number), expected[name])

    train = [*TRAIN[2:], *SIZES, "--data", form, "--out"]
    run("train", "ridge", *train, tmp_path / "head", "--model", "none")
    run("train", "maml", *train, tmp_path / "maml", "--hidden", 6, "--train-ways", 2)
    assert fastmeta.load(tmp_path / "head", device="cpu").inputs.input_shape == (4,)
    told = run("evaluate", tmp_path / "head", "--split", "val", "--episodes", 2, "--json")[0]
    assert json.loads(told)["accuracy"]["episodes"] == 2

    _, stderr = run("embed", folder_of_run, "--data", data, "--out", out, code=2)
    assert "is there already: --force" in " ".join(stderr.split())
    of_maml = conv4(1, 4, track_running_stats=False).state_dict()
    save_file({name: t.contiguous() for name, t in of_maml.items()}, tmp_path / "e.safetensors")
    _, stderr = run("embed", tmp_path / "e.safetensors", "--data", data, "--out", out, "--force", code=2)
    assert "lacks encoder.0.1.running_mean" in " ".join(stderr.split())
