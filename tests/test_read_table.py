"""Tables: classes and tasks by a column, cells that are missing or wrong, and regression tasks."""

import warnings

import pytest
import torch

from fastmeta.tasks import PersonTasks, RegressionTasks, TaskRows, make_tasks
from fastmeta.tasks.read import DataWarning, Features, table
from fastmeta.tasks.read._columns import read_columns


def written(path, text: str):
    path.write_text(text)
    return path


def rows(count: int, line) -> str:
    return "".join(line(i) + "\n" for i in range(count))


def patients(path, count=10, each=6):
    lines = [f"p{p},{p + 0.1 * r},{r},{10 * p + r}" for p in range(count) for r in range(each)]
    return written(path, "patient,age,time,score\n" + "\n".join(lines) + "\n")


def test_classes_by_a_column(tmp_path):
    text = "kind;a;b;note\n" + rows(30, lambda i: f"{i % 10};{i}.5;{i * i};word")
    with pytest.warns(DataWarning, match="columns of text are left out: note; one_hot takes them"):
        found = table(written(tmp_path / "x.csv", text), label="kind")
    train, val, test = found.splits
    assert [len(part) for part in found.splits] == [6, 2, 2] and train.input_shape == (2,)
    assert not {*train.names} & {*val.names} and train.rows.dtype == torch.float32
    used = train.rows[train.order]
    torch.testing.assert_close(used.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(used.var(0, unbiased=False), torch.ones(2))
    with pytest.warns(DataWarning):
        plain = table(tmp_path / "x.csv", label="kind", standardise=False)
    number = int(plain.splits.test.names[0])
    assert plain.splits.test.of_class(0).tolist() == [[i + 0.5, i * i] for i in range(number, 30, 10)]


def test_names_of_classes_and_tasks_are_taken_as_they_stand(tmp_path):
    """Only an empty cell is none; in columns of numbers `NA` and the like are missing."""
    words = ["NA", "None", "null", "?", "nan", "cat"]
    path = written(tmp_path / "x.csv", "y,a,t\n" + rows(24, lambda i: f"{words[i % 6]},{i},{words[i // 4]}"))
    with pytest.warns(DataWarning, match=r"column 'y': '\?', 'NA', 'None', 'nan', 'null' is taken for a name, as any"):
        found = table(path, label="y", features=["a"])
    assert sorted(name for part in found.splits for name in part.names) == sorted(words)
    assert all(part.counts.tolist() == [4] * len(part) for part in found.splits)
    with pytest.warns(DataWarning):
        found = table(path, label="y", task="t", features=["a"])
    assert found.splits.train.classes == tuple(sorted(words))
    assert sorted(name for part in found.splits for name in part.names) == sorted(words)
    with pytest.warns(DataWarning):  # beside a target a word is no number
        with pytest.raises(ValueError, match="row 2, column 'y': empty, and in 20 rows together"):
            table(path, target="y", task="t", features=["a"])


def test_one_hot_and_named_features(tmp_path):
    text = "kind,colour,size\n" + rows(12, lambda i: f"k{i % 6},{['red', 'blue', ''][i % 3]},{i}")
    found = table(written(tmp_path / "x.csv", text), label="kind", features=["size"], one_hot=["colour"])
    assert found.features.names == ("size", "colour=blue", "colour=red")
    assert found.splits.train.rows[:3, 1:].tolist() == [[0, 1], [1, 0], [0, 0]]
    other = written(tmp_path / "y.csv", "size,colour\n3,green\n,red\n")
    stored = Features.from_json(found.features.as_json())
    assert stored == found.features
    new = stored(read_columns(other))
    assert new[:, 1:].tolist() == [[0, 0], [0, 1]] and new[1, 0] == 0
    # a value that no row trains on has no column, whose weight would never be learnt
    text = "kind,s,colour\n" + rows(4, lambda i: f"k{i},{['train', 'test'][i % 2]},{['red', 'green'][i % 2]}")
    found = table(written(tmp_path / "z.csv", text), label="kind", one_hot=["colour"], split="s")
    assert found.features.names == ("colour=red",) and found.splits.test.rows[[1, 3]].tolist() == [[0], [0]]


def test_what_is_missing_is_filled_by_the_rows_that_train(tmp_path):
    text = "kind,split,a,b\n" + rows(
        8, lambda i: f"{i},{['train', 'train', 'valid', 'test'][i % 4]},{'?' if i in (2, 5) else i},{i}"
    )
    path = written(tmp_path / "x.csv", text)
    with pytest.warns(DataWarning, match="2 cells are missing, 2 in 'a'; filled with the mean of the rows that train"):
        found = table(path, label="kind", split="split", standardise=False, indicator=True)
    assert found.splits.train.names == ("0", "1", "4", "5") and found.splits.val.names == ("2", "6")
    assert found.features.names == ("a", "b", "a is missing")
    mean = (0 + 1 + 4) / 3
    torch.testing.assert_close(found.splits.val.rows[2], torch.tensor([mean, 2, 1]))
    torch.testing.assert_close(found.splits.val.rows[5], torch.tensor([mean, 5, 1]))
    with pytest.warns(DataWarning, match="2 cells are missing.*; 2 rows are dropped"):
        assert table(path, label="kind", split="split", missing="drop").splits.val.names == ("6",)
    with pytest.raises(ValueError, match="x.csv, row 4, column 'a': empty; .*missing 'mean' fills in"):
        table(path, label="kind", split="split", missing="refuse")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the file is empty|has no rows"),
        ("y,a\n", {}, "has no rows"),
        ("y,a\n1,2\n1,2,3\n", {}, "row 3: 3 cells, and the header has 2 columns"),
        ("y,a,a\n1,2,3\n", {}, "two columns are called 'a'"),
        ("z,a\n1,2\n", {}, "has no column 'y': it has z, a"),
        ("yes,a\n1,2\n", {"label": "yess"}, r"has no column 'yess' \(did you mean 'yes'\?\)"),
        ("y,a\n1,2\n2,3\n3,x\n", {}, "x.csv, row 4, column 'a': must be a finite number, .*; got 'x'"),
        ("y,a\n1,2\n2,inf\n3,4\n", {}, "row 3, column 'a': must be a finite number"),
        ("y,a\n1,2\n,3\n3,4\n", {}, "row 3, column 'y': empty, and in 1 rows together"),
        ("y,a\n1,x\n2,y\n", {"features": ["a"]}, "row 2, column 'a': must be a finite number"),
        ("y,a\n1,2\n2,3\n3,1_0\n", {}, "row 4, column 'a': must be a finite number, .*; got '1_0'"),
        ("y,a\n" + rows(9, lambda i: f"{i},{i}e200"), {}, "column 'a' has numbers that are too large for a variance"),
        ("y,a\n1,2\n2,3\n3,1e39\n", {"standardise": False}, "row 4, column 'a': too large for a float32"),
        ("y,t\n1,1\n", {"features": []}, "has no features"),
        ("y,a\n1,2\n2,3\n", {}, "2 classes or tasks, too few for 3 splits"),
        (
            "y,a,s\n1,2,train\n1,3,test\n",
            {"split": "s"},
            "row 3, column 's': y '1' is in test here, and in train in row 2",
        ),
        (
            "y,a,s\n1,2,train\n2,3,tset\n",
            {"split": "s"},
            "row 3, column 's': must be one of train, val, test; got 'tset'",
        ),
        ('y,a\n1,"2\n', {}, "x.csv, row"),
    ],
)
def test_bad_tables_say_where(tmp_path, text, options, message):
    path = written(tmp_path / "x.csv", text)
    with pytest.raises(ValueError, match=message):
        table(path, **{"label": "y", **options})


def test_columns_without_a_name_tell_nothing(tmp_path):
    path = written(tmp_path / "x.csv", ",y,a,\n" + "".join(f"{i},{i},{i % 2},\n" for i in range(9)))
    with pytest.warns(DataWarning, match="x.csv: 2 columns without a name are left out"):
        assert table(path, label="y").features.numeric == ("a",)  # not the number of the row
    path = written(tmp_path / "x.csv", "y,a,\n" + "".join(f"{i},{i % 2},\n" for i in range(9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a delimiter at the end of each line is not worth a word
        assert table(path, label="y").features.numeric == ("a",)


def test_another_tables_features(tmp_path):
    """A run's encoder is given the numbers that it was trained on, whatever the rows of the new table are."""
    cells = "".join(f"{i},{i % 3},{'pq'[i % 2]}\n" for i in range(9))
    features = table(written(tmp_path / "x.csv", "y,a,b\n" + cells), label="y", one_hot=["b"]).features
    other = written(tmp_path / "z.csv", "b,more,y,a\n" + "".join(f"r,5,{i},{i}\n" for i in range(9)))
    found = table(other, label="y", fitted=features)
    assert found.features == features
    rows = torch.cat([part.rows[part.order] for part in found.splits])
    names = torch.tensor([float(name) for part in found.splits for name in part.names])
    expected = torch.stack([(names - features.mean[0]) / features.scale[0], names * 0, names * 0], 1)
    torch.testing.assert_close(rows, expected)


def test_not_a_table(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"y,a\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        table(tmp_path / "x.csv", label="y")
    with pytest.raises(ValueError, match="needs label .* or target"):
        table(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="target needs task"):
        table(tmp_path / "x.csv", target="y")


def test_regression_by_patient(tmp_path):
    found = table(patients(tmp_path / "x.csv"), task="patient", target="score")
    train = found.splits.train
    assert isinstance(train, TaskRows) and train.kind == "regression" and train.input_shape == (2,)
    assert found.features.numeric == ("age", "time") and len(train) == 6
    x, y = train.of_task(0)
    number = int(train.names[0][1:])
    raw = y * found.targets.scale[0] + found.targets.mean[0]
    torch.testing.assert_close(raw.flatten(), 10.0 * number + torch.arange(6.0), atol=1e-4, rtol=0)
    assert x.shape == (6, 2)


def by_task(counts) -> TaskRows:
    task = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    row = torch.arange(len(task)).float()
    return TaskRows(row[:, None], torch.stack([100.0 * task, row], 1), task)


def test_regression_tasks_are_rows_of_one_task_each_once():
    tasks = RegressionTasks(by_task([5, 9, 2, 7]), shots=2, query_shots=4)
    batch = tasks.sample(200, generator=torch.Generator().manual_seed(0))
    assert batch.support_x.shape == (200, 2, 1) and batch.query_y.shape == (200, 4, 2) and tasks.output_size == 2
    seen = set()
    for t in range(200):
        mask = batch.query_mask[t]
        task = int(batch.support_y[t, 0, 0]) // 100
        own = torch.cat([batch.support_x[t], batch.query_x[t][mask]]).flatten().tolist()
        assert len(set(own)) == len(own) and len(own) == min((5, 9, 2, 7)[task], 6)
        assert (torch.cat([batch.support_y[t], batch.query_y[t]])[:, 0] == 100 * task).all()  # what is masked too
        assert torch.equal(batch.query_y[t][:, 1:], batch.query_x[t])
        seen.add(task)
    assert seen == {0, 1, 3}  # two rows leave no query
    same = tasks.sample(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same.query_x, batch.query_x)


def test_all_the_rest_is_asked_and_nothing_is_masked_where_tasks_are_whole():
    rest = RegressionTasks(by_task([5, 9]), shots=3, query_shots="all").sample(20)
    assert rest.query_x.shape == (20, 6, 1) and {*rest.query_mask.sum(1).tolist()} == {2, 6}
    assert len(RegressionTasks(by_task([5, 9]), shots=3, query_shots=2).sample(2)) == 4
    with pytest.raises(ValueError, match="shots must be below 9, the rows of the largest task"):
        RegressionTasks(by_task([5, 9]), shots=9)
    with pytest.raises(ValueError, match="must have floating targets"):
        RegressionTasks(TaskRows(torch.zeros(2, 1), torch.tensor([0, 1]), [0, 0]))


def test_task_rows_check_what_they_get():
    with pytest.raises(
        ValueError, match=r"targets must be floating \[R, O\] or int64 \[R\] of 2 rows, got float32 \[3, 1\]"
    ):
        TaskRows(torch.zeros(2, 1), torch.zeros(3), [0, 1])
    with pytest.raises(ValueError, match="numbers from 0 to 0"):
        TaskRows(torch.zeros(2, 1), torch.tensor([0, 1]), [0, 1], classes=["only"])
    half = by_task([5, 9, 2, 7]).only([3, 1])
    assert half.names == ("3", "1") and half.to("cpu").of_task(0)[1][:, 1].tolist() == list(range(16, 23))
    assert len(half.to("cpu").rows) == 16


def test_activities_of_people(tmp_path):
    text = "user,activity,x\n" + rows(200, lambda i: f"{i % 10},{['walk', 'run'][i // 10 % 2]},{i}")
    written(tmp_path / "x.csv", text)
    tasks = make_tasks(f"csv:{tmp_path / 'x.csv'}?task=user&label=activity", "val", ways=2, shots=1, query_shots=3)
    assert isinstance(tasks, PersonTasks) and tasks.output_size == 2
    assert tasks.sample(4).query_x.shape == (4, 6, 1)


def test_parquet(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs pyarrow: pip install pyarrow"):
        table(tmp_path / "x.parquet", label="y")
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(ValueError, match="x.parquet is damaged, or no Parquet file"):
        table(tmp_path / "x.parquet", label="y")
    columns = {"y": [i % 6 for i in range(12)], "a": [None if i == 3 else float(i) for i in range(12)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.warns(DataWarning, match="1 in 'a'"):
        found = table(tmp_path / "x.parquet", label="y")
    text = "y,a\n" + rows(12, lambda i: f"{i % 6},{'' if i == 3 else float(i)}")
    with pytest.warns(DataWarning, match="1 in 'a'"):
        same = table(written(tmp_path / "x.csv", text), label="y")
    assert found.splits.test.names == same.splits.test.names and torch.equal(
        found.splits.test.rows, same.splits.test.rows
    )


def test_the_patients_of_the_real_table(data_root):
    path = data_root / "parkinsons_telemonitoring" / "parkinsons_updrs.data"
    found = table(path, task="subject#", target=["motor_UPDRS", "total_UPDRS"])
    assert sum(len(part) for part in found.splits) == 42 and found.splits.train.input_shape == (19,)
    assert found.splits.train.targets.shape == (5875, 2)
