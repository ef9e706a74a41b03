"""torchmeta's tasks and data sets: against its own numbers."""

import importlib

import numpy as np
import pytest
import torch

from fastmeta.compat import torchmeta
from fastmeta.compat.torchmeta.toy import Harmonic, Sinusoid, SinusoidAndLine
from fastmeta.compat.torchmeta.transforms import (
    Categorical,
    ClassSplitter,
    FixedCategory,
    HorizontalFlip,
    Rotation,
    VerticalFlip,
    WeightedClassSplitter,
)
from fastmeta.compat.torchmeta.utils.data import (
    BatchMetaDataLoader,
    ClassDataset,
    CombinationMetaDataset,
    Dataset,
    MetaDataLoader,
    NonEpisodicWrapper,
    Task,
)

pytestmark = pytest.mark.usefixtures("double")
T, B = 3, 4
close = torch.testing.assert_close


class Numbers(ClassDataset):
    """Class c has the inputs 100 c, 100 c + 1, ...; an augmentation is a function of them."""

    sizes = (6, 7, 8, 9)
    num_classes = 4

    def __init__(self, class_augmentations=None):
        super().__init__(meta_train=True, class_augmentations=class_augmentations)

    def __getitem__(self, index):
        return NumbersOfAClass(index, index % 4, self.get_transform(index, float), self.get_target_transform(index))


class NumbersOfAClass(Dataset):
    def __init__(self, index, number, transform, target_transform):
        super().__init__(index, transform, target_transform)
        self.number = number

    def __len__(self):
        return Numbers.sizes[self.number]

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return self.transform(100 * self.number + index), self.target_transform(f"class {self.number}")


class Negative:
    def __iter__(self):
        return iter([self])

    def __call__(self, x):
        return -x


def split_tasks(ways=3, augmentations=None, **kwargs):
    tasks = CombinationMetaDataset(Numbers(augmentations), ways, target_transform=Categorical(ways))
    return ClassSplitter(tasks, num_train_per_class=2, num_test_per_class=3, **kwargs)


def test_tasks_of_a_loader():
    """Labels are a task's own and the same in both sets, which share no row."""
    loader = BatchMetaDataLoader(split_tasks(), batch_size=4)  # there are 4 combinations: a batch is an epoch
    batches = [batch for _ in range(4) for batch in loader]
    (x, y), (query_x, query_y) = (
        [torch.cat(part) for part in zip(*(batch[split] for batch in batches), strict=True)]
        for split in ("train", "test")
    )
    assert x.shape == y.shape == (16, 6) and query_x.shape == query_y.shape == (16, 9)
    orders = set()
    for task in range(16):
        of_class = {}
        for value, label in zip(torch.cat([x, query_x], 1)[task], torch.cat([y, query_y], 1)[task], strict=True):
            of_class.setdefault(int(value) // 100, set()).add(int(label))
        assert sorted(map(tuple, of_class.values())) == [(0,), (1,), (2,)]
        assert y[task].bincount().tolist() == [2, 2, 2] and query_y[task].bincount().tolist() == [3, 3, 3]
        assert not set(x[task].tolist()) & set(query_x[task].tolist())
        orders.add(tuple(sorted((c, *labels) for c, labels in of_class.items())))
    assert len(orders) > 4
    tasks = split_tasks()
    tasks.target_transform("what a program may have asked before")
    assert sorted(y for _, y in tasks[(1, 2, 3)]["train"]) == [0, 0, 1, 1, 2, 2]
    tasks = next(iter(MetaDataLoader(split_tasks(), batch_size=2, shuffle=False)))
    assert [task["train"].index for task in tasks] == [(0, 1, 2), (0, 1, 3)]
    assert isinstance(tasks[0]["test"], Task) and tasks[0]["test"].num_classes == 3


def test_a_task_is_split_the_same_way_each_time():
    tasks = split_tasks()
    parts = [{int(x) for x, _ in tasks[(0, 2, 3)]["train"]} for _ in range(3)]
    assert parts[0] == parts[1] == parts[2]
    assert parts[0] != {int(x) for x, _ in split_tasks(random_state_seed=1)[(0, 2, 3)]["train"]}
    # as torchmeta: a permutation seeded by the hashes, then the order by the splitter's own source of chance
    task = tasks[(0, 2, 3)]["train"].dataset
    order = np.random.RandomState((hash((0, 2, 3)) + hash(2)) % 2**32).permutation(Numbers.sizes[2])
    assert {200.0 + row for row in order[:2]} == {x for x, _ in tasks.dataset_transform(task)["train"] if x // 100 == 2}
    unshuffled = split_tasks(shuffle=False)[(0, 1, 3)]
    assert [x for x, _ in unshuffled["train"]] == [0.0, 1.0, 100.0, 101.0, 300.0, 301.0]
    assert [x for x, _ in unshuffled["test"]] == [2.0, 3.0, 4.0, 102.0, 103.0, 104.0, 302.0, 303.0, 304.0]


def test_seeds_give_torchmetas_numbers():
    """Those of torchmeta's own test of its splitter: task 0 of sinusoids with noise, seed 1."""
    splitter = ClassSplitter(shuffle=True, num_train_per_class=5, num_test_per_class=5)
    tasks = Sinusoid(10, num_tasks=1000, noise_std=0.1, dataset_transform=splitter)
    tasks.seed(1)
    train = [(x.item(), y.item()) for x, y in tasks[0]["train"]]
    np.testing.assert_allclose(train[:2], [(-2.03870077, -0.1031986), (0.09898378, -1.61885041)], rtol=1e-5)
    assert len(train) == 5


def test_augmentations_make_classes():
    negative = Negative()
    with pytest.warns(UserWarning, match="there already"):
        numbers = Numbers([[negative], negative])
    assert len(numbers) == 8 and numbers.class_augmentations == [negative]
    tasks = CombinationMetaDataset(numbers, 2)
    task = tasks[(2, 6)]
    assert task[0] == (200.0, ("class 2", 0)) and task[8] == (-200.0, ("class 2", 1))
    assert len(tasks) == 28 and len({task.index for task in tasks}) == 28
    wrapped = NonEpisodicWrapper(tasks)
    assert len(wrapped) == 60 and wrapped.num_classes == 8 and wrapped.num_samples == 30
    assert wrapped[6] == (100.0, ("class 1", 0)) and wrapped[59] == (-308.0, ("class 3", 1)) and wrapped[-60][0] == 0.0
    assert FixedCategory(negative)("a") == ("a", negative)


def test_what_the_data_refuses():
    with pytest.raises(ValueError, match="tuple"):
        split_tasks()[0]
    with pytest.raises(ValueError, match="fewer than the 7"):
        ClassSplitter(split_tasks()[(0, 1, 2)]["train"].dataset, num_train_per_class=4, num_test_per_class=3)
    with pytest.raises(TypeError, match="int"):
        CombinationMetaDataset(Numbers(), 2.0)
    with pytest.raises(TypeError, match="list"):
        Numbers(class_augmentations=Negative())
    for flags in ({}, {"meta_split": "dev"}, {"meta_train": True, "meta_test": True}):
        with pytest.raises(ValueError, match="meta"):
            ClassDataset(**flags)
    assert ClassDataset(meta_val=True).meta_split == "val" and ClassDataset(meta_split="test").meta_test
    with pytest.raises(IndexError):
        list(map(Categorical(2), "abc"))
    assert list(map(Categorical(), "abca")) == [0, 1, 2, 0]
    orders = {tuple(map(Categorical(3), "abc")) for _ in range(30)}
    assert len(orders) > 2 and all(sorted(order) == [0, 1, 2] for order in orders)
    many = CombinationMetaDataset(Numbers([[Negative() for _ in range(999)]]), 20)
    with pytest.warns(UserWarning, match="more than a length can be"):
        assert len(many) == 2**63 - 1
    assert len(next(iter(MetaDataLoader(many)))[0].datasets) == 20


def test_weighted_splits():
    tasks = CombinationMetaDataset(Numbers(), 2, target_transform=Categorical())
    splitter = WeightedClassSplitter(train_weights=0.25, test_weights=0.5, min_num_samples=2, max_num_samples=4)
    task = splitter(tasks[(1, 3)])
    # of 7 and 9 rows: 0.25 is 1 and 2, but 2 at least; 0.5 is 3 and 4
    assert np.bincount([int(x) // 100 for x, _ in task["train"]], minlength=4).tolist() == [0, 2, 0, 2]
    assert np.bincount([int(x) // 100 for x, _ in task["test"]], minlength=4).tolist() == [0, 3, 0, 4]
    assert not {x for x, _ in task["train"]} & {x for x, _ in task["test"]}
    equal = WeightedClassSplitter(support_weights=0.5, force_equal_per_class=True, shuffle=False)(tasks[(1, 3)])
    assert [x for x, _ in equal["support"]] == [100.0, 101.0, 102.0, 300.0, 301.0, 302.0]


def test_toy_functions():
    for kind in (Sinusoid, Harmonic, SinusoidAndLine):
        tasks = kind(10, num_tasks=20)
        tasks.seed(3)
        again = kind(10, num_tasks=20)
        again.seed(3)
        for index in range(4):
            task = tasks[index]
            x, y = task._inputs, task._targets
            if hasattr(task, "slope"):
                right = task.intercept + task.slope * x
            elif kind is Harmonic:
                (a, b), (c, d), f = task.amplitudes, task.phases, task.frequency
                right = a * np.sin(f * x + c) + b * np.sin(2 * f * x + d)
            else:
                right = task.amplitude * np.sin(x - task.phase)
            np.testing.assert_allclose(y, right)
            assert task[0][0].shape == task[0][1].shape == (1,) and len(task) == 10
            np.testing.assert_array_equal(x, again[index]._inputs)
        inputs, targets = next(iter(BatchMetaDataLoader(tasks, batch_size=4)))
        assert inputs.shape == targets.shape == (4, 10, 1) and inputs.dtype == torch.float64
    assert SinusoidAndLine(1, num_tasks=20).is_sinusoid.sum() == 10
    with pytest.warns(UserWarning, match="ignored"):
        split = torchmeta.toy.helpers.harmonic(1, test_shots=3, num_samples_per_task=8, num_tasks=4, seed=0)[0]
    assert [len(split["train"]), len(split["test"])] == [5, 3]


def test_rotations_and_flips():
    Image = pytest.importorskip("PIL.Image")
    pixels = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)[:, :3]
    image = Image.fromarray(pixels)
    turned = [np.array(rotation(image)) for rotation in Rotation([90, 180, 270])]
    for times, found in enumerate(turned, 1):
        np.testing.assert_array_equal(found, np.rot90(pixels, times))
    np.testing.assert_array_equal(np.array(HorizontalFlip()(image)), pixels[:, ::-1])
    np.testing.assert_array_equal(VerticalFlip()(torch.tensor(pixels)).numpy(), pixels[::-1])
    assert Rotation(450) == Rotation(90) != Rotation(180) and hash(Rotation(450)) == hash(Rotation(90))
    assert Rotation(90) != HorizontalFlip() and repr(Rotation(450)) == "Rotation(90)"
    with pytest.raises(ValueError, match="several"):
        Rotation([90])(image)
    with pytest.warns(UserWarning, match="already"):
        Rotation(360)


def test_omniglot(data_root):
    helpers, datasets = torchmeta.datasets.helpers, torchmeta.datasets
    tasks = helpers.omniglot(data_root, shots=1, ways=5, test_shots=2, meta_val=True, seed=0)
    assert len(tasks.dataset) == 4 * 172 and tasks.dataset.num_classes == 172
    images, labels = next(iter(BatchMetaDataLoader(tasks, batch_size=2)))["test"]
    assert images.shape == (2, 10, 1, 28, 28) and images.dtype == torch.float64
    assert 0 <= images.min() and 0.9 < images.max() <= 1 and 0.02 < images.mean() < 0.2
    assert labels.sort(1).values.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 2
    by_archive = datasets.Omniglot(data_root, 5, meta_test=True, use_vinyals_split=False)
    assert len(by_archive.dataset) == 659
    image, (name, augmentation) = by_archive[(0, 1, 2, 3, 4)][0]
    assert name == "images_evaluation/Angelic/character01" and augmentation == 0 and image.size == (28, 28)
    with pytest.raises(ValueError, match="use_vinyals_split"):
        datasets.Omniglot(data_root, 5, meta_val=True, use_vinyals_split=False)


def test_missing_omniglot_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    with pytest.raises(RuntimeError, match="download"):
        torchmeta.datasets.Omniglot(tmp_path, 5, meta_train=True)


ABSENT = {
    "datasets": "MiniImagenet",
    "datasets.helpers": "miniimagenet",
    "datasets.helpers_tabular": "bach",
    "datasets.utils": "download_file_from_google_drive",
    "transforms": "SegmentationPairTransform",
    "transforms.target_transforms": "SegmentationPairTransform",
}


@pytest.mark.parametrize("module", ABSENT)
def test_names_that_are_not_here(module):
    """Programs import more data sets than they use: those raise when they are called."""
    name, is_data = ABSENT[module], module.startswith("datasets") and module != "datasets.utils"
    module = importlib.import_module(f"fastmeta.compat.torchmeta.{module}")
    with pytest.raises(ImportError, match=f"torchmeta 1.8.0 has {name}"):
        getattr(module, name)("folder", num_classes_per_task=5)
    if is_data:
        assert isinstance(getattr(module, name), type) and getattr(module, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_tables_are_split_as_images_are():
    def table(folder, num_classes_per_task, transform, target_transform, class_augmentations):
        assert folder == "folder" and class_augmentations is None and repr(transform) == "NumpyToTorch()"
        rows = Numbers()
        rows.get_transform = lambda index, _: lambda number: transform(np.array([number, -number], dtype=float))
        return CombinationMetaDataset(rows, num_classes_per_task, target_transform=target_transform)

    helper = torchmeta.datasets.helpers_tabular.helper_with_default_tabular
    tasks = helper(table, "folder", shots=2, ways=3, test_shots=3, seed=0)
    batch = next(iter(BatchMetaDataLoader(tasks, batch_size=2)))
    inputs, labels = batch["train"]
    assert inputs.shape == (2, 6, 2) and labels.shape == (2, 6) and batch["test"][0].shape == (2, 9, 2)
    close(inputs[..., 1], -inputs[..., 0])


def test_lists_of_classes_are_not_here():
    assert torchmeta.__version__ == importlib.import_module("fastmeta.compat.torchmeta.version").VERSION
    utils = importlib.import_module("fastmeta.compat.torchmeta.datasets.utils")
    with pytest.raises(OSError, match="omniglot/train.json not found"):
        utils.get_asset("omniglot", "train.json")
