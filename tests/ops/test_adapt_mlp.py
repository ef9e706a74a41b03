"""The inner loops' Triton kernels: what they refuse, and programs that take many tasks, or one."""

import pytest
import torch
from conftest import DEVICE
from test_ops import require

from fastmeta import testing, use_backend
from fastmeta.dispatch.backends import BACKENDS
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.ops import _inner_loop

REFUSED = {
    "loss maximum_entropy is not one of cross_entropy, mse, binary_cross_entropy, huber": {"loss": "maximum_entropy"},
    "dtype bfloat16 is not one of float32, float64": {"dtype": torch.bfloat16},
    "there is no weight decay and no rate per element in the Gram form": {"form": "gram", "decay": 0.1},
}


def arguments(op: str, form="dense", dtype=torch.float64, **departures) -> tuple:
    args = _inner_loop.arguments(Make(dtype, DEVICE), 5, 4, 6, (3, 5, 2), form, **departures)
    return (*args[:3], args[6], *args[8:]) if op == "adapt_mlp" else args


@pytest.mark.parametrize("sentence", REFUSED)
@pytest.mark.parametrize("op", ["adapt_mlp", "meta_loss_mlp"])
def test_triton_says_what_it_does_not_serve(op, sentence):
    require("triton")
    with use_backend("triton"), pytest.raises(ValueError, match=f"cannot run {op}: {sentence}"):
        REGISTRY[op](*arguments(op, **REFUSED[sentence]))


@pytest.mark.parametrize("op", ["adapt_mlp", "meta_loss_mlp"])
def test_triton_refuses_what_it_cannot_count(op, monkeypatch):
    require("triton")
    from fastmeta.kernels.inner_loop import call

    args = arguments(op)
    assert BACKENDS["triton"].why_not(REGISTRY[op], args) is None
    monkeypatch.setattr(call, "MOST_ELEMENTS", 100)
    assert "elements, are more than 100" in BACKENDS["triton"].why_not(REGISTRY[op], args)


@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("form", ["dense", "gram"])
@pytest.mark.parametrize("op", ["adapt_mlp", "meta_loss_mlp"])
def test_any_number_of_programs(op, form, programs, monkeypatch, poisoned_memory):
    """What tasks share is summed by program first."""
    require("triton")
    from fastmeta.kernels.inner_loop import call

    ran = []
    monkeypatch.setattr(call, "programs_for", lambda *_: ran.append(programs) or programs)
    with use_backend("triton"):
        for order in (0, 1):
            testing.check_op(REGISTRY[op], arguments(op, form, momentum=0.5), order)
    assert len(ran) >= 3
