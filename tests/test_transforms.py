"""The ops under `torch.func`, `torch.compile`, forward mode and autocast: right, or refused, never silently wrong."""

import pytest
import torch
from conftest import CUDA, DEVICE
from test_ops import BACKENDS, LABELS, first_labels, require, sample_of, spread_labels
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from fastmeta import functional, testing, use_backend
from fastmeta.dispatch.spec import REGISTRY

FORWARD = [name for name in REGISTRY if not name.endswith("_bwd")]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
cases = pytest.mark.parametrize(
    "name, label",
    [pytest.param(name, label, id=f"{name}-{label}") for name in REGISTRY for label in spread_labels(name)],
)
first_cases = pytest.mark.parametrize(
    "name, label",
    [pytest.param(name, label, id=f"{name}-{label}") for name in FORWARD for label in first_labels(name)],
)


def consistent(spec, args):
    """What is handed in because it was found from another argument, found anew."""
    return spec.consistent(*args) if spec.consistent else args


def scalar_of(spec, args):
    """A scalar function of one tensor that runs the op: the first differentiable tensor varies."""
    position = spec.differentiable_positions[0]

    def function(x, run=spec):
        value = [x, *args[position][1:]] if isinstance(args[position], list) else x
        outputs = testing.tensors_of(run(*consistent(spec, (*args[:position], value, *args[position + 1 :]))))
        return sum(o.square().sum() for o in outputs[: spec.differentiable_outputs])

    first = args[position][0] if isinstance(args[position], list) else args[position]
    return function, first


def stacked(args, count=3):
    """Arguments with a mapped dimension: every float tensor varies, labels are shared by all."""

    def stack(t):
        return torch.stack([t * (1 + i / 4) for i in range(count)], 1) if t.is_floating_point() else t

    in_dims = tuple(
        None if dims is arg else dims  # what is no tensor comes back as it is
        for arg, dims in zip(
            args, testing.map_tensors(args, lambda t: 1 if t.is_floating_point() else None), strict=True
        )
    )
    return testing.map_tensors(args, stack), in_dims


@cases
def test_vmap(name, label):
    spec, (args, dims) = REGISTRY[name], stacked(sample_of(name, label))
    runs = (lambda *args, f=f: f(*consistent(spec, args)) for f in (spec, spec.reference))
    ours, truth = (testing.tensors_of(vmap(run, in_dims=dims)(*args)) for run in runs)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, equal_nan=True)


@cases
def test_vmap_of_grad(name, label):
    spec, args = REGISTRY[name], sample_of(name, label)
    function, x = scalar_of(spec, args)
    xs = torch.stack([x, 2 * x, -x])
    ours = vmap(grad(function))(xs)
    truth = vmap(grad(lambda x: function(x, spec.reference)))(xs)
    torch.testing.assert_close(ours, truth, **CLOSE, equal_nan=True)


@first_cases
def test_nested_vmap_and_second_order(name, label):
    spec, args = REGISTRY[name], sample_of(name, label)
    function, x = scalar_of(spec, args)
    xs = torch.stack([torch.stack([x, 2 * x]), torch.stack([-x, 3 * x])])

    def meta(run):
        return vmap(vmap(grad(lambda x: grad(lambda y: function(y, run))(x).square().sum())))(xs)

    torch.testing.assert_close(meta(spec), meta(spec.reference), rtol=1e-8, atol=1e-10)


def _has_a_small_hessian(name, label):
    _, x = scalar_of(REGISTRY[name], sample_of(name, label))
    if REGISTRY[name].file == "task_conv2d" and not x.numel():
        return False  # torch's jacrev fails on the plain reference
    return x.numel() <= 1000


@pytest.mark.parametrize(
    "name, label",
    [
        pytest.param(name, label, id=f"{name}-{label}")
        for name in FORWARD
        for label in first_labels(name)
        if _has_a_small_hessian(name, label)
    ],
)
def test_jacrev_twice(name, label):
    spec, args = REGISTRY[name], sample_of(name, label)
    function, x = scalar_of(spec, args)
    torch.testing.assert_close(
        jacrev(jacrev(function))(x), jacrev(jacrev(lambda x: function(x, spec.reference)))(x), rtol=1e-8, atol=1e-10
    )


@first_cases
def test_forward_mode_is_exact(name, label):
    spec, args = REGISTRY[name], sample_of(name, label)
    function, x = scalar_of(spec, args)
    tangent = torch.ones_like(x)
    expected = (grad(lambda x: function(x, spec.reference))(x) * tangent).sum()
    _, ours = jvp(function, (x,), (tangent,))
    torch.testing.assert_close(ours, expected, **CLOSE)
    if x.numel():  # jacfwd itself takes no empty input
        torch.testing.assert_close(jacfwd(function)(x), grad(function)(x), **CLOSE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        value = torch.autograd.forward_ad.unpack_dual(function(dual))
        torch.testing.assert_close(value.tangent, expected, **CLOSE)


@pytest.mark.parametrize("name, backend", [(n, b) for n in FORWARD for b in BACKENDS if b in REGISTRY[n].backends])
def test_compiles_without_a_graph_break(name, backend):
    require(backend)
    spec = REGISTRY[name]
    args, leaves = testing.differentiable_leaves(spec, sample_of(name, LABELS[name][0], torch.float32))
    torch._dynamo.reset()

    def loss(*args):
        return sum(o.square().sum() for o in testing.tensors_of(spec(*args))[: spec.differentiable_outputs])

    with use_backend(backend):
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*args)
        ours = torch.autograd.grad(value, leaves, allow_unused=True)
        truth = torch.autograd.grad(loss(*args), leaves, allow_unused=True)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def meta_loss(weights, biases, x, y):
    def inner(weights):
        return (functional.functional_mlp(x, weights, biases, "tanh") - y).square().sum()

    grads = grad(inner)(weights)
    fast = functional.fast_weight_update(weights, grads, 0.1)
    return (functional.functional_mlp(x, fast, biases, "tanh") - y).square().sum()


def test_compiled_maml_step_has_the_exact_meta_gradient():
    """An inner gradient inside a compiled function, differentiated outside: the Hessian term must be there."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    weights, biases, x, y = [normal(4, 3), normal(2, 4)], [normal(4), normal(2)], normal(2, 5, 3), normal(2, 5, 2)
    torch._dynamo.reset()
    eager = grad(meta_loss)(weights, biases, x, y)
    compiled = torch.compile(grad(meta_loss), backend="aot_eager")(weights, biases, x, y)

    leaves = [w.clone().requires_grad_() for w in weights]

    def mlp(weights):
        return torch.tanh(x @ weights[0].T + biases[0]) @ weights[1].T + biases[1]

    inner = torch.autograd.grad((mlp(leaves) - y).square().sum(), leaves, create_graph=True)
    fast = [w - 0.1 * g for w, g in zip(leaves, inner, strict=True)]
    truth = torch.autograd.grad((mlp(fast) - y).square().sum(), leaves)
    for a, b, c in zip(eager, compiled, truth, strict=True):
        torch.testing.assert_close(a, c, **CLOSE)
        torch.testing.assert_close(b, c, **CLOSE)


@pytest.mark.parametrize("lower", [torch.bfloat16] + [torch.float16] * CUDA)
def test_autocast(lower):
    x = torch.randn(2, 5, 3, device=DEVICE)
    weight, bias = torch.randn(4, 3, device=DEVICE), torch.randn(4, device=DEVICE)
    with torch.autocast(DEVICE, lower):
        assert functional.functional_mlp(x, [weight], [bias]).dtype == lower
        assert functional.functional_mlp(x.double(), [weight.double()], [bias.double()]).dtype == torch.float64
        assert functional.pairwise_distance(x.to(lower), x).dtype == torch.float32
        assert functional.fast_weight_update(x, x.to(lower), 0.1).dtype == torch.float32
        labels = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
        assert functional.class_prototypes(x.to(lower), labels, 2).dtype == torch.float32
        assert functional.prototypical_loss(x, labels, x.to(lower), labels, 2)[0].dtype == torch.float32
    plain, wide = {"lr": 0.1, "steps": 2, "form": "lowrank"}, torch.randn(2, 5, 16, device=DEVICE)
    layers = [torch.randn(4, 16, device=DEVICE), torch.randn(2, 4, device=DEVICE)], [bias, bias[:2]]
    truth = functional.meta_loss_mlp(wide, labels, wide, labels, *layers, **plain)
    with torch.autocast(DEVICE, lower):
        found = functional.meta_loss_mlp(wide, labels, wide, labels, *layers, **plain)
    torch.testing.assert_close(found, truth)


def public_calls():
    """Each public function with arguments, float tensors first."""
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, device=DEVICE)  # noqa: E731
    labels = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]], device=DEVICE)
    return {
        "class_prototypes": (lambda e: functional.class_prototypes(e, labels, 3), [normal(2, 4, 3)]),
        "pairwise_distance": (
            lambda q, p: functional.pairwise_distance(q, p, "cosine"),
            [normal(2, 5, 3), normal(2, 4, 3)],
        ),
        "prototypical_loss": (
            lambda s, q: functional.prototypical_loss(s, labels, q, labels, 3)[0],
            [normal(2, 4, 3), normal(2, 4, 3)],
        ),
        "contrastive_loss": (
            lambda a, b: functional.contrastive_loss(a, b, 0.2),
            [normal(2, 4, 3), normal(2, 4, 3)],
        ),
        "functional_mlp": (
            lambda x, w0, w1, b0, b1: functional.functional_mlp(x, [w0, w1], [b0, b1], "gelu"),
            [normal(2, 5, 3), normal(4, 3), normal(2, 1, 4), normal(4), normal(2, 1)],
        ),
        "fast_weight_update": (
            lambda p, g, lr: functional.fast_weight_update({"w": p}, {"w": g}, {"w": lr})["w"],
            [normal(3, 4), normal(2, 3, 4), normal(3, 4)],
        ),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", public_calls())
def test_public_functions_compile_whole(name, dynamic):
    function, tensors = public_calls()[name]
    leaves = [t.requires_grad_() for t in tensors]
    torch._dynamo.reset()

    def loss(*tensors):
        return function(*tensors).square().sum()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours = torch.autograd.grad(run(*leaves), leaves)
    for a, b in zip(ours, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", public_calls())
def test_public_functions_inside_compiled_torch_func(name):
    """vmap of grad of each public function, compiled: the way in through the reference."""
    function, tensors = public_calls()[name]
    torch._dynamo.reset()
    stacked = [torch.stack([t, 2 * t, -t]) for t in tensors]

    def per_sample(*tensors):
        return torch.func.vmap(grad(lambda *t: function(*t).square().sum()))(*tensors)

    torch.testing.assert_close(torch.compile(per_sample, backend="aot_eager")(*stacked), per_sample(*stacked), **CLOSE)
