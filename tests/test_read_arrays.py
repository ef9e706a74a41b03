"""Arrays, files of arrays and data sets of other libraries."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmeta.tasks import Examples
from fastmeta.tasks.read import DataWarning, array_file, arrays, dataset

LABELS = ["b", "a", "b", "a"]


def test_arrays_of_any_kind():
    tokens = torch.arange(12).view(4, 3)
    found = arrays(tokens, LABELS)
    assert found.rows is tokens and found.names == ("a", "b") and found.of_class(0).tolist() == [[3, 4, 5], [9, 10, 11]]
    dense = arrays(np.arange(12.0, dtype=np.float32).reshape(2, 3, 2))
    assert dense.counts.tolist() == [3, 3] and dense.input_shape == (2,)
    photos = arrays(np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8), np.array([1, 1, 0, 0]))
    assert photos.input_shape == (3, 5, 6)
    assert arrays(np.zeros((4, 5, 6), np.uint8), LABELS).input_shape == (1, 5, 6)
    assert arrays(np.zeros((4, 5, 6), np.float32), LABELS).input_shape == (5, 6)  # a sequence
    odd = arrays(np.arange(4, dtype=">u2")[::-1], np.array(LABELS))
    assert odd.rows.dtype == torch.int32 and odd.rows.flatten().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("rows", "labels", "text"),
    [
        (np.zeros((4, 2)), None, "rows without labels must be"),
        (np.full((4, 2), 2**63, np.uint64), LABELS, r"rows must be below 2\^63, got 9223372036854775808"),
        (np.zeros((4, 2)), ["a"], "1 labels, 4 rows"),
        (np.array(["a"] * 4), LABELS, "must be numbers, got an array of <U1"),
        (np.array([{}] * 4), LABELS, "must be numbers, got an array of object"),
        ([[1, 2], [3]], ["a", "b"], "must be of one shape"),
        (np.zeros((4, 2)), np.zeros(4), "labels must be integers or texts, got float64"),
        (np.zeros((4, 2)), np.zeros((4, 1), int), r"labels must be one of each row, \[R\]"),
        (torch.tensor([[0.0], [1.0], [torch.nan], [0.0]]), LABELS, "row 2 of arrays holds NaN or infinity"),
        ("images", LABELS, "must be a tensor, an array or a list of numbers"),
    ],
)
def test_arrays_that_are_refused(rows, labels, text):
    with pytest.raises((TypeError, ValueError), match=text):
        arrays(rows, labels)


def test_pictures_of_another_range_are_told():
    grey = np.random.default_rng(0).integers(0, 256, (4, 8, 8))
    for pixels in (grey, grey.astype(np.float32), grey[:, None].astype(np.float64), grey[..., None].astype(np.float16)):
        with pytest.warns(DataWarning, match="pictures .* with values up to 255, taken as they stand; pictures are"):
            arrays(pixels, LABELS)
    with pytest.warns(DataWarning, match="TensorDataset: float32 pictures"):
        dataset(torch.utils.data.TensorDataset(torch.full((4, 3, 8, 8), 255.0), torch.arange(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (grey.astype(np.uint8), grey / 255, grey - 128, grey.reshape(4, -1), grey[:, :5].astype(float)):
            arrays(other, LABELS)


def test_files(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", features=x, y=np.array(LABELS), names=np.array(["A", "B"]))
    np.savez_compressed(tmp_path / "b.npz", x=x.reshape(2, 2, 3))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.array([1, 0, 1, 0]))
    save_file({"images": torch.from_numpy(x), "labels": torch.tensor([1, 0, 1, 0])}, tmp_path / "c.safetensors")
    Examples(torch.from_numpy(x), torch.tensor([1, 0, 1, 0])).save(tmp_path / "d.safetensors")
    assert array_file(tmp_path / "a.npz").names == ("A", "B")
    assert array_file(tmp_path / "b.npz").counts.tolist() == [2, 2]
    for found in (
        array_file(tmp_path / "a.npz"),
        array_file(tmp_path / "x.npy", tmp_path / "y.npy"),
        array_file(tmp_path / "c.safetensors"),
        array_file(tmp_path / "d.safetensors"),
    ):
        assert torch.equal(found.of_class(1), torch.from_numpy(x[::2])) and len(found) == 2


class Evil:
    """Leaves a file behind when it is loaded from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_never_loaded(tmp_path):
    trap = tmp_path / "trapped"
    x = np.zeros((2, 3), np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([Evil(trap), 1], object))
    np.save(tmp_path / "b.npy", np.array([Evil(trap), 1], object))
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Evil(trap)))
    for name in ("d.pt", "d.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(trap)))
        with pytest.raises(ValueError, match=r"files are pickles, which can run any code .* write .safetensors"):
            array_file(tmp_path / name)
    with pytest.raises(ValueError, match="a.npz: 'y' holds Python objects"):
        array_file(tmp_path / "a.npz")
    for name in ("b", "c"):
        with pytest.raises(ValueError, match=f"{name}.npy .*(Python objects|damaged)"):
            array_file(tmp_path / f"{name}.npy")
    assert not trap.exists()


def test_files_that_are_refused(tmp_path):
    np.savez(tmp_path / "none.npz", z=np.zeros(3))
    np.savez(tmp_path / "two.npz", x=np.zeros((2, 2)), features=np.zeros((2, 2)))
    np.savez(tmp_path / "nan.npz", x=np.full((2, 2), np.nan), y=np.arange(2))
    np.savez(tmp_path / "cut.npz", x=np.zeros((20, 20)), y=np.arange(20))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    flipped = bytearray((tmp_path / "nan.npz").read_bytes())
    flipped[150] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    np.save(tmp_path / "cut.npy", np.zeros(100))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:200])
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" + bytes(30))
    (tmp_path / "x.csv").write_text("a")
    for name, text in {
        "none.npz": "holds none of images, x, features", "two.npz": "x and features, which mean the same",
        "nan.npz": "nan.npz: row 0 of nan holds NaN", "cut.npz": "cut.npz is damaged", "flipped.npz": "flipped.npz",
        "cut.npy": "damaged", "bad.safetensors": "damaged", "x.csv": "end in .npz, .npy, .safetensors",
        "gone.npz": "gone.npz: no such file",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=text):
            array_file(tmp_path / name)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_data_sets_of_torch():
    x = torch.randn(4, 2)
    rows = Examples.from_dataset(Pairs([(x[i], i % 2) for i in range(4)], classes=["even", "odd", "none"]))
    assert rows.names == ("even", "odd") and torch.equal(rows.of_class(1), x[1::2]) and rows.name == "Pairs"
    whole = Examples.from_dataset(torch.utils.data.TensorDataset(x, torch.tensor([5, 5, 7, 7])))
    assert whole.rows is x and whole.names == ("5", "7")
    keyed = Pairs([{"number": i, "x": x[i], "kind": i % 2} for i in range(4)], classes=["even", "odd"])
    found = dataset(keyed, label="kind")
    assert found.names == ("even", "odd") and torch.equal(found.of_class(1), x[1::2])
    with pytest.raises(ValueError, match="no column is of type ClassLabel or called label, .*: name one by label="):
        dataset(keyed)
    pictures = [(Image.new("RGB", (8 + i, 8), (i, 0, 0)), "ab"[i % 2]) for i in range(4)]
    found = dataset(Pairs(pictures), image_size=6)
    assert found.input_shape == (3, 6, 6) and found.of_class(1)[:, 0, 0, 0].tolist() == [1, 3]
    assert dataset(Pairs([(np.ones((2, 3), np.float32), np.int64(3))])).names == ("3",)
    with pytest.raises(ValueError, match=r"item 1 of Pairs is torch.uint8 \[3, 8, 9\], item 0 .* must be alike"):
        dataset(Pairs(pictures))
    with pytest.raises(TypeError, match="item 0 of Pairs: y must be an integer or a text, got 1.5"):
        dataset(Pairs([(x[0], 1.5)]))
    with pytest.raises(TypeError, match=r"item 0 of Pairs must be a pair \(x, y\)"):
        dataset(Pairs([x[0]]))
    with pytest.raises(TypeError, match="x must be a tensor, an array or a Pillow image, got str"):
        dataset(Pairs([("text", 0)]))
    with pytest.raises(TypeError, match="must be a map-style data set, .* got generator"):
        dataset(one for one in pictures)


def test_hugging_face_data_sets():
    """One that looks as theirs do; then theirs, where it is installed."""

    class Image_:
        pass

    Image_.__name__ = "Image"

    class ClassLabel:
        names = ["cat", "dog"]

    class Looks(Pairs):
        features = {"id": None, "photo": Image_(), "kind": ClassLabel()}
        column_names = ["id", "photo", "kind"]

    items = [{"id": i, "photo": Image.new("L", (4, 4), i), "kind": i % 2} for i in range(4)]
    found = Examples.from_dataset(Looks(items), name="pets")
    assert found.names == ("cat", "dog") and found.of_class(0)[:, 0, 0, 0].tolist() == [0, 2] and found.name == "pets"
    assert dataset(Looks(items), image="id").of_class(1).flatten().tolist() == [1, 3]
    with pytest.raises(ValueError, match="label must be one of the columns id, photo, kind; got 'y'"):
        dataset(Looks(items), label="y")
    with pytest.raises(TypeError, match="it has the splits train, test: give one"):
        dataset({"train": Looks(items), "test": Looks(items)})
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [item["photo"] for item in items], "label": [0, 1, 0, 1]}
    found = Examples.from_dataset(datasets.Dataset.from_dict(columns, features=features))
    assert found.names == ("cat", "dog") and found.of_class(0)[:, 0, 0, 0].tolist() == [0, 2]
