"""Over random sizes, labels, metrics, dtypes: equal to the truth in float64, and the symmetries of the ops.

The examples are the same on every run.
"""

import pytest
import torch
from conftest import CUDA, DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import TRUTH
from test_ops import BACKENDS, DTYPES, require

from fastmeta import testing, use_backend
from fastmeta.dispatch.backends import ACTIVATIONS, METRICS
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.functional import (
    class_prototypes,
    fast_weight_update,
    functional_mlp,
    pairwise_distance,
    prototypical_loss,
)
from fastmeta.ops import optimizer_steps

settings.register_profile(
    "fastmeta", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
PROFILE = settings.get_profile("fastmeta")
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

tasks = st.sampled_from([0, 1, 2, 3])
size = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
some = st.sampled_from([1, 2, 3, 5, 8, 17])
seeds = st.integers(0, 2**20)
metrics = st.sampled_from(METRICS)


def holds(backend, *strategies, examples=25):
    """Run the decorated property on a backend, over drawn arguments; at once."""
    require(backend)
    if backend == "triton" and not CUDA:
        examples = max(examples // 8, 3)  # the interpreter is slow

    def run(function):
        with use_backend(backend):
            settings(PROFILE, max_examples=examples)(given(*strategies)(function))()

    return run


# equal to the truth ----------------------------------------------------------------------------------


def width_for(metric, d):
    # with one dimension every cosine distance is 0 or 2, its gradient 0: only rounding would be compared
    return max(d, 2) if metric == "cosine" else d


@st.composite
def class_prototypes_args(draw, make):
    t, s, d = draw(tasks), draw(size), draw(size)
    n = draw(some if t * s else size)
    return make.normal(t, s, d), make.labels(n, t, s), n


@st.composite
def pairwise_distance_args(draw, make):
    metric, t = draw(metrics), draw(tasks)
    q, n, d = draw(size), draw(size), width_for(metric, draw(size))
    return make.normal(t, q, d), make.normal(t, n, d), metric


@st.composite
def prototypical_loss_args(draw, make):
    metric, t = draw(metrics), draw(tasks)
    s, q, n, d = draw(size), draw(size), draw(some), width_for(metric, draw(size))
    scale = max(d, 1) ** -0.5  # distances of about 1: else the softmax saturates
    support, query = make.normal(t, s, d, scale=scale), make.normal(t, q, d, scale=scale)
    return support, make.labels(n, t, s), query, make.labels(n, t, q), n, metric


@st.composite
def contrastive_loss_args(draw, make):
    t, b, d = draw(tasks), draw(size), draw(size)
    return make.normal(t, 2 * b, d, scale=max(d, 1) ** -0.5), draw(st.sampled_from([0.1, 0.5, 3.0]))


@st.composite
def functional_mlp_args(draw, make):
    t, b = draw(tasks), draw(size)
    widths = draw(st.lists(size, min_size=2, max_size=4))

    def lead():
        return 1 if draw(st.booleans()) else t

    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    weights = [make.normal(lead(), o, i, scale=max(i, 1) ** -0.5) for i, o in pairs]
    biases = [make.normal(lead(), o) for _, o in pairs] if draw(st.booleans()) else []
    return make.normal(lead(), b, widths[0]), weights, biases, draw(st.sampled_from(ACTIVATIONS))


@st.composite
def fast_weight_update_args(draw, make):
    t, sizes = draw(tasks), draw(st.lists(size, min_size=1, max_size=4))

    def lead():
        return 1 if draw(st.booleans()) else t

    params, grads = ([make.normal(lead(), n) for n in sizes] for _ in range(2))
    per_element = draw(st.booleans())
    lrs = [make.uniform(0.01, 1, lead(), n if per_element else 1) for n in sizes] if draw(st.booleans()) else []
    return params, grads, lrs, draw(st.sampled_from([0.0, 0.1, 2.0]))


@st.composite
def optimizer_step_args(draw, make, kind):
    sizes = draw(st.lists(size, min_size=1, max_size=4))
    shared = draw(st.sampled_from(["", "p", "g", "ps", "p-", "pgs"]))
    forms = st.sampled_from(["task", "tensor", "element", "task element"])
    hyper = draw(st.dictionaries(st.integers(0, 4), forms))
    return optimizer_steps._inputs(make, kind, draw(tasks), sizes, shared, draw(st.booleans()), hyper)


ARGUMENTS = {
    "class_prototypes": class_prototypes_args,
    "pairwise_distance": pairwise_distance_args,
    "prototypical_loss": prototypical_loss_args,
    "contrastive_loss": contrastive_loss_args,
    "functional_mlp": functional_mlp_args,
    "fast_weight_update": fast_weight_update_args,
    "sgd_step": lambda make: optimizer_step_args(make, "sgd"),
    "adam_step": lambda make: optimizer_step_args(make, "adam"),
}


def test_every_op_is_here():
    # inner loops have test_inner_loops.py; images ops/test_task_conv2d.py and ops/test_norm_act_pool.py
    images = {name for name, spec in REGISTRY.items() if spec.file in ("task_conv2d", "norm_act_pool")}
    ops = {name for name, spec in REGISTRY.items() if spec.second_order != "loop"} - images
    assert set(ARGUMENTS) == {name for name in ops if not name.endswith("_bwd")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_equals_the_truth(name, backend):
    """Which is the reference, and about the reference plain PyTorch."""

    @holds(backend, st.data(), st.sampled_from(DTYPES[backend]), seeds, examples=40)
    def run(data, dtype, seed):
        args = data.draw(ARGUMENTS[name](Make(dtype, DEVICE, seed)))
        for order in (0, 1):
            testing.check_op(REGISTRY[name], args, order, truth=TRUTH[name] if backend == "reference" else None)


# symmetries ------------------------------------------------------------------------------------------


@st.composite
def episodes(draw):
    """support, labels, query, labels, number of classes.

    No two classes tie, else rounding would pick the nearer: each has a row, and the width is not 1, where
    cosine knows only two distances.
    """
    make, t, n, d = Make(torch.float64, DEVICE, draw(seeds)), draw(tasks), draw(some), draw(some) + 1
    s, q = n + draw(size), draw(some)
    order = torch.rand(t, s, generator=make.generator).argsort(-1)
    return make.normal(t, s, d), (order % n).to(DEVICE), make.normal(t, q, d), make.labels(n, t, q), n


def permutation(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(ours, truth):
    for a, b in zip(testing.tensors_of(ours), testing.tensors_of(truth), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, equal_nan=True)


@st.composite
def calls(draw):
    """A public function as one of its task tensors alone, and those tensors, `[T, ...]` each."""
    support, support_labels, query, query_labels, n = draw(episodes())
    make, metric = Make(torch.float64, DEVICE, draw(seeds)), draw(metrics)
    t, s, d = support.shape
    weights = [make.normal(t, 7, d), make.normal(t, 3, 7), make.normal(t, 7), make.normal(t, 3)]
    params = [make.normal(t, *shape) for shape in ((4, 3), (5,), ())]
    grads, lr = [make.normal(*p.shape) for p in params], make.uniform(0.01, 1, t)
    return draw(
        st.sampled_from(
            [
                (lambda e, y: class_prototypes(e, y, n), [support, support_labels]),
                (lambda q, p: pairwise_distance(q, p, metric), [query, support]),
                (lambda *e: prototypical_loss(*e, n, metric), [support, support_labels, query, query_labels]),
                (lambda x, w0, w1, b0, b1: functional_mlp(x, [w0, w1], [b0, b1], "tanh"), [query, *weights]),
                (lambda r, *pg: fast_weight_update(list(pg[:3]), list(pg[3:]), r), [lr, *params, *grads]),
            ]
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_tasks_do_not_see_each_other(backend):
    """Tasks in another order give results in that order; a task alone gives what it gives in the batch."""

    @holds(backend, calls(), seeds, examples=50)
    def run(call, seed):
        function, tensors = call
        whole, order = testing.tensors_of(function(*tensors)), permutation(len(tensors[0]), seed)
        assert_close(function(*(t[order] for t in tensors)), [value[order] for value in whole])
        for t in range(len(order)):
            assert_close(function(*(tensor[t : t + 1] for tensor in tensors)), [value[t : t + 1] for value in whole])


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_the_rows_does_not_matter(backend):
    @holds(backend, episodes(), metrics, seeds)
    def run(episode, metric, seed):
        support, support_labels, query, query_labels, n = episode
        rows, queries = permutation(support.shape[1], seed), permutation(query.shape[1], seed)
        other, other_labels = support[:, rows], support_labels[:, rows]
        assert_close(class_prototypes(other, other_labels, n), class_prototypes(support, support_labels, n))
        assert_close(
            prototypical_loss(other, other_labels, query[:, queries], query_labels[:, queries], n, metric),
            prototypical_loss(support, support_labels, query, query_labels, n, metric),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_the_classes_do_not_matter(backend):
    @holds(backend, episodes(), metrics, seeds)
    def run(episode, metric, seed):
        support, support_labels, query, query_labels, n = episode
        names = permutation(n, seed)  # class c is now called names[c]
        prototypes = class_prototypes(support, support_labels, n)
        renamed = class_prototypes(support, names[support_labels], n)
        assert_close(renamed[:, names], prototypes)
        assert_close(
            prototypical_loss(support, names[support_labels], query, names[query_labels], n, metric),
            prototypical_loss(support, support_labels, query, query_labels, n, metric),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_translation_leaves_distances(backend):
    @holds(backend, episodes(), st.sampled_from(["sqeuclidean", "euclidean", "manhattan"]), st.floats(-10, 10))
    def run(episode, metric, shift):
        support, _, query, _, _ = episode
        shift = shift * torch.arange(1, query.shape[2] + 1, dtype=query.dtype, device=DEVICE)
        moved = pairwise_distance(query + shift, support + shift, metric)
        assert_close(moved, pairwise_distance(query, support, metric))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling(backend):
    powers = {"sqeuclidean": 2, "euclidean": 1, "cosine": 0, "dot": 2, "manhattan": 1}

    @holds(backend, episodes(), metrics, st.floats(0.125, 8))
    def run(episode, metric, factor):
        support, support_labels, query, _, n = episode
        scaled = pairwise_distance(factor * query, factor * support, metric)
        assert_close(scaled, factor ** powers[metric] * pairwise_distance(query, support, metric))
        prototypes = class_prototypes(support, support_labels, n)
        assert_close(class_prototypes(factor * support, support_labels, n), factor * prototypes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_of_two_sets_are_symmetric(backend):
    @holds(backend, episodes(), metrics)
    def run(episode, metric):
        support, _, query, _, _ = episode
        there, back = pairwise_distance(query, support, metric), pairwise_distance(support, query, metric)
        assert_close(there, back.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_along_one_gradient_are_one(backend):
    @holds(backend, tasks, st.lists(some, max_size=3), st.floats(0, 1), st.floats(0, 1), seeds)
    def run(t, shape, first, second, seed):
        make = Make(torch.float64, DEVICE, seed)
        param, grad = make.normal(*shape), make.normal(t, *shape)
        twice = fast_weight_update(fast_weight_update(param, grad, first), grad, second)
        assert_close(twice, fast_weight_update(param, grad, first + second))


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_hidden_units_does_not_matter(backend):
    @holds(backend, tasks, st.tuples(size, some, size, some), st.sampled_from(ACTIVATIONS), seeds)
    def run(t, sizes, activation, seed):
        make, (b, i, h, o) = Make(torch.float64, DEVICE, seed), sizes
        x, first, last, bias = (
            make.normal(t, b, i),
            make.normal(t, h, i),
            make.normal(t, o, h),
            make.normal(t, h),
        )
        zero, units = torch.zeros(o, dtype=x.dtype, device=DEVICE), permutation(h, seed)
        assert_close(
            functional_mlp(x, [first[:, units], last[:, :, units]], [bias[:, units], zero], activation),
            functional_mlp(x, [first, last], [bias, zero], activation),
        )
