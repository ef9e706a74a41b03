"""The store of examples: classes in order whatever their labels are, and the same again from a file."""

import os

import numpy as np
import pytest
import torch
from conftest import DEVICE

from fastmeta.tasks import EpisodeSampler, Examples, Prefetched, episodes_of, placed, store


def random(rows=40, classes=5, shape=(3, 2), dtype=torch.float32):
    """With a class of one row, and the label of each row as its first number."""
    labels = torch.cat([torch.arange(classes), torch.randint(classes - 1, (rows - classes,))])
    labels = labels[torch.randperm(rows)]
    x = torch.randint(100, (rows, *shape)).to(dtype)
    x.flatten(1)[:, 0] = labels.to(dtype)
    return x, labels


@pytest.mark.parametrize(
    "labelled",
    [lambda n: n * 10 - 7, lambda n: [f"class {i}" for i in n.tolist()], lambda n: n.numpy(), lambda n: n.int(),
     lambda n: [(i, "a") for i in n.tolist()], lambda n: ["zero" if i == 4 else i for i in n.tolist()]],
    ids=["far", "text", "numpy", "int32", "tuples", "mixed"],
)  # fmt: skip
def test_rows_of_each_class(labelled):
    x, labels = random()
    examples = Examples(x, labelled(labels), groups="aabbc")
    assert len(examples) == 5 and examples.input_shape == (3, 2) and examples.counts.sum() == 40
    assert torch.equal(examples.labels, labels) and examples.rows is x and not examples.mapped
    for c in range(5):
        assert torch.equal(examples.of_class(c), x[labels == c])  # in the order that they have
    some = examples.only([4, 1], name="two")
    assert some.names == (examples.names[4], examples.names[1]) and some.groups == ("c", "a") and some.name == "two"
    assert torch.equal(some.of_class(0), x[labels == 4]) and torch.equal(some.of_class(1), x[labels == 1])
    assert torch.equal(some.labels == -1, ~torch.isin(labels, torch.tensor([1, 4]))) and some.rows is x
    there = some.to(DEVICE)
    assert len(there.rows) == int(some.counts.sum()) and there.rows.device.type == DEVICE
    assert torch.equal(there.of_class(0).cpu(), x[labels == 4]) and torch.equal(there.of_class(1).cpu(), x[labels == 1])
    doubled = some.over(torch.cat([some.of_class(0), some.of_class(1)]) * 2, name="doubled")
    assert torch.equal(doubled.of_class(1), 2 * x[labels == 1]) and doubled.names == some.names
    assert repr(some) == f"Examples('two': 2 classes of 1 to {int((labels == 1).sum())} rows [3, 2] float32)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": [1.0, 2.0]}, "rows must be a tensor"),
        ({"rows": torch.ones(0, 2)}, r"rows must have shape \[R, ...\] with R of at least 1"),
        ({"labels": torch.zeros(2).long()}, "labels must be one of each row: 2 labels, 3 rows"),
        ({"labels": torch.zeros(3)}, "labels must be integers"),
        ({"labels": "abc"}, "labels must be a tensor or a sequence"),
        ({"labels": [0.0, float("nan"), 1.0]}, "label 1 is NaN"),
        ({"names": ["one"]}, "names must be one of each class: 1 names, 2 classes"),
        ({"groups": ["one"]}, "groups must be one of each class: 1 groups, 2 classes"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Examples(**({"rows": torch.ones(3, 2), "labels": [0, 1, 1]} | arguments))


def test_refused_classes():
    examples = Examples(torch.ones(3, 2), [0, 1, 1], name="letters")
    with pytest.raises(ValueError, match="classes must be at least one of the 2 of letters"):
        examples.only([])
    with pytest.raises(ValueError, match="classes must be numbers from 0 to 1, got 2"):
        examples.only([2])
    with pytest.raises(ValueError, match="classes must differ: 1 stands there twice"):
        examples.only([0, 1, 1])
    with pytest.raises(ValueError, match="rows must be 3, as many as letters has, got .2, 2."):
        examples.over(torch.ones(2, 2))


# ----- in a file


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [None, "aabbc"])
def test_saved_and_loaded(tmp_path, monkeypatch, dtype, groups):
    monkeypatch.setattr(store, "_AT_ONCE", 7)  # in many parts
    x, labels = random(dtype=dtype)
    names = ["ä b", 'quote "', "c", "d", "\u2603"]
    examples = Examples(x.to(DEVICE), labels, names=names, groups=groups, name="letters").only([3, 0, 4])
    examples.save(tmp_path / "e.safetensors")
    loaded = Examples.load(str(tmp_path / "e.safetensors"))
    assert loaded.mapped and loaded.name == "letters" and loaded.names == examples.names
    assert loaded.groups == examples.groups and torch.equal(loaded.counts, examples.counts)
    assert loaded.rows.dtype == dtype and len(loaded.rows) == int(examples.counts.sum())
    for c in range(3):
        assert torch.equal(loaded.of_class(c), examples.of_class(c).cpu())
    assert loaded.only([1]).mapped and not loaded.to("cpu").only([1]).mapped
    assert os.listdir(tmp_path) == ["e.safetensors"]
    from safetensors.torch import load_file

    plain = load_file(tmp_path / "e.safetensors")  # for others to read
    assert torch.equal(plain["rows"], loaded.rows) and torch.equal(plain["offsets"], loaded.offsets)
    loaded.rows[0] = 0  # what is written to stays in memory
    assert torch.equal(Examples.load(tmp_path / "e.safetensors").of_class(0), examples.of_class(0).cpu())


def test_no_file_is_better_than_half_of_one(tmp_path, monkeypatch):
    path = tmp_path / "e.safetensors"
    first = Examples(torch.rand(6, 2), [0, 0, 1, 1, 1, 2])
    first.save(path)
    monkeypatch.setattr(store, "_AT_ONCE", 8)
    parts = iter([None, None])
    real = store._bytes
    monkeypatch.setattr(store, "_bytes", lambda tensor: next(parts) or real(tensor))
    with pytest.raises(StopIteration):
        Examples(torch.rand(6, 2), [0, 0, 1, 1, 1, 2]).save(path)
    assert os.listdir(tmp_path) == ["e.safetensors"]
    assert torch.equal(Examples.load(path).rows, first.rows)
    with pytest.raises(TypeError, match="rows must be of a real dtype to be saved, got complex64"):
        Examples(torch.rand(6, 2).to(torch.complex64), [0, 0, 1, 1, 1, 2]).save(path)


def damaged(data: bytes) -> dict[str, bytes]:
    return {
        "nothing": b"",
        "no header": data[:6],
        "cut": data[:-3],
        "longer": data + b"123",
        "no JSON": data[:8] + b"x" + data[9:],
        "other format": data.replace(b"fastmeta.examples", b"fastmeta.elsewise"),
        "other version": data.replace(b'"fastmeta.examples": "1"', b'"fastmeta.examples": "2"'),
        "names": data.replace(b'\\"one\\", \\"two\\"', b'\\"one,   two\\"  '),
        "no names": data.replace(b'\\"names\\"', b'\\"namez\\"'),
        "offsets": data.replace((2).to_bytes(8, "little"), (9).to_bytes(8, "little")),
        "no rows": data.replace(b'"rows"', b'"cows"'),
    }


@pytest.mark.parametrize("label", damaged(b""))
def test_damaged_files_are_refused_by_name(tmp_path, label):
    path = tmp_path / "e.safetensors"
    Examples(torch.rand(4, 2), [0, 0, 1, 1], names=["one", "two"]).save(path)
    whole = path.read_bytes()
    broken = damaged(whole)[label]
    assert broken != whole
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"e\.safetensors (is damaged|holds no examples)"):
        Examples.load(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.safetensors cannot be read"):
        Examples.load(tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="path must be a path, got int"):
        Examples.load(3)


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_what_is_mapped_takes_no_memory(tmp_path):
    rows = torch.randint(256, (500, 40_000), dtype=torch.uint8)
    Examples(rows, torch.arange(500) % 10).save(tmp_path / "e.safetensors")
    EpisodeSampler(rows[:10].unsqueeze(1), ways=2, shots=1, query_shots=1, replace=True).sample(1)
    before = anonymous()
    examples = Examples.load(tmp_path / "e.safetensors")
    sampler = EpisodeSampler(examples, ways=10, shots=1, query_shots=1)
    sampler.sample(1)
    assert examples.rows.sum(dtype=torch.int64) == rows.sum(dtype=torch.int64)
    assert anonymous() - before < 10e6  # of 20 MB


def test_a_file_larger_than_the_memory(tmp_path):
    """Of holes, which take no disk either."""
    count = 3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    Examples(torch.ones(2, 1 << 20, dtype=torch.uint8), [0, 1]).save(tmp_path / "e.safetensors")
    data = (tmp_path / "e.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().strip()
    header = header.replace("[2, 1048576]", f"[{count}, 1048576]").replace(str(24 + (2 << 20)), str(24 + (count << 20)))
    header = header.encode() + b" " * (-len(header) % 8)
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(torch.tensor([0, 1, count]).numpy().tobytes())
        file.truncate(file.tell() + (count << 20))
    examples = Examples.load(tmp_path / "large.safetensors")
    assert examples.rows.shape == (count, 1 << 20) and not examples.rows[-1].any()


def test_rows_that_others_mapped(tmp_path):
    x = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(12, 3))
    x[:] = np.arange(36).reshape(12, 3)
    sizes = {"ways": 3, "shots": 1, "query_shots": 2}
    labels = torch.arange(12) % 3
    from_file = torch.from_file(str(tmp_path / "x.bin"), shared=True, size=36).view(12, 3)
    batches = [
        EpisodeSampler(Examples(rows, labels), **sizes).sample(4, generator=torch.Generator().manual_seed(0))
        for rows in (torch.from_numpy(x), from_file, torch.from_numpy(np.array(x)))
    ]
    for batch in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batch, batches[0], strict=True))


def test_where_rows_live(tmp_path):
    examples = Examples(torch.rand(9, 2), torch.arange(9) % 3)
    sizes = {"ways": 3, "shots": 1, "query_shots": 2}
    examples.save(tmp_path / "e.safetensors")
    mapped = Examples.load(tmp_path / "e.safetensors")
    assert placed(examples, "cpu") is examples and placed(mapped, "cpu") is mapped
    assert isinstance(episodes_of(examples, device="cpu", **sizes), EpisodeSampler)
    ahead = episodes_of(mapped, device="cpu", **sizes)
    assert isinstance(ahead, Prefetched) and ahead.sample(2).support_x.shape == (2, 3, 2)
    with pytest.raises(ValueError, match="device must be the CPU or a CUDA device"):
        placed(examples, "mps")


@pytest.mark.gpu
def test_rows_go_to_the_gpu_if_half_of_it_holds_them(monkeypatch):
    examples = Examples(torch.rand(9, 2), torch.arange(9) % 3)
    sizes = {"ways": 3, "shots": 1, "query_shots": 2}
    there = episodes_of(examples, device="cuda", **sizes)
    assert isinstance(there, EpisodeSampler) and there.examples.rows.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 9 * 2 * 4 - 1, 1 << 30))
    ahead = episodes_of(examples, device="cuda", **sizes)
    assert isinstance(ahead, Prefetched) and not ahead.tasks.examples.rows.is_cuda
    one, other = torch.Generator("cuda").manual_seed(0), torch.Generator("cuda").manual_seed(0)
    for _ in range(3):
        drawn = (there.sample(4, generator=one), ahead.sample(4, generator=other))
        assert all(torch.equal(a, b) and a.is_cuda for a, b in zip(*drawn, strict=True))
    ahead.close()
