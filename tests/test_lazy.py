"""Lazy layers are initialised as by a plain call."""

import pytest
import torch
from module_kinds import WAYS
from test_trees import WIDTH, batches, check, flat_batch, make
from torch import nn

from fastmeta.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    MAML,
    ConditionalCAML,
    FiLMMLP,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoNet,
    Reptile,
)
from fastmeta.tasks import TaskBatch


def lazy():
    return nn.Sequential(
        nn.LazyLinear(7), nn.LazyBatchNorm1d(), nn.Dropout(0.5), nn.Unflatten(1, (1, 7)), nn.LazyConv1d(2, 3),
        nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(WAYS),
    )  # fmt: skip


LAZY = {
    "maml": lambda net: MAML(net),
    "maml, gradients": lambda net: MAML(net),
    "maml, explain": lambda net: MAML(net),
    "adapt": lambda net: MAML(net),
    "anil": lambda net: ANIL(net, adapts="body"),
    "imaml": lambda net: ImplicitMAML(net),
    "reptile": lambda net: Reptile(net, batch_size=None),
    "chunks": lambda net: BOIL(net, task_chunk=1),
}


@pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning", "ignore:Lazy modules")
@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_are_initialised_by_a_plain_call(name):
    """The same numbers; statistics and modes as they were."""
    g = torch.Generator().manual_seed(0)
    batch = TaskBatch(*(torch.randn(3, n, 5, generator=g) if i else torch.arange(3 * n).view(3, n) % WAYS
                        for n in (6, 4) for i in (1, 0)))  # fmt: skip
    torch.manual_seed(1)
    right = lazy()
    right(batch.support_x[0])
    right.apply(lambda layer: layer.reset_running_stats() if hasattr(layer, "reset_running_stats") else None)
    torch.manual_seed(1)
    net = lazy()
    net[7].eval()
    net[5].num_batches_tracked += 1  # as if trained before
    learner = LAZY[name](net)
    if name == "maml, gradients":
        learner.gradients(batch)
    elif name == "maml, explain":
        learner.explain(batch)
    elif name == "adapt":
        with torch.inference_mode():
            learner.adapt(*batch[:2])
    else:
        learner(batch)
    for layer, other in zip(net.modules(), right.modules(), strict=True):
        assert type(layer) is type(other) and layer.training == (layer is not net[7])
        assert not any(p.is_inference() for p in layer.parameters())
    check(dict(net.named_parameters()), dict(right.named_parameters()))
    check(dict(net[1].named_buffers()), dict(right[1].named_buffers()))
    assert net[5].num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_elsewhere():
    """With a context, in an encoder, of several inputs; refused by name where rates are made at once."""
    batch = flat_batch()
    torch.manual_seed(0)
    cavia = CAVIA(nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(WAYS)).double(), 3)
    out = cavia(batch)
    assert cavia.model[0].in_features == 2 * WIDTH + 3
    check(CAVIA(cavia.model, 3)(batch).task_loss, out.task_loss)
    net = ProtoNet(nn.LazyLinear(6).double())
    assert net(batch).loss.isfinite() and net.encoder.in_features == 2 * WIDTH
    encoder = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4)).double()
    base = FiLMMLP(4, [2 * WIDTH, 5, WAYS]).double()
    base.layers[0] = nn.LazyLinear(5).double()
    assert ConditionalCAML(encoder, base)(batch).loss.isfinite() and base.layers[0].in_features == 2 * WIDTH
    assert encoder[1].num_batches_tracked == 1
    for options in ({"learn_inner_lr": True}, {"inner_lr": {"": 0.1, "2": 0.2}}):
        assert MAML(nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(WAYS)).double(), **options)(batch).loss > 0
    model = make("dict", "tensor")
    model.first = nn.LazyLinear(6).double()
    assert MAML(model)(batches("dict")[0]).loss.isfinite() and model.first.in_features == WIDTH
    for learner in (MetaSGD, MAMLPlusPlus):
        with pytest.raises(ValueError, match="layer '0' is lazy.*run the model once on an example first"):
            learner(nn.Sequential(nn.LazyLinear(6)))
