"""learn2learn's layers, classifiers, transforms of gradients and optimisers, against their formulas in float64."""

import sys
import types

import pytest
import torch
from torch import nn

from fastmeta.compat import learn2learn as l2l


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# transforms of gradients ----------------------------------------------------------------------------------------------
def test_module_transform():
    parameter = nn.Parameter(normal(3, 4))
    transform = l2l.optim.ModuleTransform(nn.Linear)(parameter).double()
    grad = normal(4, 3).t()  # not contiguous
    layer = transform.transform
    assert_same(transform(grad), (layer.weight @ grad.flatten() + layer.bias).view(3, 4))


@pytest.mark.parametrize("shape, n, m", [((3, 4), 3, 4), ((5,), 5, 1), ((2, 3, 2, 2), 3, 4)])
@pytest.mark.parametrize("psd", [True, False])
def test_kronecker_transform(shape, n, m, psd):
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, bias=True, psd=psd)(normal(*shape)).double()
    layer, grad = transform.transform, normal(*shape)
    assert_same(transform(grad), grad)  # first the identity
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    left, right = layer.left, layer.right
    if psd:
        left, right = left.t() @ left, right.t() @ right
    matrix = torch.kron(right.t().contiguous(), left)  # on columns in a row
    seen = grad.reshape(-1, n, m).transpose(1, 2).flatten(1)
    expected = (seen @ matrix.t()).view(-1, m, n).transpose(1, 2) + layer.bias
    assert_same(transform(grad), expected.reshape(shape))
    if len(shape) == 2:  # a vector is the columns in a row
        assert_same(layer(grad.t().flatten()), transform(grad).t().flatten())
    with pytest.raises(ValueError, match="n\\*m"):
        layer(normal(n * m + 1))
    with pytest.raises(ValueError, match="shape \\(n, m\\)"):
        layer(normal(n + 1, m))
    with pytest.raises(NotImplementedError):
        l2l.optim.transforms.kronecker_transform.get_kronecker_dims(normal(2, 2, 2))


def test_metacurvature():
    for shape, equation in (((3, 4), "ij,jo,op->ip"), ((2, 3, 2, 2), "ij,jof,op,fg->ipg")):
        transform, grad = l2l.optim.MetaCurvatureTransform(nn.Parameter(normal(*shape)), lr=0.5), normal(*shape)
        assert_same(transform(grad), 0.5 * grad)
        for p in transform.parameters():
            p.data.copy_(torch.randn_like(p))
        factors = [transform.mc_out, *([transform.mc_f.t()] if len(shape) == 4 else [])]
        flat = grad.flatten(2) if len(shape) == 4 else grad
        assert_same(transform(grad), 0.5 * torch.einsum(equation, transform.mc_in, flat, *factors).view(shape))
    bias = l2l.optim.MetaCurvatureTransform(nn.Parameter(normal(3)))
    bias.mc.data.mul_(3)
    assert_same(bias(torch.ones(3).double()), torch.full((3,), 3.0).double())
    with pytest.raises(NotImplementedError):
        l2l.optim.MetaCurvatureTransform(normal(2, 2, 2))


def test_parameter_update():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    of_first = l2l.optim.TransformDictionary({model[0]: lambda p: l2l.nn.Scale(p.shape, alpha=2.0)})
    get = l2l.optim.ParameterUpdate(model.parameters(), of_first)
    assert len(list(get.parameters())) == 2 and get.transforms_indices == [0, 1, None, None]
    x = normal(4, 2)
    gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    updates = get(model(x).sum(), model.parameters())
    for u, g, factor in zip(updates, gradients, (2, 2, 1, 1), strict=True):
        assert_same(u, factor * g)
    model[0].bias.requires_grad_(False)
    assert get(model(x).sum(), model.parameters(), allow_nograd=True)[1] is None
    with pytest.raises(RuntimeError, match="allow_nograd"):
        get(model(x).sum(), model.parameters())
    with pytest.raises(ValueError, match="Module or None"):
        l2l.optim.ParameterUpdate(model.parameters(), lambda p: "no module")
    with pytest.raises(ValueError, match="Modules or Parameters"):
        l2l.optim.TransformDictionary({"weight": None})


def test_differentiable_sgd():
    layer = nn.Linear(2, 1).double()
    weight, bias, rate = layer.weight, layer.bias, torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    l2l.optim.DifferentiableSGD(rate)(layer, [torch.ones_like(weight), None])
    assert_same(layer.weight, weight - 0.5)
    assert layer.bias is bias
    layer.weight.sum().backward()
    assert rate.grad.item() == -2
    layer = nn.Linear(2, 1).double()
    weight = layer.weight
    layer(normal(3, 2)).sum().backward()
    l2l.optim.DifferentiableSGD(0.5)(layer)
    assert_same(layer.weight, weight - 0.5 * weight.grad)


def test_learnable_optimizer():
    """The transform learns from the loss after its step: by hand, two steps of a scaled gradient."""
    layer, x = nn.Linear(2, 1, bias=False).double(), normal(5, 2)
    scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    w = layer.weight.detach().clone()
    optimiser = l2l.optim.LearnableOptimizer(layer, lambda p: l2l.nn.Scale(alpha=2.0).double(), lr=0.1)
    assert len(list(optimiser.parameters())) == 1
    for step in range(3):
        optimiser.zero_grad()
        layer(x).square().mean().backward()
        w = w if step else w.requires_grad_()
        loss = (x @ w.t()).square().mean()
        (grad,) = torch.autograd.grad(loss, w, retain_graph=True)
        assert_same(layer.weight.grad, grad)
        if step:
            own = optimiser.transforms[0].alpha.grad
            assert_same(own, torch.autograd.grad(loss, scale)[0])
        optimiser.transforms[0].alpha.grad = None
        w = w.detach() - 0.1 * scale * grad
        optimiser.step()
        assert_same(layer.weight, w)


# layers and classifiers -----------------------------------------------------------------------------------------------
def test_small_layers():
    x = normal(2, 3, 4)
    assert_same(l2l.nn.Lambda(torch.sum)(x, dim=1), x.sum(1))
    assert l2l.nn.Flatten()(x.transpose(1, 2)).shape == (2, 12)
    assert_same(l2l.nn.Scale((3, 4), alpha=0.5).double()(x), 0.5 * x)
    assert l2l.nn.Scale().alpha.shape == (1,) and l2l.nn.Scale(3).alpha.shape == (3,)
    layer = l2l.nn.freeze(nn.Linear(2, 2))
    assert not layer.weight.requires_grad and l2l.nn.unfreeze(layer).weight.requires_grad


def test_kronecker_cells():
    x, h, c = normal(2, 3), normal(2, 3), normal(2, 3)
    rnn, lstm = l2l.nn.KroneckerRNN(2, 3).double(), l2l.nn.KroneckerLSTM(2, 3).double()
    y, hidden = rnn(x, h)
    assert_same(hidden, torch.tanh(x + h))  # all matrices are the identity
    assert_same(y, hidden)
    y, (hidden, cell) = lstm(x, (h, c))
    gate = torch.sigmoid(x + h)
    assert_same(cell, gate * c + gate * torch.tanh(x + h))
    assert_same(y, gate * torch.tanh(cell))
    assert sum(1 for _ in lstm.parameters()) == 24


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize", [False, True])
def test_prototypical_classifier(distance, normalize):
    """Any labels in rising order, unequal shots; values and two derivatives."""
    support, query = normal(7, 4).requires_grad_(), normal(3, 4).requires_grad_()
    labels = torch.tensor([9, -2, 4, 4, 9, 9, -2])
    means = torch.stack([support[labels == c].mean(0) for c in (-2, 4, 9)])
    q = query
    if normalize or distance == "cosine":
        means, q = (v / (v.norm(dim=1, keepdim=True) + 1e-8) for v in (means, query))
    expected = q @ means.t() if distance == "cosine" else -(q[:, None] - means[None]).square().sum(-1)
    classifier = l2l.nn.PrototypicalClassifier(support, labels, distance=distance, normalize=normalize)
    logits = classifier(query)
    assert_same(logits, expected)
    assert_same(classifier.prototypes, means)
    ones = [torch.autograd.grad(v.pow(3).sum(), (support, query), create_graph=True) for v in (logits, expected)]
    twos = [torch.autograd.grad(sum(g.square().sum() for g in one), (support, query)) for one in ones]
    for found, wanted in zip(ones[0] + twos[0], ones[1] + twos[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_prototypical_classifier_otherwise():
    with pytest.raises(AssertionError, match="Prototypes not computed"):
        l2l.nn.PrototypicalClassifier()(normal(1, 2))
    own = l2l.nn.PrototypicalClassifier(distance=lambda prototypes, queries: queries @ prototypes.t())
    images = normal(4, 2, 2)
    assert_same(own.fit_(images, torch.tensor([1, 0, 1, 0])), torch.stack([images[1::2].mean(0), images[::2].mean(0)]))
    own.fit_(normal(2, 3).half(), torch.tensor([0, 1]))
    assert own(torch.zeros(2, 3).half()).shape == (2, 2)
    # a zero row is normalised by epsilon alone
    cosine = l2l.nn.PrototypicalClassifier(torch.zeros(1, 2), torch.tensor([0]), distance="cosine")
    assert cosine(torch.ones(1, 2)).item() == 0


def test_support_vector_classifier(monkeypatch):
    monkeypatch.setitem(sys.modules, "qpth", None)
    support, labels = torch.eye(3).double()[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0])
    with pytest.raises(ImportError, match="qpth required"):
        l2l.nn.SVClassifier(support, labels)

    def solve(Q, p, G, h, A, b):  # the equations alone: the bounds of this problem do not bind but for those at zero
        assert (Q.shape, p.shape, G.shape, h.shape) == ((12, 12), (1, 12), (12, 12), (1, 12))
        assert (A.shape, b.shape) == ((4, 12), (1, 4)) and torch.equal(h, -0.3 * p)
        system = torch.cat([torch.cat([Q, A.t()], 1), torch.cat([A, A.new_zeros(4, 4)], 1)])
        return torch.linalg.solve(system, torch.cat([-p, b], 1)[0])[:12].unsqueeze(0)

    solver = types.ModuleType("qpth.qp")
    solver.QPFunction = lambda verbose, maxIter: solve
    monkeypatch.setitem(sys.modules, "qpth", types.ModuleType("qpth"))
    monkeypatch.setitem(sys.modules, "qpth.qp", solver)
    classifier = l2l.nn.SVClassifier(support, labels, C_reg=0.3)
    query = normal(5, 3)
    logits = classifier(query)
    duals = classifier.qp_solution
    assert_same(duals.sum(1), torch.zeros(4).double())
    expected = (duals.unsqueeze(1) * (support @ query.t()).unsqueeze(2)).sum(0)
    assert_same(logits, expected)
    assert torch.equal(classifier(support).argmax(1), labels)
    assert_same(l2l.nn.metaoptnet.svm_logits(query, support, labels, 3, 1, C_reg=0.3), logits)


def test_metalayers():
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double()
    first, x = base[0], normal(2, 3)
    wrapped = l2l.nn.MetaModule(
        base, {nn.Linear: lambda layer: l2l.nn.ParameterTransform(layer, lambda p: l2l.nn.Scale(alpha=2.0).double())}
    )
    assert_same(wrapped(x), torch.relu(2 * first(x)))
    assert not first.weight.requires_grad and isinstance(first.weight, nn.Parameter)
    assert [p.shape for p in wrapped.meta_parameters()] == [(1,), (1,)]
    wrapped(x).sum().backward()
    assert all(p.grad is not None for p in wrapped.meta_parameters())
    assert wrapped.module()[0] is first


def test_blocks_are_dropped_whole():
    drop = l2l.vision.models.resnet12.DropBlock(2)
    x = torch.rand(8, 4, 5, 6) + 1
    torch.manual_seed(1)
    out = drop(x, gamma=0.1)
    torch.manual_seed(1)
    begun = torch.bernoulli(torch.full((8, 4, 4, 5), 0.1))
    kept = torch.ones_like(x)
    for n, c, i, j in begun.nonzero().tolist():
        kept[n, c, i : i + 2, j : j + 2] = 0
    assert 0 < kept.mean() < 1
    torch.testing.assert_close(out, x * kept / kept.mean())
    assert drop.eval()(x, gamma=0.1) is x


def test_residual_networks():
    """The first block by hand; blocks are dropped, ever more of them, in the last two layers alone."""
    torch.manual_seed(0)
    model = l2l.vision.models.ResNet12(3, hidden_size=512, wider=False, dropblock_dropout=0.4, channels=1).eval()
    block, x = model.features.layer1[0], torch.randn(1, 1, 84, 84)
    h = x
    for i in (1, 2, 3):
        h = block._modules[f"bn{i}"](nn.functional.conv2d(h, block._modules[f"conv{i}"].weight, padding=1))
        h = nn.functional.leaky_relu(h, 0.1) if i < 3 else h + block.downsample(x)
    torch.testing.assert_close(block(x), nn.functional.max_pool2d(nn.functional.leaky_relu(h, 0.1), 2))
    assert model(x).shape == (1, 3) and model.features.layer4[0].num_batches_tracked == 1
    asked = []
    for layer in (model.features.layer2, model.features.layer4):
        layer[0].DropBlock.forward = lambda x, gamma: asked.append(gamma) or x
        layer[0].num_batches_tracked = 20_000 - 1
    model(x)
    assert asked == [pytest.approx(0.2 / 25 * 25 / 1)]
    clone = l2l.clone_module(model)
    clone(x).sum().backward()
    assert model.classifier.weight.grad is not None
    wide = l2l.vision.models.wrn28.WideResNet(10, 1, 0.0).eval()
    images = torch.randn(1, 3, 84, 84)
    block, h = wide.layer2[0], wide.layer1(wide.conv1(images))
    right = block.conv1(block.bn1(h).relu())
    right = block.conv2(block.bn2(right).relu()) + block.shortcut(h)
    torch.testing.assert_close(wide.layer2(h), right)
    assert wide(images).shape == (1, 64)
    last = wide.bn1(wide.layer3(right)).relu().mean((2, 3))
    torch.testing.assert_close(wide(images), last)
