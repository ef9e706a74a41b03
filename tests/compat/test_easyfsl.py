"""easyfsl's classifiers: against the papers' formulas in plain torch, one row at a time, and by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
from fastmeta.compat.easyfsl.modules import MultiHeadAttention, feat_resnet12
from fastmeta.compat.easyfsl.modules.build_from_checkpoint import feat_resnet12_from_checkpoint
from fastmeta.compat.easyfsl.utils import (
    sliding_average,
)

pytestmark = pytest.mark.usefixtures("double")
C, D = 3, 4
close = torch.testing.assert_close


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
    close(feat_resnet12_from_checkpoint(tmp_path / "best.pth", "cpu").state_dict(), backbone.state_dict())
    del weights["slf_attn.fc.bias"]
    torch.save({"params": weights}, tmp_path / "worse.pth")
    with pytest.raises(ValueError, match="fc.bias"):
        FEAT.from_resnet12_checkpoint(tmp_path / "worse.pth", use_backbone=False)
    torch.save({"params": attention.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="conv1"):
        feat_resnet12_from_checkpoint(tmp_path / "other.pth", "cpu")


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
