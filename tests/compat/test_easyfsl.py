"""easyfsl's names: against its papers' formulas in plain torch, one row at a time, and cases worked out by hand."""

import copy
import importlib
import json
import pickle
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
    BDCSPN,
    FEAT,
    PTMAP,
    TIM,
    FewShotClassifier,
    Finetune,
    LaplacianShot,
    MatchingNetworks,
    PrototypicalNetworks,
    RelationNetworks,
    SimpleShot,
    TransductiveFinetuning,
)
from fastmeta.compat.easyfsl.methods.utils import compute_prototypes, entropy, k_nearest_neighbours, strip_prefix
from fastmeta.compat.easyfsl.modules import MultiHeadAttention, ResNet, feat_resnet12, resnet12
from fastmeta.compat.easyfsl.samplers import TaskSampler
from fastmeta.compat.easyfsl.utils import (
    compute_average_features_from_images,
    evaluate,
    evaluate_on_one_task,
    predict_embeddings,
    sliding_average,
)

C, D = 3, 4
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def task(support=7, queries=9):
    """Support features, labels of unequal number, and queries, in clusters."""
    labels, query_labels = torch.arange(support) % C, torch.arange(queries) % C
    centres = torch.randn(C, D)
    noise, query_noise = torch.randn(support, D) / 3, torch.randn(queries, D) / 3
    return centres[labels] + noise, labels, centres[query_labels] + query_noise


def means(x, y):
    return torch.stack([sum(x[i] for i in range(len(y)) if y[i] == c) / (y == c).sum() for c in range(C)])


def euclid(a, b):
    return torch.stack([torch.stack([((p - q) ** 2).sum().sqrt() for q in b]) for p in a])


def cosines(a, b):
    return torch.stack([torch.stack([p @ q / (p.norm() * q.norm()) for q in b]) for p in a])


def scores(model, x, y, queries):
    model.process_support_set(x, y)
    return model(queries)


# classifiers ----------------------------------------------------------------------------------------------------------
def test_prototypes():
    x, y, _ = task()
    close(compute_prototypes(x, y), means(x, y))
    assert compute_prototypes(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([1, 0, 1])).tolist() == [[3.0], [3.0]]
    maps = torch.randn(4, 2, 3, 3)
    close(compute_prototypes(maps, torch.tensor([0, 1, 1, 0])), torch.stack([maps[[0, 3]].mean(0), maps[1:3].mean(0)]))
    # as many rows as there are labels, so label 1, which is missing, has NaN and label 7 has no row
    odd = compute_prototypes(torch.ones(3, 1), torch.tensor([0, 7, 7]))
    assert odd.shape == (2, 1) and odd[0] == 1 and odd[1].isnan()


def test_prototypical_networks_are_differentiable_twice():
    """Not squared; at 25 rows and fewer torch.cdist refuses the second derivative."""
    backbone = nn.Linear(D, D)
    x, y, queries = task()
    model = PrototypicalNetworks(backbone)
    found = scores(model, x, y, queries)
    right = -euclid(backbone(queries), means(backbone(x), y))
    close(found, right)
    seconds = []
    for value in (found, right):
        first = torch.autograd.grad(value.square().sum(), backbone.parameters(), create_graph=True)
        seconds.append((first, torch.autograd.grad(first[0].square().sum(), backbone.weight)))
    close(*seconds)
    close(scores(PrototypicalNetworks(use_softmax=True), x, y, queries), (-euclid(queries, means(x, y))).softmax(1))
    same = torch.ones(2, D, requires_grad=True)
    (slope,) = torch.autograd.grad(scores(PrototypicalNetworks(), same, torch.tensor([0, 0]), same).sum(), same)
    assert torch.equal(slope, torch.zeros(2, D))


def test_features_are_centred_then_normalised():
    x, y, queries = task()
    centre = torch.randn(D)
    model = SimpleShot(feature_centering=centre, feature_normalization=1)
    found = scores(model, x, y, queries)
    x, queries = ((rows - centre) / (rows - centre).abs().sum(1, keepdim=True) for rows in (x, queries))
    close(found, cosines(queries, means(x, y)))
    assert torch.equal(model.support_labels, y)
    close(model.support_features, x)


def test_bdcspn():
    x, y, queries = task()
    shifted = queries + x.mean(0) - queries.mean(0)
    nearest = cosines(shifted, means(x, y)).argmax(1)
    rows, labels = torch.cat([x, shifted]), torch.cat([y, nearest])
    weights = cosines(rows, means(x, y)).exp()
    of_class = [[i for i in range(len(rows)) if labels[i] == c] for c in range(C)]
    prototypes = torch.stack(
        [sum(weights[i, c] * rows[i] for i in of_class[c]) / sum(weights[i, c] for i in of_class[c]) for c in range(C)]
    )
    model = BDCSPN()
    close(scores(model, x, y, queries), cosines(queries, prototypes))
    close(model.prototypes, prototypes)


def test_laplacian_shot():
    x, y, queries = task()
    model = LaplacianShot(inference_steps=4, knn=4, lambda_regularization=0.5)
    found = scores(model, x, y, queries)
    distances = euclid(queries, model.prototypes) ** 2  # those of BDCSPN
    kernel = torch.zeros(len(queries), len(queries))
    for row, others in enumerate(euclid(queries, queries)):
        kernel[row, others.argsort()[1:4]] = 1
    assert torch.equal(model.compute_pairwise_affinities(queries), kernel)
    assignments = (-distances).softmax(1)
    for _ in range(4):
        assignments = (0.5 * kernel @ assignments - distances).softmax(1)
    close(found, assignments)
    # it ends where the bound is still: many steps more change nothing
    model.inference_steps = 200
    settled = model.bound_updates(distances, kernel)
    model.inference_steps = 10**9
    assert torch.equal(model.bound_updates(distances, kernel), settled)
    bound = (found * found.log() + found * distances - 0.5 * (kernel @ found) * found).sum()
    assert model.compute_upper_bound(found, distances, kernel) == pytest.approx(bound.item())


def test_pt_map():
    x, y, queries = task()
    model = PTMAP(fine_tuning_steps=1, fine_tuning_lr=0.3, lambda_regularization=2.0)
    found = scores(model, x, y, queries)
    px, pq = ((rows.clamp(min=0) + 1e-6).sqrt() for rows in (x, queries))
    prototypes = means(px, y)

    def plan(prototypes):
        p = (-2.0 * euclid(pq, prototypes) ** 2).exp()
        for _ in range(1000):
            p = p / p.sum(1, keepdim=True)
            p = p * (len(queries) // C) / p.sum(0)
        return p

    weights = torch.cat([F.one_hot(y, C), plan(prototypes)])
    target = (weights.T @ torch.cat([px, pq])) / weights.sum(0)[:, None]
    prototypes = 0.7 * prototypes + 0.3 * target
    close(model.prototypes, prototypes, rtol=1e-5, atol=1e-5)  # the library stops at 1e-6
    close(found, plan(prototypes), rtol=1e-5, atol=1e-5)
    close(found.sum(0), torch.full((C,), 3.0), rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(scores(model, leaf, y, queries)[:, 0].square().sum(), leaf)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", [Finetune, TIM, TransductiveFinetuning])
def test_fine_tuning_is_adam_on_the_prototypes(kind):
    x, y, queries = task()
    backbone = nn.Linear(D, D)
    model = kind(backbone, fine_tuning_steps=3, fine_tuning_lr=0.1, temperature=2.0, use_softmax=True)
    assert not any(p.requires_grad for p in backbone.parameters())
    features, query_features = backbone(x), backbone(queries)
    prototypes = means(features, y).requires_grad_()
    optimizer = torch.optim.Adam([prototypes], lr=0.1)
    distance = (lambda a, b: -euclid(a, b)) if kind is TransductiveFinetuning else cosines
    for _ in range(3):
        loss = F.cross_entropy(2 * distance(features, prototypes), y)
        p = (2 * distance(query_features, prototypes)).softmax(1)
        conditional = -(p * (p + 1e-12).log()).sum(1).mean()
        if kind is TIM:
            marginal = p.mean(0)
            loss = loss + (marginal * marginal.log()).sum() + 0.1 * conditional
        elif kind is TransductiveFinetuning:
            loss = loss + conditional
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # as an evaluation is
        found = scores(model, x, y, queries)
    assert not found.requires_grad and model.is_transductive() == (kind is not Finetune)
    close(found, (2 * distance(query_features, prototypes)).softmax(1).detach())
    close(model.prototypes, prototypes)


def test_the_papers_settings():
    told = {
        kind: (model.fine_tuning_steps, model.fine_tuning_lr, model.temperature)
        for kind in (Finetune, TIM, TransductiveFinetuning)
        for model in [kind()]
    }
    assert told == {Finetune: (200, 1e-4, 1.0), TIM: (50, 1e-4, 10.0), TransductiveFinetuning: (25, 5e-5, 1.0)}


def test_matching_networks():
    x, y, queries = task()
    model = MatchingNetworks(feature_dimension=D)
    found = scores(model, x, y, queries)
    lstm, cell = model.support_features_encoder, model.query_features_encoding_cell
    both = lstm(x[None])[0][0]
    support = x + both[:, :D] + both[:, D:]
    rows = []
    for query in queries:
        hidden, state = query, torch.zeros(D)
        for _ in x:
            read = (support @ hidden).softmax(0) @ support
            hidden, state = cell(torch.cat([query, read]), (hidden, state))
            hidden = hidden + query
        attention = (F.normalize(support) @ hidden).softmax(0)
        rows.append(torch.stack([attention[y == c].sum() + 1e-6 for c in range(C)]).log())
    close(found, torch.stack(rows))
    with pytest.raises(ValueError, match="5 wide"):
        MatchingNetworks(feature_dimension=5).process_support_set(x, y)


def test_feat():
    x, y, queries = task()
    attention = MultiHeadAttention(2, D, 3, 5).eval()
    p = means(x, y)
    heads = []
    for head in range(2):
        q, k = (layer.weight[3 * head : 3 * head + 3] @ p.T for layer in (attention.w_qs, attention.w_ks))
        v = p @ attention.w_vs.weight[5 * head : 5 * head + 5].T
        heads.append((q.T @ k / np.sqrt(3)).softmax(1) @ v)
    right = attention.layer_norm(attention.fc(torch.cat(heads, 1)) + p)
    model = FEAT(attention_module=attention)
    close(scores(model, x, y, queries), -euclid(queries, right))
    close(model.prototypes, right)


def test_feat_from_a_checkpoint(tmp_path):
    torch.set_default_dtype(torch.float32)
    backbone, attention = feat_resnet12(), MultiHeadAttention(1, 640, 640, 640)
    weights = {f"encoder.{name}": value for name, value in backbone.state_dict().items()}
    weights |= {f"slf_attn.{name}": value for name, value in attention.state_dict().items()}
    torch.save({"params": weights}, tmp_path / "best.pth")
    model = FEAT.from_resnet12_checkpoint(tmp_path / "best.pth", use_softmax=True).eval()
    images = torch.randn(2, 3, 16, 16)
    close(model.backbone(images), backbone.eval()(images))
    close(model.attention_module.state_dict(), attention.state_dict())
    del weights["slf_attn.fc.bias"]
    torch.save({"params": weights}, tmp_path / "worse.pth")
    with pytest.raises(ValueError, match="fc.bias"):
        FEAT.from_resnet12_checkpoint(tmp_path / "worse.pth", use_backbone=False)


def test_relation_networks():
    x, y, queries = torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 0, 0]), torch.randn(4, 2, 6, 6)
    model = RelationNetworks(feature_dimension=2).eval()
    found = scores(model, x, y, queries).detach()
    prototypes = means(x, y)
    right = [[model.relation_module(torch.cat([p, q])[None]).item() for p in prototypes] for q in queries]
    close(found, torch.tensor(right))
    for wrong, channels in ((x.flatten(1), 2), (x, 3)):
        with pytest.raises(ValueError, match="channels|one map"):
            RelationNetworks(feature_dimension=channels).process_support_set(wrong, y)


def test_subclasses_copies_and_what_is_refused():
    class Nearest(FewShotClassifier):
        def forward(self, query_images):
            return self.softmax_if_specified(self.l2_distance_to_prototypes(self.compute_features(query_images)))

    x, y, queries = task()
    model = Nearest(nn.Linear(D, D))
    expected = scores(model, x, y, queries)
    close(scores(copy.deepcopy(Nearest(model.backbone)), x, y, queries), expected)
    proto = PrototypicalNetworks(nn.Linear(D, D))
    other = pickle.loads(pickle.dumps(proto))
    close(scores(other, x, y, queries), scores(proto, x, y, queries))
    assert list(proto.state_dict()) == ["backbone.weight", "backbone.bias"]
    with pytest.raises(NotImplementedError):
        FewShotClassifier()(queries)
    with pytest.raises(NotImplementedError):
        FewShotClassifier.is_transductive()
    with pytest.raises(ValueError, match="one vector"):
        PrototypicalNetworks().process_support_set(torch.ones(2, 3, 4), torch.tensor([0, 1]))


def test_small_helps():
    close(entropy(torch.tensor([[0.0, 0.0], [50.0, -50.0]])), torch.tensor(np.log(2) / 2))
    assert k_nearest_neighbours(torch.tensor([[0.0], [1.0], [5.0]]), 2).tolist() == [[1], [0], [1]]
    assert dict(strip_prefix({"a.b": 1, "b.a.": 2}, "a.")) == {"b": 1, "b.a.": 2}
    assert [sliding_average([1, 2, 6], window) for window in (0, 2, 9)] == [3, 4, 3]
    with pytest.raises(ValueError, match="empty"):
        sliding_average([], 1)


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
