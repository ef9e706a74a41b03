"""Every op of the registry on every kernel backend against the float64 reference: values, gradients, second order.

What the reference itself is worth shows in `test_references.py`; what is special to one op in `tests/ops/`.
"""

import pytest
import torch
from conftest import CUDA, DEVICE
from torch.autograd import gradcheck, gradgradcheck

import fastmeta.ops  # noqa: F401  (fills the registry)
from fastmeta import testing, use_backend
from fastmeta.dispatch import backends
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.dispatch.transforms import dispatcher_op

# the reference is the same torch code on every device, and shown on the CPU
BACKENDS = [
    name for name, b in backends.BACKENDS.items() if DEVICE in b.devices and not (CUDA and name == "reference")
]
KERNELS = [name for name in BACKENDS if name != "reference"]  # compared with the reference it would be with itself
DTYPES = {
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float64, torch.float16, torch.bfloat16) if CUDA else (torch.float32, torch.float64),
    "cpp": (torch.float32, torch.float64),
    "reference": (torch.float32, torch.float64),
}
LABELS = {name: [sample.label for sample in spec.samples(Make())] for name, spec in REGISTRY.items()}


def sample_of(name: str, label: str, dtype=torch.float64, seed: int = 0):
    return next(s.args for s in REGISTRY[name].samples(Make(dtype, DEVICE, seed)) if s.label == label)


def loops(name: str) -> bool:
    return REGISTRY[name].second_order == "loop"


def first_labels(name: str) -> list[str]:
    """One small sample for each choice of metric or activation."""
    seen: dict[str, str] = {}
    for label in LABELS[name]:
        seen.setdefault(label.split("-T")[0] if "-T" in label else label, label)
    return list(seen.values())


def of_images(name: str) -> bool:
    """Whether the derivatives of an op are ops of the registry in turn, with samples of their own."""
    return REGISTRY[name].file in ("task_conv2d", "norm_act_pool")


def interpreted_labels(name: str) -> list[str]:
    """For derivatives in Triton's interpreter."""
    return first_labels(name)[: 1 if of_images(name) else None]


def cases(labels=LABELS.get, backends=KERNELS, dtypes=DTYPES.get, interpreted=None):
    """Test parameters; `interpreted` picks fewer samples for Triton's interpreter, which is slow."""

    def picked(backend):
        return interpreted if interpreted and backend == "triton" and not CUDA else labels

    def shown(name, backend):
        found = picked(backend)(name)
        if REGISTRY[name].second_order == "loop" and backend == "reference":
            # many samples, each a loop of differentiated steps, of the same plain torch
            return [label for label in found if label in first_labels(name)]
        if REGISTRY[name].second_order == "loop" and backend == "triton":
            found = [label for label in found if not label.startswith("maximum_entropy")]  # which it refuses
            # in the interpreter three tasks are as good as many: two programs share them
            return found if CUDA else [label for label in found if "-T25-" not in label]
        return found

    def served(name, backend):
        loops_on_gpu = REGISTRY[name].second_order == "loop" and backend in ("cuda", "triton")
        return [d for d in dtypes(backend) if not loops_on_gpu or d in (torch.float32, torch.float64)]

    return [
        pytest.param(name, backend, dtype, label, id=f"{name}-{backend}-{str(dtype)[6:]}-{label}")
        for name in REGISTRY
        for backend in backends
        if backend in REGISTRY[name].backends
        for dtype in served(name, backend)
        for label in shown(name, backend)
    ]


def of_kernels(labels):
    """`labels` of ops whose gradient is a kernel's: that of an inner loop's gradient is plain torch on all backends."""
    return lambda name: [] if loops(name) and name.endswith("_bwd") else labels(name)


def require(backend: str) -> None:
    reason = backends.why_missing(backend, DEVICE)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("name, backend, dtype, label", cases())
def test_value(name, backend, dtype, label, poisoned_memory):
    require(backend)
    with use_backend(backend):
        testing.check_op(REGISTRY[name], sample_of(name, label, dtype))


@pytest.mark.parametrize("name, backend, dtype, label", cases(interpreted=of_kernels(interpreted_labels)))
def test_gradients(name, backend, dtype, label, poisoned_memory):
    require(backend)
    with use_backend(backend):
        testing.check_op(REGISTRY[name], sample_of(name, label, dtype), order=1)


@pytest.mark.parametrize(
    "name, backend, dtype, label",
    cases(
        # of inner loops it is plain torch at every second derivative
        lambda name: [] if name.endswith("_bwd") else first_labels(name)[:4] if loops(name) else LABELS[name],
        # half precision has no digits left
        dtypes=lambda _: (torch.float32, torch.float64),
        interpreted=lambda name: [] if name.endswith("_bwd") else interpreted_labels(name),
    ),
)
def test_second_order(name, backend, dtype, label, poisoned_memory):
    require(backend)
    with use_backend(backend):
        testing.check_op(REGISTRY[name], sample_of(name, label, dtype), order=2)


def first_label(name: str) -> list[str]:
    return first_labels(name)[:1]


def smallest_label(name: str) -> list[str]:
    """One sample for a check of hundreds of calls: of inner loops one task, row and step, of images one pixel."""
    if of_images(name):
        return [label for label in LABELS[name] if "-1x1x1-" in label]
    return [label for label in LABELS[name] if "-T1-S1-" in label] if loops(name) else first_label(name)


@pytest.mark.parametrize(
    "name, backend, dtype, label",
    cases(
        lambda name: first_labels(name)[: 4 if loops(name) else None],
        BACKENDS,
        dtypes=lambda _: [torch.float64],
        interpreted=of_kernels(smallest_label),
    ),
)
def test_gradcheck_and_gradgradcheck(name, backend, dtype, label):
    require(backend)
    spec = REGISTRY[name]
    args, leaves = testing.differentiable_leaves(spec, sample_of(name, label))

    # gradcheck's fast mode stumbles over empty inputs and outputs beside others
    leaves = [leaf for leaf in leaves if leaf.numel()] or leaves

    def function(*tensors):
        it = iter(tensors)
        positions = spec.differentiable_positions
        full = [
            testing.map_tensors((a,), lambda t: next(it) if t.numel() or not leaves[0].numel() else t)[0]
            if i in positions
            else a
            for i, a in enumerate(args)
        ]
        if spec.consistent:
            full = spec.consistent(*full)
        outputs = testing.tensors_of(spec(*full))[: spec.differentiable_outputs]
        return tuple(o for o in outputs if o.numel()) or tuple(o for o in outputs if o.shape != (0,))

    with use_backend(backend):
        assert gradcheck(function, leaves, fast_mode=True)
        hold_what_has_constant_gradients(spec, args, leaves)
        assert gradgradcheck(function, leaves, fast_mode=True)


def hold_what_has_constant_gradients(spec, args, leaves) -> None:
    """Of piecewise linear functions: `gradgradcheck`'s fast mode stumbles over constants beside other gradients.
    `gradcheck` has seen their values; that they are constants is said by plain torch, not by the op."""
    outputs = [o for o in testing.tensors_of(spec.reference(*args))[: spec.differentiable_outputs] if o.requires_grad]
    pulled = [torch.ones_like(o, requires_grad=True) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, pulled, create_graph=True, allow_unused=True)
    constant = [leaf for leaf, g in zip(leaves, found, strict=True) if g is None or not g.requires_grad]
    if len(constant) < len(leaves):  # else nothing has elements
        for leaf in constant:
            leaf.requires_grad_(False)


def spread_labels(name: str) -> list[str]:
    """Samples of several ranks and shapes for slow checks: those of the first metric or activation."""
    prefix = LABELS[name][0].split("-T")[0] + "-T" if "-T" in LABELS[name][0] else ""
    return [label for label in LABELS[name] if label.startswith(prefix)][:8:2]


def few_spread_labels(name: str) -> list[str]:
    """Of inner loops one in each form."""
    return spread_labels(name)[:: 3 if loops(name) else 1]


OPCHECKS_IN_EAGER_MODE = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(
    "name, backend, dtype, label",
    cases(spread_labels, BACKENDS, lambda _: [torch.float32], interpreted=first_label),
)
def test_opcheck(name, backend, dtype, label):
    require(backend)
    spec = REGISTRY[name]
    with use_backend(backend):
        plain = sample_of(name, label, dtype)
        torch.library.opcheck(dispatcher_op(spec), plain, test_utils=("test_schema", "test_faketensor"))
        # the check that compiles takes seconds, so one sample has it
        checks = "ALL" if label == first_label(name)[0] else OPCHECKS_IN_EAGER_MODE
        leaves = testing.differentiable_leaves(spec, plain)[0]
        torch.library.opcheck(dispatcher_op(spec), leaves, test_utils=checks)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, every other element of a wider buffer, last two dimensions swapped in memory."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    view = wide[..., ::2]
    return (
        view if t.dim() < 2 else view.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    )


@pytest.mark.parametrize(
    "name, backend, dtype, label",
    cases(spread_labels, BACKENDS, lambda _: [torch.float32], interpreted=few_spread_labels),
)
def test_any_strides(name, backend, dtype, label):
    require(backend)
    spec, args = REGISTRY[name], sample_of(name, label, dtype)
    with use_backend(backend):
        straight, strange = spec(*args), spec(*testing.map_tensors(args, strided))
        expanded = testing.map_tensors(args, lambda t: t[:1].expand(t.shape))
        repeated = testing.map_tensors(args, lambda t: t[:1].expand(t.shape).contiguous())
        pairs = [(straight, strange), (spec(*expanded), spec(*repeated))]
    for left, right in pairs:
        for a, b in zip(testing.tensors_of(left), testing.tensors_of(right), strict=True):
            if backend == "reference":  # its GEMM may sum in another order for other strides
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, backend, dtype, label", cases(spread_labels, interpreted=few_spread_labels))
def test_same_bits_on_a_second_run(name, backend, dtype, label):
    require(backend)
    args = sample_of(name, label, dtype)
    with use_backend(backend):
        runs = [testing.tensors_of(REGISTRY[name](*args)) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))  # NaN equals NaN


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "name, backend, dtype, label",
    cases(
        lambda name: (first_labels if REGISTRY[name].second_order == "loop" else LABELS.get)(name),
        backends=["cpp"] * (not CUDA),
        dtypes=lambda _: [torch.float32],
    ),
)
def test_any_number_of_threads(name, backend, dtype, label, threads, poisoned_memory):
    require(backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend(backend):
            testing.check_op(REGISTRY[name], sample_of(name, label, dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_asked_for_is_the_one_that_runs(backend):
    require(backend)
    spec = REGISTRY["pairwise_distance"]
    args = sample_of(spec.name, LABELS[spec.name][0], torch.float32)
    before = backends.calls.copy()
    with use_backend(backend):
        spec(*args)
    assert backends.calls - before == {(spec.name, backend): 1}


def test_a_backend_that_cannot_serve_says_why():
    args = sample_of("pairwise_distance", LABELS["pairwise_distance"][0])
    wrong = "cpp" if CUDA else "cuda"
    with use_backend(wrong), pytest.raises(ValueError, match=f"backend {wrong} was asked for, but cannot run pairwise"):
        REGISTRY["pairwise_distance"](*args)
    with pytest.raises(ValueError, match="must be one of cuda, cpp, triton, reference; got 'cudnn'"):
        with use_backend("cudnn"):
            pass


@pytest.mark.skipif(CUDA, reason="the C++ kernels serve the CPU")
def test_automatic_choice_falls_back_on_a_dtype_without_kernel():
    require("cpp")
    args = sample_of("pairwise_distance", LABELS["pairwise_distance"][0], torch.bfloat16)
    before = backends.calls.copy()
    REGISTRY["pairwise_distance"](*args)
    assert backends.calls - before == {("pairwise_distance", "reference"): 1}
    with use_backend("cpp"), pytest.raises(ValueError, match="dtype bfloat16 is not one of float32, float64"):
        REGISTRY["pairwise_distance"](*args)


def test_third_order_is_exact():
    """The gradient of a `_bwd` op is plain torch, so that no order of derivative is silently cut."""
    spec = REGISTRY["pairwise_distance"]
    args, leaves = testing.differentiable_leaves(spec, sample_of(spec.name, "cosine-T2-Q5-N3-D4"))

    def third(function):
        value = function(*args)
        for _ in range(3):
            value = sum(g.square().sum() for g in torch.autograd.grad(value.square().sum(), leaves, create_graph=True))
        return value

    torch.testing.assert_close(third(spec), third(spec.reference), rtol=1e-9, atol=0)
