"""pytest-benchmark over ops x backends: `python -m pytest benchmarks --benchmark-only`.

For one backend beside another over time. Ratios to peers come from `python -m benchmarks`, which interleaves.
"""

import pytest
import torch

import fastmeta.ops  # noqa: F401  (fills the registry)
from fastmeta import testing, use_backend
from fastmeta.dispatch import backends
from fastmeta.dispatch.spec import REGISTRY, Make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(name, backend, index, id=f"{name}-{workload.label}-{backend}")
    for name, spec in REGISTRY.items()
    if spec.workloads
    for index, workload in enumerate(spec.workloads(Make(torch.float32)))
    for backend in backends.BACKENDS
    if backends.why_missing(backend, DEVICE) is None
]


@pytest.mark.parametrize("order", [0, 1], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name, backend, index", CASES)
def test_op(benchmark, name, backend, index, order):
    spec = REGISTRY[name]
    workload = list(spec.workloads(Make(torch.float32, DEVICE)))[index]
    if backend == "reference" and name in ("pairwise_distance", "prototypical_loss") and workload.bytes > 1e7:
        pytest.skip("the reference materialises [T, Q, N, D]")
    benchmark.group = f"{name} {workload.label} {'forward+backward' if order else 'forward'}"
    args = testing.differentiable_leaves(spec, workload.args) if order else (workload.args, [])

    def run():
        outputs = testing.tensors_of(spec(*args[0]))[: spec.differentiable_outputs]
        if order:
            torch.autograd.grad(outputs, args[1], [torch.ones_like(o) for o in outputs])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with use_backend(backend):
        testing.check_op(spec, next(iter(spec.samples(Make(torch.float32, DEVICE)))).args, order)
        benchmark(run)
