"""Low-rank fast weights in modules that are no plain MLP, against a plain Python loop over tasks in float64."""

import copy

import pytest
import torch
from lowrank_models import ENGINE, MODELS, assert_same, batch_norm, inner_loop, make, oracle, result
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.algorithms import MAML
from fastmeta.engines import lowrank_module
from fastmeta.engines._trace import traced


@pytest.fixture(params=["low_rank", "per_task", "mixed"])
def form(request, monkeypatch):
    """All layers in low-rank form; none; or as the engine decides, which for these sizes is some of them."""
    if request.param != "mixed":
        monkeypatch.setattr(lowrank_module, "ROWS_PER_WIDTH", {"low_rank": 1e9, "per_task": 0.0}[request.param])


@pytest.fixture
def all_low_rank(monkeypatch):
    monkeypatch.setattr(lowrank_module, "ROWS_PER_WIDTH", 1e9)


# vmap takes weight_norm task by task and says that this is slow: here the gradient counts
@pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._weight_norm:UserWarning")
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradient_is_the_oracles(form, name, first_order):
    outputs = 6 if name == "token_mlp" else 3
    model, batch = make(name, outputs=outputs)
    with sdpa_kernel(SDPBackend.MATH):  # the fused form has no second derivative
        *expected, fast = oracle(model, batch, F.cross_entropy, 0.5, 3, first_order)
    inner = inner_loop("cross_entropy", 0.5, 3, first_order)
    assert_same(result(model, batch, inner), expected)
    adapted = ENGINE.adapt(model, inner, *batch[:2])
    for parameter, weight in fast.items():
        torch.testing.assert_close(adapted[parameter].detach(), weight, rtol=1e-10, atol=1e-10)


def test_what_is_found():
    def found(name):
        model, batch = make(name)
        trace = traced(model, batch[0])
        return trace.biases, [use.weight for use in trace.uses], trace.constant

    every = {f"{n}.weight": f"{n}.bias" for n in "abcd"}
    assert found("residual_image") == (every, list(every), {"a.weight"})
    assert found("twice") == (
        {"a.weight": "a.bias", "b.weight": None, "c.weight": "c.bias"},
        ["a.weight", "a.weight", "b.weight", "b.weight", "c.weight"],
        set(),
    )
    assert found("tied") == ({"a.weight": None, "c.weight": "c.bias"}, ["a.weight", "a.weight", "c.weight"], set())
    assert found("shared_bias")[0] == {"a.weight": None, "b.weight": None, "c.weight": "c.bias"}
    assert found("direct")[0] == {"b.weight": None, "d.weight": "d.bias"}
    assert found("own_gradient")[0] == {"b.weight": "b.bias"}
    assert found("nested")[0] == {"c.weight": "c.bias"}
    assert found("hooked")[0]["b.weight"] is None
    assert found("multihead")[0] == {"fc.weight": "fc.bias", "out.weight": "out.bias"}
    assert found("frozen_weight")[0] == {"c.weight": "c.bias", "d.weight": "d.bias"}
    assert found("frozen_bias")[0] == every | {"a.weight": None, "c.weight": None}
    assert found("tokens")[1:] == (["token.weight", "mix.weight", "out.weight"], {"token.weight"})


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_steps(all_low_rank, steps):
    model, batch = make("residual", "mse")
    expected = oracle(model, batch, F.mse_loss, 0.1, steps)[:2]
    assert_same(result(model, batch, inner_loop("mse", 0.1, steps)), expected)


def test_custom_loss(all_low_rank):
    def loss(prediction, target):
        return (F.layer_norm(prediction, (3,)) - target).abs().pow(3).mean() + prediction.exp().mean()

    for name in ("residual", "mlp", "tokens"):
        model, batch = make(name, "mse")
        assert_same(result(model, batch, inner_loop(loss, 0.1, 2)), oracle(model, batch, loss, 0.1, 2)[:2])


def test_running_statistics_do_not_change(all_low_rank):
    torch.manual_seed(0)
    model, batch = batch_norm().double(), make("batch_norm")[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    actual = result(model, batch, inner_loop("cross_entropy", 0.5, 2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert_same(actual, oracle(model, batch, F.cross_entropy, 0.5, 2)[:2])


def test_inputs_may_need_gradients(all_low_rank):
    model, batch = make("residual", "mse")
    for tensor in batch:
        tensor.requires_grad_()
    actual = F.mse_loss(ENGINE.query(model, inner_loop("mse", 0.3, 3), *batch[:3]), batch[3])
    gradients = [torch.autograd.grad(loss, batch) for loss in (actual, losses(model, batch).mean())]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def losses(model, batch):
    return torch.stack([task_loss(model, dict(model.named_parameters()), task) for task in zip(*batch, strict=True)])


def task_loss(model, fast, task, lr=0.3, steps=3):
    for _ in range(steps):
        loss = F.mse_loss(functional_call(model, fast, (task[0],)), task[1])
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: w - lr * g for (name, w), g in zip(fast.items(), gradients, strict=True)}
    return F.mse_loss(functional_call(model, fast, (task[2],)), task[3])


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_under_torch_func(all_low_rank, first_order):
    """`torch.func.grad` of the whole, and vmap over a stack of slow weights (an ensemble of meta-learners)."""
    model, batch = make("residual", "mse")
    maml = MAML(model, inner_lr=0.3, inner_steps=3, loss="mse", engine="lowrank", first_order=first_order)
    expected = oracle(model, batch, F.mse_loss, 0.3, 3, first_order)[1]
    slow = {f"model.{name}": p.detach() for name, p in model.named_parameters()}

    def loss(slow):
        return functional_call(maml, slow, (batch,)).loss

    gradients = torch.func.grad(loss)(slow)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[f"model.{name}"], gradient, rtol=1e-10, atol=1e-10)
    stacked = {name: torch.stack([p, p * 0.5]) for name, p in slow.items()}
    both = torch.func.vmap(torch.func.grad(loss))(stacked)
    for name, gradient in gradients.items():
        torch.testing.assert_close(both[name][0], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_adapts_all_the_same_without_gradients(all_low_rank, mode):
    model, batch = make("residual")
    inner = inner_loop("cross_entropy", 0.5, 3)
    with mode():
        actual = ENGINE.query(model, inner, *batch[:3])
    assert not actual.requires_grad
    torch.testing.assert_close(actual, ENGINE.query(model, inner, *batch[:3]).detach())


def test_in_forward_mode(all_low_rank):
    model, batch = make("residual", "mse")
    batch[2].requires_grad_()
    (gradient,) = torch.autograd.grad(ENGINE.query(model, inner_loop("mse", 0.3, 3), *batch[:3]).sum(), batch[2])
    torch.manual_seed(0)
    direction = torch.randn_like(batch[2])
    with forward_ad.dual_level():
        query_x = forward_ad.make_dual(batch[2].detach(), direction)
        result = ENGINE.query(model, inner_loop("mse", 0.3, 3), *batch[:2], query_x)
        tangent = forward_ad.unpack_dual(result).tangent
    torch.testing.assert_close(tangent.sum(), (gradient * direction).sum(), rtol=1e-10, atol=1e-10)


DENSE = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.fastmeta.functional_mlp.default)


def test_one_dense_product_per_layer_and_no_weight_per_task(all_low_rank):
    """The slow weight meets all rows of all tasks at once, and nothing of the size `[T, O, I]` is ever made."""

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen, self.dense = set(), []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.seen.add(output.numel())
            if func in DENSE:
                self.dense.append((output.shape[:-1].numel(), output.shape[-1]))
            return output

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(31, 37), nn.LayerNorm(37), nn.Linear(37, 41), nn.GELU(), nn.Linear(41, 3)).double()
    support_x, query_x = torch.randn(4, 2, 31, dtype=torch.float64), torch.randn(4, 7, 31, dtype=torch.float64)
    support_y, query_y = torch.randint(0, 3, (4, 2)), torch.randint(0, 3, (4, 7))
    inner = inner_loop("cross_entropy", 0.1, 2)
    traced(model, support_x)
    with Shapes() as shapes:
        output = ENGINE.query(model, inner, support_x, support_y, query_x)
        forward = list(shapes.dense)
        torch.autograd.grad(inner.loss.per_task(output, query_y).mean(), list(model.parameters()))
    for width in (37, 41, 3):
        assert forward.count((4 * 7, width)) == 1
    assert not shapes.seen & {4 * 31 * 37, 4 * 37 * 41, 4 * 41 * 3}


class Fickle(nn.Module):
    """Another path at every call, as with stochastic depth."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 6), nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2:
            x = torch.tanh(self.a(x))
        return self.b(x)


def test_a_path_that_changes_is_noticed(all_low_rank):
    model, batch = Fickle().double(), make("residual")[1]
    inner = inner_loop("cross_entropy", 0.1, 2)
    assert ENGINE.query(model, inner, *batch[:3]).shape == (3, 5, 3)
    assert "from run to run" in ENGINE.why_not(model, inner, batch[0])
    assert ENGINE.adapt(model, inner, *batch[:2])["b.weight"].shape == (3, 3, 6)


class Switch(Fickle):
    def forward(self, x):
        x = torch.tanh(self.a(x) if self.calls else x @ self.a.weight)
        return self.b(x)


def test_a_path_that_changed_once_is_traced_again(all_low_rank):
    model, batch = Switch().double(), make("residual")[1]
    inner = inner_loop("cross_entropy", 0.1, 2)
    for model.calls in (1, 0, 1):
        assert_same(result(model, batch, inner), oracle(model, batch, F.cross_entropy, 0.1, 2)[:2])


def test_tracing_leaves_random_numbers_alone(all_low_rank):
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.LayerNorm(9), nn.Linear(9, 3)).double()
    batch, outputs = make("residual")[1], []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(ENGINE.query(model, inner_loop("cross_entropy", 0.1, 2), *batch[:3]))
    assert torch.equal(*outputs)  # the first call traced, the second did not
    batch = [tensor[:1].expand(4, *tensor.shape[1:]) for tensor in batch]
    assert len(set(ENGINE.query(model, inner_loop("mse", 0.1, 0), *batch[:3]).sum((1, 2)).tolist())) == 4


@pytest.mark.parametrize(("tasks", "support", "query"), [(1, 1, 1), (2, 0, 3), (2, 3, 0)])
def test_small_and_empty_sizes(all_low_rank, tasks, support, query):
    model, batch = make("residual", tasks=tasks, support=support, query=query)
    output = ENGINE.query(model, inner_loop("cross_entropy", 0.1, 2), *batch[:3])
    assert output.shape == (tasks, query, 3)
    if support == 0:  # nothing to adapt to
        torch.testing.assert_close(output, model(batch[2].flatten(0, 1)).unflatten(0, (tasks, query)))


def refusal(model, x):
    return ENGINE.why_not(model, inner_loop("cross_entropy", 0.1, 1), x)


def test_refusals():
    model, (x, *_) = make("residual")
    assert refusal(model, x) is None
    assert "no tasks" in refusal(model, x[:0])
    assert "dtype" in refusal(model, x.float())
    with torch.autocast("cpu"):
        assert "autocast" in refusal(model, x)
    assert "no linear layer" in refusal(nn.LayerNorm(6).double(), x)
    assert "no linear layer" in refusal(copy.deepcopy(model).requires_grad_(False), x)
    never_updated = batch_norm().double().eval()
    assert "running statistics" in refusal(never_updated, x)
    with pytest.raises(ValueError, match="lowrank.*running statistics"):
        MAML(never_updated, engine="lowrank")(make("residual")[1])
    with pytest.raises(ValueError, match="support_y must lie in"):
        MAML(model, engine="lowrank")((x, torch.full((3, 4), 3), x, torch.zeros(3, 4, dtype=torch.int64)))


def test_choice_and_its_explanation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Linear(32, 3))
    batch = [tensor.float() if tensor.is_floating_point() else tensor for tensor in make("residual")[1]]
    assert "lowrank: picked" in MAML(model).explain(batch)
    values = [batch[0], torch.randn(3, 4, 3), batch[2], torch.randn(*batch[2].shape[:2], 3)]
    text = MAML(model, inner_steps=50, loss="mse").explain(values)
    assert "lowrank: picked" in text  # the first layer sees the same four rows in all steps
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 32), nn.Linear(32, 3))
    text = MAML(model, inner_steps=50).explain(batch)
    assert "vmap: picked" in text and "outnumber the width" in text
    assert "lowrank: cannot serve" in MAML(nn.LayerNorm(6)).explain(batch)
