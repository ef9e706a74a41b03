"""MAML++: MAML with learned inner rates, a loss at every inner step, and batch norms that know the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta._trees import first

from ..engines import ENGINES, InnerLoop, Rates, Steps, check_prediction, module_engine
from ..engines.vmap import buffers_per_task
from ._arguments import check_count, check_number
from ._inner_lr import real_dtype
from ._lazy import check_initialised
from ._rated_loop import LearnedRates
from .fast_weights import FastWeights
from .output import MetaOutput, judged, weighted

if TYPE_CHECKING:
    from ..tasks import TaskBatch

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LEAST_SHARE = 0.03  # of a step's equal share, that its loss keeps in the authors' code until it is dropped


class BatchNormPerStep(nn.Module):
    """Batch norm with statistics, scale and shift of its own for each inner step (Antoniou et al. 2019, section 4:
    "per-step batch normalization").

    In train mode it uses the statistics of the rows it is given, and remembers them for the step; in eval mode it uses
    the step's running statistics, unless it has none. `MAMLPlusPlus` sets `step`; steps beyond the last are the last.

    Args:
        num_features: channels of the inputs `[B, num_features, ...]`.
        steps: `K`.
        momentum, eps: as in `torch.nn.BatchNorm2d`.
        affine: whether there are a scale and a shift.
        track_running_stats: False uses the rows at hand in eval mode too, as the authors' code does.
    """

    def __init__(
        self,
        num_features: int,
        steps: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__()
        self.num_features = check_count("num_features", num_features, 1)
        self.steps = check_count("steps", steps, 1)
        values.flag("affine", affine)
        values.flag("track_running_stats", track_running_stats)
        self.momentum, self.eps = check_number("momentum", momentum, 0), check_number("eps", eps, 0)
        self.step = 0
        shape = (steps, num_features)
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None
        self.register_buffer("running_mean", torch.zeros(shape) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(shape) if track_running_stats else None)

    @classmethod
    def like(cls, norm: nn.Module, steps: int) -> BatchNormPerStep:
        """One that starts at every step as `norm`, a `torch.nn.BatchNorm*d`, is."""
        new = cls(
            norm.num_features,
            steps,
            momentum=0.1 if norm.momentum is None else norm.momentum,
            eps=norm.eps,
            affine=norm.affine,
            track_running_stats=norm.running_mean is not None,
        )
        for name in ("weight", "bias", "running_mean", "running_var"):
            old = getattr(norm, name)
            if old is not None:
                value = old.detach().expand(steps, -1).clone()
                setattr(new, name, nn.Parameter(value, old.requires_grad) if name in ("weight", "bias") else value)
        return new.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, num_features, ...]` to the same shape."""
        step, shape = min(self.step, self.steps - 1), [1, -1] + [1] * (x.dim() - 2)
        if self.training or self.running_mean is None:
            dims = [0, *range(2, x.dim())]
            mean, var = x.mean(dims), x.var(dims, correction=0)
            if self.training and self.running_mean is not None:
                rows = x.numel() // self.num_features
                new = (mean.detach(), var.detach() * (rows / max(rows - 1, 1)))
                for running, value in zip((self.running_mean, self.running_var), new, strict=True):
                    running[step].mul_(1 - self.momentum).add_(value, alpha=self.momentum)
        else:
            mean, var = self.running_mean[step], self.running_var[step]
        scale = torch.rsqrt(var + self.eps)
        if self.weight is None:
            return (x - mean.view(shape)) * scale.view(shape)
        return (x - mean.view(shape)) * (scale * self.weight[step]).view(shape) + self.bias[step].view(shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, steps={self.steps}, momentum={self.momentum}, eps={self.eps}"


class MAMLPlusPlus(LearnedRates):
    """MAML++ (Antoniou, Edwards, Storkey 2019, "How to train your MAML", section 4). Each part is a switch:

    * *Per-layer per-step rates* (`learned_rates`): a rate for each layer and inner step, trained with the weights.
    * *Multi-step loss* (`multi_step_iterations`): for so many iterations the outer loss is a weighted sum of the query
      losses after every inner step. The weights start equal, and shift to the last step as in the authors' code; after
      that the last step's loss alone counts.
    * *Derivative-order annealing* (`first_order_iterations`): so many iterations of first order, then second.
    * *Per-step batch norm* (`batch_norm_per_step`): the model's batch norms are replaced, in place, by
      `BatchNormPerStep`.
    * *Cosine annealing of the outer rate* belongs to the trainer: `lr_schedule="cosine"`.

    Departures: the weights of the multi-step loss shift at each iteration, where the authors' code does so at each
    epoch of 500; a layer's weight and bias have one rate, as in the paper, where the code has one for each tensor;
    running statistics move by the mean over the batch's tasks, where the code takes task after task; rates are trained
    relative to `inner_lr`.

    `rates` holds the rates as multiples of `inner_lr`, `[K]` under `layer/<name>` for each layer, with `/` for `.` in
    its name. So an outer optimiser moves them by the same fraction whatever `inner_lr` is: trained as they are, rates
    of 0.01 are thrown about by an Adam that suits the weights, until five inner steps diverge. Inner steps beyond the
    `K` of construction have the last one's rates and statistics. A frozen layer's rates are neither used nor trained
    until it is unfrozen, and a saved state without them loads. Iterations are counted in `forward` in train mode
    with gradients on, and the count is part of the `state_dict`. While the multi-step loss lasts, `task_loss` holds
    the weighted sums, so that `loss` is still its mean; accuracy is that of the last step. A batch with masks is one
    iteration; its running statistics move once for each group of tasks with the same numbers of rows.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`. Parameters with `requires_grad=False` are
            neither adapted nor trained.
        inner_lr: what all rates start at, 0.1 by default; above 0.
        inner_steps: `K >= 1`, 5 by default. May be set anew between calls, to 0 and up.
        learned_rates: True by default; False keeps them as they are.
        multi_step_iterations: 5000 by default, the authors' 10 epochs; 0 for none.
        first_order_iterations: 0 by default, the authors' setting in most runs; the paper also has 50 epochs.
        batch_norm_per_step: True by default; nothing happens to a model without batch norms.
        adapt_norms: whether scales and shifts of norms adapt; False by default, as the authors' code. They are trained.
        first_order: never take second derivatives.
        loss: as in `MAML`.
        task_chunk: at most this many tasks at a time, to bound memory; as in `MAML`.

    Multi-layer perceptrons run in the fused inner loops, other modules under `torch.func`.

    Raises:
        TypeError, ValueError: arguments out of range; inputs and targets that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        learned_rates: bool = True,
        multi_step_iterations: int = 5000,
        first_order_iterations: int = 0,
        batch_norm_per_step: bool = True,
        adapt_norms: bool = False,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | str | None = None,
    ):
        check_count("inner_steps", inner_steps, 1)
        first_rate = check_number("inner_lr", inner_lr, 0, open=True)  # the rates are multiples of it
        check_initialised(values.module("model", model), "MAMLPlusPlus")
        values.flag("learned_rates", learned_rates)
        if values.flag("batch_norm_per_step", batch_norm_per_step):
            model = _replace_batch_norms(model, inner_steps)
        super().__init__(model, inner_steps=inner_steps, first_order=first_order, loss=loss, task_chunk=task_chunk)
        self.multi_step_iterations = check_count("multi_step_iterations", multi_step_iterations, 0)
        self.first_order_iterations = check_count("first_order_iterations", first_order_iterations, 0)
        self.inner_lr = first_rate
        self.adapt_norms = values.flag("adapt_norms", adapt_norms)
        self.iteration = 0
        self.rates = nn.ParameterDict()
        for name, p in self._with_rates():
            key = self._key(name)
            if key not in self.rates:
                multiples = p.new_ones(inner_steps, dtype=real_dtype(p))
                self.rates[key] = nn.Parameter(multiples, requires_grad=learned_rates)

    def predict(self, state: FastWeights, query_x: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """As `InnerLoopAlgorithm.predict`; batch norms are those of the last of `inner_steps` steps."""
        return super().predict(state, query_x, query_mask)

    def _predictions(self, state: FastWeights, query_x: Tensor) -> Tensor:
        if not any(isinstance(module, BatchNormPerStep) for module in self.model.modules()):
            return super()._predictions(state, query_x)
        fast = {name: w for name, w in state.weights.items() if name not in state.shared}
        return self._logits(fast, query_x, self.inner_steps - 1, remember=False)

    def forward(self, batch: TaskBatch, weights: Tensor | None = None) -> MetaOutput:
        """As `InnerLoopAlgorithm.forward`; in training the iterations are counted."""
        output = super().forward(batch, weights)
        if self._trains():
            self.iteration += 1
        return output

    def step_weights(self) -> list[float] | None:
        """What the query loss after each inner step counts for at this iteration; None where only the last counts."""
        steps, total = self.inner_steps, self.multi_step_iterations
        if not self._trains() or self.iteration >= total or steps < 2:
            return None
        share, done = 1 / steps, self.iteration / total
        early = max(share * (1 - done), _LEAST_SHARE * share)
        return [early] * (steps - 1) + [1 - (steps - 1) * early]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.iteration)

    def set_extra_state(self, state: Tensor) -> None:
        self.iteration = int(state)

    def extra_repr(self) -> str:
        return (
            f"inner_lr={self.inner_lr}, multi_step_iterations={self.multi_step_iterations}, "
            f"first_order_iterations={self.first_order_iterations}, adapt_norms={self.adapt_norms}, "
            f"{super().extra_repr()}"
        )

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    @staticmethod
    def _key(name: str) -> str:
        """What a parameter's layer is called in `rates`: never like an attribute of the dict, as `values` would be."""
        return "layer/" + name.rpartition(".")[0].replace(".", "/")

    def _with_rates(self) -> list[tuple[str, nn.Parameter]]:
        """What adapts, but for what is frozen: that has rates, too, for when it is so no more."""
        norms = (BatchNormPerStep, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
        fixed = set()
        if not self.adapt_norms:
            fixed = {id(p) for module in self.model.modules() if isinstance(module, norms) for p in module.parameters()}
        return [(name, p) for name, p in self.model.named_parameters() if id(p) not in fixed]

    def _rates(self, support_x: Tensor) -> Rates:
        rates = {key: self.inner_lr * multiple for key, multiple in self.rates.items()}
        keys = {n: self._key(n) for n, p in self._with_rates() if p.requires_grad}
        return {name: rates[key] for name, key in keys.items() if key in rates}

    def _inner(self, *targets: Tensor) -> InnerLoop:
        inner = super()._inner(*targets)
        early = self._trains() and self.iteration < self.first_order_iterations
        return inner._replace(first_order=inner.first_order or early)

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        inner = inner._replace(lr=self._rates(support_x))
        if ENGINES["fused"].why_not(self.model, inner, support_x) is None:
            return super()._adapted(inner, support_x, support_y)
        fast: dict[str, Tensor] = {}
        for fast in self._walk(inner, support_x, support_y):  # noqa: B007
            pass
        return fast

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        inner, shares = self._inner(support_y, query_y)._replace(lr=self._rates(support_x)), self.step_weights()
        if ENGINES["fused"].why_not(self.model, inner, support_x) is None:
            if shares is None:
                return super()._tasks(support_x, support_y, query_x, query_y, weights)
            walk = _fused_walk(self.model, inner, support_x, support_y)
            predict = ENGINES["layerwise"].predict
        else:
            batch = support_x, support_y, query_x, query_y
            engine = module_engine(self.model, inner, support_x, support_y)
            if not self._remembers() and self._in_turn(engine, *batch, weights):
                return self._chunked(1, batch, weights)
            walk = self._walk(inner, support_x, support_y)
            predict = None
        total, logits = None, None
        for step, fast in enumerate(walk):
            if shares is None and step < inner.steps - 1:
                continue
            logits = predict(self.model, fast, query_x) if predict else self._logits(fast, query_x, step)
            if shares is not None:
                check_prediction(inner.loss, logits, query_y, "query_y")
                value = shares[step] * inner.loss.per_task(logits, query_y)
                total = value if total is None else total + value
        if logits is None:
            logits = self._logits({}, query_x, 0)
        return weighted(judged(inner.loss, logits, query_y, total), weights)

    def _walk(self, inner: InnerLoop, x: Tensor, y: Tensor) -> Iterator[dict[str, Tensor]]:
        """The weights that adapt after each inner step, on any module."""
        slow, steps = dict(self.model.named_parameters()), Steps(inner.lr, inner.rule)
        fast, engine = {name: slow[name] for name in inner.lr}, module_engine(self.model, inner, x, y)
        for step in range(inner.steps):
            buffers = self._fresh_buffers(len(first(x)), step)
            gradients = engine.gradients(self.model, inner, fast, buffers, x, y)
            self._remember(buffers)
            fast = steps.take(fast, gradients)
            yield fast

    def _logits(self, fast: Mapping[str, Tensor], x: Tensor, step: int, *, remember: bool = True) -> Tensor:
        """Predictions `[T, B, C]` of weights `[T, *shape]`, with the slow weights where there are none."""
        buffers = self._fresh_buffers(len(first(x)), max(step, 0))
        logits = module_engine(self.model, self._inner(), x).predictions(self.model, fast, buffers, x)
        if remember:
            self._remember(buffers)
        return logits

    def _fresh_buffers(self, tasks: int, step: int) -> dict[str, Tensor]:
        """A copy per task of the buffers, the batch norms set to `step`."""
        for module in self.model.modules():
            if isinstance(module, BatchNormPerStep):
                module.step = step
        return buffers_per_task(self.model, tasks)

    def _remembers(self) -> bool:
        """Whether batch norms keep statistics, which move by the mean over all tasks."""
        norms = (m for m in self.model.modules() if isinstance(m, BatchNormPerStep))
        return self.training and any(norm.running_mean is not None for norm in norms)

    @torch.no_grad()
    def _remember(self, buffers: Mapping[str, Tensor]) -> None:
        """Keep what the batch norms have written into the tasks' copies of their statistics."""
        if not self.training:
            return
        for prefix, module in self.model.named_modules():
            if isinstance(module, BatchNormPerStep) and module.running_mean is not None:
                for name, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(buffers[f"{prefix}.{name}" if prefix else name].mean(0))


def _fused_walk(model: nn.Module, inner: InnerLoop, x: Tensor, y: Tensor) -> Iterator[dict[str, Tensor]]:
    """All weights after each inner step of a multi-layer perceptron."""
    loop, weights = ENGINES["fused"].loop(model, inner)
    for step in range(inner.steps):
        lr = loop.lr[:, step : step + 1] if isinstance(loop.lr, Tensor) else loop.lr
        weights = loop._replace(inner=inner._replace(steps=1), lr=lr).adapted(weights, x, y)
        yield weights


def _replace_batch_norms(model: nn.Module, steps: int) -> nn.Module:
    if isinstance(model, _BATCH_NORMS):
        return BatchNormPerStep.like(model, steps)
    for name, child in model.named_children():
        setattr(model, name, _replace_batch_norms(child, steps))
    return model
