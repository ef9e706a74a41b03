"""Steps of inner optimisers for all parameters of all tasks: SGD with momentum, and Adam.

Every tensor is flattened to `[T, n]`, or `[1, n]` where the tasks share it. A hyper-parameter is a number for all
parameters, or by parameter a tensor `[T, n]`, `[1, n]`, `[T, 1]` or `[1, 1]`; its list is empty where the number holds.
What an earlier step remembers is an empty list before the first. One number may come in another form than people know:

- a share is what an average takes of what is new, `1 - beta` (SGD: `1 - dampening`, and 1 in the first step);
- Adam's rate and epsilon hold the bias corrections (Kingma and Ba 2015, the end of section 2), `lr sqrt(c2) / c1` and
  `eps sqrt(c2)` with `c = 1 - beta^step`;
- the decay of decoupled weights is `lr * weight_decay`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload, leading_size


def root(value: Tensor) -> Tensor:
    """The square root, all of whose derivatives are 0 where `value` is 0.

    Optimisers divide by `root(v) + eps`, where v is an average of squared gradients: as a function of the gradient g
    the root is |g|, times a constant, around g = 0. In `m / (root(v) + eps)` what it adds to the derivative there is 0,
    since m is 0 too; autograd multiplies that 0 by the infinite derivative of the root, and gives NaN.

    The root of the least normal number stands for that of 0: 1e-19 in float32, which no eps is near.
    """
    if value.dtype == torch.float16:  # whose least number is not small
        zero = value == 0
        return value.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return value.clamp_min(torch.finfo(value.dtype).tiny).sqrt()


def _of_parameter(lists, numbers, index: int) -> list:
    return [of[index] if of else number for of, number in zip(lists, numbers, strict=True)]


def _average(old: Tensor | None, new: Tensor, share) -> Tensor:
    return share * new if old is None else old + share * (new - old)


def _whole(tasks: int, lists) -> tuple[list[Tensor], ...]:
    return tuple([t.expand(tasks, -1).clone(memory_format=torch.contiguous_format) for t in of] for of in lists)


def _tasks(*lists) -> int:
    return leading_size([t for tensors in lists for t in tensors])


# SGD ------------------------------------------------------------------------------------------------------------


def sgd_reference(
    params, grads, buffers, rates, momenta, shares, decays, rate, momentum, share, decay, nesterov, keeps
):  # fmt: skip
    moved, news = [], []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        lr, mu, part, w = _of_parameter((rates, momenta, shares, decays), (rate, momentum, share, decay), i)
        if isinstance(w, Tensor) or w:
            g = g + w * p
        new = part * g + (mu * buffers[i] if buffers else 0)
        moved.append(p - lr * (g + mu * new if nesterov else new))
        news.append(new)
    tasks = _tasks(params, grads, buffers, rates, momenta, shares, decays)
    return _whole(tasks, (moved, news if keeps else []))


def sgd_fake(params, grads, buffers, rates, momenta, shares, decays, *numbers):
    tasks = _tasks(params, grads, buffers, rates, momenta, shares, decays)
    return tuple([p.new_empty(tasks, p.shape[1]) for p in (params if wanted else ())] for wanted in (True, numbers[-1]))


# Adam -----------------------------------------------------------------------------------------------------------


def adam_reference(
    params, grads, means, squares, maxima, rates, shares1, shares2, epsilons, decays, rate, share1, share2, eps, decay,
    decoupled, amsgrad,
):  # fmt: skip
    moved, new_means, new_squares, new_maxima = [], [], [], []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        lr, a, b, e, w = _of_parameter(
            (rates, shares1, shares2, epsilons, decays), (rate, share1, share2, eps, decay), i
        )
        if isinstance(w, Tensor) or w:
            p, g = (p - w * p, g) if decoupled else (p, g + w * p)
        mean = _average(means[i] if means else None, g, a)
        square = _average(squares[i] if squares else None, g * g, b)
        largest = torch.maximum(maxima[i], square) if amsgrad and maxima else square
        moved.append(p - lr * (mean / (root(largest) + e)))
        new_means.append(mean)
        new_squares.append(square)
        new_maxima.append(largest)
    tasks = _tasks(params, grads, means, squares, maxima, rates, shares1, shares2, epsilons, decays)
    return _whole(tasks, (moved, new_means, new_squares, new_maxima if amsgrad else []))


def adam_fake(params, *rest):
    tasks, amsgrad = _tasks(params, *rest[:9]), rest[-1]
    return tuple([p.new_empty(tasks, p.shape[1]) for p in of] for of in (*[params] * 3, params if amsgrad else []))


# both: registration, and inputs ---------------------------------------------------------------------------------


def _registered(name: str, outputs: int, tensors: str, numbers: str, flags: str, **parts) -> tuple[Op, Op]:
    """The op and its gradient; `tensors` are the names of its lists, `numbers` and `flags` those of the rest."""
    lists = tuple(tensors.split())
    first_flag = len(lists) + len(numbers.split())  # behind the number of the decay
    arguments = [f"Tensor[] {of}" for of in lists]
    arguments += [f"float {number}" for number in numbers.split()] + [f"bool {flag}" for flag in flags.split()]

    def whole(args):
        """Zeros for the gradient of one output."""
        tasks, params = _tasks(*args[: len(lists)]), args[0]
        return [p.new_zeros(tasks, p.shape[1]) for p in params]

    def backward(args, grads, needs):
        known = [
            [z if g is None else g for g, z in zip(of, whole(args), strict=True)]
            if any(g is not None for g in of) and any(g is None for g in of)
            else [g for g in of if g is not None]
            for of in grads
        ]
        if args[len(lists) - 1] or args[first_flag - 1]:
            return gradient(*known, *args, needs)
        # what does not decay lets gradients pass as they are
        passed = [g.sum_to_size(p.shape) for g, p in zip(known[0] or whole(args), args[0], strict=True)]
        rest = needs & ~1
        return passed, *(gradient(*known, *args, rest)[1:] if rest else [None] * (len(lists) - 1))

    def backward_reference(*args):
        """The list of an output for which no gradient has come is empty: it is 0."""
        grads, rest = args[:outputs], args[outputs:]
        last = rest[-2]  # whether there is a last output
        grads = [of or whole(rest) if last or i + 1 < outputs else [] for i, of in enumerate(grads)]
        return derived["reference"](*grads, *rest)

    of_family = {"family": "optimizer_steps", "lacks_gradients": True}
    spec = register(
        Op(
            name=name,
            arguments=", ".join(arguments),
            returns=f"({', '.join(['Tensor[]'] * outputs)})",
            differentiable=lists,
            backward=backward,
            autocast="widest",
            **of_family,
            **parts,
        )
    )
    derived = derive_backward(spec)
    gradient = register(
        Op(
            **derived | {"reference": backward_reference},
            backward=lambda *args: vjp_of_reference(gradient)(*args),
            samples=lambda make: _backward_samples(spec, make),
            **of_family,
        )
    )
    return spec, gradient


# (T, sizes, what the tasks share among params p, grads g and state s, or "-" for no state, flags, hyper-parameters that
# are tensors and how they repeat)
_SIZES = (
    ("first", 3, (7, 129, 1), "p-", 0, {}),
    ("later", 2, (3, 5), "", 0, {}),
    ("flagged", 2, (3, 5), "", 1, {}),
    ("decay", 3, (7, 33), "ps", 1, {4: "task"}),
    ("rates", 3, (7, 33), "", 1, {0: "task element"}),
    ("learned", 3, (5, 3), "g", 1, {0: "task", 1: "tensor", 2: "element", 3: "task element", 4: "tensor"}),
    ("learned", 1, (1,), "", 0, {0: "task", 1: "tensor", 2: "element", 3: "task element", 4: "tensor"}),
    ("learned", 0, (3, 4), "p", 1, {0: "task", 1: "tensor", 2: "element", 3: "task element", 4: "tensor"}),
    ("later", 2, (0, 4), "", 1, {0: "element"}),
)
# what is drawn for each hyper-parameter
_RANGES = {"sgd": ((0.01, 1), (0.1, 0.9), (0.2, 0.8), (0.1, 0.5))}
_RANGES["adam"] = ((0.01, 1), (0.1, 0.9), (0.1, 0.9), (0.1, 0.5), (0.1, 0.5))


def _inputs(make: Make, kind: str, t, sizes, shared, flag, hyper):
    """Arguments of `sgd_step` or `adam_step`; hyper-parameter 4 is the decay, and SGD's fourth."""
    lists = [[make.normal(1 if of in shared else t, n) for n in sizes] for of in "pg"]
    rows = 1 if "s" in shared else t
    lists.append([make.normal(rows, n) for n in sizes])
    if kind == "adam":
        lists.append([make.uniform(0.1, 1, rows, n) for n in sizes])
        # far from the squares, so that rounding does not decide which is larger
        lists.append([100 * make.uniform(0, 1, rows, n).round() for n in sizes])
    if "-" in shared:
        lists[2:] = [[] for _ in lists[2:]]
    ranges = _RANGES[kind]
    hyper = {min(which, len(ranges) - 1): form for which, form in hyper.items()}
    for which, (low, high) in enumerate(ranges):
        form = hyper.get(which)
        rows = t if form and "task" in form else 1
        lists.append([make.uniform(low, high, rows, n if "element" in form else 1) for n in sizes] if form else [])
    numbers = [high / 2 for _, high in ranges]
    if not flag:
        numbers[-1] = 0.0  # no decay
    return *lists, *numbers, bool(flag), "-" not in shared if kind == "sgd" else bool(flag)


def _label(name, t, sizes, shared, *_):
    return f"{name}-T{t}-{'+'.join(map(str, sizes))}-shared({shared})"


def _samples(kind: str):
    return lambda make: (Sample(_label(*size), _inputs(make, kind, *size[1:])) for size in _SIZES)


def _backward_samples(spec: Op, make: Make):
    for i, sample in enumerate(spec.samples(make)):
        tasks, params = _tasks(*(arg for arg in sample.args if isinstance(arg, list))), sample.args[0]
        outputs = spec.returns.count("[]") - (not sample.args[-1])
        grads = [[make.normal(tasks, p.shape[1]) for p in params] for _ in range(outputs)]
        grads += [[]] * (spec.returns.count("[]") - outputs)
        if i in (0, 2):
            grads[1:] = [[]] * (len(grads) - 1)
        needs = 2 if i == 1 else 2 ** len(spec.differentiable) - 1
        yield Sample(f"{sample.label}-needs{needs}", (*grads, *sample.args, needs))


def _workloads(kind: str, arrays: int):
    def workloads(make: Make):
        t, widths = 1000, (1, 40, 40, 1)
        sizes = [n for i, o in zip(widths[:-1], widths[1:], strict=True) for n in (i * o, o)]
        args = _inputs(make, kind, t, sizes, "", 0, {})
        yield Workload(
            f"T{t}-{'x'.join(map(str, widths))}",
            args,
            flops=5 * arrays * t * sum(sizes),
            bytes=args[0][0].element_size() * arrays * t * sum(sizes),
        )

    return workloads


SGD, SGD_BACKWARD = _registered(
    "sgd_step",
    2,
    "params grads buffers rates momenta shares decays",
    "rate momentum share decay",
    "nesterov keeps",
    summary="one step of SGD with momentum for all parameters of all tasks",
    reference=sgd_reference,
    fake=sgd_fake,
    samples=_samples("sgd"),
    workloads=_workloads("sgd", 5),
    source="Sutskever et al. 2013",
)
ADAM, ADAM_BACKWARD = _registered(
    "adam_step",
    4,
    "params grads means squares maxima rates shares1 shares2 epsilons decays",
    "rate share1 share2 eps decay",
    "decoupled amsgrad",
    summary="one step of Adam for all parameters of all tasks",
    reference=adam_reference,
    fake=adam_fake,
    samples=_samples("adam"),
    workloads=_workloads("adam", 7),
    source="Kingma and Ba 2015; Reddi et al. 2018; Loshchilov and Hutter 2019",
)
