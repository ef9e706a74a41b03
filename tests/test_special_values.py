"""NaN, infinities and rows of zeros give on every backend what plain PyTorch makes of them: none becomes a number, and
none reaches other rows, classes or tasks."""

import pytest
import special_values as special
import torch
from conftest import CUDA, DEVICE
from test_ops import BACKENDS, DTYPES

from fastmeta import functional as fm
from fastmeta import use_backend
from fastmeta.dispatch.spec import REGISTRY

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
INTERPRETED = lambda backend: backend == "triton" and not CUDA  # noqa: E731
NAMES = [case.name for case in special.cases("nan")]


def dtypes(backend):
    if INTERPRETED(backend):
        return (torch.float32,)
    return (*DTYPES[backend], *(HALF if backend == "reference" else ()))


@pytest.mark.parametrize("value", special.VALUES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_as_in_plain_pytorch(name, backend, value):
    spec = REGISTRY[name.split("-")[0]]
    if backend not in spec.backends:
        pytest.skip(f"{backend} has no {spec.name}")
    if INTERPRETED(backend) and value in ("-inf", "zeros"):
        pytest.skip("slow in the interpreter, and as the others")
    case = special.cases(value)[NAMES.index(name)]
    for dtype in dtypes(backend):
        tensors = [t.to(dtype) for t in case.tensors]
        truth, gradients = special.with_gradients(
            case.plain, [t.double() for t in tensors], case.differentiable_outputs
        )
        with use_backend(backend):
            ours, found = special.with_gradients(
                lambda *t: spec(*case.arguments(*t)), [t.to(DEVICE) for t in tensors], case.differentiable_outputs
            )
        for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
            special.agree(a, b, TOLERANCE[dtype], f"{dtype}, output {i}")
        if dtype in HALF:  # whose range cannot hold the gradient of a direction at 0
            continue
        for i, (a, b) in enumerate(zip(found, gradients, strict=True)):
            special.agree(a, b, 10 * TOLERANCE[dtype], f"{dtype}, gradient {i}")


INNER = {"lr": 0.3, "steps": 2}
FORMS = ("onchip", "lowrank")


def inner_problem(value, which):
    draw = special._draw(5)
    x, qx = draw(3, 5, 4), draw(3, 6, 4)
    if which == "support":
        x = special.spoiled(x, value)
    elif which == "query":
        qx = special.spoiled(qx, value)
    shapes = list(zip(special.WIDTHS[1:], special.WIDTHS[:-1], strict=True))
    return x, qx, [draw(1, *shape) / 2 for shape in shapes], [draw(1, shape[0]) / 2 for shape in shapes]


@pytest.mark.parametrize("value", ["nan", "zeros"])
@pytest.mark.parametrize("which", ["support", "query"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inner_loops(backend, form, which, value):
    if INTERPRETED(backend) and (value, which) != ("nan", "support"):
        pytest.skip("slow in the interpreter")
    tensors = [t.float() for t in special.flat(inner_problem(value, which))]
    y, qy = (torch.arange(3 * rows).view(3, rows) % 3 for rows in (5, 6))
    n = len(special.WIDTHS) - 1

    def plain(x, qx, *parameters):
        losses, logits, fast = [], [], []
        for t in range(3):
            w, b = special.adapted(x[t], y[t], parameters[:n], parameters[n:], "cross_entropy", "relu", **INNER)
            fast.append([*w, *b])
            logits.append(special.net(qx[t], w, b, "relu"))
            losses.append(special.LOSSES["cross_entropy"](logits[-1], qy[t]))
        return torch.stack(losses), torch.stack(logits), *(torch.stack(f) for f in zip(*fast, strict=True))

    def ours(x, qx, *parameters):
        w, b = parameters[:n], parameters[n:]
        options = {"activation": "relu", "form": form, **INNER}
        loss, logits = fm.meta_loss_mlp(x, y.to(DEVICE), qx, qy.to(DEVICE), w, b, **options)
        weights, biases = fm.adapt_mlp(x, y.to(DEVICE), w, b, **options).materialize()
        return loss, logits, *weights, *biases

    truth, _ = special.with_gradients(plain, [t.double() for t in tensors], 1)
    with use_backend(backend):
        found, gradients = special.with_gradients(ours, [t.to(DEVICE) for t in tensors], 1)
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        special.agree(a, b, 1e-4, f"output {i}")
    if value == "nan":  # other tasks go on; the shared weights' gradient is lost
        for g in gradients[:2]:
            assert g[[0, 2]].isfinite().all()
        assert all(g.isnan().all() for g in gradients[2:])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_knows_rows_of_zeros(dtype):
    """1e-8, the least norm that counts, is 0 in float16."""
    ones, zeros = torch.ones(1, 2, 3, dtype=dtype, device=DEVICE), torch.zeros(1, 2, 3, dtype=dtype, device=DEVICE)
    assert (fm.pairwise_distance(ones, zeros, "cosine") == 1).all()
    assert (fm.contrastive_loss(zeros, zeros).float() - torch.log(torch.tensor(3.0))).abs().max() < 0.02
