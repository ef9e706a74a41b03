"""torchmeta's names: against torch.nn, plain autograd task by task, cases worked out by hand, and its own numbers."""

import copy
import importlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastmeta
from fastmeta.compat import torchmeta
from fastmeta.compat.torchmeta import modules as meta
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
from fastmeta.compat.torchmeta.utils import (
    get_num_samples,
    get_prototypes,
    gradient_update_parameters,
    hardness_metric,
    matching_log_probas,
    matching_loss,
    matching_probas,
    pairwise_cosine_similarity,
    prototypical_loss,
    ridge_regression,
    task_parameters,
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

T, B = 3, 4
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# layers ---------------------------------------------------------------------------------------------------------------
LAYERS = {
    "linear": (meta.MetaLinear, nn.Linear, (3, 5), {}, (B, 3)),
    "linear, rows of rows": (meta.MetaLinear, nn.Linear, (3, 5), {"bias": False}, (B, 2, 3)),
    "conv1d": (meta.MetaConv1d, nn.Conv1d, (2, 4, 3), {"padding": 1, "stride": 2}, (B, 2, 7)),
    "conv2d": (meta.MetaConv2d, nn.Conv2d, (2, 4, 3), {"padding": (1, 0), "dilation": 2}, (B, 2, 6, 7)),
    "conv2d, circular": (
        meta.MetaConv2d,
        nn.Conv2d,
        (2, 4, 3),
        {"padding": 1, "padding_mode": "circular", "groups": 2, "bias": False},
        (B, 2, 5, 5),
    ),
    "conv3d": (meta.MetaConv3d, nn.Conv3d, (2, 3, 2), {"padding": 1}, (B, 2, 3, 3, 3)),
    "batchnorm1d": (meta.MetaBatchNorm1d, nn.BatchNorm1d, (3,), {}, (B, 3)),
    "batchnorm2d": (meta.MetaBatchNorm2d, nn.BatchNorm2d, (3,), {"momentum": None}, (B, 3, 2, 2)),
    "batchnorm3d": (meta.MetaBatchNorm3d, nn.BatchNorm3d, (3,), {"track_running_stats": False}, (B, 3, 2, 2, 2)),
    "layernorm": (meta.MetaLayerNorm, nn.LayerNorm, ((2, 3),), {}, (B, 2, 3)),
    "bilinear": (meta.MetaBilinear, nn.Bilinear, (3, 2, 5), {}, (B, 3), (B, 2)),
    "embedding": (meta.MetaEmbedding, nn.Embedding, (6, 3), {"padding_idx": 1}, (B, 5)),
    "attention": (meta.MetaMultiheadAttention, nn.MultiheadAttention, (6, 2), {}, *[(B, 2, 6)] * 3),
    "attention, widths": (
        meta.MetaMultiheadAttention,
        nn.MultiheadAttention,
        (6, 2),
        {"kdim": 3, "vdim": 5, "add_bias_kv": True, "batch_first": True},
        (2, B, 6),
        (2, B, 3),
        (2, B, 5),
    ),
}
layers = pytest.mark.parametrize("name", LAYERS)


def both(name, tasks=None):
    """The layer, torch's with the same parameters (not ones and zeros), and inputs, with a task dimension if asked."""
    kind, plain, sizes, options, *shapes = LAYERS[name]
    layer, plain = kind(*sizes, **options), plain(*sizes, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(layer.state_dict())
    shapes = [shape if tasks is None else (tasks, *shape) for shape in shapes]
    inputs = [torch.randint(6, shape) if "embedding" in name else torch.randn(shape) for shape in shapes]
    return layer, plain, inputs


def first(output):
    return output[0] if isinstance(output, tuple) else output


@layers
def test_a_layer_is_torchs(name):
    layer, plain, inputs = both(name)
    assert isinstance(layer, meta.MetaModule) and isinstance(layer, type(plain))
    assert list(dict(layer.meta_named_parameters())) == list(dict(plain.named_parameters()))
    for mode in (True, False):
        layer.train(mode), plain.train(mode)
        expected = first(plain(*inputs))
        assert torch.equal(first(layer(*inputs)), expected)
        close(layer.state_dict(), plain.state_dict())
        close(first(layer(*inputs, params=dict(plain.named_parameters()))), first(plain(*inputs)))


@layers
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_parameters_with_a_task_dimension(name, mode):
    """All tasks at once, values, gradients and running statistics, are the tasks one after the other."""
    layer, plain, inputs = both(name, T)
    getattr(layer, mode)(), getattr(plain, mode)()
    params = {key: torch.randn(T, *value.shape).requires_grad_() for key, value in layer.named_parameters()}
    out = first(layer(*inputs, params=params))
    tasks = []
    for task in range(T):
        own = {key: value[task] for key, value in params.items()}
        tasks.append(first(torch.func.functional_call(plain, own, tuple(x[task] for x in inputs))))
    expected = torch.stack(tasks)
    close(out, expected)
    close(layer.state_dict(), plain.state_dict())
    weight = torch.randn_like(out)
    found, right = (torch.autograd.grad((y * weight).sum(), list(params.values())) for y in (out, expected))
    close(found, right)


def test_inputs_that_the_tasks_share():
    for name in ("linear", "conv2d"):
        layer, plain, (x,) = both(name)
        params = {key: torch.randn(T, *value.shape) for key, value in layer.named_parameters()}
        tasks = [{key: value[task] for key, value in params.items()} for task in range(T)]
        close(layer(x, params=params), torch.stack([torch.func.functional_call(plain, p, (x,)) for p in tasks]))


def test_a_bias_that_is_not_given_is_not_added():
    layer = meta.MetaLinear(3, 2)
    x = torch.randn(B, 3)
    close(layer(x, params={"weight": layer.weight}), x @ layer.weight.T)
    with pytest.raises(KeyError, match="weight"):
        layer(x, params={"bias": layer.bias})


def test_embedding_bag_and_what_has_no_task_dimension():
    layer = meta.MetaEmbeddingBag(6, 3, mode="sum")
    weight = torch.randn(6, 3)
    close(layer(torch.tensor([[0, 2], [3, 3]]), params={"weight": weight}), weight[[0, 3]] + weight[[2, 3]])
    with pytest.raises(ValueError, match="max_norm"):
        meta.MetaEmbedding(6, 3, max_norm=1.0)(torch.tensor([[1]]), params={"weight": torch.randn(1, 6, 3)})


# modules --------------------------------------------------------------------------------------------------------------
class Mixed(meta.MetaModule):
    def __init__(self):
        super().__init__()
        self.features = meta.MetaSequential(
            OrderedDict([("meta", meta.MetaLinear(2, 3)), ("plain", nn.Linear(3, 3)), ("tanh", nn.Tanh())])
        )
        self.classifier = meta.MetaLinear(3, 4, bias=False)

    def forward(self, inputs, params=None):
        features = self.features(inputs, params=self.get_subdict(params, "features"))
        return self.classifier(features, params=self.get_subdict(params, "classifier"))


def test_meta_parameters_are_those_of_meta_modules():
    model = Mixed()
    names = ["features.meta.weight", "features.meta.bias", "classifier.weight"]
    assert [name for name, _ in model.meta_named_parameters()] == names
    assert [name for name, _ in model.meta_named_parameters(prefix="a", recurse=True)] == [f"a.{n}" for n in names]
    assert [id(p) for p in model.meta_parameters()] == [id(p) for _, p in model.meta_named_parameters()]
    assert list(meta.MetaSequential(nn.Linear(1, 1)).meta_named_parameters()) == []


def test_get_subdict():
    model, x = Mixed(), torch.randn(B, 2)
    params = OrderedDict(model.meta_named_parameters())
    assert list(model.get_subdict(params, "features")) == ["meta.weight", "meta.bias"]
    assert model.get_subdict(None, "features") is None
    assert list(meta.get_subdict(params, "features")) == ["meta.weight", "meta.bias"]
    assert meta.get_subdict(params) is params and meta.get_subdict({"weight": x}, "feat") == {}
    assert list(meta.get_subdict({"module.a.weight": x, "module.ab": x}, "a")) == ["weight"]
    # `features.x` is not of `feature`; what is missing is told, and taken from the module
    with pytest.warns(UserWarning, match="`feature` of `Mixed`"):
        assert model.get_subdict(params, "feature") is None
    with pytest.warns(UserWarning, match="features"):
        out = model(x, params={"classifier.weight": torch.zeros(4, 3)})
    close(out, torch.zeros(B, 4))
    close(model(x, params=params), model(x))


class BatchLinear(nn.Linear, meta.MetaModule):
    """A layer as coordinate networks write it: the weights may have any leading dimensions."""

    def forward(self, input, params=None):
        if params is None:
            params = OrderedDict(self.named_parameters())
        return input @ params["weight"].transpose(-1, -2) + params["bias"].unsqueeze(-2)


def test_client_layers_copies_and_files():
    model = meta.MetaSequential(BatchLinear(2, 3), nn.Tanh(), meta.MetaLinear(3, 1))
    x = torch.randn(B, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    other = meta.MetaSequential(BatchLinear(2, 3), nn.Tanh(), meta.MetaLinear(3, 1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    out = model(x.expand(T, B, 2), params=task_parameters(model, T))
    close(out, model(x).expand(T, B, 1))


def test_data_parallel_on_a_cpu():
    model = meta.DataParallel(Mixed())
    x = torch.randn(B, 2)
    own = dict(model.module.meta_named_parameters())
    wrapped = dict(model.meta_named_parameters())
    assert all(name.startswith("module.") for name in wrapped)
    changed = {name: value + 1 for name, value in own.items()}
    expected = model.module(x, params=changed)
    close(model(x, params=changed), expected)
    close(model(x, params={f"module.{name}": value for name, value in changed.items()}), expected)
    close(model(x), model.module(x))


def test_data_parallel_hands_all_parameters_to_each_device(monkeypatch):
    parallel = importlib.import_module("fastmeta.compat.torchmeta.modules.parallel")

    def halves(inputs, kwargs, devices, dim):
        return tuple((half,) for half in inputs[0].chunk(2)), ({"k": 1}, {"k": 2})

    def copies(tensors, devices, detach):
        return [[t.detach() if detach else t * 1 for t in tensors] for _ in devices]

    monkeypatch.setattr(parallel, "scatter_kwargs", halves)
    monkeypatch.setattr(parallel, "_broadcast_coalesced_reshape", copies)
    model, x = meta.DataParallel(Mixed()), torch.randn(B, 2)
    model.dim = 0  # which torch sets where there are GPUs
    params = dict(model.module.meta_named_parameters())
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            inputs, kwargs = model.scatter((x,), {"params": params}, [0, 1])
        assert torch.equal(inputs[1][0], x[2:]) and [kwarg["k"] for kwarg in kwargs] == [1, 2]
        for kwarg in kwargs:
            close(dict(kwarg["params"]), params)
            assert all(value.requires_grad == enabled for value in kwarg["params"].values())
    assert model.scatter((x,), {}, [0, 1])[1] == ({"k": 1}, {"k": 2})


# inner steps ----------------------------------------------------------------------------------------------------------
def linear(*weight):
    model = meta.MetaLinear(len(weight), 1, bias=False)
    model.weight.data = torch.tensor([weight], dtype=torch.float32)
    return model


def rows(*values):
    return torch.tensor([values], dtype=torch.float32)


def test_small_integers_are_exact():
    """f = (w . [1, 2, 3])^2 / 2 at w = [2, 3, 5]: gradient 23 [1, 2, 3]; g the same of [4, 5, 6] at the new w."""
    model = linear(2.0, 3.0, 5.0)
    params = gradient_update_parameters(model, 0.5 * model(rows(1.0, 2.0, 3.0)) ** 2)
    assert torch.equal(params["weight"], rows(-9.5, -20.0, -29.5))
    (gradient,) = torch.autograd.grad(0.5 * model(rows(4.0, 5.0, 6.0), params=params) ** 2, model.parameters())
    assert torch.equal(gradient, rows(3780.0, 8505.0, 13230.0))
    # first order: the gradient at the new weights, -315 [4, 5, 6]
    params = gradient_update_parameters(model, 0.5 * model(rows(1.0, 2.0, 3.0)) ** 2, first_order=True)
    (gradient,) = torch.autograd.grad(0.5 * model(rows(4.0, 5.0, 6.0), params=params) ** 2, model.parameters())
    assert torch.equal(gradient, rows(-1260.0, -1575.0, -1890.0))


def test_steps_in_a_row_with_rates_by_name():
    model = Mixed()
    x, y = torch.randn(B, 2), torch.randn(B, 4)
    rates = {name: torch.rand((), requires_grad=True) for name, _ in model.meta_named_parameters()}
    params = None
    for _ in range(2):
        params = gradient_update_parameters(model, F.mse_loss(model(x, params=params), y), params, rates)
    fast = dict(model.meta_named_parameters())
    for _ in range(2):
        loss = F.mse_loss(torch.func.functional_call(model, fast, (x,)), y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - rates[name] * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
    assert list(params) == list(fast)
    wanted = [*model.parameters(), *rates.values()]
    found, right = (
        torch.autograd.grad(F.mse_loss(torch.func.functional_call(model, dict(p), (x,)), 2 * y), wanted)
        for p in (params, fast)
    )
    close(found, right)


def test_what_a_step_refuses():
    with pytest.raises(ValueError, match="MetaModule"):
        gradient_update_parameters(nn.Linear(1, 1), torch.zeros(()))
    with pytest.raises(ValueError, match="MetaModule"):
        task_parameters(nn.Linear(1, 1), 2)
    model = linear(1.0)
    with pytest.raises(RuntimeError, match="not have been used"):
        gradient_update_parameters(model, torch.zeros((), requires_grad=True) * 1)


@pytest.mark.parametrize("first_order", [False, True])
def test_all_tasks_at_once_and_maml_are_the_loop(first_order):
    model = meta.MetaSequential(meta.MetaLinear(2, 5), nn.Tanh(), meta.MetaLayerNorm(5), meta.MetaLinear(5, 3))
    x, query_x = torch.randn(2, T, B, 2)
    y, query_y = torch.randint(3, (2, T, B))
    losses = []
    for task in range(T):
        params = None
        for _ in range(2):
            loss = F.cross_entropy(model(x[task], params=params), y[task])
            params = gradient_update_parameters(model, loss, params, step_size=0.4, first_order=first_order)
        losses.append(F.cross_entropy(model(query_x[task], params=params), query_y[task]))
    right = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))

    params = task_parameters(model, T)
    for _ in range(2):
        loss = F.cross_entropy(model(x, params=params).mT, y, reduction="none").mean(1).sum()
        params = gradient_update_parameters(model, loss, params, step_size=0.4, first_order=first_order)
    loss = F.cross_entropy(model(query_x, params=params).mT, query_y)
    close(torch.autograd.grad(loss, list(model.parameters())), right)

    maml = fastmeta.MAML(model, inner_lr=0.4, inner_steps=2, first_order=first_order)
    maml(fastmeta.TaskBatch(x, y, query_x, query_y)).loss.backward()
    close(tuple(p.grad for p in model.parameters()), right)


def test_maml_runs_meta_modules_in_its_kernels():
    """An argument that may be left out, as `params`, does not stand in the way; one that may not does."""
    model = meta.MetaSequential(meta.MetaLinear(2, 5), nn.ReLU(), meta.MetaLinear(5, 1))
    tasks = fastmeta.TaskBatch(*(torch.randn(T, B, size) for size in (2, 1, 2, 1)))
    maml = fastmeta.MAML(model, inner_lr=0.1, loss="mse")
    assert "fused: picked" in str(maml.explain(tasks))
    maml(tasks).loss.backward()
    losses = []
    for x, y, query_x, query_y in zip(*tasks, strict=True):
        params = gradient_update_parameters(model, F.mse_loss(model(x), y), step_size=0.1)
        losses.append(F.mse_loss(model(query_x, params=params), query_y))
    close(tuple(p.grad for p in model.parameters()), torch.autograd.grad(sum(losses) / T, list(model.parameters())))

    class Scaled(meta.MetaSequential):
        def forward(self, input, scale):
            return super().forward(input) * scale

    assert "takes 2 arguments" in str(fastmeta.MAML(Scaled(*model), inner_lr=0.1, loss="mse").explain(tasks))


# prototypes, matching, ridge regression -------------------------------------------------------------------------------
def test_prototypes_are_quotients_of_sums_in_order():
    """7 threes of class 0 have a mean of 3, which a product with 1/7 misses; a class without examples has zeros."""
    embeddings = torch.full((1, 9, 2), 3.0, dtype=torch.float32)
    embeddings[0, 7:] = torch.tensor([[1.0, 8.0], [2.0, 4.0]])
    targets = torch.tensor([[0] * 7 + [2, 2]])
    counts = get_num_samples(targets, 4)
    assert counts.dtype == torch.int64 and counts.tolist() == [[7, 0, 2, 0]]
    assert get_num_samples(targets, 4, torch.float32).dtype == torch.float32
    prototypes = get_prototypes(embeddings, targets, 4)
    assert prototypes.tolist() == [[[3.0, 3.0], [0.0, 0.0], [1.5, 6.0], [0.0, 0.0]]]


def test_prototypical_loss_by_hand():
    prototypes = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    queries = torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]]])  # squared distances 1 and 2; 0 and 4
    right = torch.tensor([[1 + np.log(np.exp(-1) + np.exp(-2))], [4 + np.log(1 + np.exp(-4))]])
    targets = torch.tensor([[0], [1]])
    close(prototypical_loss(prototypes, queries, targets, reduction="none"), right)
    close(prototypical_loss(prototypes, queries, targets), right.mean())
    close(prototypical_loss(prototypes, queries, torch.tensor([[0], [-100]])), right[0, 0])
    integers = torch.randint(-9, 9, (2, 3, 4)).float(), torch.randint(-9, 9, (2, 5, 4)).float()
    labels = torch.randint(3, (2, 5))
    squares = torch.tensor(
        [[[((p - q) ** 2).sum() for q in integers[1][t]] for p in integers[0][t]] for t in range(2)]
    ).float()
    assert torch.equal(prototypical_loss(*integers, labels), F.cross_entropy(-squares, labels))


def test_cosine_bounds_the_product_of_norms():
    a = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]]]).requires_grad_()
    b = torch.tensor([[[4.0, 3.0], [0.0, 1.0]]])
    close(pairwise_cosine_similarity(a, b), torch.tensor([[[0.96, 0.8], [0.0, 0.0], [0.8, 0.0]]]))
    # |a| |b| = 5e-3 and 1e-3 are below 1e-2, so the dot product 4e-3 is divided by that; each norm alone is not below
    close(pairwise_cosine_similarity(a, b, eps=1e-2)[0, 2], torch.tensor([0.4, 0.0]))
    (gradient,) = torch.autograd.grad(pairwise_cosine_similarity(a, b).sum(), a)
    assert gradient.isfinite().all()


def test_matching_by_hand():
    support = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]]).requires_grad_()
    queries = torch.tensor([[[5.0, 0.0], [0.0, 7.0]]])
    targets = torch.tensor([[2, 0, 0]])
    e = np.e
    right = torch.tensor([[[2 / (e + 2), 2 * e / (1 + 2 * e)], [0.0, 0.0], [e / (e + 2), 1 / (1 + 2 * e)]]])
    close(matching_probas(support, targets, queries, 3), right)  # [T, C, Q]
    log_probas = matching_log_probas(support, targets, queries, 3)
    close(log_probas, right.log())
    assert log_probas[0, 1].tolist() == [-torch.inf] * 2
    loss = matching_loss(support, targets, queries, torch.tensor([[2, 0]]), 3, reduction="sum")
    close(loss, -(right[0, 2, 0].log() + right[0, 0, 1].log()))

    def plain(support):
        cosines = F.cosine_similarity(support[0][:, None], queries[0], dim=-1)
        attention = cosines.softmax(0)
        return -(attention[0, 0].log() + attention[1:, 1].sum().log())

    close(torch.autograd.grad(loss, support), torch.autograd.grad(plain(support), support))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_regression_solves_its_equations(scale, bias):
    embeddings, targets = torch.randn(5, 7).requires_grad_(), torch.tensor([0, 2, 1, 0, 2])
    x = torch.cat([torch.ones(5, 1), embeddings], 1) if bias else embeddings
    hot = torch.eye(3)[targets]
    factor = 5.0 if scale else 1.0
    right = torch.linalg.inv(x.T @ x / factor + 0.1 * torch.eye(7 + bias)) @ x.T @ hot / factor
    slope = torch.autograd.grad(right.square().sum(), embeddings)
    for woodbury in (None, True, False):
        solution = ridge_regression(embeddings, targets, 0.1, 3, woodbury, scale, bias)
        assert solution.weight.shape == (3, 7)
        close(solution.weight, right[int(bias) :].T)
        assert solution.bias is None if not bias else torch.allclose(solution.bias, right[0])
        both = solution.weight.square().sum() + (solution.bias.square().sum() if bias else 0)
        close(torch.autograd.grad(both, embeddings), slope)
    # without a penalty only the system of as many rows as there are examples can be solved: it interpolates
    solution = ridge_regression(embeddings, targets, 0.0, 3, scale=scale, bias=bias)
    close(embeddings @ solution.weight.T + (solution.bias if bias else 0), hot)
    regression = ridge_regression(embeddings, hot, torch.tensor(0.1), scale=scale, bias=bias)
    close(regression.weight, right[int(bias) :].T)


def test_ridge_regression_without_the_number_of_classes():
    with pytest.warns(UserWarning, match="num_classes"):
        assert ridge_regression(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), 1.0).weight.shape == (2, 3)
    with pytest.raises(ValueError, match=r"\[S, O\]"):
        ridge_regression(torch.randn(4, 3), torch.randn(4), 1.0)


def test_hardness():
    seen = []

    def backbone(images):
        seen.append(images.shape)
        return images.flatten(1)[:, [224 * 112 + 112, 224 * 112 + 113]]  # two pixels in the middle, logits

    images = torch.zeros(1, 2, 3, 4, 4)
    images[0, 0, 0, 2, 2], images[0, 1, 0, 2, 3] = 1.0, 1.0
    queries = 3 * images[:, :1]  # logits [3, 0]
    images[0, 0, 0, 2, 3] = -2.0  # of which the prototypes take nothing: [1, 0] and [0, 1]
    batch = {"support": (images, torch.tensor([[0, 1]])), "query": (queries, torch.tensor([[0]]))}
    p = np.e / (np.e + 1)  # logits 1 and 0
    close(hardness_metric(batch, 2, backbone), torch.tensor([np.log((1 - p) / p)]))
    assert seen == [(2, 3, 224, 224), (1, 3, 224, 224)]
    with pytest.raises(ValueError, match="'train' nor 'support'"):
        hardness_metric({"query": 0}, 2, backbone)
    with pytest.raises(ValueError, match="RGB"):
        hardness_metric({key: (x[:, :, :1], y) for key, (x, y) in batch.items()}, 2, backbone)


# tasks ----------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("module", ["datasets", "datasets.helpers", "transforms"])
def test_names_that_are_not_here(module):
    """Programs import more data sets than they use: those raise when they are called."""
    name = {"datasets": "MiniImagenet", "datasets.helpers": "miniimagenet", "transforms": "NumpyToTorch"}[module]
    module = importlib.import_module(f"fastmeta.compat.torchmeta.{module}")
    with pytest.raises(ImportError, match=f"torchmeta 1.8.0 has {name}"):
        getattr(module, name)("folder", num_classes_per_task=5)
    if name != "NumpyToTorch":
        assert isinstance(getattr(module, name), type) and getattr(module, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_lists_of_classes_are_not_here():
    utils = importlib.import_module("fastmeta.compat.torchmeta.datasets.utils")
    with pytest.raises(OSError, match="omniglot/train.json not found"):
        utils.get_asset("omniglot", "train.json")
