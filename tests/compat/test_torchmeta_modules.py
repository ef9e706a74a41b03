"""torchmeta's modules: against torch.nn, with and without a task dimension."""

import copy
import importlib
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fastmeta.compat.torchmeta import modules as meta
from fastmeta.compat.torchmeta.utils import (
    task_parameters,
)

pytestmark = pytest.mark.usefixtures("double")
T, B = 3, 4
close = torch.testing.assert_close


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
