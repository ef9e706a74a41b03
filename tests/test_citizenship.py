"""PyTorch's own tools around ops and learners: right, or refused, never silently wrong.

What is not here is elsewhere: every op under `vmap`, `grad`, `jacrev`, `jvp`, `torch.compile` and autocast in
test_transforms.py, fake tensors, `opcheck` and equal bits on a second run in test_ops.py.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch._functorch.config
from conftest import DEVICE
from test_classes import LEARNERS as BY_EMBEDDING
from test_ops import first_labels, sample_of
from test_transforms import CLOSE, FORWARD, consistent, public_calls, scalar_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from fastmeta import MAML, ProtoNet, TaskBatch, functional, testing
from fastmeta.algorithms import ANIL, BOIL, ImplicitMAML, MAMLPlusPlus, MetaSGD, Reptile
from fastmeta.dispatch.spec import REGISTRY
from fastmeta.nn import mlp

INNER_LOOPS = {
    "maml": lambda f: MAML(f, inner_lr=0.3, inner_steps=2),
    "meta-sgd": lambda f: MetaSGD(f),
    "anil": lambda f: ANIL(f, inner_lr=0.3),
    "boil": lambda f: BOIL(f, inner_lr=0.3),
    "maml++": lambda f: MAMLPlusPlus(f, inner_lr=0.3),
    "imaml": lambda f: ImplicitMAML(f, inner_lr=0.3),
    "reptile": lambda f: Reptile(f, inner_lr=0.3),
}
LEARNERS = INNER_LOOPS | BY_EMBEDDING
public = pytest.mark.parametrize("name", public_calls())


def learner(name):
    torch.manual_seed(0)
    return LEARNERS[name](mlp([5, 6, 3 if name in INNER_LOOPS else 4], "tanh")).double().to(DEVICE)


def tasks(count=3, seed=0):
    """Three classes, two support rows each, four queries."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 10, 5, generator=g, dtype=torch.float64)
    y = torch.cat([torch.arange(3).repeat(count, 2), torch.randint(3, (count, 4), generator=g)], 1)
    return TaskBatch(*(part.to(DEVICE) for part in (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])))


def gradients(run, module):
    return torch.autograd.grad(run, list(module.parameters()), allow_unused=True)


def assert_same(ours, truth):
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", FORWARD)
def test_vjp(name):
    spec, args = REGISTRY[name], sample_of(name, first_labels(name)[0])
    places = spec.differentiable_positions

    def run(function):
        def outputs(*given):
            full = list(args)
            for place, value in zip(places, given, strict=True):
                full[place] = value
            found = testing.tensors_of(function(*consistent(spec, full)))
            return tuple(found[: spec.differentiable_outputs])

        values, pull = torch.func.vjp(outputs, *(args[place] for place in places))
        return testing.tensors_of(pull(tuple(v.cos() for v in values)))

    assert_same(run(spec), run(spec.reference))


@pytest.mark.parametrize("name", FORWARD)
def test_products_with_the_hessian(name):
    """`vjp` of `grad`, pulled back where no transform is active any more, and `jvp` of `grad`."""
    spec, args = REGISTRY[name], sample_of(name, first_labels(name)[0])
    function, x = scalar_of(spec, args)

    def products(run):
        gradient = torch.func.grad(lambda x: function(x, run))
        value, pull = torch.func.vjp(gradient, x)
        return value, pull(x.cos())[0], torch.func.jvp(gradient, (x,), (x.cos(),))[1]

    for ours, truth in zip(products(spec), products(spec.reference), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-10)


class Scores(nn.Module):
    """A head with ops of ours in its forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, support, labels, query):
        rows = torch.cat([support, query], 1)
        rows = functional.functional_mlp(
            rows, [self.first.weight, self.second.weight], [self.first.bias, self.second.bias], "tanh"
        )
        support, query = rows.split([support.shape[1], query.shape[1]], 1)
        return -functional.pairwise_distance(query, functional.class_prototypes(support, labels, 3))


def test_functional_call_under_transforms():
    """A module's parameters replaced, and mapped over, as in ensembles."""
    torch.manual_seed(0)
    net, batch = Scores().double().to(DEVICE), tasks()
    own = {name: p.detach() for name, p in net.named_parameters()}
    stacked = {name: torch.stack([p, 0.5 * p]) for name, p in own.items()}

    def loss(parameters):
        return torch.func.functional_call(net, parameters, batch[:3]).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i in range(2):
        leaves = {name: p[i].clone().requires_grad_() for name, p in stacked.items()}
        assert_same(torch.autograd.grad(loss(leaves), list(leaves.values())), [ours[name][i] for name in leaves])


@public
def test_other_numbers_of_tasks_compile_nothing_anew(name):
    function, tensors = public_calls()[name]
    labels = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]], device=DEVICE)
    calls = {
        "class_prototypes": lambda y, e: functional.class_prototypes(e, y, 3),
        "prototypical_loss": lambda y, s, q: functional.prototypical_loss(s, y, q, y, 3)[0],
    }
    run = calls.get(name, lambda y, *t: function(*t))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for n in (1, 2, 4, 3):
        given = [torch.cat([t] * n) if t.shape[0] == 2 else t for t in (labels, *tensors)]
        torch.testing.assert_close(compiled(*given), run(*given), **CLOSE)
    assert counter.frame_count == 1


class Predict(nn.Module):
    def __init__(self, learner):
        super().__init__()
        self.learner = learner

    def forward(self, support_x, support_y, query_x):
        return self.learner.predict(self.learner.adapt(support_x, support_y), query_x)


@pytest.mark.parametrize(
    "make",
    [lambda: LEARNERS["maml"](mlp([5, 6, 3], "tanh")), lambda: ProtoNet(mlp([5, 6, 4], "tanh"), ways=3)],
    ids=["maml", "protonet"],
)
def test_predict_is_exported_for_any_number_of_tasks(make):
    torch.manual_seed(0)
    net, count = Predict(make()).double().to(DEVICE).eval(), Dim("T", min=2)
    program = export(net, tuple(tasks()[:3]), dynamic_shapes=({0: count}, {0: count}, {0: count}))
    for n in (3, 5):
        batch = tasks(n)
        torch.testing.assert_close(program.module()(*batch[:3]), net(*batch[:3]), **CLOSE)
    kernels = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert "fastmeta" in kernels  # the ops are in it, not their references


def test_a_number_of_classes_that_labels_tell_is_not_exported():
    with pytest.raises(ValueError, match="ways=N"):
        export(Predict(ProtoNet(mlp([5, 4]))).double().eval().to(DEVICE), tuple(tasks()[:3]))


@pytest.mark.parametrize("name", ["maml", "meta-sgd", "protonet", "ridge"])
def test_learners_under_autocast(name):
    net, batch = learner(name).float(), tasks()
    batch = batch._replace(support_x=batch.support_x.float(), query_x=batch.query_x.float())
    truth = net(batch)
    expected = gradients(truth.loss, net)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = net(batch)
    torch.testing.assert_close(output.loss.float(), truth.loss, rtol=0.05, atol=0.05)
    for ours, right in zip(gradients(output.loss, net), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, right, rtol=0.2, atol=0.05)


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@public
def test_ops_in_deterministic_mode(name, deterministic):
    function, tensors = public_calls()[name]
    leaves = [t.requires_grad_() for t in tensors]
    once, again = (torch.autograd.grad(function(*leaves).square().sum(), leaves) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("name", ["maml", "meta-sgd", "protonet", "in-context"])
def test_learners_in_deterministic_mode(name, deterministic):
    net, batch = learner(name).eval(), tasks()
    once, again = (gradients(net(batch).loss, net) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("name", LEARNERS)
def test_copies_and_pickles(name):
    """Of learners, before and after they have run, and of what they adapt to."""
    net, batch = learner(name).eval(), tasks()
    truth = net(batch)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(batch).logits, truth.logits, **CLOSE)
        with torch.no_grad():  # and its parameters are its own
            for p in other.parameters():
                p.add_(1)
        torch.testing.assert_close(net(batch).logits, truth.logits, **CLOSE)
    with torch.no_grad():
        state = net.adapt(batch.support_x, batch.support_y)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        torch.testing.assert_close(net.predict(other, batch.query_x), truth.logits, **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@public
def test_checkpointed_ops(name, reentrant):
    function, tensors = public_calls()[name]
    leaves = [t.requires_grad_() for t in tensors]
    ours, truth = (
        torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=not reentrant)
        if not reentrant
        else by_backward(run(*leaves).square().sum(), leaves)
        for run in (lambda *t: checkpoint(function, *t, use_reentrant=reentrant), function)
    )
    assert_same(ours, truth)
    if not reentrant:  # twice
        assert_same(*(torch.autograd.grad(sum(g.sin().sum() for g in first), leaves) for first in (ours, truth)))


def by_backward(loss, leaves):
    """Reentrant checkpoints take no `torch.autograd.grad`."""
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", ["maml", "meta-sgd", "protonet"])
def test_checkpointed_learners(name):
    net, batch = learner(name), tasks()
    loss = checkpoint(lambda x: net(batch._replace(query_x=x)).loss, batch.query_x, use_reentrant=False)
    assert_same(gradients(loss, net), gradients(net(batch).loss, net))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["maml", "meta-sgd", "imaml", "protonet"])
def test_ddp_around_a_learner(name, one_process):
    net, batch = learner(name), tasks()
    truth = gradients(net(batch).loss, net)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
    reduced = []
    wrapped.register_comm_hook(None, lambda _, bucket: reduced.append(bucket) or ready(bucket.buffer()))
    wrapped(batch).loss.backward()
    assert reduced, "no gradient went by DDP"
    assert_same([p.grad for p in wrapped.parameters()], truth)


def ready(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


@pytest.mark.gpu
@public
def test_ops_run_on_the_current_stream(name):
    function, tensors = public_calls()[name]
    truth = function(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows on another stream would see the zeros below
        late = [torch.zeros_like(t).copy_(t) for t in tensors]
        found = function(*late)
    stream.synchronize()
    torch.testing.assert_close(found, truth, **CLOSE)


# What PyTorch gets wrong without a word: the second derivative of what was compiled -----------------------------------


def squares(prediction, target):
    return (prediction - target).square().mean()


def regression(seed=0):
    g = torch.Generator().manual_seed(seed)
    return TaskBatch(
        *(torch.randn(2, n, w, generator=g, dtype=torch.float64).to(DEVICE) for n in (5, 4) for w in (3, 2))
    )


def compiled(function):
    return torch.compile(function, backend="aot_eager")


class CompiledPart(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.bend = net, compiled(torch.tanh)

    def forward(self, x):
        return self.net[3](self.bend(self.net[1](x)))


@pytest.mark.parametrize(
    "where, options, donated",  # with buffers that are donated PyTorch refuses, and advises to switch that off
    [
        ("loss", {"engine": "loop"}, True),
        ("loss", {"engine": "loop"}, False),
        ("loss", {"engine": "vmap"}, False),
        ("module", {"engine": "loop"}, False),
        ("part", {"engine": "loop"}, False),
        ("part", {"memory": "sweep"}, False),
    ],
    ids=str,
)
def test_compiled_inner_losses_are_exact_or_refused(where, options, donated):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, batch = mlp([3, 4, 2], "tanh").double().to(DEVICE), regression()
    truth = gradients(MAML(net, inner_lr=0.3, inner_steps=2, loss=squares)(batch).loss, net)
    model = {"loss": net, "module": compiled(net), "part": CompiledPart(net)}[where]
    loss = compiled(squares) if where == "loss" else squares
    maml = MAML(model, inner_lr=0.3, inner_steps=2, loss=loss, **options)
    with torch._functorch.config.patch(donated_buffer=donated):
        if options == {"engine": "vmap"}:  # torch.func goes through what is compiled
            assert_same(gradients(maml(batch).loss, net), truth)
        else:
            with pytest.raises(RuntimeError, match="which cannot be differentiated twice"):
                gradients(maml(batch).loss, net)


@torch._functorch.config.patch(donated_buffer=False)
def test_compiled_gradients_in_loops_of_ones_own():
    """Refused by whoever is handed them; of first order they are right."""
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 5, 3, generator=g, dtype=torch.float64).to(DEVICE) for _ in range(2))
    weight = torch.randn(2, 3, 3, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()

    def loss(weight):
        return (torch.tanh(x @ weight) - y).square().sum()

    bend = compiled(torch.tanh)
    for inner in (compiled(loss), lambda w: (bend(x @ w) - y).square().sum()):
        steps = {
            "fast_weight_update": lambda grad: functional.fast_weight_update({"w": weight}, {"w": grad}, 0.1),
            "sgd_step": lambda grad: functional.sgd_step([weight], [grad], lr=0.1),
            "adam_step": lambda grad: functional.adam_step([weight], [grad], lr=0.1),
        }
        for step in steps.values():
            with pytest.raises(RuntimeError, match="which cannot be differentiated twice"):
                step(*torch.autograd.grad(inner(weight), weight, create_graph=True))
        (first,) = torch.autograd.grad(inner(weight), weight)
        (plain,) = torch.autograd.grad(loss(weight), weight)
        fast = [functional.fast_weight_update(weight, grad, 0.1) for grad in (first, plain)]
        assert_same(*(torch.autograd.grad(loss(w), weight) for w in fast))


def test_importing_fastmeta_does_not_import_the_compiler():
    """It takes two seconds."""
    code = "import sys, fastmeta; sys.exit('torch._dynamo.eval_frame' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
