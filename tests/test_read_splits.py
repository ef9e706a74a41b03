"""Splits by class: fractions, lists, files, a column; super-classes kept apart."""

import pytest
import torch

from fastmeta.tasks import Examples, split_examples
from fastmeta.tasks.read import names_in_files, names_in_table

GROUPS = [f"g{c % 10}" for c in range(50)]


def examples(classes=50, groups=GROUPS):
    names = [f"{groups[c]}/c{c:02d}" for c in range(classes)] if groups else None
    labels = torch.arange(classes).repeat(3)
    return Examples(torch.arange(3 * classes), labels, names=names, groups=groups and groups[:classes], name="all")


def test_fractions():
    parts = split_examples(examples())
    assert [len(part) for part in parts] == [32, 8, 10]
    names = [{*part.names} for part in parts]
    assert len(names[0] | names[1] | names[2]) == 50
    assert parts.val.name == "all/val" and parts.val.rows is not None
    assert split_examples(examples()).train.names == parts.train.names
    assert split_examples(examples(), seed=1).train.names != parts.train.names
    assert [len(part) for part in split_examples(examples(3, None), (0.98, 0.01, 0.01))] == [1, 1, 1]
    two = split_examples(examples(), (0.5, 0.5, 0))
    assert [len(two.train), len(two.val), two.test] == [25, 25, None]


def test_super_classes_stay_together():
    parts = split_examples(examples(), by_group=True)
    groups = [{*part.groups} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert sum(map(len, parts)) == 50 and 25 <= len(parts.train) <= 35
    few = Examples(torch.zeros(6), torch.arange(6), groups=["a", "a", "a", "a", "b", "c"])
    assert [len({*part.groups}) for part in split_examples(few, by_group=True)] == [1, 1, 1]
    with pytest.raises(ValueError, match="by_group needs super-classes, and all has none"):
        split_examples(examples(groups=None), by_group=True)
    with pytest.raises(ValueError, match="2 super-classes, too few for 3 splits"):
        split_examples(Examples(torch.zeros(3), torch.arange(3), groups=list("aab")), by_group=True)


def test_names():
    parts = split_examples(examples(), names={"train": ["c01", "g0/c00"], "test": ["c20"]})
    assert parts.train.names == ("g0/c00", "g1/c01") and parts.val is None and parts.test.names == ("g0/c20",)
    with pytest.raises(ValueError, match="the test split names 'c99', which is none of all"):
        split_examples(examples(), names={"test": ["c99"]})
    with pytest.raises(ValueError, match="'g1/c01' is in two splits, train and val"):
        split_examples(examples(), names={"train": ["c01"], "val": ["g1/c01"]})
    twice = Examples(torch.zeros(2), torch.arange(2), names=["a/x", "b/x"])
    with pytest.raises(ValueError, match="'x', which could be a/x or b/x"):
        split_examples(twice, names={"train": ["x"]})


def test_files_and_columns(tmp_path):
    for split, text in {"train": "c01\nc02\n", "val": "\nc03\n", "test": "c04"}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    assert [len(part) for part in split_examples(examples(), names=names_in_files(tmp_path))] == [2, 1, 1]
    (tmp_path / "val.txt").unlink()
    with pytest.raises(ValueError, match="val.txt: no such file"):
        names_in_files(tmp_path)
    table = tmp_path / "classes.csv"
    table.write_text("name,class,part\nx,c01,Train\ny,c02,dev\nz,c02,val\n")
    assert names_in_table(table, "part") == {"train": ["c01"], "val": ["c02"], "test": []}
    table.write_text("class,split\nc01,train\nc01,test\n")
    with pytest.raises(ValueError, match="row 3, column 'split': 'c01' is in test here, and in train in row 2"):
        names_in_table(table)
    with pytest.raises(ValueError, match="has no column 'kind': it has class, split"):
        names_in_table(table, classes="kind")
    table.write_text("class\tsplit\na,b\ttrain\nNA\ttest\n")
    assert names_in_table(table) == {"train": ["a,b"], "val": [], "test": ["NA"]}
    with pytest.raises(ValueError, match="nowhere.csv: no such file"):
        names_in_table(tmp_path / "nowhere.csv")
    table.write_text("class,split\nc01,\n")
    with pytest.raises(ValueError, match="row 2, column 'split': must be one of train, val, test; got ''"):
        names_in_table(table)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.9, 0.1), (-0.1, 0.5, 0.5), (0, 0, 0), 0.5])
def test_fractions_that_are_none(fractions):
    with pytest.raises(ValueError, match="fractions"):
        split_examples(examples(), fractions)
