"""Losses of tasks that count for more or less: against the float64 reference, and that they are served by the gradient
which a kernel finds with the loss, without the slower backward op."""

from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from test_ops import BACKENDS, require

from fastmeta import MAML, ProtoNet, TaskBatch, algorithms, use_backend
from fastmeta.dispatch import backends, native
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.functional import contrastive_loss, meta_loss_mlp, prototypical_loss
from fastmeta.nn import mlp
from fastmeta.ops import _inner_loop
from fastmeta.ops.contrastive_loss import _embeddings
from fastmeta.ops.prototypical_loss import _inputs
from fastmeta.testing import check_op

FUSED = DEVICE == "cpu" and native.has_kernel("meta_loss_mlp_with_gradient", "cpu")
only_native = pytest.mark.skipif(not FUSED, reason="no compiled kernels for the CPU")


def inner(tasks, queries, widths, form="dense", **options):
    return lambda make: _inner_loop.arguments(make, tasks, 6, queries, widths, form, **options)


SMALL = {
    "prototypical_loss": lambda make: (*_inputs(make, 3, 5, 6, 3, 4), "sqeuclidean"),
    "contrastive_loss": lambda make: (_embeddings(make, 3, 4, 5), 0.5),
    "meta_loss_mlp": inner(3, 4, (3, 5, 2), steps=1),
}
# every way through the compiled kernels: more tasks than a pack of lanes and than two threads have each, parts of rows
PATHS = [
    ("prototypical_loss", lambda make: (*_inputs(make, 3, 15, 140, 5, 8), "sqeuclidean")),
    ("prototypical_loss", lambda make: (*_inputs(make, 9, 5, 6, 3, 4), "cosine")),
    ("prototypical_loss", lambda make: (*_inputs(make, 1, 5, 6, 3, 4), "euclidean")),
    ("contrastive_loss", lambda make: (_embeddings(make, 5, 30, 6), 0.2)),
    ("meta_loss_mlp", inner(41, 45, (1, 7, 9, 3))),
    ("meta_loss_mlp", inner(41, 5, (4, 9, 2), per_task=True, loss="cross_entropy")),
    ("meta_loss_mlp", inner(5, 70, (3, 20, 2), loss="cross_entropy")),
    ("meta_loss_mlp", inner(5, 9, (6, 8, 2), "gram")),
    ("meta_loss_mlp", inner(3, 6, (3, 5, 1), loss="maximum_entropy")),
    ("meta_loss_mlp", inner(1, 9, (3, 8, 2))),
]
WEIGHTS = {
    "equal": lambda make, tasks: make.normal(1).expand(tasks),
    "any": lambda make, tasks: make.normal(tasks),
    "zeros": lambda make, tasks: make.normal(tasks) * (torch.arange(tasks, device=make.device) % 3 != 1),
    "nothing": lambda make, tasks: make.normal(tasks) * 0,
}
USES = {
    "mean": lambda weighted, weights: weighted.mean(),
    "sum of weights": lambda weighted, weights: weighted.sum() / weights.abs().sum().clamp_min(1),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(name, args, weights, use, told=True):
    """The gradient of the weighted losses; returns how often the backward op ran. told: the op of the weights."""
    spec = REGISTRY[name]

    def of(function, **options):
        def run(*args):
            outputs = function(*args, **options)
            loss = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            own = weights.to(loss)
            return use(own * loss, own)

        return run

    backends.calls.clear()
    check_op(
        replace(spec, reference=of(spec.reference), differentiable_outputs=None),
        args,
        order=1,
        function=of(spec, weights=weights) if told else of(spec),
    )
    return sum(count for (op, _), count in backends.calls.items() if op == spec.name + "_bwd")


@only_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", range(len(PATHS)))
def test_weights_come_out_of_the_one_pass(index, dtype):
    name, arguments = PATHS[index]
    make = Make(dtype, DEVICE)
    args = arguments(make)
    for kind, draw in WEIGHTS.items():
        weights = draw(make, len(args[0]))
        use = USES["sum of weights" if kind == "any" else "mean"]
        assert check(name, args, weights, use) == 0, kind


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
def test_on_every_backend(name, backend):
    require(backend)
    if backend not in REGISTRY[name].backends:
        pytest.skip(f"{backend} has no kernel for {name}")
    make = Make(torch.float64, DEVICE)
    args = SMALL[name](make)
    with use_backend(backend):
        check(name, args, make.normal(3), USES["mean"])


@only_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_weights_that_the_op_is_not_told(name, dtype):
    """Where tasks share nothing the gradients found for the mean can be scaled one by one; else the backward runs."""
    make = Make(dtype, DEVICE)
    args = SMALL[name](make)
    ran = 0 if REGISTRY[name].per_task else 1
    some, nearly_equal = torch.tensor([1, 0, 1], device=make.device), 1 + make.normal(3, scale=1e-5)
    for weights in (make.normal(3), make.normal(3) * some, nearly_equal):
        assert check(name, args, weights, USES["mean"], told=False) == ran
    only_one = lambda weighted, weights: weighted[1]  # noqa: E731
    assert check(name, args, make.normal(3), only_one, told=True) == ran
    other = make.normal(3)  # told of some weights, used with more
    assert check(name, args, make.normal(3), lambda weighted, weights: (other.to(weighted) * weighted).mean()) == ran


@only_native
def test_what_cannot_be_scaled_takes_the_backward():
    """A weight of 0 was told, or a gradient found that is no number."""
    make = Make(torch.float64, DEVICE)
    args = SMALL["prototypical_loss"](make)
    told = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    spec = REGISTRY["prototypical_loss"]

    def gradients(support, query, incoming, **options):
        backends.calls.clear()
        leaves = [support.clone().requires_grad_(), query.clone().requires_grad_()]
        loss = spec(leaves[0], args[1], leaves[1], *args[3:], **options)[0]
        return torch.autograd.grad(loss, leaves, incoming), backends.calls["prototypical_loss_bwd", "cpp"]

    incoming = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    (right, _), (found, ran) = (gradients(args[0], args[2], incoming, **o) for o in ({}, {"weights": told}))
    assert ran == 1
    for f, r in zip(found, right, strict=True):
        torch.testing.assert_close(f, r)
    bad = args[0].clone()
    bad[1] = torch.inf
    for weight, runs in ((0.0, 1), (2.0, 0), (torch.nan, 1), (torch.inf, 1)):
        incoming[1] = weight
        found, ran = gradients(bad, args[2], incoming)
        assert ran == runs
        for f, r in zip(found, right, strict=True):  # the other tasks' are theirs
            torch.testing.assert_close(f[[0, 2]], r[[0, 2]])


@pytest.mark.parametrize("name", SMALL)
def test_no_tasks(name):
    make = Make(torch.float64, DEVICE)
    empty = {
        "prototypical_loss": lambda: (*_inputs(make, 0, 5, 6, 3, 4), "sqeuclidean"),
        "contrastive_loss": lambda: (_embeddings(make, 0, 4, 5), 0.5),
        "meta_loss_mlp": lambda: inner(0, 4, (3, 5, 2))(make),
    }
    check(name, empty[name](), make.normal(0), lambda weighted, weights: weighted.sum())


def public(name, make):
    """The function of a user, as one of task weights, and what has gradients."""
    if name == "meta_loss_mlp":
        data = make.normal(3, 4, 2), make.normal(3, 4, 1), make.normal(3, 5, 2), make.normal(3, 5, 1)
        leaves = [make.normal(4, 2).requires_grad_(), make.normal(1, 4).requires_grad_()]
        options = {"lr": 0.1, "steps": 2, "loss": "mse", "activation": "tanh"}
        return lambda w, *leaves: meta_loss_mlp(*data, leaves, None, **options, task_weights=w)[0], leaves
    if name == "contrastive_loss":
        leaves = [make.normal(3, 4, 5).requires_grad_(), make.normal(3, 4, 5).requires_grad_()]
        return lambda w, *leaves: contrastive_loss(*leaves, weights=w), leaves
    support, labels, query, query_labels, n = _inputs(make, 3, 5, 6, 3, 4)
    leaves = [support.requires_grad_(), query.requires_grad_()]
    return lambda w, s, q: prototypical_loss(s, labels, q, query_labels, n, weights=w)[0], leaves


@pytest.mark.parametrize("name", SMALL)
def test_weights_have_gradients_of_any_order(name):
    make = Make(torch.float64, DEVICE)
    function, leaves = public(name, make)
    weights = make.normal(3).requires_grad_()
    plain = function(None, *leaves)
    torch.testing.assert_close(function(weights, *leaves), weights * plain, rtol=0, atol=0)
    everything = [weights, *leaves]
    direction = [make.normal(*t.shape) for t in everything]

    def twice(loss):
        first = torch.autograd.grad(loss.mean(), everything, create_graph=True)
        along = sum((f * d).sum() for f, d in zip(first, direction, strict=True))
        return *first, *torch.autograd.grad(along, everything)

    backends.calls.clear()
    once = torch.autograd.grad(function(weights, *leaves).mean(), everything)
    if FUSED:
        assert not any(op.endswith("_bwd") for op, _ in backends.calls)
    right = twice(weights * plain)
    for found, truth in zip((*once, *twice(function(weights, *leaves))), (*right[:3], *right), strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("name", ["prototypical_loss", "meta_loss_mlp"])
def test_under_transforms(name):
    make = Make(torch.float64, DEVICE)
    function, leaves = public(name, make)
    weights = make.normal(3)
    right = torch.autograd.grad((weights * function(None, *leaves)).mean(), leaves[0])[0]
    detached = [leaf.detach() for leaf in leaves]
    mean = lambda first, w: function(w, first, *detached[1:]).mean()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(mean)(detached[0], weights), right)
    both = torch.func.vmap(torch.func.grad(mean), in_dims=(None, 0))(detached[0], torch.stack([weights, 2 * weights]))
    torch.testing.assert_close(both, torch.stack([right, 2 * right]))
    _, tangent = torch.func.jvp(lambda w: mean(detached[0], w), (weights,), (torch.ones_like(weights),))
    torch.testing.assert_close(tangent, function(None, *leaves).mean())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "wrong, error, text",
    [
        ([1.0, 1.0, 1.0], TypeError, r"task_weights must be a tensor of shape \[T\], got list"),
        (torch.ones(3, 1), ValueError, r"task_weights must have shape \[T\], got \[3, 1\]"),
        (torch.ones(1), ValueError, r"task_weights has T = 1 \(shape \[1\]\), but .* has 3"),
        (torch.ones(3, dtype=torch.int64), TypeError, "task_weights must be float32, float64, float16 or bfloat16"),
        (torch.ones(3), TypeError, "task_weights is float32, but .* is float64: they must agree"),
        (torch.ones(3, device="meta"), ValueError, "task_weights must be on the CPU or a CUDA device, got meta"),
    ],
)
def test_wrong_weights(name, wrong, error, text):
    function, leaves = public(name, Make(torch.float64, "cpu"))
    with pytest.raises(error, match=text if name == "meta_loss_mlp" else text.replace("task_weights", "weights")):
        function(wrong, *leaves)


def test_under_autocast_and_in_half_precision():
    """Weights go where the loss goes: to float32."""
    make = Make(torch.bfloat16, "cpu")
    for name in SMALL:
        function, leaves = public(name, make)
        weights = make.normal(3)
        with torch.autocast("cpu"):
            loss = function(weights, *leaves)
            torch.testing.assert_close(loss, weights.float() * function(None, *leaves))
    function, leaves = public("meta_loss_mlp", make)
    assert function(weights, *leaves).dtype == torch.float32


LEARNERS = {
    "maml": lambda: MAML(mlp((4, 6, 3)), inner_lr=0.2, inner_steps=2),
    "maml in chunks": lambda: MAML(mlp((4, 6, 3)), inner_lr=0.2, task_chunk=2),
    "maml, task after task": lambda: MAML(mlp((4, 6, 3)), inner_lr=0.2, engine="loop"),
    "maml, low rank": lambda: MAML(mlp((4, 6, 3)), inner_lr=0.2, engine="lowrank"),
    "metasgd": lambda: algorithms.MetaSGD(mlp((4, 6, 3))),
    "anil": lambda: algorithms.ANIL(mlp((4, 6, 3)), inner_lr=0.2),
    "maml++": lambda: algorithms.MAMLPlusPlus(mlp((4, 6, 3)), inner_lr=0.2, inner_steps=2, multi_step_iterations=0),
    "cavia": lambda: algorithms.CAVIA(mlp((6, 6, 3)), 2, inner_lr=0.5),
    "protonet": lambda: ProtoNet(mlp((4, 6, 5)), ways=3),
    "ridge": lambda: algorithms.RidgeHead(mlp((4, 6, 5)), ways=3),
    "contrastive": lambda: algorithms.Contrastive(mlp((4, 6, 5)), None, ways=3),
    "modulated-protonet": lambda: algorithms.ModulatedProtoNet(
        mlp((4, 6, 5)), algorithms.FiLMMLP(10, [4, 6, 5]), ways=3
    ),
    "imaml": lambda: algorithms.ImplicitMAML(mlp((4, 6, 3)), inner_steps=3, cg_steps=40),
    "reptile": lambda: algorithms.Reptile(mlp((4, 6, 3)), optimizer="sgd", inner_steps=2, batch_size=None),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_learners(name):
    """The gradient of the weighted mean is that of the tasks one by one."""
    torch.manual_seed(0)
    learner, make = LEARNERS[name]().double(), Make(torch.float64, "cpu", 1)
    labels = make.balanced_labels(5, 3, 2)
    batch = TaskBatch(make.normal(5, 6, 4), labels, make.normal(5, 6, 4), labels)
    weights = torch.tensor([0.3, 2.0, 0.0, -1.0, 1.5], dtype=torch.float64)
    parameters = [p for p in learner.parameters() if p.requires_grad]

    def gradients(batch, weights=None):
        output = learner(batch, weights)
        return output, torch.autograd.grad(output.loss, parameters, allow_unused=True, materialize_grads=True)

    output, found = gradients(batch, weights)
    torch.testing.assert_close(output.loss, (weights * output.task_loss).mean())
    if name != "maml in chunks":
        torch.testing.assert_close(output.task_loss, learner(batch).task_loss)
    right = [torch.zeros_like(p) for p in parameters]
    # an encoder's and a rule's tasks do not meet in these learners, so each can be run alone
    for task, weight in enumerate(weights.tolist()):
        _, own = gradients(TaskBatch(*(part[task : task + 1] for part in batch)))
        right = [r + weight / len(weights) * g for r, g in zip(right, own, strict=True)]
    torch.testing.assert_close(list(found), right)
    if isinstance(learner, MAML):
        direct, named = learner.gradients(batch, weights)
        torch.testing.assert_close(direct.loss, output.loss.detach())
        torch.testing.assert_close(list(named.values()), right)


def test_learners_refuse_other_weights():
    learner, make = LEARNERS["maml"]().double(), Make(torch.float64, "cpu", 1)
    labels = make.balanced_labels(5, 3, 2)
    batch = TaskBatch(make.normal(5, 6, 4), labels, make.normal(5, 6, 4), labels)
    with pytest.raises(ValueError, match=r"weights has T = 4 \(shape \[4\]\), but support_x has 5"):
        learner(batch, torch.ones(4))
    with pytest.raises(TypeError, match="weights must be a tensor"):
        learner.gradients(batch, [1.0] * 5)
