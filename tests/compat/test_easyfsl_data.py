"""easyfsl's tasks, data sets and networks: cases worked out by hand."""

import importlib
import json
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastmeta.compat.easyfsl.datasets import (
    CUB,
    EasySet,
    FeaturesDataset,
    FewShotDataset,
    SupportSetFolder,
    TieredImageNet,
    WrapFewShotDataset,
)
from fastmeta.compat.easyfsl.datasets.default_configs import default_transform
from fastmeta.compat.easyfsl.methods import (
    FewShotClassifier,
)
from fastmeta.compat.easyfsl.modules import ResNet, resnet12
from fastmeta.compat.easyfsl.samplers import TaskSampler
from fastmeta.compat.easyfsl.utils import (
    compute_average_features_from_images,
    evaluate,
    evaluate_on_one_task,
    predict_embeddings,
)

pytestmark = pytest.mark.usefixtures("double")
C, D = 3, 4
close = torch.testing.assert_close


# tasks ----------------------------------------------------------------------------------------------------------------
class Labelled(FewShotDataset):
    labels = [30, 7, 7, 30, 5, 7, 5, 30, 5, 30]

    def __getitem__(self, item):
        return torch.full((2, 3), float(item)), torch.tensor(self.labels[item])

    def __len__(self):
        return len(self.labels)

    def get_labels(self):
        return self.labels


def test_episodes():
    data = Labelled()
    sampler = TaskSampler(data, n_way=2, n_shot=1, n_query=2, n_tasks=20)
    assert len(sampler) == 20
    random.seed(3)
    drawn = list(sampler)
    # by Python's random: first the classes, then each one's rows
    random.seed(3)
    for rows in drawn:
        labels = random.sample([5, 7, 30], 2)
        right = [random.sample([i for i, label in enumerate(data.labels) if label == wanted], 3) for wanted in labels]
        assert rows == sum(right, [])
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    for x, y, queries, query_y, classes in loader:
        assert x.shape == (2, 2, 3) and queries.shape == (4, 2, 3) and len(set(classes)) == 2
        for rows, labels in ((x, y), (queries, query_y)):
            assert [data.labels[int(row[0, 0])] for row in rows] == [classes[label] for label in labels]
        assert len({int(row[0, 0]) for row in torch.cat([x, queries])}) == 6


def test_what_a_sampler_refuses():
    with pytest.raises(ValueError, match="3 labels"):
        TaskSampler(Labelled(), 4, 1, 1, 1)
    with pytest.raises(ValueError, match="label 7 has 3 rows"):
        TaskSampler(Labelled(), 2, 2, 2, 1)
    collate = TaskSampler(Labelled(), 1, 1, 0, 1).episodic_collate_fn
    x = torch.zeros(2)
    for row, error in (
        ((np.zeros(2), 0), TypeError),
        ((x, 0.5), TypeError),
        ((x, torch.tensor(0.5)), TypeError),
        ((x, torch.tensor([0])), ValueError),
    ):
        with pytest.raises(error, match="tensor without dimensions"):
            collate([row])


def test_evaluation_counts():
    class Told(FewShotClassifier):
        """Scores that say class 0, unless a query is above 5."""

        def forward(self, query_images):
            assert not self.training and not torch.is_grad_enabled()
            return F.one_hot((query_images[:, 0] > 5).long(), 2)

    model, x, y = Told(), torch.zeros(2, 1), torch.tensor([0, 1])
    queries = torch.tensor([[0.0], [9.0], [9.0]])
    tasks = [(x, y, queries, torch.tensor(labels), [4, 2]) for labels in ([0, 1, 1], [1, 1, 0], [0, 0, 1])]
    assert evaluate(model, tasks, device="cpu", use_tqdm=False) == 6 / 9
    with torch.no_grad():
        assert evaluate_on_one_task(model, *tasks[1][:4]) == (1, 3)
    assert evaluate(model, tasks[:1], device="cpu", tqdm_prefix="a bar, or none") == 1


# data -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """Images 10 x 8 of one colour: two of `b`, one in a folder of `a`."""
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("b/2.PNG", 30), ("b/1.png", 20), ("a/in/3.bmp", 10), ("b/none.txt", None)):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if colour is None:
            path.write_text("")
        else:
            Image.new("RGB", (10, 8), (colour, 0, 0)).save(path, path.suffix[1:].lower())
    return tmp_path / "data"


def red(image):
    return torch.from_numpy(np.array(image))[..., 0]


def test_support_set_folder(folder):
    data = SupportSetFolder(folder, transform=red)
    assert data.classes == ["a", "b"] and data.class_to_idx == {"a": 0, "b": 1}
    assert data.get_labels().tolist() == data.targets == [0, 1, 1] and len(data) == 3
    assert data.get_images().shape == (3, 8, 10) and data.get_images()[:, 0, 0].tolist() == [10, 20, 30]
    assert SupportSetFolder(folder, transform=red, target_transform=str)[2][1] == "1"
    assert SupportSetFolder(folder, image_size=4).get_images().shape == (3, 3, 4, 4)
    with pytest.raises(TypeError, match="tensors"):
        SupportSetFolder(folder, transform=lambda image: image)
    (folder / "c").mkdir()
    for wrong in (folder, folder / "c"):
        with pytest.raises(FileNotFoundError, match="no image|no folder"):
            SupportSetFolder(wrong)


def test_easy_set(folder, tmp_path, monkeypatch):
    specs = tmp_path / "specs.json"
    right = {"class_names": ["one", "two"], "class_roots": [str(folder / "b"), str(folder / "a" / "in")]}
    specs.write_text(json.dumps(right))
    data = EasySet(specs, transform=red)
    assert data.get_labels() == [0, 0, 1] and len(data) == 3 and data.number_of_classes() == 2
    assert [int(image[0, 0]) for image, _ in (data[i] for i in range(3))] == [20, 30, 10] and data[2][1] == 1
    assert EasySet.list_data_instances(right["class_roots"], {".bmp"})[1] == [1]
    with pytest.warns(UserWarning, match="empty"):
        assert EasySet.list_data_instances([str(tmp_path)]) == ([], [])
    for wrong in ({"class_names": []}, {**right, "class_names": ["one"]}):
        specs.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="class_roots"):
            EasySet(specs)
    with pytest.raises(ValueError, match="JSON"):
        EasySet("specs.csv")
    monkeypatch.chdir(tmp_path)
    for kind, place in ((CUB, "CUB"), (TieredImageNet, "tiered_imagenet")):
        with pytest.raises(ValueError, match="data/.*/val.json"):
            kind("val")
        (folder / place).mkdir()
        (folder / place / "val.json").write_text(json.dumps(right))
        assert kind("val", transform=red).get_labels() == [0, 0, 1]


def test_default_transform():
    """The middle of a resized image, normalised. 200 * 1.15 is 229 there, and 14 columns are cut."""
    Image = pytest.importorskip("PIL.Image")
    ramp = np.zeros((229, 229, 3), dtype=np.uint8)
    ramp[:, :, 1] = np.arange(229)
    pixels = default_transform(200, training=False)(Image.fromarray(ramp))
    assert pixels.shape == (3, 200, 200)
    close(pixels[0], torch.full((200, 200), -0.485 / 0.229))
    close(pixels[1, 7], (torch.arange(14, 214) / 255 - 0.456) / 0.224)


def test_features_and_wrapped_datasets():
    x = torch.randn(3, 2)
    data = FeaturesDataset.from_dict({"a": x[:1], "b": x[1:].numpy()})
    close(data.embeddings, x)
    assert data.get_labels() == [0, 1, 1] and data.class_names == ["a", "b"] and data.number_of_classes() == 2
    assert data[1][1] == 1 and len(data) == 3
    with pytest.raises(ValueError, match="class a"):
        FeaturesDataset.from_dict({"a": [1.0]})
    pairs = [("name", image, label) for image, label in data]
    wrapped = WrapFewShotDataset(pairs, 1, 2)
    assert wrapped.get_labels() == [0, 1, 1] and len(wrapped) == 3
    assert torch.equal(wrapped[2][0], x[2]) and wrapped[2][1] == 1
    for wrong in ((1, 1), (-1, 0), (0, 3)):
        with pytest.raises(ValueError, match="place"):
            WrapFewShotDataset(pairs, *wrong)
    for method in (lambda d: d[0], len, FewShotDataset.get_labels):
        with pytest.raises(NotImplementedError):
            method(FewShotDataset())


class Frame:
    """The part of a data frame that is asked for."""

    def __init__(self, **columns):
        self.columns = list(columns)
        for name, values in columns.items():
            setattr(self, name, Column(values))


class Column(list):
    def unique(self):
        return list(dict.fromkeys(self))


def test_a_frame_of_features():
    x = torch.randn(3, 2)
    data = FeaturesDataset.from_dataframe(Frame(embedding=list(x), class_name=["z", "a", "z"]))
    assert data.get_labels() == [0, 1, 0] and data.class_names == ["z", "a"]
    close(data.embeddings, x)
    with pytest.raises(ValueError, match="columns"):
        FeaturesDataset.from_dataframe(Frame(embedding=[]))
    with pytest.warns(UserWarning, match="empty"):
        assert len(FeaturesDataset.from_dataframe(Frame(embedding=[], class_name=[]))) == 0


def test_embeddings_of_a_loader():
    x = torch.randn(5, 2)
    loader = [(x[:3], torch.tensor([4, 5, 4])), (x[3:], ["d", "e"])]
    model = nn.Linear(2, 3)
    close(compute_average_features_from_images(loader, model, "cpu"), model(x).mean(0).detach())
    pandas = pytest.importorskip("pandas")
    frame = predict_embeddings(loader, model)
    assert isinstance(frame, pandas.DataFrame) and list(frame.class_name) == [4, 5, 4, "d", "e"]
    close(torch.stack(list(frame.embedding)), model(x).detach())


def test_what_is_missing_is_told(monkeypatch):
    for package in ("pandas", "torchvision", "torchvision.transforms", "torchvision.models.resnet"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="predict_embeddings needs pandas"):
        predict_embeddings([], None)
    with pytest.raises(ImportError, match="training set needs torchvision"):
        default_transform(84, training=True)
    with pytest.raises(ImportError, match="resnet12 needs torchvision"):
        resnet12()


class Block(nn.Module):
    """As torchvision's, as far as a `ResNet` asks."""

    expansion = 2

    def __init__(self, inputs, planes, stride=1, downsample=None):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * planes, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(2 * planes)
        self.downsample = downsample or nn.Identity()

    def forward(self, x):
        return self.bn2(self.conv(x)) + self.downsample(x)


def test_residual_networks():
    images = torch.randn(2, 3, 16, 16)
    model = ResNet(Block, [1, 2, 1, 1], planes=[2, 3, 4, 5], zero_init_residual=True)
    assert model(images).shape == (2, 10)
    assert not model.layer2[1].bn2.weight.any()
    close(model.layer2[1](torch.ones(1, 6, 2, 2)), torch.ones(1, 6, 2, 2))
    model.set_use_fc(True)
    assert model(images).shape == (2, 1000)
    assert ResNet(Block, [1] * 4, [1] * 4, use_pooling=False, big_kernel=True)(images).shape == (2, 2, 1, 1)
    with pytest.raises(ValueError, match="use_pooling"):
        ResNet(Block, [1] * 4, [1] * 4, use_fc=True, use_pooling=False)(images)


def test_names_that_are_not_here():
    datasets = importlib.import_module("fastmeta.compat.easyfsl.datasets")
    with pytest.raises(ImportError, match="easyfsl 1.5.0 has MiniImageNet"):
        datasets.MiniImageNet("folder")
    with pytest.raises(AttributeError, match="nothing"):
        datasets.nothing  # noqa: B018
