"""Every engine against a plain Python loop over tasks, and what the engines accept and refuse."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.algorithms import MAML
from fastmeta.engines.inspect import mlp_spec
from fastmeta.nn import conv4, mlp

LOSSES = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "huber": F.huber_loss,
}
ENGINES = ["fused", "lowrank", "layerwise", "vmap"]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def make_batch(loss, *, tasks=3, support=4, query=5, shape=(6,), outputs=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def pair(rows):
        x = torch.randn(tasks, rows, *shape, generator=generator, dtype=dtype)
        if loss == "binary_cross_entropy":
            return x, torch.rand(tasks, rows, outputs, generator=generator, dtype=dtype)
        if loss != "cross_entropy":
            return x, torch.randn(tasks, rows, outputs, generator=generator, dtype=dtype)
        return x, torch.randint(0, outputs, (tasks, rows), generator=generator)

    return (*pair(support), *pair(query))


def oracle(model, batch, loss, lr, steps, first_order=False):
    """MAML as the paper writes it, one task after the other, by autograd through autograd."""
    names, slow = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = slow
        for _ in range(steps):
            support_loss = LOSSES[loss](
                functional_call(model, dict(zip(names, fast, strict=True)), (support_x,)), support_y
            )
            gradients = torch.autograd.grad(support_loss, fast, create_graph=not first_order)
            fast = [w - lr * g for w, g in zip(fast, gradients, strict=True)]
        losses.append(LOSSES[loss](functional_call(model, dict(zip(names, fast, strict=True)), (query_x,)), query_y))
    losses = torch.stack(losses)
    return losses, dict(zip(names, torch.autograd.grad(losses.mean(), slow), strict=True))


def engine_result(model, batch, loss, lr, steps, **options):
    maml = MAML(model, inner_lr=lr, inner_steps=steps, loss=loss, **options)
    output = maml(batch)
    names, slow = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return output.task_loss, dict(zip(names, torch.autograd.grad(output.loss, slow), strict=True))


def assert_same(result, expected, tolerance=1e-10):
    torch.testing.assert_close(result[0], expected[0], rtol=tolerance, atol=tolerance)
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            result[1][name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def make_mlp(activation="relu", bias=True, seed=0):
    torch.manual_seed(seed)
    return mlp([6, 7, 8, 3], activation, bias=bias).double()


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_meta_gradient_is_the_oracles(engine, loss, steps, first_order):
    model, batch = make_mlp("tanh"), make_batch(loss)
    expected = oracle(model, batch, loss, 0.3, steps, first_order)
    assert_same(engine_result(model, batch, loss, 0.3, steps, first_order=first_order, engine=engine), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "silu", "gelu"])
@pytest.mark.parametrize("engine", ["fused", "lowrank", "layerwise"])
def test_activations_and_biases(engine, activation, bias):
    model, batch = make_mlp(activation, bias), make_batch("cross_entropy")
    expected = oracle(model, batch, "cross_entropy", 0.5, 2)
    assert_same(engine_result(model, batch, "cross_entropy", 0.5, 2, engine=engine), expected)


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.c(self.b(torch.sin(self.a(x)))))  # two linear layers in a row, an activation at the end


@pytest.mark.parametrize("engine", ["lowrank", "layerwise"])
def test_mixed_layers(engine):
    torch.manual_seed(0)
    model, batch = Sine().double(), make_batch("mse")
    assert mlp_spec(model).activations == ("sine", "identity", "tanh")
    assert_same(engine_result(model, batch, "mse", 0.5, 3, engine=engine), oracle(model, batch, "mse", 0.5, 3))


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"])
@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_are_not_adapted(engine, frozen):
    model, batch = make_mlp("tanh"), make_batch("mse")
    model.get_parameter(frozen).requires_grad_(False)
    assert_same(engine_result(model, batch, "mse", 0.3, 2, engine=engine), oracle(model, batch, "mse", 0.3, 2))


@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_differs_from_second(engine):
    model, batch = make_mlp("tanh"), make_batch("mse")
    second = engine_result(model, batch, "mse", 0.3, 2, engine=engine)
    first = engine_result(model, batch, "mse", 0.3, 2, engine=engine, first_order=True)
    torch.testing.assert_close(first[0], second[0])
    assert (first[1]["1.weight"] - second[1]["1.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_in_first_order_support_rows_get_no_gradient(engine):
    """They reach the query loss through inner gradients alone, which count as constants."""
    model, batch = make_mlp("tanh"), make_batch("mse")
    support_x = batch[0].requires_grad_()
    output = MAML(model, inner_lr=0.3, inner_steps=2, loss="mse", first_order=True, engine=engine)(batch)
    (gradient,) = torch.autograd.grad(output.loss, support_x, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_order_of_tasks_does_not_matter(engine):
    model, batch = make_mlp(), make_batch("cross_entropy", tasks=6)
    order = torch.randperm(6)
    losses, gradients = engine_result(model, batch, "cross_entropy", 0.3, 2, engine=engine)
    permuted = engine_result(model, [t[order] for t in batch], "cross_entropy", 0.3, 2, engine=engine)
    assert_same(permuted, (losses[order], gradients))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_steps_is_plain_training(engine):
    model, batch = make_mlp(), make_batch("cross_entropy")
    loss = F.cross_entropy(model(batch[2].flatten(0, 1)), batch[3].flatten())
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))
    result = engine_result(model, batch, "cross_entropy", 0.3, 0, engine=engine)
    assert_same((result[0].mean(), result[1]), (loss, expected))


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
@pytest.mark.parametrize("engine", ENGINES)
def test_chunks_give_the_same_gradient(engine, chunk):
    model, batch = make_mlp(), make_batch("cross_entropy", tasks=5)
    expected = engine_result(model, batch, "cross_entropy", 0.3, 2, engine=engine)
    assert_same(engine_result(model, batch, "cross_entropy", 0.3, 2, engine=engine, task_chunk=chunk), expected)


def test_chunked_gradient_refuses_to_be_differentiated_again():
    model, batch = make_mlp(), make_batch("mse")
    loss = MAML(model, loss="mse", task_chunk=1)(batch).loss
    (gradient, *_) = torch.autograd.grad(loss * 3, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="task_chunk"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match="task_chunk"):
        MAML(model, loss="mse", task_chunk=1)([batch[0].requires_grad_(), *batch[1:]])


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_reach_the_inputs(engine):
    model, batch = make_mlp("tanh"), make_batch("mse")
    # the kernels give targets no gradient: "auto" then passes the fused engine over
    batch = [t.requires_grad_(engine != "fused" or i % 2 == 0) for i, t in enumerate(batch)]
    inputs = [t for t in batch if t.requires_grad]
    gradients = torch.autograd.grad(
        MAML(model, inner_lr=0.3, inner_steps=2, loss="mse", engine=engine)(batch).loss, inputs
    )
    expected = torch.autograd.grad(oracle_loss(model, batch), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


def oracle_loss(model, batch):
    names, slow = zip(*model.named_parameters(), strict=True)
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = slow
        for _ in range(2):
            loss = F.mse_loss(functional_call(model, dict(zip(names, fast, strict=True)), (support_x,)), support_y)
            fast = [w - 0.3 * g for w, g in zip(fast, torch.autograd.grad(loss, fast, create_graph=True), strict=True)]
        total = total + F.mse_loss(functional_call(model, dict(zip(names, fast, strict=True)), (query_x,)), query_y)
    return total / len(batch[0])


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (0, 3, 2), (2, 0, 3), (2, 3, 0)], ids=["ones", "no_tasks", "no_support", "no_query"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_small_and_empty_sizes(engine, sizes):
    tasks, support, query = sizes
    if engine == "vmap" and tasks == 0:
        pytest.skip("torch.func.vmap cannot map over nothing")
    model, batch = make_mlp(), make_batch("cross_entropy", tasks=tasks, support=support, query=query)
    output = MAML(model, inner_lr=0.3, engine=engine)(batch)
    assert output.logits.shape == (tasks, query, 3) and output.task_loss.shape == (tasks,)
    if support == 0:  # nothing to adapt to
        torch.testing.assert_close(output.logits, model(batch[2].flatten(0, 1)).unflatten(0, (tasks, query)))


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 13), reason="earlier versions of dynamo take no module for a constant")
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_meta_gradient_is_exact(engine):
    """Compilers have dropped the second-order terms without a word; see that they are there."""
    torch._dynamo.reset()
    model, batch = make_mlp("tanh"), make_batch("mse")
    maml = MAML(model, inner_lr=0.3, inner_steps=2, loss="mse", engine=engine)
    output = torch.compile(maml, backend="aot_eager", fullgraph=True)(batch)
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(output.loss, list(model.parameters())), strict=True)
    )
    assert_same((output.task_loss, gradients), oracle(model, batch, "mse", 0.3, 2))


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "fused"])
def test_custom_loss_is_the_built_in_one(engine, first_order):
    model, batch = make_mlp("tanh"), make_batch("mse")
    options = {"engine": engine, "first_order": first_order}
    expected = engine_result(model, batch, "mse", 0.3, 2, **options)

    def own(prediction, target):
        return ((prediction - target) ** 2).mean()

    result = engine_result(model, batch, own, 0.3, 2, **options)
    assert_same(result, expected)


@pytest.mark.parametrize("engine", ["layerwise", "lowrank"])
def test_custom_loss_over_a_whole_task(engine):
    """No mean over rows, and targets of a shape of their own."""

    def total(prediction, target):
        return torch.logsumexp(prediction.square().T @ target, 1).sum() - prediction.sum() ** 2

    model, (support_x, _, query_x, _) = make_mlp("tanh"), make_batch("mse")
    torch.manual_seed(0)
    support_y, query_y = (torch.randn(*x.shape[:2], 2, dtype=x.dtype) for x in (support_x, query_x))
    batch = (support_x, support_y, query_x, query_y)
    assert_same(
        engine_result(model, batch, total, 0.03, 2, engine=engine),
        engine_result(model, batch, total, 0.03, 2, engine="vmap"),
    )


def test_a_custom_loss_by_a_known_name_is_not_the_kernels():
    model, (support_x, support_y, query_x, query_y) = make_mlp("tanh"), make_batch("mse")
    batch = (support_x, support_y.sigmoid(), query_x, query_y.sigmoid())

    def binary_cross_entropy(prediction, target):  # of probabilities; the kernels' is of logits
        return nn.functional.binary_cross_entropy(prediction.sigmoid() * 0.5, target)

    assert_same(
        engine_result(model, batch, binary_cross_entropy, 0.3, 2),
        engine_result(model, batch, binary_cross_entropy, 0.3, 2, engine="vmap"),
    )


def test_dropout_differs_between_tasks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    batch = [t[:1].expand(4, *t.shape[1:]) for t in make_batch("mse")]
    losses = MAML(model, loss="mse")(batch).task_loss
    assert len(set(losses.tolist())) == 4
    assert len({round(loss, 12) for loss in MAML(model, loss="mse").eval()(batch).task_loss.tolist()}) == 1


class TestBatchNorm:
    def model(self, **options):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 3)).double()

    def test_statistics_are_the_tasks_own(self):
        model, batch = self.model(), make_batch("mse")
        before = copy.deepcopy(model.state_dict())
        result = engine_result(model, batch, "mse", 0.3, 2)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert_same(result, oracle(self.model(track_running_stats=False), batch, "mse", 0.3, 2))

    def test_eval_refuses_statistics_that_were_never_updated(self):
        model, batch = self.model(), make_batch("mse")
        maml = MAML(model, loss="mse").eval()
        with pytest.raises(ValueError, match="'1'.*track_running_stats=False"):
            maml(batch)
        model.train()(batch[0].flatten(0, 1))
        model.eval()
        assert_same(engine_result(model, batch, "mse", 0.01, 1), oracle(model, batch, "mse", 0.01, 1))

    def test_eval_without_running_statistics(self):
        model, batch = self.model(track_running_stats=False), make_batch("mse")
        torch.testing.assert_close(
            MAML(model, loss="mse").eval()(batch).loss, MAML(model, loss="mse").train()(batch).loss
        )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.outputs = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.stack([x, x.sin()], 1)
        return self.outputs(self.attention(x, x, x, need_weights=False)[0].mean(1))


EXACT = {
    "batch": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
    "layer": lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
    "group": lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)),
    "rms": lambda: nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), nn.Linear(4, 3)),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(8, 3)
    ),
    "attention": Attention,
}


# vmap takes fused attention task by task and says that this is slow: here the gradient counts
@pytest.mark.filterwarnings("ignore:There is a performance drop.*aten.._scaled_dot_product_flash_attention:UserWarning")
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_second_order_through_norms_and_attention(make):
    """torch.func alone gets these wrong (the norms' affine part) or refuses them (fused attention)."""
    torch.manual_seed(0)
    model, batch = make().double(), make_batch("cross_entropy")
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracle(model, batch, "cross_entropy", 0.5, 2)
    assert_same(engine_result(model, batch, "cross_entropy", 0.5, 2), expected)


def test_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(conv4(hidden=4, track_running_stats=False), nn.Linear(4, 3)).double()
    batch = make_batch("cross_entropy", tasks=2, shape=(1, 16, 16))
    expected = oracle(model, batch, "cross_entropy", 0.1, 2)
    assert_same(engine_result(model, batch, "cross_entropy", 0.1, 2), expected, 1e-8)
