"""Modules as people write them: which of them are plain multi-layer perceptrons, that formulas serve; the others are
served all the same, and `explain` says by what."""

import re

import pytest
import torch
from test_engines import Sine, assert_same, engine_result, make_batch, make_mlp, oracle
from torch import nn

from fastmeta import use_backend
from fastmeta.algorithms import MAML
from fastmeta.engines.inspect import MLPSpec, mlp_spec
from fastmeta.nn import conv4


class SeedModel(nn.Module):
    """A module as people write them, with a reshape that knows the image size."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 256)
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x):
        x = x.view(-1, 28 * 28)
        x = torch.relu(self.fc1(x))
        x = self.fc2(x)
        return x


@pytest.mark.parametrize("shape", [(1, 28, 28), (784,)], ids=["image", "row"])
@pytest.mark.parametrize("engine", ["auto", "layerwise", "vmap"])
def test_unchanged_module_with_a_reshape(engine, shape):
    torch.manual_seed(0)
    model, batch = SeedModel().double(), make_batch("cross_entropy", shape=shape, outputs=10)
    expected = oracle(model, batch, "cross_entropy", 0.05, 2)
    assert_same(engine_result(model, batch, "cross_entropy", 0.05, 2, engine=engine), expected)
    assert "fused: picked" in MAML(model).explain(batch)


class Reshaping(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc = how, nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.how(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: torch.flatten(x, start_dim=1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(x.shape[0], 12),
        lambda x: x.reshape(-1, 12),
        lambda x: torch.reshape(x, (x.shape[0], -1)),
    ],
)
def test_reshapes_that_are_understood(how):
    assert mlp_spec(Reshaping(how)) == MLPSpec(("fc.weight",), ("fc.bias",), ("identity",), 12, True)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(x + torch.relu(self.a(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.a(x) * self.scale


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x, scale=None):
        return self.a(x) if scale is None else self.a(x) * scale


class Needed(Optional):
    def forward(self, x, scale):
        return super().forward(x, scale)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x), x


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


REFUSED = [
    (Residual, "branch or a residual"),
    (Twice, "'a' is used twice"),
    (Branching, "could not be traced"),
    (Scaled, "no explicit formula|uses 'scale' directly"),
    (Needed, "takes 2 arguments"),
    (Pair, "something else than its last layer"),
    (tied, "'2.weight' is shared"),
    (hooked, "has hooks"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)), "Dropout: random"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), "LayerNorm: norms"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "BatchNorm1d: norms"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU("tanh"), nn.Linear(4, 3)), "'1' has no explicit formula"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 3)), "does not directly follow"),
    (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), "does not directly follow"),
    (lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten(0)), "no explicit formula"),
    (lambda: nn.Sequential(nn.Tanh()), "does not directly follow"),
    (lambda: nn.Sequential(nn.Flatten()), "no nn.Linear"),
    (conv4, "no explicit formula|norms"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_modules_that_formulas_refuse(make, reason):
    spec = mlp_spec(make())
    assert isinstance(spec, str)
    assert re.search(reason, spec), spec


@pytest.mark.parametrize("make", [Residual, Twice, Scaled, Optional, hooked, lambda: nn.Linear(6, 3)])
def test_auto_serves_them_all_the_same(make):
    torch.manual_seed(0)
    model, batch = make().double(), make_batch("mse")
    assert_same(engine_result(model, batch, "mse", 0.1, 2), oracle(model, batch, "mse", 0.1, 2))


def test_arguments_that_have_defaults_are_what_forward_is_called_with():
    assert mlp_spec(Optional()).weights == ("a.weight",)


def test_spec_follows_the_module():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    assert mlp_spec(model).activations == ("relu", "identity")
    model[1] = nn.Tanh()
    assert mlp_spec(model).activations == ("tanh", "identity")
    handle = model[0].register_forward_pre_hook(lambda module, args: None)
    assert isinstance(mlp_spec(model), str)
    handle.remove()
    assert isinstance(mlp_spec(model), MLPSpec)
    model[1] = nn.Dropout()
    assert isinstance(mlp_spec(model), str)


def test_explain_names_the_pick_and_the_reasons():
    batch = make_batch("cross_entropy")
    text = MAML(make_mlp()).explain(batch)
    assert "fused: picked" in text and "layerwise: could serve" in text and "vmap: could serve" in text
    with use_backend("reference"):
        text = MAML(make_mlp()).explain(batch)
        assert "lowrank: picked" in text and "the reference was asked for" in text
        text = MAML(make_mlp(), inner_steps=50).explain(batch)
        assert "layerwise: picked" in text and "outnumber" in text
    text = MAML(Residual().double()).explain(batch)
    assert "lowrank: picked" in text and "residual" in text
    text = MAML(Sine().double(), loss="mse").explain(make_batch("mse"))
    assert "lowrank: picked" in text and "fused: cannot serve: its last layer is followed by tanh" in text
    text = MAML(make_mlp(), loss=lambda prediction, target: prediction.sum()).explain(batch)
    assert "lowrank: picked" in text and "<lambda>" in text


@pytest.mark.parametrize("engine", ["fused"])
def test_forced_engine_raises_with_the_reason(engine):
    batch = make_batch("cross_entropy")
    with pytest.raises(ValueError, match=f"{engine}.*residual"):
        MAML(Residual().double(), engine=engine)(batch)
    with pytest.raises(ValueError, match="mix examples"):
        MAML(Reshaping(lambda x: x.reshape(-1, 12)).double(), engine=engine)(batch)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
        MAML(make_mlp(), engine=engine)(batch)
    with pytest.raises(ValueError, match="dtypes"):
        MAML(make_mlp().float(), engine=engine)(batch)
    with pytest.raises(ValueError, match="engine must be one of"):
        MAML(make_mlp(), engine="turbo")
