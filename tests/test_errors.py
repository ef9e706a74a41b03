"""Wrong arguments: the type of the error, and a text that names the argument, what came and what is allowed.

No kernel runs before the arguments are known to be right.
"""

import re

import pytest
import torch
from conftest import CUDA, DEVICE
from test_ops import BACKENDS, require
from wrong_calls import RIGHT, WRONG, D, N, Q, S, T, labels, x

import fastmeta
from fastmeta import functional, use_backend
from fastmeta.dispatch import backends


@pytest.fixture(autouse=True)
def no_kernel_runs():
    before = backends.calls.copy()
    yield
    assert backends.calls == before


@pytest.mark.parametrize(
    "name, changes, error, text",
    [
        pytest.param(name, *case, id=f"{name}-{'-'.join(case[0])}-{i}")
        for name, cases in WRONG.items()
        for i, case in enumerate(cases)
    ],
)
def test_wrong_argument(name, changes, error, text):
    with pytest.raises(error, match=re.escape(text)) as caught:
        getattr(functional, name)(**RIGHT[name]() | changes)
    assert type(caught.value) is error  # no subclass such as NotImplementedError


def test_every_public_function_is_here():
    inner_loops = {"adapt_mlp", "meta_loss_mlp"}  # test_inner_loops.py has theirs
    sweeps = {"meta_gradient", "meta_loss", "functional_call"}  # and test_meta_gradient.py
    steps = {"adam_step", "sgd_step"}  # and test_optimizer_steps.py
    assert set(functional.__all__) - inner_loops - sweeps - steps == set(WRONG) == set(RIGHT)


@pytest.mark.skipif(not CUDA, reason="needs two devices")
@pytest.mark.parametrize(
    "name, changes, text",
    [
        (
            "class_prototypes",
            lambda: {"labels": labels(T, S, device="cpu")},
            "labels is on cpu, but embeddings is on cuda:0",
        ),
        (
            "pairwise_distance",
            lambda: {"prototypes": x(T, N, D, device="cpu")},
            "prototypes is on cpu, but query is on cuda:0",
        ),
        (
            "prototypical_loss",
            lambda: {"query": x(T, Q, D, device="cpu")},
            "query_labels is on cuda:0, but query is on cpu",
        ),
        (
            "functional_mlp",
            lambda: {"biases": [x(4), x(3, device="cpu")]},
            "biases[1] is on cpu, but x is on cuda:0",
        ),
        (
            "fast_weight_update",
            lambda: {"grads": {"w": x(T, 4, 3), "b": x(T, 4, device="cpu")}},
            "grads['b'] is on cpu, but params['w'] is on cuda:0",
        ),
    ],
)
def test_tensors_on_two_devices(name, changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(functional, name)(**RIGHT[name]() | changes())


@pytest.mark.parametrize("wrong", [-1, N])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_out_of_range_reach_no_backend(backend, wrong):
    require(backend)
    wrong_labels, right_labels = labels(T, S, value=wrong), labels(T, S)
    embeddings = x(T, S, D)
    with use_backend(backend):
        with pytest.raises(ValueError, match=rf"^labels must lie in \[0, num_classes\) = \[0, 3\), got {wrong}$"):
            torch.ops.fastmeta.class_prototypes(embeddings, wrong_labels, N)
        with pytest.raises(ValueError, match=rf"^query_labels must lie in \[0, num_classes\) = \[0, 3\), got {wrong}$"):
            torch.ops.fastmeta.prototypical_loss(embeddings, right_labels, embeddings, wrong_labels, N, "dot")


def test_labels_are_checked_under_every_transform():
    """Forward mode and torch.func take other ways to the op than a plain call."""
    wrong, embeddings = labels(T, S, value=N), x(T, S, D)

    def function(embeddings):
        return functional.class_prototypes(embeddings, wrong, N).sum()

    text = r"^labels must lie in \[0, num_classes\) = \[0, 3\), got 3$"
    with pytest.raises(ValueError, match=text):
        torch.func.grad(function)(embeddings)
    with pytest.raises(ValueError, match=text):
        torch.func.vmap(torch.func.grad(function))(embeddings[None])
    with pytest.raises(ValueError, match=text):
        torch.func.jvp(function, (embeddings,), (embeddings,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=text):
        function(torch.autograd.forward_ad.make_dual(embeddings, embeddings))


@pytest.mark.skipif(CUDA, reason="the switch is for CUDA tensors; a wrong label there is undefined")
def test_labels_on_the_cpu_are_checked_whatever_the_switch():
    fastmeta.check_labels(False)
    try:
        with pytest.raises(ValueError, match="labels must lie in"):
            functional.class_prototypes(x(T, S, D), labels(T, S, value=N), N)
    finally:
        fastmeta.check_labels(True)


def test_arguments_are_checked_before_autocast_reads_them():
    with torch.autocast(DEVICE, torch.bfloat16):
        for name, changes in (
            ("functional_mlp", {"weights": [None, x(3, 4)]}),
            ("pairwise_distance", {"prototypes": None}),
        ):
            with pytest.raises(TypeError, match=r"must be a tensor.*, got NoneType"):
                getattr(functional, name)(**RIGHT[name]() | changes)


@pytest.mark.parametrize("name", ["cudnn", "", "Reference"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=re.escape(f"must be one of cuda, cpp, triton, reference; got {name!r}")):
        with use_backend(name):
            pass
