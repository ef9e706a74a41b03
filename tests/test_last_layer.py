"""ANIL's head is the layer that is used last, whatever the order of construction; looking for it leaves no trace."""

import copy

import pytest
import torch
from module_kinds import Heads, Tied, make, plain, tasks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from fastmeta.algorithms import ANIL, BOIL
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
pytestmark = [
    pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._weight_norm:UserWarning"),
]

# of the modules that are built in another order than they run in, or that a chain of layers does not show
HEADS = {
    "mlp": ("2.",),
    "conv, batch norm": ("5.",),
    "residual, layer norm": ("out.",),
    "LSTM": ("out.",),
    "transformer encoder": ("out.",),
    "several heads": ("heads.0.",),
    "checkpointed": ("out.",),
    "own autograd.Function": ("b.",),
    "weight norm": ("2.",),
    "hooks": ("2.",),
}


class Backwards(nn.Module):
    """The head is made first, and with batch norm no symbol gets through."""

    def __init__(self, head):
        super().__init__()
        self.head, self.norm, self.body = head, nn.BatchNorm1d(6), nn.Linear(4, 6)
        self.seen, self.last, self.calls = [], None, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = torch.tanh(self.norm(self.body(x)))
        self.seen.append(len(x))
        self.last, self.calls = h, self.calls + 1
        self.count += 1
        return self.head(F.dropout(h, 0.0))


class Direct(nn.Module):
    """Parameters without layers of their own, used by operators."""

    def __init__(self):
        super().__init__()
        self.w, self.body, self.b = nn.Parameter(torch.ones(6, 3)), nn.Linear(4, 6), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return torch.tanh(self.body(x)) @ self.w + self.b


class TiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.embed = nn.Linear(6, 11), nn.Embedding(11, 6)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids).mean(1))


def names(net, *prefixes):
    return [name for name, _ in net.named_parameters() if name.startswith(prefixes)]


def check_against_plain(learner, batch, adapts):
    losses, predictions, gradients = plain(learner.model, batch, lr=0.3, steps=2, adapts=adapts)
    out = learner(batch)
    torch.testing.assert_close(out.task_loss.detach(), losses, **CLOSE)
    named = {n: p for n, p in learner.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(out.loss, list(named.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(dict(zip(named, found, strict=True)), gradients, **CLOSE)
    predicted = learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
    torch.testing.assert_close(predicted.detach(), predictions, **CLOSE)


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_modules_of_every_kind(kind):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    check_against_plain(learner, batch, lambda name: name.startswith(HEADS[kind]))
    assert learner.adapting == names(net, *HEADS[kind])


def test_the_order_of_construction_does_not_matter():
    torch.manual_seed(0)
    net, batch = Backwards(nn.Linear(6, 3)).double(), TaskBatch(*tasks("mlp"))
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    assert learner.adapting == names(net, "body")  # no batch seen, and no symbol gets through: the last one made
    check_against_plain(learner, batch, lambda name: name.startswith("head."))
    assert learner.adapting == names(net, "head.")
    check_against_plain(BOIL(net, inner_lr=0.3, inner_steps=2), batch, lambda name: not name.startswith("head."))
    assert ANIL(Tied()).adapting == ["out.weight", "out.bias"]


def test_a_head_that_is_no_single_module():
    """With a weight that is computed: the layer with its parametrizations, or with what torch's hooks keep."""
    batch = TaskBatch(*tasks("mlp"))
    for head in (weight_norm(nn.Linear(6, 3, bias=False)), nn.Sequential(nn.Identity(), weight_norm(nn.Linear(6, 3)))):
        net = Backwards(head).double()
        learner = ANIL(net, inner_lr=0.3, inner_steps=2)
        check_against_plain(learner, batch, lambda name: name.startswith("head."))
        assert learner.adapting == names(net, "head.")
    net = Backwards(prune.l1_unstructured(nn.Linear(6, 3, bias=False), "weight", amount=2)).double()
    learner = ANIL(net)
    learner.adapt(batch.support_x, batch.support_y)
    assert learner.adapting == ["head.weight_orig"]
    net = Backwards(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)))
    net.head.append(nn.Flatten())
    learner = ANIL(net.double())
    learner.adapt(batch.support_x, batch.support_y)
    assert learner.adapting == names(net, "head.1.norm2.")
    assert ANIL(Direct()).adapting == ["w", "b"]


def test_attention_is_one_layer():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.body = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(4, 6)

        def forward(self, x):
            h = self.body(x).unsqueeze(1)
            return self.attend(h, h, h)[0].squeeze(1)

    net, batch = Attention().double(), TaskBatch(*tasks("mlp"))
    learner = ANIL(net)
    learner.adapt(batch.support_x, batch.support_y)
    assert learner.adapting == names(net, "attend.")


def test_a_weight_that_the_head_shares_adapts_for_both():
    torch.manual_seed(0)
    net, batch = TiedToEmbedding().double(), TaskBatch(*tasks("text, embeddings"))
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    check_against_plain(learner, batch, lambda name: name in ("out.weight", "out.bias"))
    assert learner.adapting == ["out.weight", "out.bias"]

    class Ends(nn.Module):  # each with a bias of its own
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.out.weight = self.a.weight

        def forward(self, x):
            return self.out(torch.tanh(self.a(x)))

    assert ANIL(Ends()).adapting == ["a.weight", "out.bias"]
    twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    twice.append(nn.Linear(4, 3))
    twice.append(twice[0].__class__(3, 4)).append(twice[0])
    assert ANIL(twice).adapting == ["0.weight", "0.bias"]


def test_looking_leaves_no_trace():
    net, batch = Backwards(nn.Linear(6, 3)).double(), TaskBatch(*tasks("mlp"))
    calls, hooked = [], nn.Sequential(net, nn.Identity())
    net.body.register_forward_hook(lambda *_: calls.append(1))
    net.norm.register_forward_pre_hook(lambda *_: calls.append(2))
    learner = ANIL(hooked, inner_lr=0.3, inner_steps=1)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = learner._head(batch.support_x)
    assert list(found) == ["0.head.weight", "0.head.bias"]
    assert not calls and not net.seen and net.last is None and net.calls == 0
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())


def test_a_head_that_is_chosen_anew_for_each_batch():
    torch.manual_seed(0)
    net, batch = Heads().double(), TaskBatch(*tasks("several heads"))
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    for net.use in (0, 1, 0):
        assert learner.adapting == names(net, f"heads.{net.use}.")
        check_against_plain(learner, batch, lambda name: name.startswith(f"heads.{net.use}."))
    net = Backwards(nn.Linear(6, 3)).double()
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    learner(batch)
    net.head = nn.Linear(6, 3).double()  # made anew
    check_against_plain(learner, batch, lambda name: name.startswith("head."))


def test_where_it_cannot_be_seen_the_last_made_is_taken_with_a_warning():
    class Itself(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 3), nn.Linear(4, 4)

        def forward(self, x):
            if self is not net:
                raise RuntimeError("only I")
            return self.head(torch.tanh(self.body(x)))

    net, batch = Itself().double(), TaskBatch(*tasks("mlp"))
    with pytest.warns(UserWarning, match="adapts='head': which layer is used last cannot be seen .only I"):
        state = ANIL(net).adapt(batch.support_x, batch.support_y)
    assert state.shared == {"head.weight", "head.bias"}


def test_a_frozen_head():
    net, batch = make("several heads"), TaskBatch(*tasks("several heads"))
    learner = ANIL(net, inner_lr=0.3, inner_steps=2)
    net.heads[0].requires_grad_(False)
    with pytest.raises(ValueError, match="adapts picks none .* that require gradients: heads.0.weight, heads.0.bias"):
        learner(batch)
    ANIL(net)  # frozen for now
    net.heads[0].weight.requires_grad_(True)
    check_against_plain(learner, batch, lambda name: name == "heads.0.weight")
    assert len(learner.adapt(torch.zeros(0, 5, 4).double(), torch.zeros(0, 5).long())) == 0
