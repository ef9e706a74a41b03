"""What the algorithms with an inner loop share: rates by parameter name, the parameters that adapt and those that do
not, and where the loop runs.

*Rates* are a dict from the names of the parameters that adapt to tensors `[1, ...]` or `[K, ...]`: first the inner
step, then one element or the parameter's own shape. Steps beyond the last have the last one's rate. Whatever the dict
does not name is shared by all tasks, and trains through the inner loop without taking part in it.

A multi-layer perceptron runs in the fused inner loops (`fastmeta.functional.meta_loss_mlp`); anything else runs step by
step under `torch.func`. Where an `nn.Sequential` begins with layers that do not adapt, these run once, as an encoder in
front of the loop, which passes their gradient on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..engines import InnerLoop, as_loss, choose
from ..engines._exact import gradients_per_task
from ..engines.fused import FusedEngine, _check_targets, _layers
from ..engines.inspect import MLPSpec, mlp_spec
from ..engines.layerwise import _backward, _forward, rows, why_no_formulas
from ..engines.layerwise import _layers as _layers_or_none
from ..engines.vmap import VmapEngine, _buffers_per_task
from ..functional.inner_loops import adapt_mlp, mean_meta_loss_mlp
from ._chunks import chunked_loss
from .maml import FastWeights, _check_pair
from .output import MetaOutput, judged

if TYPE_CHECKING:
    from ..engines._losses import Loss
    from ..tasks import TaskBatch

Rates = Mapping[str, Tensor]

_FUSED, _VMAP = FusedEngine(), VmapEngine()
_parts: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


class InnerLoopAlgorithm(nn.Module):
    """`adapt`, `predict` and `forward` for algorithms that are an inner loop with rates of their own: `_rates`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: int,
        first_order: bool,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        task_chunk: int | None,
    ):
        super().__init__()
        self.inner_steps = check_count("inner_steps", inner_steps, 0)
        self.task_chunk = None if task_chunk is None else check_count("task_chunk", task_chunk, 1)
        self.model = model
        self.first_order = first_order
        self.loss = as_loss(loss)

    def _rates(self) -> Rates:
        raise NotImplementedError

    def adapt(self, support_x: Tensor, support_y: Tensor) -> FastWeights:
        """Run the inner loop on support sets `[T, S, ...]` with targets `[T, S]` or `[T, S, O]`."""
        _check_pair("support_x", support_x, "support_y", support_y)
        inner, rates = self._inner(support_y), self._rates()
        encoder, tail = split(self.model, rates)
        (support_x,) = encode(encoder, support_x)
        if inner.first_order:
            support_x = support_x.detach()
        fast = adapted(tail, inner, rates, support_x, support_y)
        return self._state(fast, support_x.shape[0])

    def predict(self, state: FastWeights, query_x: Tensor) -> Tensor:
        """Predictions `[T, Q, C]` of the adapted weights for `query_x` `[T, Q, ...]`."""
        if query_x.shape[0] != len(state):
            raise ValueError(f"query_x has {query_x.shape[0]} tasks, state has {len(state)}")
        return choose("auto", self.model, self._inner(), query_x).predict(self.model, state.weights, query_x)

    def forward(self, batch: TaskBatch) -> MetaOutput:
        """Adapt to every task's support set and judge on its query set."""
        check_batch(batch)
        if self.task_chunk is not None and batch[0].shape[0] > self.task_chunk:
            return chunked_loss(self._tasks, batch, self.task_chunk, trained(self))
        return self._tasks(*batch)

    def extra_repr(self) -> str:
        return (
            f"inner_steps={self.inner_steps}, first_order={self.first_order}, loss={self.loss.name!r}, "
            f"task_chunk={self.task_chunk}"
        )

    def _inner(self, *targets: Tensor) -> InnerLoop:
        differentiable = torch.is_grad_enabled() and any(target.requires_grad for target in targets)
        return InnerLoop(0.0, self.inner_steps, self.first_order, self.loss, differentiable)

    def _state(self, fast: Mapping[str, Tensor], tasks: int) -> FastWeights:
        slow = dict(self.model.named_parameters())
        weights = slow | dict(fast)
        return FastWeights(weights, frozenset(n for n in slow if weights[n].dim() == slow[n].dim()), tasks)

    def _tasks(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> MetaOutput:
        inner, rates = self._inner(support_y, query_y), self._rates()
        encoder, tail = split(self.model, rates)
        support_x, query_x = encode(encoder, support_x, query_x)
        if inner.first_order:  # support rows reach the query loss through inner gradients alone
            support_x = support_x.detach()
        spec, lr = fused(tail, inner, rates, support_x)
        if spec is None:
            fast = adapted(tail, inner, rates, support_x, support_y)
            return judged(self.loss, _VMAP.predict(tail, fast, query_x), query_y)
        (task_loss, logits), mean = fused_meta_loss(spec, tail, inner, lr, support_x, support_y, query_x, query_y)
        return judged(self.loss, logits, query_y, task_loss, mean)


# arguments -----------------------------------------------------------------------------------------------------------


def check_count(name: str, value: int, least: int) -> int:
    """`value`, if it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_number(name: str, value: float, least: float = float("-inf"), *, open: bool = False) -> float:
    """`value` as a float, if it is a finite number of at least `least`, or above it where the range is open."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value < float("inf") or (open and value == least):
        raise ValueError(f"{name} must be {'above' if open else 'at least'} {least} and finite, got {value}")
    return float(value)


def check_batch(batch: TaskBatch) -> None:
    """Raise ValueError unless inputs and targets of support and query begin with the same tasks and examples."""
    support_x, support_y, query_x, query_y = batch
    _check_pair("support_x", support_x, "support_y", support_y)
    _check_pair("query_x", query_x, "query_y", query_y)
    if support_x.shape[0] != query_x.shape[0]:
        raise ValueError(f"support_x has {support_x.shape[0]} tasks, query_x has {query_x.shape[0]}")


def trained(module: nn.Module) -> list[Tensor]:
    """The parameters that the outer loop trains."""
    return [p for p in module.parameters() if p.requires_grad]


# where it runs -------------------------------------------------------------------------------------------------------


def split(model: nn.Module, adapting: Collection[str]) -> tuple[nn.Module | None, nn.Module]:
    """An encoder of leading layers with parameters of which none adapts, or None; and the rest of the model.

    Parameters have the same names in the rest as in the model.
    """
    if type(model) is not nn.Sequential or model._forward_hooks or model._forward_pre_hooks:
        return None, model
    children = list(model.named_children())
    first = {name.partition(".")[0] for name in adapting}
    start = next((i for i, (name, _) in enumerate(children) if name in first), len(children))
    if start == len(children) or not any(any(True for _ in child.parameters()) for _, child in children[:start]):
        return None, model
    key = (start, *(id(child) for _, child in children))
    known = _parts.get(model)
    if known is None or known[0] != key:  # kept, so that looking at the parts is done once
        known = (key, model[:start], model[start:])
        _parts[model] = known
    return known[1], known[2]


def encode(encoder: nn.Module | None, *parts: Tensor) -> list[Tensor]:
    """Rows `[T, B, ...]` through a part that the tasks share.

    Its batch norms see one task's rows, as in the inner loop, unless they have running statistics: then all rows of all
    tasks together in train mode, and those statistics in eval mode, as in a prototypical network.
    """
    if encoder is None:
        return list(parts)
    if isinstance(mlp_spec(encoder), MLPSpec) or _has_running_statistics(encoder):
        rows = torch.cat(parts, 1)
        features = encoder(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return list(features.split([part.shape[1] for part in parts], 1))
    return [_VMAP.predict(encoder, dict(encoder.named_parameters()), part) for part in parts]


def _has_running_statistics(encoder: nn.Module) -> bool:
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return bool(norms) and all(norm.running_mean is not None for norm in norms)


def fused(model: nn.Module, inner: InnerLoop, rates: Rates, x: Tensor):
    """`(spec, lr)` for the fused inner loops, or `(None, None)` where they cannot serve the model or the rates."""
    if _FUSED.why_not(model, inner, x) is not None:
        return None, None
    spec = mlp_spec(model)
    lr = _fused_rates(spec, dict(model.named_parameters()), rates, inner.steps)
    return (None, None) if lr is None else (spec, lr)


def fused_options(spec: MLPSpec, inner: InnerLoop) -> dict:
    """Arguments that `adapt_mlp` and `meta_loss_mlp` share."""
    activation = spec.activations[0] if len(spec.activations) > 1 else "identity"
    loss = inner.loss.in_kernels
    return {"steps": inner.steps, "loss": loss, "activation": activation, "first_order": inner.first_order}


def fused_meta_loss(spec: MLPSpec, model: nn.Module, inner: InnerLoop, lr, support_x, support_y, query_x, query_y):
    """Query loss `[T]` and predictions `[T, Q, C]`; and the mean of the losses."""
    slow = dict(model.named_parameters())
    _check_targets(spec, slow, inner, support_x, support_y, "support_y")
    _check_targets(spec, slow, inner, query_x, query_y, "query_y")
    targets = (inner.loss.kernel_targets(y) for y in (support_y, query_y))
    data = (rows(spec, support_x), next(targets), rows(spec, query_x), next(targets))
    return mean_meta_loss_mlp(*data, *_layers(spec, slow), lr=lr, **fused_options(spec, inner))


def fused_adapt(
    spec: MLPSpec, inner: InnerLoop, lr, weights: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """All weights `[T, ...]` by name after the fused inner loop from `weights`, per task or shared."""
    outputs = weights[spec.weights[-1]].shape[-2]
    inner.loss.check((*x.shape[:2], outputs), y, "support_y", values=False)
    options = {"lr": lr, **fused_options(spec, inner)}
    fast = adapt_mlp(rows(spec, x), inner.loss.kernel_targets(y), *_layers(spec, weights), **options)
    fast_weights, fast_biases = fast.materialize()
    return dict(zip((*spec.weights, *(spec.biases if fast_biases else ())), (*fast_weights, *fast_biases), strict=True))


def _fused_rates(spec: MLPSpec, slow: Mapping[str, Tensor], rates: Rates, steps: int):
    """Rates as `adapt_mlp` takes them: a table `[L, K]`, or a tensor per parameter; None if they fit neither."""
    layers = [[name for name in pair if name is not None] for pair in zip(spec.weights, spec.biases, strict=True)]
    of_layer = [[rates.get(name) for name in names] for names in layers]
    scalar = all(rate is None or rate.numel() == len(rate) for layer in of_layer for rate in layer)
    if scalar and all(rate is layer[0] for layer in of_layer for rate in layer):
        none = slow[spec.weights[0]].new_zeros(steps)
        return torch.stack([none if rate is None else rate_of_steps(rate, steps).flatten() for rate, *_ in of_layer])
    if any(rate is not None and len(rate) != 1 for layer in of_layer for rate in layer):
        return None

    def per_element(names):
        return [
            rates[name][0].expand(slow[name].shape) if name in rates else torch.zeros_like(slow[name]) for name in names
        ]

    return per_element(spec.weights), None if spec.biases[0] is None else per_element(spec.biases)


# step by step --------------------------------------------------------------------------------------------------------


def rate_of_steps(rate: Tensor, steps: int) -> Tensor:
    """`[steps, ...]` of a rate `[1|K, ...]`: what comes after the last step has its rate."""
    if steps <= len(rate):
        return rate[:steps]
    return torch.cat([rate, rate[-1:].expand(steps - len(rate), *rate.shape[1:])])


def rate_at(rate: Tensor, step: int) -> Tensor:
    return rate[min(step, len(rate) - 1)]


def adapted(model: nn.Module, inner: InnerLoop, rates: Rates, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Every parameter by name after the inner loop: `[T, *shape]` if it adapted, `[*shape]` if the tasks share it."""
    slow = dict(model.named_parameters())
    spec, lr = fused(model, inner, rates, x)
    if spec is not None:
        fast = fused_adapt(spec, inner, lr, slow, x, y)
        return slow | {name: fast[name] for name in rates}
    weights = {name: slow[name] for name in rates}
    for weights in steps_of(model, inner, rates, x, y):  # noqa: B007
        pass
    return slow | weights


def steps_of(model: nn.Module, inner: InnerLoop, rates: Rates, x: Tensor, y: Tensor) -> Iterator[dict[str, Tensor]]:
    """The weights that adapt `[T, *shape]`, after each inner step, on any module."""
    slow = dict(model.named_parameters())
    fast = {name: slow[name] for name in rates}
    for step in range(inner.steps):
        buffers = _buffers_per_task(model, x.shape[0])
        gradients = task_gradients(model, inner, fast, buffers, x, y)
        fast = {name: w - rate_at(rates[name], step) * gradients[name] for name, w in fast.items()}
        yield fast


def task_gradients(
    model: nn.Module,
    inner: InnerLoop,
    fast: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
) -> dict[str, Tensor]:
    """Gradient `[T, *shape]` of every task's loss for the parameters in `fast`, `[T, *shape]` or shared by the tasks.

    `buffers` `[T, ...]` are written into, as the module writes into its own.
    """
    slow = dict(model.named_parameters())
    shared = {name: w for name, w in slow.items() if name not in fast}

    def task_loss(fast, shared, buffers, x, y):
        prediction = functional_call(model, (fast, shared, buffers), (x,))
        inner.loss.check((1, *prediction.shape), y.unsqueeze(0), "support_y")
        return inner.loss.one_task(prediction, y)

    axes = {name: 0 if w.dim() > slow[name].dim() else None for name, w in fast.items()}
    second_order = torch.is_grad_enabled() and not inner.first_order
    gradient = gradients_per_task(task_loss, (axes, None, 0, 0, 0), second_order=second_order)
    return gradient(dict(fast), shared, dict(buffers), x, y)


def mlp_gradients(
    spec: MLPSpec, loss: Loss, weights: Mapping[str, Tensor], names: Collection[str], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """`task_gradients` of a multi-layer perceptron, in plain formulas that can be differentiated again.

    `weights` holds all parameters, `names` says which gradients are wanted.
    """
    layers = _layers_or_none(spec, weights)
    inputs, pre, prediction = _forward(spec, *layers, rows(spec, x))
    loss.check(prediction.shape, y, "support_y")
    gradient = loss.gradient(prediction, loss.constant(y, prediction))
    gradients = {}
    for layer, delta in enumerate(_backward(spec, layers[0], inputs, pre, prediction, gradient)):
        if spec.weights[layer] in names:
            gradients[spec.weights[layer]] = torch.matmul(delta.mT, inputs[layer])
        if spec.biases[layer] in names:
            gradients[spec.biases[layer]] = delta.sum(1)
    return {name: gradients[name] for name in names}


def gradient_of_tasks(
    model: nn.Module, loss: Loss, fast: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """`mlp_gradients` where they serve, `task_gradients` where not; for the parameters in `fast`."""
    inner = InnerLoop(0.0, 0, False, loss)
    if why_no_formulas(model, inner, x) is None:
        weights = dict(model.named_parameters()) | dict(fast)
        return mlp_gradients(mlp_spec(model), loss, weights, list(fast), x, y)
    return task_gradients(model, inner, fast, _buffers_per_task(model, x.shape[0]), x, y)
