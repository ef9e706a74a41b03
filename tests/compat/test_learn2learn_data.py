"""learn2learn's data sets, task transforms and tasksets."""

import copy
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from fastmeta.compat import learn2learn as l2l
from fastmeta.compat.learn2learn.data import transforms as T
from fastmeta.compat.learn2learn.data._rotation import turned
from fastmeta.compat.learn2learn.data.samplers import TasksetSampler

LABELS = torch.tensor([0, 1, 2, 3] * 5)


def numbers():
    """Sample i is the number i, of label i mod 4."""
    return l2l.data.MetaDataset(TensorDataset(torch.arange(20.0), LABELS))


def chain(which, ds):
    return {
        "fused": lambda: [T.FusedNWaysKShots(ds, n=2, k=2), T.LoadData(ds), T.RemapLabels(ds), T.ConsecutiveLabels(ds)],
        "replacement": lambda: [
            T.FusedNWaysKShots(ds, n=2, k=2, replacement=True, filter_labels=[0, 2, 3]),
            T.LoadData(ds),
        ],
        "parts": lambda: [T.NWays(ds, n=3), T.KShots(ds, k=2), T.LoadData(ds), T.RemapLabels(ds)],
        "shots": lambda: [
            T.FilterLabels(ds, [1, 2]),
            T.KShots(ds, k=3, replacement=True),
            T.LoadData(ds),
            T.RemapLabels(ds, shuffle=False),
        ],
    }[which]()


# what learn2learn draws after random.seed(1), in its first sample()
DRAWN = {
    "fused": ([0, 12, 13, 17], [0, 0, 1, 1]),
    "replacement": ([11, 3, 12, 12], [3, 3, 0, 0]),
    "parts": ([12, 16, 13, 17, 7, 3], [1, 1, 2, 2, 0, 0]),
    "shots": ([9, 17, 1, 2, 14, 10], [0, 0, 0, 1, 1, 1]),
}


@pytest.mark.parametrize("which", DRAWN)
def test_the_same_seed_draws_the_same_tasks(which):
    ds = numbers()
    random.seed(1)
    task = l2l.data.Taskset(ds, chain(which, ds), num_tasks=3).sample()
    assert isinstance(task, list) and [part.tolist() for part in task] == list(DRAWN[which])
    assert task[1].dtype == torch.int64


@pytest.mark.parametrize("kind", ["tensors", "filtered", "device", "transformed", "rotated"])
def test_one_indexing_loads_what_samples_are(kind):
    data = torch.rand(20, 1, 4, 4)
    ds = l2l.data.MetaDataset(TensorDataset(data, LABELS + 7))
    if kind == "filtered":
        ds = l2l.data.FilteredMetaDataset(l2l.data.FilteredMetaDataset(ds, [9, 8, 7]), [7, 9])
    if kind == "device":
        ds = l2l.data.MetaDataset(l2l.data.OnDeviceDataset(ds))
    if kind == "transformed":
        ds = l2l.data.MetaDataset(l2l.data.OnDeviceDataset(ds, transform=lambda x: x + 1))
    transforms = [T.NWays(ds, 2), T.KShots(ds, 3), T.LoadData(ds), T.RemapLabels(ds)]
    if kind == "rotated":
        transforms += [l2l.vision.transforms.RandomClassRotation(ds, [0.0, 90.0, 30.0])]
    tasksets = [
        l2l.data.Taskset(ds, transforms, num_tasks=3),
        l2l.data.Taskset(ds, transforms, num_tasks=3, task_collate=lambda samples: default_collate(samples)),
    ]
    tasks = []
    for taskset in tasksets:
        random.seed(0)
        tasks.append([*taskset, *taskset])
    for one, other in zip(*tasks, strict=True):
        assert one[0].dtype == other[0].dtype and one[1].dtype == other[1].dtype
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    random.seed(5)
    batch = tasksets[0].sample_batch(4, shots=1)
    random.seed(5)
    (support, labels), (query, query_labels) = l2l.data.partition_task(*tasksets[1].sample(), shots=1)
    assert batch[0].shape == (4, 2, 1, 4, 4) and batch[3].tolist() == [[0, 0, 1, 1]] * 4
    for found, expected in zip(batch, (support, labels, query, query_labels), strict=True):
        assert torch.equal(found[0], expected)


def test_a_loader_of_ones_own_is_called():
    """Nothing is loaded past a subclass, or a transform that is not known."""

    class Plus(l2l.data.MetaDataset):
        def __getitem__(self, item):
            x, y = super().__getitem__(item)
            return x + 100, y

    ds = Plus(TensorDataset(torch.arange(20.0), LABELS))
    assert l2l.data.Taskset(ds, [T.NWays(ds, 1), T.LoadData(ds)]).sample()[0].min() >= 100

    class Negated(T.RemapLabels):
        def remap(self, data, mapping):
            return [-data[0], mapping(data[1])]

    ds = numbers()
    assert l2l.data.Taskset(ds, [T.KShots(ds, 3), T.LoadData(ds), Negated(ds)]).sample()[0].max() <= 0

    def by_halves(description):
        remap = T.RemapLabels(ds, shuffle=False)
        return remap([d for d in description if d.index % 4 < 2]) + remap([d for d in description if d.index % 4 > 1])

    _, labels = l2l.data.Taskset(ds, [T.LoadData(ds), by_halves]).sample()
    assert labels.tolist() == [0, 1] * 10

    def twice(description):
        for d in description:
            d.transforms.append(lambda sample: (2 * sample[0], sample[1]))
        return description

    task = l2l.data.Taskset(ds, [T.LoadData(ds), twice], num_tasks=1).sample()
    assert torch.equal(task[0], 2 * torch.arange(20.0))


# tasksets -------------------------------------------------------------------------------------------------------------
def test_taskset():
    ds = numbers()
    taskset = l2l.data.Taskset(ds, chain("fused", ds), num_tasks=4)
    first = list(taskset)
    assert len(taskset) == len(first) == 4 and len(taskset.sampled_descriptions) == 4
    assert len(list(taskset)) == 4
    for one, other in zip(first, map(taskset.__getitem__, range(4)), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    endless = l2l.data.Taskset(ds, chain("fused", ds))
    assert len(endless) == 1 and not endless.sampled_descriptions
    assert len({tuple(x.tolist()) for (x, _), _ in zip(endless, range(20), strict=False)}) > 5
    assert l2l.data.Taskset(ds.dataset, lambda none: T.LoadData(ds)(none)).sample()[0].shape == (20,)
    loaded = next(iter(DataLoader(taskset, batch_size=4)))
    assert loaded[0].shape == (4, 4)
    again = pickle.loads(pickle.dumps(taskset))
    assert torch.equal(again[2][0], taskset[2][0])
    for wrong in (0, -2):
        with pytest.raises(ValueError, match="num_tasks"):
            l2l.data.Taskset(ds, num_tasks=wrong)
    with pytest.raises(NotImplementedError):
        taskset + taskset
    l2l.utils.warn_once.warned_messages.clear()
    with pytest.warns(DeprecationWarning, match="Taskset"):
        assert isinstance(l2l.data.TaskDataset(ds), l2l.data.Taskset)


def test_shots_with_replacement_are_samples_of_their_own():
    """Else what a later transform writes into one is done to all that are the same."""
    ds = l2l.data.MetaDataset(TensorDataset(torch.arange(2.0), torch.tensor([0, 1])))
    x, y = l2l.data.Taskset(ds, [T.KShots(ds, 3, replacement=True), T.LoadData(ds), T.RemapLabels(ds)]).sample()
    assert x.tolist() == [0, 0, 0, 1, 1, 1] and sorted(y.tolist()) == [0, 0, 0, 1, 1, 1]


def test_transforms():
    ds = numbers()
    ordered = T.ConsecutiveLabels(ds)(None)
    assert [ds.indices_to_labels[d.index] for d in ordered] == sorted(LABELS.tolist())
    assert [d.index for d in ordered[:5]] == [0, 4, 8, 12, 16]
    kept = T.FilterLabels(ds, [3])(T.LoadData(ds)(None))
    assert {d.transforms[0](d.index)[1].item() for d in kept} == {3}
    some = T.FusedNWaysKShots(ds, n=2, k=3)(T.FilterLabels(ds, [1, 2, 3])(None))
    assert sorted(Counter(ds.indices_to_labels[d.index] for d in some).values()) == [3, 3]
    for _ in range(5):
        assert l2l.data.Taskset(ds, [T.LoadData(ds), T.RemapLabels(ds, shuffle=False)]).sample()[1].equal(LABELS)
    with pytest.raises(ValueError):
        T.KShots(ds, 6)(None)
    with pytest.raises(ValueError):
        T.NWays(ds, 5)(None)


def test_taskset_sampler():
    ds = numbers()
    taskset = l2l.data.Taskset(ds, [T.FusedNWaysKShots(ds, n=2, k=2)], num_tasks=3)
    batches = list(DataLoader(ds, batch_sampler=TasksetSampler(taskset)))
    assert [len(x) for x, _ in batches] == [4, 4, 4]
    drawn = sorted(sorted(d.index for d in task) for task in taskset.sampled_descriptions.values())
    assert sorted(sorted(x.long().tolist()) for x, _ in batches) == drawn


# data sets ------------------------------------------------------------------------------------------------------------
class Words(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor([float(i)]), "abca"[i]


def test_meta_dataset(tmp_path):
    ds = l2l.data.MetaDataset(Words())
    assert ds.labels == ["a", "b", "c"] and ds.labels_to_indices["a"] == [0, 3] and ds.indices_to_labels[2] == "c"
    assert len(ds) == 4 and ds[3][1] == "a"
    halves = (
        l2l.data.MetaDataset(Words(), labels_to_indices={"x": [0, 2], "y": [1]}),
        l2l.data.MetaDataset(Words(), indices_to_labels={0: "x", 1: "y", 2: "x"}),
    )
    for half in halves:
        assert dict(half.labels_to_indices) == {"x": [0, 2], "y": [1]} and half.labels == ["x", "y"]
        assert dict(half.indices_to_labels) == {0: "x", 1: "y", 2: "x"}
    with pytest.raises(TypeError, match="torch dataset"):
        l2l.data.MetaDataset([(1, 2)])
    with pytest.raises(ValueError, match="scalar labels"):
        l2l.data.MetaDataset(TensorDataset(torch.zeros(2), torch.zeros(2, 2)))
    kept = Words()
    kept._bookkeeping_path = str(tmp_path / "labels.pkl")
    l2l.data.MetaDataset(kept)
    kept.__class__ = type("Silent", (Words,), {"__getitem__": None})  # it is not asked again
    assert l2l.data.MetaDataset(kept).labels == ["a", "b", "c"]


def test_union_and_filter():
    a, b = numbers(), l2l.data.MetaDataset(TensorDataset(torch.arange(50.0, 56.0), torch.tensor([5, 0, 5, 0, 2, 2])))
    union = l2l.data.UnionMetaDataset([a, b.dataset])
    assert len(union) == 26 and sorted(union.labels) == list(range(7))
    assert union[19] == [torch.tensor(19.0), 3] and union[20] == [torch.tensor(50.0), 4]
    assert union.labels_to_indices[5] == [21, 23] and union[25][1] == 6
    with pytest.raises(IndexError):
        union[26]
    kept = l2l.data.FilteredMetaDataset(union, [6, 0, 99])
    assert kept.labels == [6, 0] and [kept[i][1] for i in range(len(kept))] == [6, 6, 0, 0, 0, 0, 0]
    assert kept[0][0] == 54 and kept.labels_to_indices[0] == [2, 3, 4, 5, 6] and 99 not in union.labels_to_indices
    again = l2l.data.FilteredMetaDataset(kept, [0])
    assert [again[i][0].item() for i in range(5)] == [0, 4, 8, 12, 16]


def test_on_device_dataset():
    ds = l2l.data.OnDeviceDataset(numbers(), device="cpu", transform=lambda x: x + 1)
    assert ds[3] == (torch.tensor(4.0), torch.tensor(3)) and l2l.data.MetaDataset(ds).labels == [0, 1, 2, 3]


def test_infinite_iterator():
    found = [x for x, _ in zip(l2l.data.InfiniteIterator([1, 2, 3]), range(7), strict=False)]
    assert found == [1, 2, 3, 1, 2, 3, 1]


# support and query ----------------------------------------------------------------------------------------------------
def test_partition_task():
    x, y = torch.arange(6), torch.tensor([7, -1, 7, -1, -1, 7])
    (support, labels), (query, query_labels) = l2l.data.partition_task(x, y, shots=2)
    assert support.tolist() == [1, 3, 0, 2] and labels.tolist() == [-1, -1, 7, 7]
    assert query.tolist() == [4, 5] and query_labels.tolist() == [-1, 7]
    assert l2l.utils.partition_task is l2l.data.partition_task
    assert len(l2l.data.partition_task(x, y, shots=3)[1][0]) == 0 == len(l2l.data.partition_task(x, y, shots=0)[0][0])
    unequal, odd = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    for labels, shots in ((unequal, 1), (odd[1:], 1), (y, 4), (y[:4], 1)):
        with pytest.raises(AssertionError):
            l2l.data.partition_task(x, labels, shots=shots)
    with pytest.raises(AssertionError):
        l2l.data.stack_tasks([(x, y), (x, torch.tensor([0, 0, 1, 1, 2, 2]))])
    with pytest.raises(ValueError, match="at least one task"):
        l2l.data.stack_tasks([])


# images ---------------------------------------------------------------------------------------------------------------
def test_class_rotation():
    image = torch.arange(16.0).view(1, 4, 4)
    ds = l2l.data.MetaDataset(TensorDataset(image.expand(20, 1, 4, 4), LABELS))
    assert T.RandomClassRotation is l2l.vision.transforms.RandomClassRotation
    rotate = T.RandomClassRotation(ds, [0.0, 90.0, 180.0, 270.0])
    random.seed(1)
    turns = []
    for x, y in (l2l.data.Taskset(ds, [T.LoadData(ds), rotate]).sample() for _ in range(3)):
        for label in range(4):
            same = x[y == label]
            assert all(torch.equal(one, same[0]) for one in same)
            turns += [k for k in range(4) if torch.equal(same[0], torch.rot90(image, k, (1, 2)))]
    assert len(turns) == 12 and len(set(turns[:4])) > 1, "classes turn by themselves"


@pytest.mark.parametrize("degrees", [0, 90, 180, -90, 30, 45.0, 200])
@pytest.mark.parametrize("shape", [(7, 7), (6, 9)])
def test_turned_as_pil_does(degrees, shape):
    from PIL import Image

    torch.manual_seed(0)
    image = torch.randint(1, 255, shape, dtype=torch.uint8)
    expected = turned(Image.fromarray(image.numpy()), degrees)
    expected = torch.from_numpy(np.array(expected))
    found = turned(image.unsqueeze(0), degrees)[0]
    assert (found != expected).float().mean() < 0.05  # pixels half way between two


@pytest.mark.parametrize("name", ["glyphs", "omniglot"])
def test_tasksets_of_images(name, request, monkeypatch):
    data_root = None
    if name == "omniglot":
        data_root = request.getfixturevalue("data_root")
    else:  # drawing them takes a minute
        sizes, images = {"train": 5, "val": 3, "test": 4}, l2l.vision.benchmarks.images
        drawn = {split: torch.randint(0, 120, (classes, 6, 1, 28, 28)).byte() for split, classes in sizes.items()}
        monkeypatch.setattr(images, "load_images", lambda name, split: drawn[split] if name == "glyphs" else None)
    assert list(l2l.vision.benchmarks.list_tasksets()) == ["omniglot", "glyphs", "sinusoid"]
    sets = l2l.vision.benchmarks.get_tasksets(
        name, train_ways=3, train_samples=4, test_ways=2, test_samples=6, num_tasks=5, root=data_root or ""
    )
    assert [len(taskset) for taskset in sets] == [5, 5, 5]
    for taskset, ways, samples in zip(sets, (3, 2, 2), (4, 6, 6), strict=True):
        x, y = taskset.sample()
        assert x.shape == (ways * samples, 1, 28, 28) and x.dtype == torch.float32
        assert 0 <= x.min() < x.max() <= 1 and x.mean() < 0.5
        assert sorted(y.tolist()) == sorted([*range(ways)] * samples)
    labels = [set(taskset.dataset.labels) for taskset in sets]
    assert not (labels[0] & labels[1] or labels[0] & labels[2] or labels[1] & labels[2])
    if name == "omniglot":
        assert list(map(len, labels)) == [1100, 100, 423]


def test_tasksets_of_sinusoids():
    train, *_ = l2l.vision.benchmarks.get_tasksets("sinusoid", train_samples=10, num_tasks=3)
    x, y = train[1]
    assert x.shape == y.shape == (10, 1) and torch.equal(train[1][0], x) and len(list(train)) == 3
    batch = train.sample_batch(4, shots=6)
    assert [tuple(part.shape) for part in batch] == [(4, 6, 1), (4, 6, 1), (4, 4, 1), (4, 4, 1)]
    with pytest.raises(KeyError, match="no data in fastmeta"):
        l2l.vision.benchmarks.get_tasksets("mini-imagenet")
    with pytest.raises(KeyError, match="is none of omniglot"):
        l2l.vision.benchmarks.get_tasksets("omniglott")


def test_full_omniglot(data_root):
    ds = l2l.vision.datasets.FullOmniglot(data_root, transform=lambda image: image.size, target_transform=lambda c: -c)
    assert len(ds) == 32460 and ds[0] == ((105, 105), 0) and ds[19279][1] == -963 and ds[-1][1] == -1622
    assert ds[19280][1] == -964 and len(l2l.data.MetaDataset(ds).labels) == 1623


def test_full_omniglot_is_not_downloaded_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    with pytest.raises(RuntimeError, match="download=True"):
        l2l.vision.datasets.FullOmniglot(tmp_path)


def test_networks():
    models = l2l.vision.models
    net = models.OmniglotFC(28**2, 5, sizes=[8, 4])
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    assert list(dict(net.named_parameters()))[:4] == [
        f"features.1.0.{name}" for name in ("normalize.weight", "normalize.bias", "linear.weight", "linear.bias")
    ]
    assert net.classifier.weight.abs().max() <= 0.02 and not net.classifier.bias.any()
    net = models.OmniglotCNN(5, hidden_size=4)
    assert net(torch.rand(3, 28, 28)).shape == (3, 5) and copy.deepcopy(net).base is not net.base
    assert {"base.0.conv.weight", "base.3.normalize.running_mean", "classifier.bias"} <= set(net.state_dict())
    net = models.MiniImagenetCNN(5, hidden_size=4)
    assert net(torch.rand(2, 3, 84, 84)).shape == (2, 5) and "features.3.conv.bias" in net.state_dict()
    assert models.CNN4Backbone(4, layers=2)(torch.rand(1, 3, 84, 84)).shape == (1, 4 * 5 * 5)
