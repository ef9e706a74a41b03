"""`fast_weight_update` called again with the same shapes, by the backend that is chosen where none is asked for."""

import pytest
import torch
from conftest import DEVICE

from fastmeta.dispatch import backends, native
from fastmeta.functional import fast_weight_update

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
has_kernel = native.has_kernel("fast_weight_update_shaped", DEVICE)


@pytest.mark.parametrize("tasks", [1, 2, 5, 6])
@pytest.mark.parametrize("rate", ["float", "task", "tensor", "element", "task and element"])
@pytest.mark.parametrize("shared", ["", "params", "grads"])
def test_the_next_call_of_the_same_shapes(tasks, rate, shared, monkeypatch):
    """What the first call has found is not looked for again; what could be tasks or elements stays what it is."""
    if tasks == 1 and shared:
        pytest.skip("a task alone shares nothing")
    shapes = [(5,), (2, 3), (1,), (6, 1, 2)]

    def make(lead, seed):
        g = torch.Generator().manual_seed(seed)
        return [torch.rand(*lead, *s, generator=g, dtype=torch.float64).to(DEVICE) for s in shapes]

    run, runs = backends.run_shaped_update, []
    monkeypatch.setattr(backends, "run_shaped_update", lambda *args: runs.append(0) or run(*args))
    for seed in range(3):
        params = make(() if shared == "params" else (tasks,), seed)
        grads = make(() if shared == "grads" else (tasks,), seed + 10)
        rates = {
            "float": 0.3,
            "task": torch.rand(tasks, dtype=torch.float64, device=DEVICE) if tasks > 1 else torch.tensor(0.3).double(),
            "tensor": [t.flatten()[0] for t in make((), seed + 20)],
            "element": make((), seed + 20),
            "task and element": make((tasks,), seed + 20),
        }[rate]
        lrs = rates if isinstance(rates, list) else [rates] * len(shapes)
        if seed == 2:  # of the same shapes, but not contiguous
            grads = [g if g.dim() < 2 else g.mT.contiguous().mT for g in grads]
        fast = fast_weight_update(params, grads, rates)
        for p, g, lr, shape, found in zip(params, grads, lrs, shapes, fast, strict=True):
            if rate == "task" and tasks > 1:
                lr = lr.view(tasks, *(1,) * len(shape))
            torch.testing.assert_close(found, (p - lr * g).expand(tasks, *shape), **CLOSE)
    surely = has_kernel and tasks == 2 and rate != "task"  # where no size is that of another kind
    assert len(runs) == 1 if surely else len(runs) <= 1
